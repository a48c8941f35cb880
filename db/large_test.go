package db_test

import (
	"context"
	"errors"
	"fmt"
	"net"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"

	"mailproxy/db"
)

// largeCluster is a cluster of two whose every table is a large one, with n domains on the master.
func largeCluster(t testing.TB, n int) []*node {
	t.Helper()
	c := cluster(t, 2)
	c[0].SetLarge(1)
	c[0].sql(t, fmt.Sprintf("INSERT INTO config.domain (name, comment) SELECT 'd' || i || '.test', md5(i::text) FROM generate_series(1, %d) i", n))
	return c
}

// oddTable has a column of each kind, and all that a table of config may have around it.
const oddTable = `CREATE TABLE config.odd (
		id    bigint,
		kind  text COLLATE "C",
		price numeric(12, 4) NOT NULL DEFAULT 1.5,
		free  numeric,
		at    timestamptz,
		day   date,
		raw   bytea,
		tags  text[] NOT NULL DEFAULT '{}',
		nums  integer[],
		doc   jsonb,
		ok    boolean CHECK (ok IS NOT false OK_OR),
		f     double precision,
		span  interval,
		net   inet,
		fixed character(5),
		"Quo""ted, col" text,
		PRIMARY KEY (kind, id)
	);
	CREATE INDEX "odd ON config.odd USING" ON config.odd (lower(kind), price DESC) WHERE id > 0;
	CREATE INDEX ON config.odd USING gin (tags);
	COMMENT ON TABLE config.odd IS 'cluster: it''s odd';
	COMMENT ON COLUMN config.odd.raw IS 'secret: nobody''s';
	COMMENT ON INDEX config."odd ON config.odd USING" IS 'an index';
	COMMENT ON CONSTRAINT odd_pkey ON config.odd IS 'the key';
	ALTER TABLE config.odd ALTER doc SET STORAGE EXTERNAL;
	GRANT SELECT, UPDATE ON config.odd TO mailproxy_peer;
	GRANT SELECT ON config.odd TO PUBLIC;
	SELECT node.attach();
	COMMENT ON TRIGGER a_guard ON config.odd IS 'the guard'`

// makeOdd makes the table at all nodes, as a migration would, and fills it at the first.
func makeOdd(t testing.TB, c []*node) {
	t.Helper()
	for _, n := range c {
		n.sql(t, strings.ReplaceAll(oddTable, "OK_OR", "OR id = 7"))
	}
	c[0].sql(t, `INSERT INTO config.odd VALUES
		(1, E'tab\there\nline \\ back ''quote'' "double" \u00fc\U0001f4e7 \\N', 1.1, 1.10, '2024-02-29 23:59:59.123456+01', '0044-03-15 BC',
			'\x00015c0a09ff', ARRAY['', 'NULL', NULL, 'a,b', '{}', E'\t\\"', E'\n'], '{{1,NULL},{3,4}}', '{"a": [1, 1.10, null], "b": "\\ \u0001"}', true,
			0.1, '1 year -2 days 03:04:05.6', '10.0.0.0/8', 'ab', E'\\.'),
		(2, '', 0, 'NaN', 'infinity', NULL, '', '{}', '{}', 'null', NULL, '-Infinity', NULL, '::1', '', ''),
		(3, '\N', 99999999.9999, 1e40, '-infinity', 'infinity', NULL, '{}', NULL, '""', NULL, 1e-300, '00:00', NULL, NULL, NULL),
		(7, E'\b\f\n\r\t\v\x01NULL', -1, 100, 'epoch', 'epoch', '\x', '{{a},{b}}', NULL, '[]', false, 'NaN', '-1 mon', '1.2.3.4', 'abcde', E'\r\n')`)
}

