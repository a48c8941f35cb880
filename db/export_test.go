package db

import (
	"context"
	"net"
	"time"
)

// KillListeners ends the connections that listen.
func (d *DB) KillListeners(ctx context.Context) error {
	_, err := d.pool.Exec(ctx, `SELECT pg_terminate_backend(pid) FROM pg_stat_activity
		WHERE datname = current_database() AND query = 'LISTEN mailproxy'`)
	return err
}

// ListenOnce is Listen on one connection, with other times.
func (d *DB) ListenOnce(ctx context.Context, wake func(), every, longest time.Duration) error {
	return d.listenOnce(ctx, wake, every, longest)
}

// SetDoubt says how long a commit whose answer was lost is asked after.
func (d *DB) SetDoubt(bound time.Duration) { d.doubt = bound }

// MaxConns is the pool's bound.
func (d *DB) MaxConns() int32 { return d.pool.Config().MaxConns }

// Dialer is how servers are reached.
func Dialer() *net.Dialer { return dialer() }
