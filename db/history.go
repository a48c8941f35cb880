package db

import (
	"context"
	"encoding/json"
	"fmt"
	"math"
	"time"

	"github.com/jackc/pgx/v5"

	"mailproxy/config"
)

// A Change is one row that a commit changed.
type Change struct {
	Table string          `json:"table"`         // without its schema: domain
	Op    string          `json:"op"`            // insert, update, delete
	Key   json.RawMessage `json:"key"`           // the primary key's columns
	Old   json.RawMessage `json:"old,omitempty"` // the row before; secrets left out
	New   json.RawMessage `json:"new,omitempty"` // the row after; secrets left out
}

// A HistoryEntry is one configuration commit.
type HistoryEntry struct {
	Epoch   config.Epoch `json:"epoch"`
	Serial  int64        `json:"serial"`
	At      time.Time    `json:"at"`
	Who     string       `json:"who"`
	Node    config.CID   `json:"node"` // where it was made
	Command string       `json:"command,omitempty"`
	Changes []Change     `json:"changes"`           // the first 1,000
	Omitted int64        `json:"omitted,omitempty"` // how many more there are
}

// A JournalEntry is a commit of a node that the master's history lacks: it was set aside when a push took its place.
type JournalEntry struct {
	ID int64 `json:"id"`
	HistoryEntry
	SetAsideAt time.Time    `json:"set_aside_at"`
	By         config.Epoch `json:"by"` // the epoch whose push that was
	// Outcome is what became of it: empty while it is open, applied, dropped. Closed entries stay.
	Outcome  string    `json:"outcome,omitempty"`
	ClosedAt time.Time `json:"closed_at,omitzero"`
	ClosedBy string    `json:"closed_by,omitempty"`
	Reason   string    `json:"reason,omitempty"`
}

// decodeChanges reads a JSON array of changes in which null is a row that is not there.
func decodeChanges(raw []byte) ([]Change, error) {
	var all []Change
	if err := json.Unmarshal(raw, &all); err != nil {
		return nil, err
	}
	for i := range all {
		if string(all[i].Old) == "null" {
			all[i].Old = nil
		}
		if string(all[i].New) == "null" {
			all[i].New = nil
		}
	}
	return all, nil
}

// maxChanges bounds what is read of one commit: an import is one as well.
const maxChanges = 1000

// The changes of a commit, as JSON, and how many more there are; the commit is h and its changes are c.
const selectChanges = `(SELECT coalesce(jsonb_agg(jsonb_build_object('table', tab, 'op', op, 'key', key, 'old', old, 'new', new) ORDER BY seq), '[]')
		FROM (SELECT c.* FROM %[1]s ORDER BY c.seq LIMIT $1) x), (SELECT greatest(count(*) - $1, 0) FROM %[1]s)`

var (
	selectHistory = `SELECT h.epoch_n, h.epoch_owner, h.serial, h.at, h.who, h.node, h.command, ` + fmt.Sprintf(selectChanges,
		"config.change c WHERE (c.serial, c.epoch_n, c.epoch_owner) = (h.serial, h.epoch_n, h.epoch_owner)") + `
		FROM config.history h ORDER BY h.serial DESC, h.epoch_n DESC, h.epoch_owner DESC LIMIT $2`
	selectJournal = `SELECT h.epoch_n, h.epoch_owner, h.serial, h.at, h.who, h.node, h.command, ` + fmt.Sprintf(selectChanges,
		"node.journal_change c WHERE c.id = h.id") + `, h.id, h.set_aside_at, h.by_n, h.by_owner, coalesce(h.outcome, ''),
		h.closed_at, coalesce(h.closed_by, ''), coalesce(h.reason, '') FROM node.journal h WHERE $2::bigint IN (0, h.id) ORDER BY h.id`
)

// scanEntry reads one commit, and what more was asked for.
func scanEntry(r pgx.Rows, h *HistoryEntry, more ...any) error {
	var raw []byte
	err := r.Scan(append([]any{&h.Epoch.N, &h.Epoch.Owner, &h.Serial, &h.At, &h.Who, &h.Node, &h.Command, &raw, &h.Omitted}, more...)...)
	if err == nil {
		h.Changes, err = decodeChanges(raw)
	}
	return err
}

// History gives the newest commits, newest first.
func (d *DB) History(ctx context.Context, limit int) ([]HistoryEntry, error) {
	var all []HistoryEntry
	err := collect(ctx, d.pool, &all, func(r pgx.Rows, h *HistoryEntry) error { return scanEntry(r, h) }, selectHistory, maxChanges, limit)
	if err != nil {
		return nil, fmt.Errorf("read history: %w", mapError(err))
	}
	return all, nil
}

// Journal gives the commits that were set aside, oldest first, those that were dealt with too.
func (d *DB) Journal(ctx context.Context) ([]JournalEntry, error) {
	return d.journal(ctx, maxChanges, 0)
}

// JournalEntry gives one of them with all its changes. ErrNoSuch.
func (d *DB) JournalEntry(ctx context.Context, id int64) (JournalEntry, error) {
	all, err := d.journal(ctx, math.MaxInt64, id)
	if err != nil {
		return JournalEntry{}, err
	}
	if id == 0 || len(all) == 0 {
		return JournalEntry{}, fmt.Errorf("journal entry %d: %w", id, ErrNoSuch)
	}
	return all[0], nil
}

// journal gives one entry, or with id 0 all of them, with so many changes each.
func (d *DB) journal(ctx context.Context, changes, id int64) ([]JournalEntry, error) {
	var all []JournalEntry
	err := collect(ctx, d.pool, &all, func(r pgx.Rows, j *JournalEntry) error {
		var closed *time.Time
		err := scanEntry(r, &j.HistoryEntry, &j.ID, &j.SetAsideAt, &j.By.N, &j.By.Owner, &j.Outcome, &closed, &j.ClosedBy, &j.Reason)
		if closed != nil {
			j.ClosedAt = *closed
		}
		return err
	}, selectJournal, changes, id)
	if err != nil {
		return nil, fmt.Errorf("read journal: %w", mapError(err))
	}
	return all, nil
}

// What can become of a journal entry.
const (
	Applied = "applied"
	Dropped = "dropped"
)

// CloseJournal notes how an entry of the journal was dealt with, by whom and why. ErrNoSuch where it is not open.
func (d *DB) CloseJournal(ctx context.Context, id int64, outcome, who, reason string) error {
	tag, err := d.pool.Exec(ctx, `UPDATE node.journal SET outcome = $2, closed_by = $3, reason = $4, closed_at = clock_timestamp()
		WHERE id = $1 AND closed_at IS NULL`, id, outcome, who, reason)
	if err != nil {
		return fmt.Errorf("close journal entry %d: %w", id, mapError(err))
	}
	if tag.RowsAffected() == 0 {
		return fmt.Errorf("journal entry %d: %w", id, ErrNoSuch)
	}
	return nil
}
