package db

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"time"

	"github.com/jackc/pgx/v5"

	"mailproxy/config"
)

// How long a commit whose answer was lost is asked after, and how often. The bound is longer than a failover of a database cluster.
const (
	doubtBound  = 60 * time.Second
	doubtTry    = 15 * time.Second
	doubtFirst  = 50 * time.Millisecond
	doubtAtMost = 2 * time.Second
)

// A mark is what a commit is known by on every server: its place in the history, and the microsecond at which it was taken. The place
// alone does not do: where a standby took over without the commit, the next one is given the same.
type mark struct {
	at   config.Position
	time time.Time
}

// readMark gives the mark of the commit that this transaction is.
func readMark(ctx context.Context, tx pgx.Tx, at config.Position) (mark, error) {
	m := mark{at: at}
	err := tx.QueryRow(ctx, "SELECT at FROM config.history WHERE (serial, epoch_n, epoch_owner) = ($1, $2, $3)",
		at.Serial, at.Epoch.N, at.Epoch.Owner).Scan(&m.time)
	return m, err
}

// inDoubt says whether an error of COMMIT leaves open what became of it: the server did not say no, and did not say yes either.
func inDoubt(err error) bool {
	if pg, ok := asPg(err); ok {
		return pg.SeverityUnlocalized != "ERROR" // FATAL and PANIC end the session, whatever came before
	}
	return !errors.Is(err, pgx.ErrTxCommitRollback)
}

// settle finds out what became of a commit whose answer was lost, on whichever server can be written now, and gives nil where it was
// made. ErrDisconnected: it was not, and will not be; ErrInDoubt: nobody answered in time. It asks on when ctx has ended, since that
// may be why the answer was lost.
func (d *DB) settle(ctx context.Context, m mark, cause error) error {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), d.doubt)
	defer cancel()
	d.pool.Reset() // the other connections lead where that one led
	for pause := doubtFirst; ; pause = min(2*pause, doubtAtMost) {
		made, err := d.made(ctx, m)
		switch {
		case err == nil && made:
			d.log.Info().Stringer("epoch", m.at.Epoch).Int64("serial", m.at.Serial).Str("reason", "found in the history").Msg("commit.settled")
			return nil
		case err == nil:
			return fmt.Errorf("%w: %w", ErrDisconnected, cause)
		}
		timer := time.NewTimer(pause + rand.N(pause/2))
		select {
		case <-ctx.Done():
			timer.Stop()
			return fmt.Errorf("%w, configuration %v: %w", ErrInDoubt, m.at, cause)
		case <-timer.C:
		}
	}
}

// made says whether the commit is in the history, or was set aside since. The lock of the position row waits for a COMMIT that the
// server still works on; and as the lock makes this a transaction that is waited for, what it saw has reached the standbys, too, where
// commits wait for them.
func (d *DB) made(ctx context.Context, m mark) (bool, error) {
	ctx, cancel := context.WithTimeout(ctx, doubtTry)
	defer cancel()
	var made bool
	err := d.write(ctx, func(tx pgx.Tx) error {
		if _, err := tx.Exec(ctx, "SELECT FROM node.position FOR UPDATE"); err != nil {
			return err
		}
		return tx.QueryRow(ctx, `SELECT EXISTS (SELECT FROM config.history WHERE (serial, epoch_n, epoch_owner, at) = ($1, $2, $3, $4))
			OR EXISTS (SELECT FROM node.journal WHERE (serial, epoch_n, epoch_owner, at) = ($1, $2, $3, $4))`,
			m.at.Serial, m.at.Epoch.N, m.at.Epoch.Owner, m.time).Scan(&made)
	})
	return made, err
}
