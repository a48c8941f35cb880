package db

import (
	"context"
	"encoding/json"
	"fmt"
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
		"node.journal_change c WHERE c.id = h.id") + `, h.id, h.set_aside_at, h.by_n, h.by_owner FROM node.journal h ORDER BY h.id`
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

// Journal gives the commits that were set aside, oldest first.
func (d *DB) Journal(ctx context.Context) ([]JournalEntry, error) {
	var all []JournalEntry
	err := collect(ctx, d.pool, &all, func(r pgx.Rows, j *JournalEntry) error {
		return scanEntry(r, &j.HistoryEntry, &j.ID, &j.SetAsideAt, &j.By.N, &j.By.Owner)
	}, selectJournal, maxChanges)
	if err != nil {
		return nil, fmt.Errorf("read journal: %w", mapError(err))
	}
	return all, nil
}

// DropJournal forgets one entry of the journal, once it has been dealt with.
func (d *DB) DropJournal(ctx context.Context, id int64) error {
	tag, err := d.pool.Exec(ctx, "DELETE FROM node.journal WHERE id = $1", id)
	if err != nil {
		return fmt.Errorf("drop journal entry %d: %w", id, mapError(err))
	}
	if tag.RowsAffected() == 0 {
		return fmt.Errorf("journal entry %d: %w", id, ErrNoSuch)
	}
	return nil
}
