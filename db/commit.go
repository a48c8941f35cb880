package db

import (
	"context"
	"fmt"
	"strconv"

	"github.com/jackc/pgx/v5"

	"mailproxy/config"
)

// An Author is who changes the configuration, for its history.
type Author struct {
	// Who is a person or a part of the system: "root".
	Who string
	// Command is what was done, as it could be typed again; no secrets.
	Command string
	// Node is where it was typed; 0: here.
	Node config.CID
}

// Commit runs edit in one configuration commit: serial + 1, digest, history, NOTIFY. check, unless nil, sees the snapshot as it would
// be, and may refuse. On any error but ErrInDoubt nothing is changed. An edit that changes no row takes no serial. On a slave: a
// *NotMasterError. Commits run one after the other. Where the connection is lost, and be it at COMMIT, ErrDisconnected says that
// nothing was changed; a commit that was made all the same is found on the server that can be written by then, and is no error.
func (d *DB) Commit(ctx context.Context, a Author, edit func(ctx context.Context, tx *Tx) error,
	check func(*config.Snapshot) error) (config.Position, error) {
	var checked *loaded
	at, err := d.marked(ctx, func(tx pgx.Tx) (m mark, err error) {
		m, checked, err = d.commitIn(ctx, tx, a, edit, check)
		return m, err
	})
	if err != nil {
		return config.Position{}, fmt.Errorf("commit: %w", err)
	}
	if checked != nil {
		d.keep(checked)
	}
	return at, nil
}

// commitIn is Commit within its transaction. It gives a mark without a time where no row was changed, and what was checked, if anything.
func (d *DB) commitIn(ctx context.Context, tx pgx.Tx, a Author, edit func(ctx context.Context, tx *Tx) error,
	check func(*config.Snapshot) error) (mark, *loaded, error) {
	if err := begin(ctx, tx, a); err != nil {
		return mark{}, nil, err
	}
	before, err := readState(ctx, tx)
	if err != nil {
		return mark{}, nil, err
	}
	if !before.IsMaster() {
		return mark{}, nil, &NotMasterError{Master: before.Promised.Owner}
	}
	if err := edit(ctx, &Tx{tx: tx, db: d}); err != nil {
		return mark{}, nil, err
	}
	after, err := readState(ctx, tx)
	if err != nil || after.Position == before.Position {
		return mark{at: after.Position}, nil, err
	}
	var l *loaded
	if check != nil {
		if l, err = d.load(ctx, tx); err != nil {
			return mark{}, nil, err
		}
		if err := check(l.snapshot); err != nil {
			return mark{}, nil, err
		}
	}
	m, err := readMark(ctx, tx, after.Position)
	return m, l, err
}

// begin locks the position row, so that commits never deadlock, and says who commits.
func begin(ctx context.Context, tx pgx.Tx, a Author) error {
	node := ""
	if a.Node != 0 {
		node = strconv.Itoa(int(a.Node))
	}
	_, err := tx.Exec(ctx, `SELECT set_config('mailproxy.who', $1, true), set_config('mailproxy.command', $2, true),
		set_config('mailproxy.node', $3, true) FROM (SELECT FROM node.position FOR UPDATE) p`, a.Who, a.Command, node)
	return err
}

// A Tx edits the configuration within a commit. Put makes or replaces a row; Delete gives ErrNoSuch where there is none.
type Tx struct {
	tx pgx.Tx
	db *DB
}

// Snapshot gives the configuration as this transaction has made it so far.
func (t *Tx) Snapshot(ctx context.Context) (*config.Snapshot, error) { return t.db.snapshot(ctx, t.tx) }

// Renew takes a serial though no row is edited: rows that were changed with the triggers off become this commit's, and every node moves on
// to it.
func (t *Tx) Renew(ctx context.Context) error { return t.exec(ctx, "SELECT node.take_serial()") }

func (t *Tx) exec(ctx context.Context, sql string, args ...any) error {
	_, err := t.tx.Exec(ctx, sql, args...)
	return mapError(err)
}

// remove is exec for a row that must be there.
func (t *Tx) remove(ctx context.Context, what, sql string, args ...any) error {
	tag, err := t.tx.Exec(ctx, sql, args...)
	if err != nil {
		return mapError(err)
	}
	if tag.RowsAffected() == 0 {
		return fmt.Errorf("%s: %w", what, ErrNoSuch)
	}
	return nil
}
