package db

import (
	"context"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
)

const (
	listenBackOffMin = 100 * time.Millisecond
	listenBackOffMax = 5 * time.Second
	// listenCheck is how often the connection is tried, and peers' long statements are looked for, however many wake-ups come.
	listenCheck = 20 * time.Second
	// longestPeerStatement bounds what a peer may run here.
	longestPeerStatement = 60 * time.Second
)

// Listen calls wake after each commit that became visible here, at the start, and after each reconnect. wake carries no data and must
// return soon. Listen reconnects by itself and returns nil when ctx ends.
func (d *DB) Listen(ctx context.Context, wake func()) error {
	wait := listenBackOffMin
	warned := false
	for {
		started := time.Now()
		err := d.listenOnce(ctx, wake, listenCheck, longestPeerStatement)
		if ctx.Err() != nil {
			return nil
		}
		if !warned || time.Since(started) > listenCheck {
			d.log.Warn().Err(err).Msg("db.listen")
			warned = true
		}
		if time.Since(started) > listenBackOffMax {
			wait = listenBackOffMin
		}
		timer := time.NewTimer(wait)
		select {
		case <-ctx.Done():
			timer.Stop()
			return nil
		case <-timer.C:
		}
		wait = min(2*wait, listenBackOffMax)
	}
}

// listenOnce listens on one connection until that or ctx ends. Every so often it ends what peers run for longer than they may.
func (d *DB) listenOnce(ctx context.Context, wake func(), every, longest time.Duration) error {
	conn, err := pgx.ConnectConfig(ctx, d.pool.Config().ConnConfig)
	if err != nil {
		return err
	}
	defer closeConn(conn.PgConn())
	if _, err := conn.Exec(ctx, "LISTEN mailproxy"); err != nil {
		return err
	}
	d.forgetLoaded()
	wake()
	for next := time.Now().Add(every); ; {
		bounded, cancel := context.WithDeadline(ctx, next)
		_, err := conn.WaitForNotification(bounded)
		cancel()
		switch {
		case err == nil:
			wake()
		case ctx.Err() != nil:
			return ctx.Err()
		case !pgconn.Timeout(err):
			return err
		}
		if time.Now().Before(next) {
			continue
		}
		if _, err := conn.Exec(ctx, "SELECT node.end_long($1)", longest); err != nil {
			return err
		}
		next = time.Now().Add(every)
	}
}

// forgetLoaded has the next Load read everything. It may be another server that answers by now, and one that has taken over without the last
// commits gives their numbers to other ones.
func (d *DB) forgetLoaded() {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.loaded = nil
}

// closeConn says good-bye in bounded time.
func closeConn(c *pgconn.PgConn) {
	ctx, cancel := context.WithTimeout(context.Background(), time.Second)
	defer cancel()
	_ = c.Close(ctx) // it ends either way
}
