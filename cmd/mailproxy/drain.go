package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"sync"
	"time"

	"github.com/rs/zerolog"

	"mailproxy/cluster"
	"mailproxy/internal/durable"
	"mailproxy/smtpd"
)

// drainCut is how long a session that is past DATA has to finish when the node is drained; nobody waits for the node as for one
// that stops, and a large message over a slow link shall not come twice.
const drainCut = 5 * time.Minute

// A drainer is the node's switch between taking mail and not. The switch is a file, so that it stays as it is over a restart.
type drainer struct {
	file  string
	smtpd *smtpd.Server // nil where smtp does not run here
	bound time.Duration // drainCut
	log   zerolog.Logger

	mu  sync.Mutex
	on  *drainNote  // guarded by mu; nil while mail is taken
	cut *time.Timer // guarded by mu
}

// A drainNote is the file.
type drainNote struct {
	Since time.Time `json:"since"`
	By    string    `json:"by"`
}

// openDrainer reads the switch. A file that cannot be read means what one that can means.
func openDrainer(stateDir string, server *smtpd.Server, log zerolog.Logger) *drainer {
	d := &drainer{file: filepath.Join(stateDir, "draining"), smtpd: server, bound: drainCut, log: log}
	text, err := os.ReadFile(d.file)
	if errors.Is(err, fs.ErrNotExist) {
		return d
	}
	note := drainNote{By: "unknown"}
	if err == nil {
		err = json.Unmarshal(text, &note)
	}
	if err != nil {
		log.Error().Err(err).Msg("drain.unreadable")
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	d.turnLocked(&note)
	return d
}

// Begin stops taking mail, durably.
func (d *drainer) Begin(by string) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.on != nil {
		return nil
	}
	note := drainNote{time.Now().UTC().Truncate(time.Second), by}
	text, err := json.Marshal(note)
	if err == nil {
		err = durable.WriteFile(d.file, append(text, '\n'), 0o600)
	}
	if err != nil {
		return fmt.Errorf("drain: %w", err)
	}
	d.turnLocked(&note)
	d.log.Info().Str("by", by).Int("sessions", d.open()).Msg("drain.begun")
	return nil
}

// End takes mail again.
func (d *drainer) End(by string) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.on == nil {
		return nil
	}
	err := os.Remove(d.file)
	if err == nil || errors.Is(err, fs.ErrNotExist) {
		err = durable.SyncDir(filepath.Dir(d.file))
	}
	if err != nil {
		return fmt.Errorf("undrain: %w", err)
	}
	d.turnLocked(nil)
	d.log.Info().Str("by", by).Msg("drain.ended")
	return nil
}

func (d *drainer) turnLocked(note *drainNote) {
	d.on = note
	if d.smtpd == nil {
		return
	}
	if d.cut != nil {
		d.cut.Stop()
		d.cut = nil
	}
	if note == nil {
		d.smtpd.Resume()
		return
	}
	d.smtpd.Pause()
	d.cut = time.AfterFunc(d.bound, d.end)
}

// end cuts the sessions that took longer than they have.
func (d *drainer) end() {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.on == nil {
		return
	}
	if n := d.smtpd.Cut(); n > 0 {
		d.log.Warn().Int("sessions", n).Int64("bound_ms", d.bound.Milliseconds()).Msg("drain.cut")
	}
}

// On says whether the node is draining.
func (d *drainer) On() bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.on != nil
}

// status is what `pmgcm status` shows; nil while mail is taken.
func (d *drainer) status() *cluster.Draining {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.on == nil {
		return nil
	}
	return &cluster.Draining{Since: d.on.Since, By: d.on.By, Sessions: d.open()}
}

func (d *drainer) open() int {
	if d.smtpd == nil {
		return 0
	}
	return d.smtpd.Stats().Open
}
