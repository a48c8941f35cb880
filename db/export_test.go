package db

import "context"

// KillListeners ends the connections that listen.
func (d *DB) KillListeners(ctx context.Context) error {
	_, err := d.pool.Exec(ctx, `SELECT pg_terminate_backend(pid) FROM pg_stat_activity
		WHERE datname = current_database() AND query = 'LISTEN mailproxy'`)
	return err
}
