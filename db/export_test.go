package db

import (
	"context"
	"net"
	"time"

	"github.com/jackc/pgx/v5"
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

// Read is read.
func (d *DB) Read(ctx context.Context, f func(tx pgx.Tx) error) error { return d.read(ctx, f) }

// ReadAside is readAside.
func (d *DB) ReadAside(ctx context.Context, f func(tx pgx.Tx) error) error {
	return d.readAside(ctx, f)
}

// SetDoubt says how long a commit whose answer was lost is asked after.
func (d *DB) SetDoubt(bound time.Duration) { d.doubt = bound }

// SetLarge says from how many rows on a table is sent as a large one.
func (d *DB) SetLarge(rows int64) { d.large = rows }

// SetPart says how long a large table is sent before the peer keeps what it has.
func (d *DB) SetPart(t time.Duration) { d.part = t }

// SumRows sums lines of a COPY: as node.sums and as node.check_sql.
func SumRows(columns []string, lines ...string) (sums, check string) {
	s := newRowSums(columns)
	for _, l := range lines {
		s.add([]byte(l))
	}
	return s.String(), s.check.String()
}

// MuchTouched is muchTouched.
const MuchTouched = muchTouched

// Hash64 is what rows are checked by.
func Hash64(b []byte, seed uint64) uint64 { return hash64(b, seed) }

// MaxConns is the pool's bound.
func (d *DB) MaxConns() int32 { return d.pool.Config().MaxConns }

// Dialer is how servers are reached.
func Dialer() *net.Dialer { return dialer() }
