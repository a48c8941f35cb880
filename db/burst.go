package db

import (
	"context"
	"encoding/json"
	"fmt"
	"strconv"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
)

// What is sent in one piece is bounded in rows and bytes, since it lies in memory.
const (
	burstRows  = 200
	burstBytes = 64 << 10
)

// burst is send for few rows: it takes one round trip, where send takes six, which is what a change costs over a far link. false: there
// are more rows than that, and nothing was sent.
func (s *sending) burst(ctx context.Context, sql string) (bool, error) {
	rows, n, err := s.few(ctx, sql)
	if err != nil || n == 0 {
		return false, err
	}
	if s.progress != nil {
		s.progress(n, n)
	}
	to := s.here.Position
	epoch, cluster := strconv.AppendInt(nil, to.Epoch.N, 10), []byte(s.here.ClusterID)
	// Without a BEGIN all up to the batch's one Sync is one transaction. What fails ends it, and nothing behind that is carried out.
	batch := &pgconn.Batch{}
	batch.ExecParams("SELECT node.begin_push($1, $2)", [][]byte{epoch, cluster}, nil, nil, nil)
	batch.ExecParams("INSERT INTO pg_temp.staging (tab, op, row) SELECT r->>0, r->>1, r->2 FROM jsonb_array_elements($1::jsonb) r",
		[][]byte{rows}, nil, nil, nil)
	batch.ExecParams("SELECT journalled FROM node.push($1, $2, $3, $4, '{}')",
		[][]byte{epoch, cluster, strconv.AppendInt(nil, to.Serial, 10), fmt.Appendf(nil, `\x%x`, to.Digest[:])}, nil, nil, nil)
	results, err := s.peer.conn.PgConn().ExecBatch(ctx, batch).ReadAll()
	if err != nil {
		return false, err
	}
	s.stats.Rows = n
	s.stats.Journalled, err = strconv.Atoi(string(results[2].Rows[0][0]))
	return true, err
}

// few reads the rows of a query as a JSON array of [tab, op, row], and their number; 0 where they are too many.
func (s *sending) few(ctx context.Context, sql string) (rows json.RawMessage, n int64, err error) {
	var changes int64
	err = s.tx.QueryRow(ctx, "SELECT count(*) FROM (SELECT FROM config.change WHERE serial > $1 AND serial <= $2 LIMIT $3) c",
		s.there.Position.Serial, s.here.Position.Serial, burstRows).Scan(&changes)
	if err != nil || changes >= burstRows {
		return nil, 0, err
	}
	// Never prepared: its text names serials, and is no push's again.
	err = s.tx.QueryRow(ctx, "SELECT jsonb_agg(jsonb_build_array(tab, op, row_)), count(*) FROM ("+sql+") q (tab, op, row_)", pgx.QueryExecModeExec).
		Scan(&rows, &n)
	if len(rows) > burstBytes {
		return nil, 0, err
	}
	return rows, n, err
}
