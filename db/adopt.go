package db

import (
	"context"
	"fmt"
	"time"

	"github.com/jackc/pgx/v5"

	"mailproxy/config"
)

// Adopt overwrites this node's configuration with a peer's at exactly one position: the step of a node that promotes itself, so it
// must have promised itself an epoch above. Own commits that the peer's history lacks go to the journal. ErrMoved where the peer is at
// another position by now, ErrStale where this node has promised otherwise.
func (d *DB) Adopt(ctx context.Context, p *Peer, at config.Position) (PushStats, error) {
	start := time.Now()
	stats := PushStats{To: at, Full: true}
	err := d.write(ctx, func(tx pgx.Tx) error {
		here, err := readState(ctx, tx)
		if err != nil {
			return err
		}
		stats.From = here.Position
		if _, err := tx.Exec(ctx, "SELECT node.stage()"); err != nil {
			return err
		}
		sql := fmt.Sprintf("SELECT * FROM node.export_config(%d, %d, %d)", at.Epoch.N, at.Epoch.Owner, at.Serial)
		got, err := copyRows(ctx, p.conn.PgConn(), tx.Conn().PgConn(), sql, nil)
		stats.Rows, stats.Bytes = got.rows, got.bytes
		if err != nil {
			return err
		}
		var touched int64
		return tx.QueryRow(ctx, "SELECT journalled, touched FROM node.adopt($1, $2, $3, $4)", at.Epoch.N, at.Epoch.Owner, at.Serial,
			at.Digest[:]).Scan(&stats.Journalled, &touched)
	})
	stats.Took = time.Since(start)
	if err != nil {
		return stats, fmt.Errorf("adopt %v: %w", at, err)
	}
	return stats, nil
}