// catalog describes a table of config with all that hangs on it, but for its OIDs.
func catalog(t testing.TB, n *node, table string) string {
	t.Helper()
	return one[string](t, n.dsn, `SELECT jsonb_pretty(jsonb_build_object(
		'columns', (SELECT jsonb_agg(jsonb_build_array(a.attname, a.attnum, format_type(a.atttypid, a.atttypmod), a.attnotnull, a.attstorage, a.attcollation::regcollation,
				pg_get_expr(d.adbin, d.adrelid), col_description(a.attrelid, a.attnum), a.attacl) ORDER BY a.attnum)
			FROM pg_attribute a LEFT JOIN pg_attrdef d ON (d.adrelid, d.adnum) = (a.attrelid, a.attnum) WHERE a.attrelid = c.oid AND a.attnum > 0),
		'indexes', (SELECT jsonb_agg(jsonb_build_array(pg_get_indexdef(i.indexrelid), i.indisprimary, i.indisvalid, i.indisready,
				obj_description(i.indexrelid, 'pg_class')) ORDER BY i.indexrelid::regclass::text) FROM pg_index i WHERE i.indrelid = c.oid),
		'constraints', (SELECT jsonb_agg(jsonb_build_array(o.conname, pg_get_constraintdef(o.oid), obj_description(o.oid, 'pg_constraint')) ORDER BY o.conname)
			FROM pg_constraint o WHERE o.conrelid = c.oid),
		'triggers', (SELECT jsonb_agg(jsonb_build_array(pg_get_triggerdef(g.oid), g.tgenabled, obj_description(g.oid, 'pg_trigger')) ORDER BY g.tgname)
			FROM pg_trigger g WHERE g.tgrelid = c.oid),
		'acl', (SELECT jsonb_agg(x::text ORDER BY x::text) FROM aclexplode(c.relacl) x),
		'table', jsonb_build_array(c.relowner::regrole, c.relkind, c.relpersistence, c.reloptions, obj_description(c.oid, 'pg_class'), t.typname, c.relchecks)))
		FROM pg_class c JOIN pg_type t ON t.oid = c.reltype WHERE c.oid = format('config.%I', $1::text)::regclass`, table)
}

// lineDiff gives the lines that only one of two texts has.
func lineDiff(before, now string) string {
	var all []string
	for line := range strings.SplitSeq(before, "\n") {
		if !strings.Contains(now, line) {
			all = append(all, "- "+line)
		}
	}
	for line := range strings.SplitSeq(now, "\n") {
		if !strings.Contains(before, line) {
			all = append(all, "+ "+line)
		}
	}
	return strings.Join(all, "\n")
}

// oid tells one table of config from another in its place.
func oid(t testing.TB, n *node, table string) uint32 {
	t.Helper()
	return one[uint32](t, n.dsn, "SELECT format('config.%I', $1::text)::regclass::oid", table)
}

// tidy wants nothing left of pushes at a node.
func tidy(t testing.TB, n *node) {
	t.Helper()
	if left := one[string](t, n.dsn, `SELECT coalesce(string_agg(relname, ' '), '') FROM pg_class
		WHERE relnamespace IN ('node'::regnamespace, 'config'::regnamespace) AND relname ~ '^(in|kept)_[0-9]+'`); left != "" {
		t.Errorf("node %d: left over: %s", n.cid, left)
	}
}

func TestALargeTableTakesThePlaceOfAnEmptyOneWithAllThatHangsOnIt(t *testing.T) {
	c := largeCluster(t, 100)
	makeOdd(t, c)
	tables := []string{"odd", "domain", "secret"}
	before := map[string]string{}
	for _, table := range tables {
		before[table] = catalog(t, c[1], table)
	}
	was := oid(t, c[1], "odd")
	if s := push(t, c[0], c[1]); !s.Full || s.Journalled != 0 {
		t.Errorf("push: %+v", s)
	}
	same(t, c[0], c[1])
	tidy(t, c[1])
	if oid(t, c[1], "odd") == was {
		t.Error("the table is still the old one: its rows were inserted")
	}
	for _, table := range tables {
		if now := catalog(t, c[1], table); now != before[table] {
			t.Errorf("config.%s is another table now:\n%s", table, lineDiff(before[table], now))
		}
	}
	const rows = "SELECT string_agg(o::text, E'\n' ORDER BY id) FROM config.odd o"
	if a, b := one[string](t, c[0].dsn, rows), one[string](t, c[1].dsn, rows); a != b {
		t.Errorf("rows\n%s\nand\n%s", a, b)
	}
	if err := c[1].trySQL("DELETE FROM config.odd"); code(errors.Unwrap(err)) != "MP001" {
		t.Errorf("the guard of the new table: %v", err)
	}
	c[0].sql(t, "UPDATE config.odd SET free = 1.100 WHERE id = 1", "DELETE FROM config.odd WHERE id = 2")
	if s := push(t, c[0], c[1]); s.Full {
		t.Errorf("delta: %+v", s)
	}
	same(t, c[0], c[1])
}

