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

// markNow is readMark of a transaction that has taken its serial.
func markNow(ctx context.Context, tx pgx.Tx) (mark, error) {
	s, err := readState(ctx, tx)
	if err != nil {
		return mark{}, err
	}
	return readMark(ctx, tx, s.Position)
}

// marked runs a transaction that is a configuration commit. Where its connection is lost, also at COMMIT, it says what became of it, as
// Commit does. f gives a mark without a time where it changed nothing.
func (d *DB) marked(ctx context.Context, f func(tx pgx.Tx) (mark, error)) (config.Position, error) {
	var m mark
	end, err := d.writeTo(ctx, func(tx pgx.Tx) (err error) {
		m, err = f(tx)
		return err
	})
	if end == doubtful && !m.time.IsZero() {
		err = d.settle(ctx, m, err)
	}
	if err != nil {
		return config.Position{}, err
	}
	return m.at, nil
}

// repeatable runs a transaction that changes nothing when it is run again: where the answer to its COMMIT is lost, it is. ErrDisconnected
// where nothing was changed; ErrInDoubt where no server answered in time.
func (d *DB) repeatable(ctx context.Context, f func(tx pgx.Tx) error) error {
	end, err := d.writeTo(ctx, f)
	if end != doubtful {
		return err
	}
	return d.untilAnswered(ctx, err, func(ctx context.Context) (final bool, answer error) {
		ctx, cancel := context.WithTimeout(ctx, doubtTry)
		defer cancel()
		end, err := d.writeTo(ctx, f)
		return err == nil || end == refused, err
	})
}

// An ending is how a transaction ended.
type ending int

// One that failed changed nothing: its own error, or its connection, came before COMMIT. One that is doubtful may have been made.
const (
	refused ending = iota
	lost
	doubtful
	committed
)

// writeTo is write that says how it ended.
func (d *DB) writeTo(ctx context.Context, f func(tx pgx.Tx) error) (ending, error) {
	end := lost // until a transaction has begun
	err := d.write(ctx, func(tx pgx.Tx) error {
		err := f(tx)
		switch {
		case err == nil:
			end = doubtful
		case tx.Conn().IsClosed() && ctx.Err() == nil:
			err = fmt.Errorf("%w: %w", ErrDisconnected, err)
		default:
			end = refused
		}
		return err
	})
	switch {
	case err == nil:
		end = committed
	case end == doubtful && !inDoubt(err):
		end = refused
	}
	return end, err
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
	return d.untilAnswered(ctx, fmt.Errorf("configuration %v: %w", m.at, cause), func(ctx context.Context) (final bool, answer error) {
		made, err := d.made(ctx, m)
		switch {
		case err != nil:
			return false, err
		case !made:
			return true, fmt.Errorf("%w: %w", ErrDisconnected, cause)
		}
		d.log.Info().Stringer("epoch", m.at.Epoch).Int64("serial", m.at.Serial).Str("reason", "found in the history").Msg("commit.settled")
		return true, nil
	})
}

// untilAnswered asks whichever server can be written now, until there is an answer. ErrInDoubt: nobody answered in time.
func (d *DB) untilAnswered(ctx context.Context, cause error, ask func(ctx context.Context) (final bool, answer error)) error {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), d.doubt)
	defer cancel()
	d.pool.Reset() // the other connections lead where that one led
	for pause := doubtFirst; ; pause = min(2*pause, doubtAtMost) {
		if final, answer := ask(ctx); final {
			return answer
		}
		timer := time.NewTimer(pause + rand.N(pause/2))
		select {
		case <-ctx.Done():
			timer.Stop()
			return fmt.Errorf("%w, %w", ErrInDoubt, cause)
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
