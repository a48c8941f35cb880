package db

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/jackc/pgx/v5"

	"mailproxy/config"
)

// Adopt overwrites this node's configuration, which the caller has compared at here, with a peer's at exactly one position: the step of a
// node that promotes itself, so it must have promised itself an epoch above. What it costs follows the commits that are missing here, where the peer's history leads
// from here to there. Own commits that the peer's history lacks go to the journal. ErrMoved where the peer or this node is at another
// position by now, so that nothing that came in meanwhile is taken back; ErrStale where this node has promised otherwise.
func (d *DB) Adopt(ctx context.Context, p *Peer, here, at config.Position) (PushStats, error) {
	start := time.Now()
	stats, err := d.adopt(ctx, p, here, at, false)
	// A peer of an older version knows no way but the whole; after rows were changed by hand, commits do not lead to the same ones.
	if mapped := mapError(err); errors.Is(mapped, errNoPath) || errors.Is(mapped, ErrDrift) || isUndefined(err) {
		stats, err = d.adopt(ctx, p, here, at, true)
	}
	stats.Took = time.Since(start)
	if err != nil {
		return stats, fmt.Errorf("adopt %v: %w", at, err)
	}
	return stats, nil
}

func (d *DB) adopt(ctx context.Context, p *Peer, here, at config.Position, full bool) (PushStats, error) {
	stats := PushStats{From: here, To: at, Full: full}
	err := d.write(ctx, func(tx pgx.Tx) error {
		if _, err := tx.Exec(ctx, "SELECT node.stage()"); err != nil {
			return err
		}
		whole := []string{}
		sql := fmt.Sprintf("SELECT * FROM node.export_delta(%d, %d, %d, %d, %d, %d)", at.Epoch.N, at.Epoch.Owner, at.Serial,
			here.Epoch.N, here.Epoch.Owner, here.Serial)
		if full {
			there, err := p.state(ctx)
			if err != nil {
				return err
			}
			var sums map[string]string
			if err := tx.QueryRow(ctx, "SELECT node.sums()").Scan(&sums); err != nil {
				return err
			}
			whole = differing(sums, there.sums)
			stats.Tables = whole
			sql = fmt.Sprintf("SELECT * FROM node.export_config(%d, %d, %d) WHERE tab = ANY (%s::text[])", at.Epoch.N, at.Epoch.Owner, at.Serial,
				quote("{"+strings.Join(whole, ",")+"}"))
		}
		got, err := copyRows(ctx, p.conn.PgConn(), tx.Conn().PgConn(), sql)
		stats.Rows, stats.Bytes = got.rows, got.bytes
		if err != nil {
			return err
		}
		if err := stillAt(ctx, tx, here); err != nil {
			return err
		}
		var touched int64
		return tx.QueryRow(ctx, "SELECT journalled, touched FROM node.adopt($1, $2, $3, $4, $5)", at.Epoch.N, at.Epoch.Owner, at.Serial,
			at.Digest[:], whole).Scan(&stats.Journalled, &touched)
	})
	return stats, err
}

// stillAt holds the position for the rest of the transaction: while rows were on their way a push may have brought this node further.
func stillAt(ctx context.Context, tx pgx.Tx, here config.Position) error {
	if _, err := tx.Exec(ctx, "SELECT FROM node.position FOR UPDATE"); err != nil {
		return err
	}
	now, err := readState(ctx, tx)
	if err == nil && now.Position.Compare(here) != 0 {
		return fmt.Errorf("%w: here it is %v, not %v", ErrMoved, now.Position, here)
	}
	return err
}

// isUndefined says whether a function was asked for that is not there.
func isUndefined(err error) bool {
	pg, ok := asPg(err)
	return ok && pg.Code == "42883"
}