func TestRowsOfALargeTableThatDifferAreMerged(t *testing.T) {
	c := largeCluster(t, 2000)
	makeOdd(t, c)
	push(t, c[0], c[1])
	was := oid(t, c[1], "odd")
	c[1].byHand(t, "UPDATE config.odd SET free = 1.100, raw = NULL WHERE id = 1", "DELETE FROM config.odd WHERE id = 2",
		"UPDATE config.odd SET kind = 'moved' WHERE id = 3", "UPDATE config.domain SET comment = 'by hand' WHERE name = 'd77.test'",
		"DELETE FROM config.domain WHERE name = 'd78.test'", "INSERT INTO config.domain (name) VALUES ('mine.test')")
	s := push(t, c[0], c[1])
	if !s.Full || !slices.Equal(s.Tables, []string{"domain", "odd"}) || s.Journalled != 1 {
		t.Errorf("repair: %+v", s)
	}
	if s.Rows > 200 {
		t.Errorf("%d rows were sent to repair six", s.Rows)
	}
	same(t, c[0], c[1])
	tidy(t, c[1])
	if oid(t, c[1], "odd") != was {
		t.Error("a table that had rows was replaced")
	}
	j, err := c[1].Journal(t.Context())
	if err != nil || len(j) != 1 || len(j[0].Changes) != 7 {
		t.Errorf("journal: %+v, %v", j, err)
	}
	p := peer(t, c[1], 1)
	if s, err := c[0].PushFull(t.Context(), p, nil); err != nil || s.Rows < 4000 { // domains, and the changes that made them
		t.Errorf("all of it: %+v, %v", s, err)
	}
	same(t, c[0], c[1])
}

// Here nobody has looked: the kept sums say that all is well.
func TestRowsThatWereChangedUnseenAreRepairedByAFullPush(t *testing.T) {
	c := largeCluster(t, 100)
	push(t, c[0], c[1])
	c[1].sql(t, "SET session_replication_role = replica", "UPDATE config.domain SET comment = 'by hand' WHERE name = 'd7.test'")
	p := peer(t, c[1], 1)
	if _, err := c[0].PushFull(t.Context(), p, nil); err != nil {
		t.Fatal(err)
	}
	same(t, c[0], c[1])
	if got := loadDomain(t, c[1].DB, "d7.test").Comment; got == "by hand" {
		t.Error("the row is as it was")
	}
}

func TestDriftOfTheMasterIsFoundBeforeAnythingIsCommittedAtTheSlave(t *testing.T) {
	c := largeCluster(t, 100)
	c[0].sql(t, "SET session_replication_role = replica", "UPDATE config.domain SET comment = 'by hand' WHERE name = 'd7.test'")
	p := peer(t, c[1], 1)
	before := c[1].state(t).Position
	_, err := c[0].Push(t.Context(), p, nil)
	if !errors.Is(err, db.ErrDrift) || !strings.Contains(err.Error(), "config.domain") {
		t.Errorf("push: %v", err)
	}
	if got := c[1].state(t).Position; got != before {
		t.Errorf("moved from %v to %v", before, got)
	}
	tidy(t, c[1])
	if got := names(t, c[1].DB); len(got) != 0 {
		t.Errorf("domains %v", got)
	}
	if _, _, err := c[0].Verify(t.Context()); err != nil { // the truth from then on
		t.Fatal(err)
	}
	push(t, c[0], c[1])
	same(t, c[0], c[1])
}

