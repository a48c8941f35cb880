package db

import (
	"bytes"
	"context"
	"fmt"
	"strconv"
	"strings"
	"time"

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

// A largeCopy is a large table on its way into a table beside it at the peer.
type largeCopy struct {
	table          string
	columns, types []string
	texts          string   // the columns' text in a row r, for SELECT
	from           string   // the rows r to be held beside, in the order that they are read in
	rel            string   // the table beside, in schema node
	how            string   // as node.begin_copy has it: swap, buckets, rows
	buckets        int      // into how many it was parted, to see which differ
	needed         *string  // those that do, whose rows rel shall hold, as an array of SQL; nil: it shall hold all rows
	sums           *rowSums // of what was sent; nil: not all of rel was, or nobody asks

	kept    bool   // rel outlives the push, should that break
	upto    int64  // what an earlier push has left is of so many of the first rows, ...
	wrong   string // ... but for some buckets ...
	lacking int64  // ... which are so many rows
	parted  int    // into how many it was parted for that; 0: nothing was left
	sent    int64  // rows that the peer has taken
}

// fillLarge copies tables to the peer, each into one beside it in the transaction that is open. Where that takes long, what is there is
// committed on the way, and the transaction that is open at the end is another one.
func (s *sending) fillLarge(ctx context.Context, tables []string) ([]*largeCopy, error) {
	if len(tables) == 0 {
		return nil, nil
	}
	if _, err := s.tx.Exec(ctx, textSettings); err != nil {
		return nil, err
	}
	var copies []*largeCopy
	for _, t := range tables {
		c := &largeCopy{table: t}
		copies = append(copies, c)
		if err := s.fill(ctx, c, copies); err != nil {
			return nil, fmt.Errorf("table %s: %w", t, err)
		}
	}
	if !s.parts {
		return copies, nil
	}
	for _, c := range copies {
		if err := s.takeKept(ctx, c); err != nil {
			return nil, fmt.Errorf("table %s: %w", c.table, err)
		}
	}
	return copies, nil
}

// fill copies a table to the peer: what an earlier push has not brought there.
func (s *sending) fill(ctx context.Context, c *largeCopy, begun []*largeCopy) error {
	err := s.tx.QueryRow(ctx, `SELECT c, node.types($1, c), f, substr(left(node.text_sql($1), -length(' FROM ' || f)), length('SELECT  '))
		FROM node.columns($1) c, format('config.%I r', $1) f`, c.table).Scan(&c.columns, &c.types, &c.from, &c.texts)
	if err != nil {
		return err
	}
	err = s.peer.conn.QueryRow(ctx, "SELECT coalesce(rel, ''), coalesce(how, ''), coalesce(upto, 0) FROM node.resume($1, $2, $3, $4, $5)",
		s.here.Position.Epoch.N, s.here.ClusterID, c.table, c.columns, c.types).Scan(&c.rel, &c.how, &c.upto)
	if err != nil {
		return err
	}
	if c.kept = c.rel != ""; !c.kept {
		if err := s.beginCopy(ctx, c); err != nil {
			return err
		}
	}
	if c.how == "buckets" && !s.whole {
		if err := s.differing(ctx, c); err != nil {
			return err
		}
	}
	if c.kept {
		if err := s.nextPart(ctx, begun[:len(begun)-1]); err != nil { // it empties the bucket table, too
			return err
		}
		if err := s.resume(ctx, c); err != nil {
			return err
		}
	}
	return s.copyParts(ctx, c, begun)
}

// beginCopy makes the table beside, in the transaction that is open.
func (s *sending) beginCopy(ctx context.Context, c *largeCopy) error {
	err := s.peer.conn.QueryRow(ctx, "SELECT rel, how FROM node.begin_copy($1, $2, $3, $4, $5)", s.here.Position.Epoch.N, s.here.ClusterID,
		c.table, c.columns, c.types).Scan(&c.rel, &c.how)
	if err == nil && c.how == "swap" && c.sums == nil && !c.kept { // else the peer sums, or its triggers do
		c.sums = newRowSums(c.columns)
	}
	return err
}

// copyParts sends the rows of a table. Of what takes long the peer keeps what it has so far, and of all tables begun before.
func (s *sending) copyParts(ctx context.Context, c *largeCopy, begun []*largeCopy) error {
	var see func(row []byte)
	if c.sums != nil {
		see = c.sums.add
	}
	if _, err := s.tx.Exec(ctx, inOneOrder); err != nil {
		return err
	}
	rows := s.open(ctx, c.sql(), see)
	more, err := true, error(nil)
	for err == nil && more {
		more, err = rows.copyPart(ctx, s.peer.conn.PgConn(), intoColumns(c.rel, c.columns), s.partEnd())
		c.sent = rows.taken
		if err == nil && (more || s.parts) {
			err = s.nextPart(ctx, begun)
		}
	}
	return s.close(rows, err)
}

// inOneOrder makes rows come in the order that they lie in, as they did for an earlier push and will for a later one, but for those that
// were changed.
const inOneOrder = "SELECT set_config('synchronize_seqscans', 'off', true), set_config('max_parallel_workers_per_gather', '0', true)"

// sql gives the query for the rows to send: of the first ones those that lack, then the rest.
func (c *largeCopy) sql() string {
	if c.parted == 0 {
		return fmt.Sprintf("SELECT %s FROM %s", c.texts, c.from)
	}
	return fmt.Sprintf("SELECT %[1]s FROM (SELECT r.* FROM %[2]s LIMIT %[3]d) r WHERE %[4]s UNION ALL SELECT %[1]s FROM (SELECT r.* FROM %[2]s OFFSET %[3]d) r",
		c.texts, c.from, c.upto, c.wrong)
}

// reached says of how many of the first rows what the peer has taken is.
func (c *largeCopy) reached() int64 { return c.upto + max(0, c.sent-c.lacking) }

// partTime is how long rows are sent before what the peer has of them is committed there. A break costs as much; less would cost a join over a
// fast link, which has sent all by then.
const partTime = 5 * time.Second

// partEnd is until when rows are sent in the transaction that is open.
func (s *sending) partEnd() time.Time {
	if s.began.IsZero() {
		s.began = time.Now()
	}
	return s.began.Add(s.part)
}

// nextPart commits what the peer has, as tables that stay, and begins the next transaction there. What is under way is the last of those
// begun.
func (s *sending) nextPart(ctx context.Context, begun []*largeCopy) error {
	s.parts = true
	var note string
	for _, c := range begun {
		if c.kept {
			note = fmt.Sprintf("SELECT node.note_kept(%s, %d); ", quote(c.table), c.reached())
			continue
		}
		err := s.peer.conn.QueryRow(ctx, "SELECT node.keep_copy($1, $2, $3, $4)", c.table, c.columns, c.types, c.reached()).Scan(&c.rel)
		if err != nil {
			return fmt.Errorf("keep what is there: %w", err)
		}
		c.kept, note = true, ""
	}
	return s.begin(ctx, note+"COMMIT; ")
}

// takeKept moves what is kept of a table into one of the transaction that is open.
func (s *sending) takeKept(ctx context.Context, c *largeCopy) error {
	if err := s.beginCopy(ctx, c); err != nil {
		return err
	}
	_, err := s.peer.conn.Exec(ctx, "SELECT node.take_kept($1, $2::text::integer[], $3)", c.table, c.needed, c.buckets)
	return err
}

// endCopy has the peer check and index what it holds of a table. What was sent was summed on its way: ErrDrift where that is not what this
// node's triggers have kept, since rows were changed with them off.
func (s *sending) endCopy(ctx context.Context, c *largeCopy) error {
	kept := strings.Fields(s.sums[c.table])
	check := "0" // the SHA-256 of the rows decides
	if c.sums != nil {
		if c.sums.String() != s.sums[c.table] {
			return fmt.Errorf("%w: what its triggers have kept of config.%s is not what its rows are, here", ErrDrift, c.table)
		}
		check = c.sums.check.String()
	}
	_, err := s.peer.conn.Exec(ctx, "SELECT node.end_copy($1, $2, $3, $4, $5, $6, $7, $8, 0)", c.table, c.columns, kept[0], kept[1], kept[2],
		kept[3], kept[4], check)
	return err
}

// bucketRows is how many rows of a table are in one bucket, about, where some are expected to differ, and keptRows where hardly any are.
// maxBuckets is how many buckets there are at most: both sides group by them in memory.
const (
	bucketRows = 16
	keptRows   = 64
	maxBuckets = 1 << 17
)

// bucketsOf gives into how many buckets rows are parted: a power of two.
func bucketsOf(rows, each int64) int {
	buckets := 1
	for ; each < rows && buckets < maxBuckets; each *= 2 {
		buckets *= 2
	}
	return buckets
}

// differing narrows the rows of a table to the buckets that differ from the peer's.
func (s *sending) differing(ctx context.Context, c *largeCopy) error {
	c.buckets = bucketsOf(rowsOf(s.sums[c.table]), bucketRows)
	theirs := make(chan error, 1)
	go func() {
		_, err := s.peer.conn.Exec(ctx, "SELECT node.sum_buckets($1, $2, $3)", c.table, c.columns, c.buckets)
		theirs <- err
	}()
	ours, bucket, err := s.sumBuckets(ctx, c, c.from, c.buckets)
	if theirErr := <-theirs; err == nil {
		err = theirErr
	}
	if err != nil {
		return err
	}
	if err := s.sendBuckets(ctx, ours); err != nil {
		return err
	}
	c.needed = new(string)
	if err := s.peer.conn.QueryRow(ctx, "SELECT node.differing($1, $2)::text", c.table, c.buckets).Scan(c.needed); err != nil {
		return err
	}
	c.from = fmt.Sprintf("%s WHERE %s = ANY (%s::integer[])", c.from, bucket, quote(*c.needed))
	if s.progress == nil {
		return nil
	}
	var n int64
	if err := s.tx.QueryRow(ctx, "SELECT count(*) FROM "+c.from).Scan(&n); err != nil {
		return err
	}
	s.of += n - rowsOf(s.sums[c.table])
	return nil
}

// resume finds out which of the first rows the peer has, as an earlier push has brought them.
func (s *sending) resume(ctx context.Context, c *largeCopy) error {
	if _, err := s.tx.Exec(ctx, inOneOrder); err != nil {
		return err
	}
	c.parted = bucketsOf(c.upto, keptRows)
	ours, bucket, err := s.sumBuckets(ctx, c, fmt.Sprintf("(SELECT r.* FROM %s LIMIT %d) r", c.from, c.upto), c.parted)
	if err != nil {
		return err
	}
	if err := s.sendBuckets(ctx, ours); err != nil {
		return err
	}
	var had int64
	err = s.peer.conn.QueryRow(ctx, "SELECT wrong::text, lacking, had FROM node.compare_kept($1, $2, $3)", c.table, c.columns, c.parted).
		Scan(&c.wrong, &c.lacking, &had)
	if err != nil {
		return err
	}
	c.wrong = fmt.Sprintf("%s = ANY (%s::integer[])", bucket, quote(c.wrong))
	if s.stats.Resumed += had; s.progress != nil && had > 0 {
		s.progress(s.stats.Rows+s.stats.Resumed, s.of)
	}
	return nil
}

// sumBuckets sums rows r of a table here, in buckets, as SQL COPY has it: at most maxBuckets short lines. It gives the expression for a
// row's bucket.
func (s *sending) sumBuckets(ctx context.Context, c *largeCopy, from string, buckets int) (sums *bytes.Buffer, bucket string, err error) {
	var hash string
	err = s.tx.QueryRow(ctx, "SELECT node.bucket_sql($1, $2), node.hash_sql($3, 1)", c.table, buckets, c.columns).Scan(&bucket, &hash)
	if err != nil {
		return nil, "", err
	}
	// As in node.sum_buckets.
	if _, err := s.tx.Exec(ctx, "SELECT set_config('work_mem', '32MB', true), set_config('enable_sort', 'off', true), set_config('jit', 'off', true)"); err != nil {
		return nil, "", err
	}
	sums = &bytes.Buffer{}
	_, err = s.tx.Conn().PgConn().CopyTo(ctx, sums, fmt.Sprintf("COPY (SELECT %s, count(*), sum(%s) FROM %s GROUP BY 1) TO STDOUT", bucket, hash, from))
	return sums, bucket, err
}

func (s *sending) sendBuckets(ctx context.Context, sums *bytes.Buffer) error {
	_, err := s.peer.conn.PgConn().CopyFrom(ctx, sums, "COPY pg_temp.bucket (bucket, n, x) FROM STDIN")
	return err
}

// quote makes a literal of a text.
func quote(text string) string { return "'" + strings.ReplaceAll(text, "'", "''") + "'" }

// intoColumns names a table in node with the columns to fill.
func intoColumns(rel string, columns []string) string {
	quoted := make([]string, len(columns))
	for i, c := range columns {
		quoted[i] = pgx.Identifier{c}.Sanitize()
	}
	return pgx.Identifier{"node", rel}.Sanitize() + " (" + strings.Join(quoted, ", ") + ")"
}
