package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"slices"
	"time"

	"github.com/urfave/cli/v2"

	"mailproxy/cluster"
	"mailproxy/config"
	"mailproxy/internal/durable"
	"mailproxy/secret"
	"mailproxy/tunnel"
)

// An opened is the secrets that the mail path logs in with and the keys of its certificates, open in memory. In its file they lie sealed, as in the database, so that mail
// flows with PostgreSQL down, also across a restart: what the file holds tells nothing without the node's key.
type opened struct {
	file   string
	keyDir string

	// The rest is guarded by configuration.mu.
	values map[string][]byte
	saved  []byte // what is in the file
}

var errNotOpened = errors.New("is not there, or does not open")

// secret gives an opened secret, for a login.
func (c *configuration) secret(name string) ([]byte, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	value, ok := c.opened.values[name]
	if !ok {
		return nil, errNotOpened
	}
	return value, nil
}

// start opens what the file has.
func (o *opened) start() error {
	b, err := os.ReadFile(o.file)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	own, err := tunnel.PrivateKey(o.keyDir)
	if err != nil {
		return err
	}
	var box secret.Box
	if err := json.Unmarshal(b, &box); err != nil {
		return fmt.Errorf("%s: %w", o.file, err)
	}
	o.saved = b
	o.values, err = box.Open(own)
	return err
}

// openSecrets opens what transports and certificates refer to, as the database has it now. What is there and does not open stays what it was.
func (c *configuration) openSecrets(ctx context.Context, s *config.Snapshot) {
	values, box, err := c.db.OpenSecrets(ctx, s.Secrets())
	if err != nil {
		return // the next reading of the configuration says more
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, name := range s.Secrets() {
		if old, ok := c.opened.values[name]; ok && values[name] == nil && slices.Contains(c.unreadable, name) {
			values[name] = old
		}
	}
	c.opened.values = values
	if err := c.opened.save(box); err != nil {
		c.log.Error().Err(err).Msg("secret.unsaved")
	}
}

// save brings the file up to date.
func (o *opened) save(box *secret.Box) error {
	if len(box.Sealed) == 0 {
		o.saved = nil
		if err := os.Remove(o.file); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
		return nil
	}
	b, err := json.Marshal(box)
	if err != nil || bytes.Equal(b, o.saved) {
		return err
	}
	if err := durable.WriteFile(o.file, b, 0o600); err != nil {
		return err
	}
	o.saved = b
	return nil
}

const (
	takeUpTime = 10 * time.Second      // for the daemon to take up a secret that was set
	takeUpPoll = 20 * time.Millisecond // between two looks
)

// takenUp waits until this node's daemon has a secret, that was just set, in its file, so that what stops it from then on, and the database
// with it, does not bring the value before back. It does not wait for what the mail path does not use, nor for a daemon that does not run.
func (s *store) takenUp(c *cli.Context, name string, value []byte) error {
	if carriedStore(c.Context) != nil { // the node where it was typed waits
		return nil
	}
	ctx, cancel := context.WithTimeout(c.Context, takeUpTime)
	defer cancel()
	now, err := s.Load(ctx)
	if err != nil || !slices.Contains(now.Secrets(), name) {
		return err
	}
	poll := time.NewTicker(takeUpPoll)
	defer poll.Stop()
	for {
		daemon, err := net.Dial("unix", s.local.ControlSocket())
		if err != nil {
			return nil //nolint:nilerr // it does not run
		}
		_ = daemon.Close()
		file := opened{file: s.local.SecretsFile(), keyDir: s.local.KeyDir()}
		err = file.start()
		if err == nil && bytes.Equal(file.values[name], value) {
			return nil
		}
		select {
		case <-poll.C:
		case <-ctx.Done():
			_, err = fmt.Fprintln(c.App.ErrWriter, `mailproxy: it is set; this node's daemon has not taken it up yet, "pmgcm status" says why`)
			return err
		}
	}
}

// missingLocked says which transports cannot log in.
func (c *configuration) missingLocked() (all []cluster.Problem) {
	s := c.loaded.Load()
	if s == nil || c.databaseErr != nil {
		return nil
	}
	for i := range s.Transports {
		t := &s.Transports[i]
		name := t.PasswordSecret()
		if _, ok := c.opened.values[name]; name == "" || ok || slices.Contains(c.unreadable, name) {
			continue
		}
		all = append(all, cluster.Problem{What: fmt.Sprintf("transport %s cannot log in: the secret %s is not there", t.Name, name),
			Remedy: "`mailproxy secret set " + name + "`; mail waits in the queue meanwhile"})
	}
	return all
}