// What a slave's newer schema has more stays NULL, whatever its default, and a row of it that is not is found.
func TestALargeTableWhoseSchemaIsNewerAtTheSlave(t *testing.T) {
	c := largeCluster(t, 100)
	c[1].sql(t, "ALTER TABLE config.domain ADD COLUMN later text DEFAULT 'by default', ADD COLUMN a_first integer", "SELECT node.attach()")
	before, was := catalog(t, c[1], "domain"), oid(t, c[1], "domain")
	push(t, c[0], c[1])
	same(t, c[0], c[1])
	if now := catalog(t, c[1], "domain"); now != before || oid(t, c[1], "domain") == was {
		t.Errorf("config.domain is another table now, or the same:\n%s", lineDiff(before, now))
	}
	c[1].byHand(t, "UPDATE config.domain SET later = 'by hand' WHERE name = 'd7.test'")
	if s := push(t, c[0], c[1]); !s.Full {
		t.Errorf("repair: %+v", s)
	}
	same(t, c[0], c[1])
	if n := one[int](t, c[1].dsn, "SELECT count(*) FROM config.domain WHERE later IS NOT NULL OR a_first IS NOT NULL"); n != 0 {
		t.Errorf("%d rows have what the master does not know", n)
	}
}

// A table is merged into where a swap would lose something of it.
func TestWhatASwapWouldLoseIsMerged(t *testing.T) {
	for name, sql := range map[string]string{
		"a view of it":                "CREATE VIEW public.v AS SELECT name FROM config.domain",
		"a function of its rows":      "CREATE FUNCTION public.f(config.domain) RETURNS text LANGUAGE sql AS 'SELECT $1.name'",
		"a right to a column":         "GRANT SELECT (name) ON config.domain TO mailproxy_peer",
		"a storage parameter":         "ALTER TABLE config.domain SET (fillfactor = 70)",
		"a column of another type":    "ALTER TABLE config.domain ALTER comment TYPE varchar(100)",
		"a trigger that is off":       "CREATE TRIGGER x BEFORE INSERT ON config.domain EXECUTE FUNCTION node.other_cluster(); ALTER TABLE config.domain DISABLE TRIGGER x",
		"a rule":                      "CREATE RULE x AS ON DELETE TO config.domain DO ALSO NOTIFY x",
		"a policy":                    "ALTER TABLE config.domain ENABLE ROW LEVEL SECURITY",
		"a second unique index":       "CREATE UNIQUE INDEX ON config.domain (lower(name))",
		"a table that inherits of it": "CREATE TABLE public.x () INHERITS (config.domain)",
	} {
		t.Run(name, func(t *testing.T) {
			c := largeCluster(t, 10)
			c[1].sql(t, sql)
			before, was := catalog(t, c[1], "domain"), oid(t, c[1], "domain")
			push(t, c[0], c[1])
			same(t, c[0], c[1])
			if now := catalog(t, c[1], "domain"); now != before || oid(t, c[1], "domain") != was {
				t.Errorf("config.domain is another table now, or the same:\n%s", lineDiff(before, now))
			}
		})
	}
}

// hold opens a transaction at a node and leaves it so.
func hold(t testing.TB, n *node, level pgx.TxIsoLevel, sql string) pgx.Tx {
	t.Helper()
	conn, err := pgx.Connect(context.Background(), n.dsn)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close(context.Background()) })
	tx, err := conn.BeginTx(context.Background(), pgx.TxOptions{IsoLevel: level})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := tx.Exec(context.Background(), sql); err != nil {
		t.Fatal(err)
	}
	return tx
}

// count reads in a transaction that hold has opened.
func count(t testing.TB, tx pgx.Tx, table string) (n int) {
	t.Helper()
	if err := tx.QueryRow(context.Background(), "SELECT count(*) FROM config."+table).Scan(&n); err != nil {
		t.Fatal(err)
	}
	return n
}

