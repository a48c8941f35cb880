package cluster

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"

	"mailproxy/config"
	"mailproxy/db"
)

// Journal gives the commits that were set aside on this node, oldest first; those that were dealt with only with all.
func (o *Operator) Journal(ctx context.Context, all bool) ([]db.JournalEntry, error) {
	if _, err := o.state(ctx); err != nil {
		return nil, err
	}
	entries, err := o.DB.Journal(ctx)
	if !all {
		entries = slices.DeleteFunc(entries, func(e db.JournalEntry) bool { return e.Outcome != "" })
	}
	return entries, err
}

// JournalEntry gives one of them; ErrNoSuchEntry.
func (o *Operator) JournalEntry(ctx context.Context, id int64) (db.JournalEntry, error) {
	if _, err := o.state(ctx); err != nil {
		return db.JournalEntry{}, err
	}
	e, err := o.DB.JournalEntry(ctx, id)
	if errors.Is(err, db.ErrNoSuch) {
		return e, fmt.Errorf("%w: %d", ErrNoSuchEntry, id)
	}
	return e, err
}

// A JournalPlan is what an entry of the journal would change in today's configuration.
type JournalPlan struct {
	Entry       db.JournalEntry     `json:"entry"`
	Differences []config.Difference `json:"differences"`
	// Left are the tables of changes that cannot be entered again: the cluster's own rows, and secrets, whose values are in no history.
	Left []string `json:"left,omitempty"`

	now, then *config.Snapshot
}

// JournalDiff compares an entry of the journal with today's configuration. ErrNoSuchEntry.
func (o *Operator) JournalDiff(ctx context.Context, id int64) (JournalPlan, error) {
	e, err := o.JournalEntry(ctx, id)
	if err != nil {
		return JournalPlan{}, err
	}
	p := JournalPlan{Entry: e, Differences: []config.Difference{}}
	if p.now, err = o.DB.Load(ctx); err != nil {
		return p, err
	}
	if p.then, err = db.Patch(p.now, e.Changes, func(c db.Change) json.RawMessage { return c.New }); err != nil {
		return p, err
	}
	for _, c := range e.Changes {
		if !db.Patched(c.Table) && !slices.Contains(p.Left, c.Table) {
			p.Left = append(p.Left, c.Table)
		}
	}
	p.Differences = append(p.Differences, config.Diff(p.now, p.then)...)
	return p, nil
}

// JournalApply enters a plan's changes again, as a new commit on the master, and closes the entry. The position is that of the commit.
// ErrEntryClosed; ErrNotEntered; ErrRefused where the master does not take it.
func (o *Operator) JournalApply(ctx context.Context, p JournalPlan) (config.Position, error) {
	if p.Entry.Outcome != "" {
		return config.Position{}, fmt.Errorf("%w: %s", ErrEntryClosed, p.Entry.Outcome)
	}
	if len(p.Differences) == 0 && len(p.Left) > 0 {
		return config.Position{}, fmt.Errorf("%w: rows of %s", ErrNotEntered, strings.Join(p.Left, ", "))
	}
	at := p.now.Position
	if len(p.Differences) > 0 {
		reply, err := o.Carry(ctx, config.Command{
			Who: o.Author.Who, Line: o.Author.Command, Args: []string{"config", "apply", "-", "--yes"}, Text: string(p.then.Text()), At: p.now.Position,
		})
		if err != nil {
			return at, err
		}
		if reply.Code != 0 {
			return at, fmt.Errorf("%w: %s", ErrRefused, reply.Error)
		}
		at = reply.At
	}
	reason := fmt.Sprintf("as commit %v", at)
	if len(p.Left) > 0 {
		reason += ", without its rows of " + strings.Join(p.Left, ", ")
	}
	return at, o.closeEntry(ctx, p.Entry.ID, db.Applied, reason)
}

// JournalDrop closes an entry of the journal that is not wanted. The reason goes into the history of the configuration first, as a commit
// of its own on the master; killed between the two, it is there twice when it was run again. ErrNoSuchEntry, ErrEntryClosed; Carry's errors.
func (o *Operator) JournalDrop(ctx context.Context, id int64, reason string) error {
	e, err := o.JournalEntry(ctx, id)
	if err != nil {
		return err
	}
	if e.Outcome != "" {
		return fmt.Errorf("%w: %s", ErrEntryClosed, e.Outcome)
	}
	line := fmt.Sprintf("pmgcm journal drop %d --reason %q (%s)", id, reason, describe(e))
	reply, err := o.Carry(ctx, config.Command{Who: o.Author.Who, Line: line, Args: []string{"config", "note"}})
	if err != nil {
		return err
	}
	if reply.Code != 0 {
		return fmt.Errorf("%w: %s", ErrRefused, reply.Error)
	}
	return o.closeEntry(ctx, id, db.Dropped, reason)
}

// describe names a commit that was set aside, for people.
func describe(e db.JournalEntry) string {
	return fmt.Sprintf("commit %v/%d of node %d by %s: %s", e.Epoch, e.Serial, e.Node, e.Who, e.Command)
}

func (o *Operator) closeEntry(ctx context.Context, id int64, outcome, reason string) error {
	err := o.DB.CloseJournal(ctx, id, outcome, o.Author.Who, reason)
	if errors.Is(err, db.ErrNoSuch) {
		return fmt.Errorf("%w: %d", ErrEntryClosed, id)
	}
	return err
}
