package db

import (
	"bytes"
	"context"
	"fmt"
	"strconv"
	"strings"

	"github.com/jackc/pgx/v5"
)

// largeTable is from how many rows on a table that is sent whole goes by itself, typed (migrations/00014_large.sql). Smaller ones cost
// less together.
const largeTable = 10_000

// rowsOf reads the number of rows from a table's kept sums, as node.sums gives them. A table that is empty has none.
func rowsOf(sums string) int64 {
	n, _, _ := strings.Cut(sums, " ")
	rows, _ := strconv.ParseInt(n, 10, 64)
	return rows
}

// textSettings make one text of each value, whatever the server's own settings say.
const textSettings = `SELECT set_config(name, value, true) FROM (VALUES ('timezone', 'UTC'), ('datestyle', 'ISO, YMD'),
	('extra_float_digits', '1'), ('bytea_output', 'hex'), ('intervalstyle', 'postgres')) s(name, value)`

// sendLarge copies a table to the peer. What is sent is summed on its way: ErrDrift where that is not what this node's triggers have kept,
// since rows were changed with them off.
func (s *sending) sendLarge(ctx context.Context, tx pgx.Tx, table string) error {
	var columns, types []string
	var sql string
	err := s.tx.QueryRow(ctx, "SELECT c, node.types($1, c), node.text_sql($1) FROM node.columns($1) c", table).Scan(&columns, &types, &sql)
	if err != nil {
		return err
	}
	for _, t := range []pgx.Tx{s.tx, tx} {
		if _, err := t.Exec(ctx, textSettings); err != nil {
			return err
		}
	}
	var rel, how string
	err = tx.QueryRow(ctx, "SELECT rel, how FROM node.begin_copy($1, $2, $3, $4, $5)", s.here.Position.Epoch.N, s.here.ClusterID, table,
		columns, types).Scan(&rel, &how)
	if err != nil {
		return err
	}
	if how == "buckets" && !s.whole {
		if sql, err = s.differing(ctx, tx, table, columns, sql); err != nil {
			return err
		}
	}
	sums := newRowSums(columns)
	see := sums.add
	if how != "swap" { // the peer's triggers sum
		see = nil
	}
	if err := s.copy(ctx, tx, sql, intoColumns(rel, columns), see); err != nil {
		return err
	}
	if how == "swap" && sums.String() != s.sums[table] {
		return fmt.Errorf("%w: what its triggers have kept of config.%s is not what its rows are, here", ErrDrift, table)
	}
	lanes, check := sums.numbers()
	_, err = tx.Exec(ctx, "SELECT node.end_copy($1, $2, $3, $4, $5, $6, $7, $8, $9)", table, columns, sums.rows,
		lanes[0], lanes[1], lanes[2], lanes[3], check[0], check[1])
	return err
}

// copy sends rows to a table of the peer's, and counts them.
func (s *sending) copy(ctx context.Context, tx pgx.Tx, sql, into string, see func(row []byte)) error {
	counter := &rowCounter{rows: s.stats.Rows}
	if s.progress != nil {
		counter.progress = func(rows int64) { s.progress(rows, s.of) }
	}
	err := copyAcross(ctx, s.tx.Conn().PgConn(), tx.Conn().PgConn(), sql, into, counter, see)
	s.stats.Rows = counter.rows
	return err
}

// bucketRows is how many rows of a table are in one bucket, about, and maxBuckets how many buckets there are at most. Both sides group by
// them in memory.
const (
	bucketRows = 16
	maxBuckets = 1 << 17
)

// differing compares a table with the peer's by sums of buckets of rows, and narrows the query for its rows to the buckets that differ.
func (s *sending) differing(ctx context.Context, tx pgx.Tx, table string, columns []string, sql string) (string, error) {
	buckets := 1
	for n := int64(bucketRows); n < rowsOf(s.sums[table]) && buckets < maxBuckets; n *= 2 {
		buckets *= 2
	}
	var sums, bucket string
	err := s.tx.QueryRow(ctx, "SELECT node.buckets_sql($1, $2, $3), node.bucket_sql($1, $3)", table, columns, buckets).Scan(&sums, &bucket)
	if err != nil {
		return "", err
	}
	// As in node.sum_buckets.
	if _, err := s.tx.Exec(ctx, "SELECT set_config('work_mem', '32MB', true), set_config('enable_sort', 'off', true), set_config('jit', 'off', true)"); err != nil {
		return "", err
	}
	theirs := make(chan error, 1)
	go func() {
		_, err := tx.Exec(ctx, "SELECT node.sum_buckets($1, $2, $3)", table, columns, buckets)
		theirs <- err
	}()
	var ours bytes.Buffer // at most maxBuckets short lines
	_, err = s.tx.Conn().PgConn().CopyTo(ctx, &ours, "COPY ("+sums+") TO STDOUT")
	if theirErr := <-theirs; err == nil {
		err = theirErr
	}
	if err != nil {
		return "", err
	}
	if _, err := tx.Conn().PgConn().CopyFrom(ctx, &ours, "COPY pg_temp.bucket (bucket, n, x) FROM STDIN"); err != nil {
		return "", err
	}
	var differ string
	if err := tx.QueryRow(ctx, "SELECT node.differing($1, $2)::text", table, buckets).Scan(&differ); err != nil {
		return "", err
	}
	sql = fmt.Sprintf("%s WHERE %s = ANY ('%s'::integer[])", sql, bucket, differ)
	if s.progress != nil {
		var n int64
		if err := s.tx.QueryRow(ctx, "SELECT count(*) FROM ("+sql+") row_").Scan(&n); err != nil {
			return "", err
		}
		s.of += n - rowsOf(s.sums[table])
	}
	return sql, nil
}

// intoColumns names a table in node with the columns to fill.
func intoColumns(rel string, columns []string) string {
	quoted := make([]string, len(columns))
	for i, c := range columns {
		quoted[i] = pgx.Identifier{c}.Sanitize()
	}
	return pgx.Identifier{"node", rel}.Sanitize() + " (" + strings.Join(quoted, ", ") + ")"
}