// startPush pushes in the background.
func startPush(t testing.TB, from, to *node) <-chan error {
	t.Helper()
	p := peer(t, to, from.cid)
	done := make(chan error, 1)
	go func() {
		_, err := from.Push(context.Background(), p, nil)
		done <- err
	}()
	return done
}

// eventually waits until a condition holds.
func eventually(t testing.TB, holds func() bool) {
	t.Helper()
	for deadline := time.Now().Add(time.Minute); !holds(); {
		if time.Now().After(deadline) {
			t.Fatal("it did not come to that within a minute")
		}
	}
}

// impatient reads tables of a push at a node, and fails where it has to wait for one that is held.
const impatient = `SET lock_timeout = '1s'; SELECT (SELECT count(*) FROM config.domain), (SELECT count(*) FROM config.change),
	(SELECT count(*) FROM config.history), (SELECT count(*) FROM config.node)`

// All that takes long is done before a reader could notice: the push is held at its last step.
func TestReadersDoNotWaitForAPushThatIsUnderWay(t *testing.T) {
	c := largeCluster(t, 1000)
	position := hold(t, c[1], pgx.ReadCommitted, "SELECT FROM node.position FOR UPDATE")
	done := startPush(t, c[0], c[1])
	eventually(t, func() bool {
		return one[bool](t, c[1].dsn, `SELECT EXISTS (SELECT FROM pg_stat_activity WHERE datname = current_database()
			AND usename ~ '^push_' AND query ~ 'node.push' AND wait_event_type = 'Lock')`)
	})
	if err := c[1].trySQL(impatient); err != nil {
		t.Errorf("a reader beside a push: %v", err)
	}
	if err := position.Rollback(t.Context()); err != nil {
		t.Fatal(err)
	}
	if err := <-done; err != nil {
		t.Fatal(err)
	}
	same(t, c[0], c[1])
}

// A push that cannot have a table for itself does not queue for it, where later readers would stand behind it: it merges.
func TestReadersDoNotWaitBehindAPushThatWaitsForAReader(t *testing.T) {
	c := largeCluster(t, 100)
	was := oid(t, c[1], "domain")
	reader := hold(t, c[1], pgx.ReadCommitted, "SELECT FROM config.domain")
	done := startPush(t, c[0], c[1])
	for waiting := true; waiting; {
		select {
		case err := <-done:
			if err != nil {
				t.Fatal(err)
			}
			waiting = false
		default:
			if err := c[1].trySQL(impatient); err != nil {
				t.Fatalf("a reader beside a reader: %v", err)
			}
		}
	}
	if err := reader.Rollback(t.Context()); err != nil {
		t.Fatal(err)
	}
	same(t, c[0], c[1])
	tidy(t, c[1])
	if oid(t, c[1], "domain") != was {
		t.Error("the table was replaced under a reader")
	}
}

// Whoever reads by one snapshot sees the node as it was then, over the swap: nothing, or what it had.
func TestASnapshotSeesNothingOfASwap(t *testing.T) {
	c := largeCluster(t, 100)
	reader := hold(t, c[1], pgx.RepeatableRead, "SELECT FROM node.position")
	was := oid(t, c[1], "domain")
	push(t, c[0], c[1])
	if oid(t, c[1], "domain") == was {
		t.Error("no swap")
	}
	if d, n := count(t, reader, "domain"), count(t, reader, "node"); d != 0 || n != 0 {
		t.Errorf("a snapshot from before the push sees %d domains, %d nodes", d, n)
	}
	if err := reader.Rollback(t.Context()); err != nil {
		t.Fatal(err)
	}
	reader = hold(t, c[1], pgx.RepeatableRead, "SELECT FROM node.position")
	c[1].sql(t, "ALTER TABLE config.domain DISABLE TRIGGER a_guard", "ALTER TABLE config.domain DISABLE TRIGGER c_record_delete",
		"DELETE FROM config.domain", "ALTER TABLE config.domain ENABLE TRIGGER ALL")
	was = oid(t, c[1], "domain")
	push(t, c[0], c[1])
	same(t, c[0], c[1])
	if oid(t, c[1], "domain") != was {
		t.Error("a swap under a snapshot that saw rows")
	}
	if d := count(t, reader, "domain"); d != 100 {
		t.Errorf("a snapshot from before the rows were deleted sees %d domains", d)
	}
}

