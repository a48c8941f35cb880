package cluster

import (
	"context"
	"fmt"

	"mailproxy/db"
)

// Journal gives the commits that were set aside on this node, oldest first.
func (o *Operator) Journal(ctx context.Context) ([]db.JournalEntry, error) {
	if _, err := o.state(ctx); err != nil {
		return nil, err
	}
	return o.DB.Journal(ctx)
}

// JournalEntry gives one of them; ErrNoSuchEntry.
func (o *Operator) JournalEntry(ctx context.Context, id int64) (db.JournalEntry, error) {
	all, err := o.Journal(ctx)
	if err != nil {
		return db.JournalEntry{}, err
	}
	for _, e := range all {
		if int64(e.ID) == id {
			return e, nil
		}
	}
	return db.JournalEntry{}, fmt.Errorf("%w: %d", ErrNoSuchEntry, id)
}
