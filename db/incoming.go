package db

import (
	"context"
	"fmt"

	"github.com/jackc/pgx/v5"
)

// Size gives how many rows the configuration has, history among them, and the newest migration that made its tables; cheap.
func (d *DB) Size(ctx context.Context) (rows, schema int64, err error) {
	err = d.read(ctx, func(tx pgx.Tx) error {
		return tx.QueryRow(ctx, `SELECT (SELECT coalesce(sum(n), 0)::bigint FROM node.digest),
			(SELECT max(version_id) FROM node.migration WHERE is_applied)`).Scan(&rows, &schema)
	})
	if err != nil {
		return 0, 0, fmt.Errorf("read the configuration's size: %w", err)
	}
	return rows, schema, nil
}

// Incoming gives how many rows, and bytes of them, have come in of a push that is being received. 0 while none is, and on a server that
// does not show it to us.
func (d *DB) Incoming(ctx context.Context) (rows, bytes int64, err error) {
	err = d.pool.QueryRow(ctx, `SELECT coalesce(max(tuples_processed), 0), coalesce(max(bytes_processed), 0) FROM pg_stat_progress_copy
		WHERE datname = current_database() AND command = 'COPY FROM'`).Scan(&rows, &bytes)
	if err != nil {
		return 0, 0, fmt.Errorf("read the progress of a push: %w", err)
	}
	return rows, bytes, nil
}