// The sender is gone in the middle of the rows, as by kill -9.
func TestAPushThatIsCutLeavesTheSlaveAsItWas(t *testing.T) {
	c := largeCluster(t, 20_000)
	before, was := c[1].state(t).Position, oid(t, c[1], "domain")
	dial := dialer(t, c[1].DB, 1)
	var conn net.Conn
	p, err := db.OpenPeer(t.Context(), func(ctx context.Context) (net.Conn, error) {
		var err error
		conn, err = dial(ctx)
		return conn, err
	})
	if err != nil {
		t.Fatal(err)
	}
	defer p.Close()
	s, err := c[0].Push(t.Context(), p, func(rows, _ int64) {
		if rows > 10_000 {
			conn.Close()
		}
	})
	if err == nil || s.Rows == 0 {
		t.Fatalf("push: %+v, %v", s, err)
	}
	eventually(t, func() bool {
		return !one[bool](t, c[1].dsn, "SELECT EXISTS (SELECT FROM pg_stat_activity WHERE datname = current_database() AND usename ~ '^push_')")
	})
	if got := c[1].state(t).Position; got != before || oid(t, c[1], "domain") != was {
		t.Errorf("moved from %v to %v", before, got)
	}
	if n := one[int](t, c[1].dsn, "SELECT count(*) FROM config.domain"); n != 0 {
		t.Errorf("%d domains", n)
	}
	tidy(t, c[1])
	push(t, c[0], c[1])
	same(t, c[0], c[1])
}

// The receiver does not take the sender's word for what lies there. Another version's hashes decide nothing: the SHA-256 of the rows does.
func TestWhatWasCopiedIsCheckedAgainstWhatWasSent(t *testing.T) {
	c := largeCluster(t, 1)
	sums := strings.Fields(one[string](t, c[0].dsn, "SELECT node.sums()->>'domain'"))
	for name, tt := range map[string]struct{ sha, want string }{
		"the same rows, hashed by another version": {sums[1], ""},
		"other rows": {"1", "MP004"},
	} {
		t.Run(name, func(t *testing.T) {
			conn := as(t, c[1], 1)
			rel := beginCopy(t, conn)
			_, err := conn.PgConn().CopyFrom(t.Context(), strings.NewReader("c4ca4238a0b923820dcc509a6f75849b\t{}\td1.test\t\n"), "COPY "+rel+" FROM STDIN")
			if err != nil {
				t.Fatal(err)
			}
			_, err = conn.Exec(t.Context(), "SELECT node.end_copy('domain', '{comment,hosts,name,transport}', 1, $1, $2, $3, $4, 0, 0)",
				tt.sha, sums[2], sums[3], sums[4])
			if err == nil && tt.want != "" || err != nil && code(err) != tt.want {
				t.Errorf("%v, want %q", err, tt.want)
			}
			if err == nil { // what was checked stays so
				_, err := conn.PgConn().CopyFrom(t.Context(), strings.NewReader("\t{}\td2.test\t\n"), "COPY "+rel+" FROM STDIN")
				if code(err) != "42501" {
					t.Errorf("rows after the check: %v", err)
				}
			}
		})
	}
}

// beginCopy begins to copy domains, in a transaction, and gives the table with its columns.
func beginCopy(t testing.TB, conn *pgx.Conn) string {
	t.Helper()
	if _, err := conn.Exec(context.Background(), "BEGIN"); err != nil {
		t.Fatal(err)
	}
	var rel, how string
	err := conn.QueryRow(context.Background(), `SELECT rel, how FROM node.begin_copy(1, $1, 'domain', '{comment,hosts,name,transport}',
		'{text,text[],text,text}')`, clusterID).Scan(&rel, &how)
	if err != nil || how != "swap" {
		t.Fatalf("%q, %v", how, err)
	}
	return "node." + rel + " (comment, hosts, name, transport)"
}

// What the sender sums of the text on its way is what PostgreSQL sums of the rows, so that neither a push is refused nor the slow way taken.
func TestRowsAreSummedOnTheirWayAsPostgreSQLSumsThem(t *testing.T) {
	c := cluster(t, 1)
	makeOdd(t, c)
	conn, err := pgx.Connect(t.Context(), c[0].dsn)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close(t.Context())
	var columns []string
	var sql, check string
	err = conn.QueryRow(t.Context(), "SELECT c, node.text_sql('odd'), node.check_sql(c, 'config.odd') FROM node.columns('odd') c").Scan(&columns, &sql, &check)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := conn.Exec(t.Context(), "SET timezone = 'UTC'; SET bytea_output = hex"); err != nil {
		t.Fatal(err)
	}
	var out strings.Builder
	if _, err := conn.PgConn().CopyTo(t.Context(), &out, "COPY ("+sql+") TO STDOUT"); err != nil {
		t.Fatal(err)
	}
	sums, got := db.SumRows(columns, slices.Collect(strings.Lines(out.String()))...)
	if want := one[string](t, c[0].dsn, "SELECT node.sums()->>'odd'"); sums != want {
		t.Errorf("sums %s, want %s", sums, want)
	}
	var n int
	var want string
	if err := conn.QueryRow(t.Context(), check).Scan(&n, &want); err != nil {
		t.Fatal(err)
	}
	if n != 4 || got != want {
		t.Errorf("check %v, want %d %v", got, n, want)
	}
	for n := range 40 {
		text := "abcdefghijklmnopqrstuvwxyz0123456789ABCDEF"[:n]
		for _, seed := range []int64{0, 1, -1, 1 << 40} {
			var want int64
			if err := conn.QueryRow(t.Context(), "SELECT hashtextextended($1, $2)", text, seed).Scan(&want); err != nil {
				t.Fatal(err)
			}
			if got := db.Hash64([]byte(text), uint64(seed)); got != uint64(want) {
				t.Errorf("hash of %q by %d: %d, want %d", text, seed, int64(got), want)
			}
		}
	}
}

func TestWhatAPusherMayNotDoWithTheTablesOfItsPush(t *testing.T) {
	c := largeCluster(t, 1)
	for sql, want := range map[string]string{
		"SELECT * FROM pg_temp.beside":          "42501",
		"UPDATE pg_temp.beside SET swap = true": "42501",
		"SELECT * FROM pg_temp.bucket":          "42501",
		"SELECT * FROM REL":                     "42501",
		"UPDATE REL SET name = ''":              "42501",
		"DROP TABLE REL":                        "42501",
		"CREATE TRIGGER x BEFORE INSERT ON REL EXECUTE FUNCTION node.guard()": "42501",
		"SELECT node.swap_in()":                                                                     "42501",
		"SELECT node.swap('domain', 'x')":                                                           "42501",
		"SELECT node.merge_beside('domain', 'x', 'true')":                                           "42501",
		"SELECT node.begin_copy(1, 'x', 'domain', '{}', '{}')":                                      "MP008",
		"SELECT node.begin_copy(1, '" + clusterID + "', 'nothing', '{}', '{}')":                     "MP006",
		"SELECT node.begin_copy(1, '" + clusterID + "', 'domain', '{name,nothing}', '{text,text}')": "MP006",
	} {
		conn := as(t, c[1], 1)
		rel, _, _ := strings.Cut(beginCopy(t, conn), " ")
		if _, err := conn.Exec(t.Context(), strings.ReplaceAll(sql, "REL", rel)); code(err) != want {
			t.Errorf("%s: %v, want %s", sql, err, want)
		}
		conn.Close(t.Context())
	}
}
