package db_test

import (
	"context"
	"errors"
	"net"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"

	"mailproxy/config"
	"mailproxy/db"
)

// bridled is a cluster of n with 40,000 domains on the master, whose large tables are committed at a slave as they come.
func bridled(t testing.TB, n int) []*node {
	t.Helper()
	c := cluster(t, n)
	c[0].sql(t, "INSERT INTO config.domain (name, comment) SELECT 'd' || i || '.test', md5(i::text) FROM generate_series(1, 40000) i")
	for _, x := range c {
		x.SetPart(time.Millisecond)
	}
	return c
}

// A breakingConn ends after so many octets were written.
type breakingConn struct {
	net.Conn
	left int
}

var errBroke = errors.New("the link broke")

func (c *breakingConn) Write(b []byte) (int, error) {
	if len(b) < c.left {
		c.left -= len(b)
		return c.Conn.Write(b)
	}
	n, _ := c.Conn.Write(b[:c.left])
	c.left = 0
	c.Conn.Close()
	return n, errBroke
}

// pushOver pushes once over a link that breaks after so many octets. It has ended at the receiver too.
func pushOver(t testing.TB, from, to *node, octets int, progress db.Progress) (db.PushStats, error) {
	t.Helper()
	dial := dialer(t, to.DB, from.cid)
	p, err := db.OpenPeer(t.Context(), func(ctx context.Context) (net.Conn, error) {
		conn, err := dial(ctx)
		return &breakingConn{conn, octets}, err
	})
	if err != nil {
		t.Fatal(err)
	}
	s, err := from.Push(t.Context(), p, progress)
	p.Close()
	return s, err
}

// kept gives how many rows a node keeps of a push that broke.
func kept(t testing.TB, n *node) (rows int) {
	t.Helper()
	for _, rel := range strings.Fields(one[string](t, n.dsn, "SELECT coalesce(string_agg(rel, ' '), '') FROM node.kept")) {
		rows += one[int](t, n.dsn, "SELECT count(*) FROM node."+rel)
	}
	return rows
}

// broken pushes over a link that breaks, so that something is kept.
func broken(t testing.TB, from, to *node, octets int) {
	t.Helper()
	if s, err := pushOver(t, from, to, octets, nil); err == nil {
		t.Fatalf("the push did not break: %+v", s)
	}
	if kept(t, to) == 0 {
		t.Fatal("nothing is kept")
	}
}

// As many octets go as there are, not as often as the link breaks.
func TestAPushThatBreaksGoesOnWhereItWas(t *testing.T) {
	c := bridled(t, 3)
	for _, x := range c[2:] {
		x.SetPart(time.Hour)
	}
	all := push(t, c[0], c[2]).Bytes
	before, digest := c[1].state(t).Position, c[1].state(t).Position.Digest
	limit := int(all / 4)
	var sent, resumed int64
	var breaks int
	for {
		var told []int64
		s, err := pushOver(t, c[0], c[1], limit, func(rows, of int64) {
			if rows > of {
				t.Errorf("%d of %d rows", rows, of)
			}
			told = append(told, rows)
		})
		sent += s.Bytes
		if s.Resumed > 0 && told[0] == 0 && told[1] < s.Resumed {
			t.Errorf("progress %v, and %d rows were there", told[:2], s.Resumed)
		}
		if s.Resumed < resumed {
			t.Errorf("%d rows were there, and %d before", s.Resumed, resumed)
		}
		resumed = s.Resumed
		if err == nil {
			break
		}
		if breaks++; breaks > 20 {
			t.Fatalf("%d octets, and no end: %v", sent, err)
		}
		if st := c[1].state(t); st.Position != before || st.Position.Digest != digest {
			t.Fatalf("the slave is at %v %v", st.Position, st.Position.Digest)
		}
		if n := one[int](t, c[1].dsn, "SELECT count(*) FROM pg_class WHERE relname ~ '^(kept|in)_[0-9]+' AND relkind = 'r'"); n > 2 {
			t.Errorf("%d tables beside", n)
		}
	}
	t.Logf("%d octets at once; with %d breaks %d, %d rows resumed", all, breaks, sent, resumed)
	if breaks < 3 || sent > all*3/2 {
		t.Errorf("%d octets went with %d breaks, %d go at once", sent, breaks, all)
	}
	same(t, c[0], c[1])
	tidy(t, c[1])
}

func TestAPushGoesOnAfterWhatHappenedSinceItBroke(t *testing.T) {
	const alter, attach = "ALTER TABLE config.domain ADD COLUMN later integer", "SELECT node.attach()"
	for name, tt := range map[string]struct {
		do      func(t *testing.T, c []*node)
		resumes bool
	}{
		"nothing": {func(*testing.T, []*node) {}, true},
		"rows were changed, deleted and added": {func(t *testing.T, c []*node) {
			c[0].sql(t, "UPDATE config.domain SET comment = 'since' WHERE name LIKE 'd7__.test'", "DELETE FROM config.domain WHERE name LIKE 'd8__.test'",
				"INSERT INTO config.domain (name) SELECT 'since' || i || '.test' FROM generate_series(1, 1000) i")
		}, true},
		"all rows were changed": {func(t *testing.T, c []*node) { c[0].sql(t, "UPDATE config.domain SET comment = 'since'") }, true}, // of config.change
		"a column was added": {func(t *testing.T, c []*node) {
			for _, n := range c {
				n.sql(t, alter, attach)
			}
			c[0].sql(t, "UPDATE config.domain SET later = 7 WHERE name = 'd7.test'")
		}, true},
		"a column was added at the slave": {func(t *testing.T, c []*node) { c[1].sql(t, alter+" DEFAULT 7", attach) }, true},
		"a column is of another type at the slave": {func(t *testing.T, c []*node) {
			c[1].sql(t, "ALTER TABLE config.domain ALTER comment TYPE varchar(100)", "ALTER TABLE config.change ALTER op TYPE varchar(10)", attach)
		}, false},
		"what is kept was changed by hand": {func(t *testing.T, c []*node) {
			c[1].sql(t, `DO $$ DECLARE r text; BEGIN FOR r IN SELECT rel FROM node.kept LOOP
				EXECUTE format('INSERT INTO node.%1$I SELECT * FROM node.%1$I LIMIT 5', r);
				EXECUTE format('DELETE FROM node.%1$I WHERE ctid = ANY (ARRAY(SELECT ctid FROM node.%1$I LIMIT 7 OFFSET 20))', r); END LOOP; END $$`)
		}, true},
		"another master reigns": {func(t *testing.T, c []*node) {
			push(t, c[0], c[2])
			e := config.Epoch{N: 2, Owner: 3}
			if _, err := c[1].Promise(t.Context(), e); err != nil {
				t.Fatal(err)
			}
			promote(t, c[2], e)
			c[0], c[2] = c[2], c[0]
		}, true},
	} {
		t.Run(name, func(t *testing.T) {
			c := bridled(t, 3)
			broken(t, c[0], c[1], 5<<20)
			tt.do(t, c)
			if s := push(t, c[0], c[1]); s.Resumed > 0 != tt.resumes {
				t.Errorf("%d rows were there still", s.Resumed)
			}
			same(t, c[0], c[1])
			tidy(t, c[1])
		})
	}
}

func TestAMergeThatBreaksGoesOnWhereItWas(t *testing.T) {
	c := bridled(t, 2)
	push(t, c[0], c[1])
	c[1].byHand(t, "UPDATE config.domain SET comment = comment || name || repeat('by hand ', 20) WHERE name < 'd3'",
		"INSERT INTO config.domain (name) VALUES ('mine.test')", "DELETE FROM config.domain WHERE name = 'd4.test'")
	was := oid(t, c[1], "domain")
	p := peer(t, c[1], 1)
	_, err := c[0].Push(t.Context(), p, nil)
	if err != nil {
		t.Fatal(err)
	}
	same(t, c[0], c[1])
	all := int64(0)
	c[1].byHand(t, "UPDATE config.domain SET comment = 'by hand' WHERE name < 'd3'", "INSERT INTO config.domain (name) VALUES ('mine.test')",
		"DELETE FROM config.domain WHERE name = 'd4.test'")
	for {
		s, err := pushOver(t, c[0], c[1], 700<<10, nil)
		all += s.Bytes
		if err == nil {
			if s.Resumed == 0 {
				t.Error("it began again")
			}
			break
		}
		if one[bool](t, c[1].dsn, "SELECT EXISTS (SELECT FROM pg_class c JOIN node.kept k ON c.relname = k.rel WHERE relpersistence <> 'p')") {
			t.Error("what is kept is not durable")
		}
		if got := loadDomain(t, c[1].DB, "d1.test").Comment; got != "by hand" {
			t.Fatalf("a row is another by now: %q", got)
		}
		if all > 10<<20 {
			t.Fatalf("%d octets, and no end: %v", all, err)
		}
	}
	same(t, c[0], c[1])
	tidy(t, c[1])
	if oid(t, c[1], "domain") != was {
		t.Error("a table that had rows was replaced")
	}
	j, err := c[1].Journal(t.Context())
	if err != nil || len(j) != 2 || len(j[1].Changes) != len(j[0].Changes) {
		t.Errorf("journal: %d, %v", len(j), err)
	}
}

// What is kept was committed before a snapshot that sees nothing of the table in config, and still does not.
func TestASnapshotSeesNothingOfASwapOfWhatWasKept(t *testing.T) {
	c := bridled(t, 2)
	broken(t, c[0], c[1], 5<<20)
	was := oid(t, c[1], "change")
	reader := hold(t, c[1], pgx.RepeatableRead, "SELECT FROM node.position")
	if s := push(t, c[0], c[1]); s.Resumed == 0 || oid(t, c[1], "change") == was {
		t.Errorf("no swap of what was kept: %+v", s)
	}
	if n := count(t, reader, "change"); n != 0 {
		t.Errorf("a snapshot from before the push sees %d changes", n)
	}
}

// What is kept is on disk, as the slave's PostgreSQL is run in earnest.
func TestAPushGoesOnAfterTheSlavesPostgreSQLWasKilled(t *testing.T) {
	t.Parallel()
	dir := place(t)
	r := run(t, instanceOptions(dir))
	slave := &node{dsn: r.wait(t), cid: 2}
	slave.DB = openAs(t, slave.dsn, nodeKey(2))
	if err := slave.Migrate(t.Context()); err != nil {
		t.Fatal(err)
	}
	c := append(bridled(t, 1), slave)
	commit(t, c[0].DB, func(ctx context.Context, tx *db.Tx) error { return tx.PutNode(ctx, member(2)) })
	slave.enter(t, config.Epoch{N: 1, Owner: 1})
	var had int64
	for range 2 {
		p := peer(t, slave, 1)
		killed := false
		s, err := c[0].Push(t.Context(), p, func(rows, _ int64) {
			if rows > had+12_000 && !killed {
				killed = true
				if err := syscall.Kill(postmasterPID(t, dir), syscall.SIGKILL); err != nil {
					t.Error(err)
				}
			}
		})
		if err == nil || s.Resumed < had {
			t.Fatalf("push: %+v, %v", s, err)
		}
		r.wait(t)
		eventually(t, func() bool {
			conn, err := tryAs(t, slave, 1)
			if err == nil {
				conn.Close(t.Context())
			}
			return err == nil
		})
		if n := one[int](t, slave.dsn, "SELECT count(*) FROM config.domain"); n != 0 {
			t.Errorf("%d domains", n)
		}
		if had = int64(kept(t, slave)); had == 0 {
			t.Error("nothing is kept")
		}
	}
	if s := push(t, c[0], slave); s.Resumed != had {
		t.Errorf("%d of %d rows were there still", s.Resumed, had)
	}
	same(t, c[0], slave)
	tidy(t, slave)
}

// Drift of the master is found before anything is committed at the slave, also where it came after most rows.
func TestWhatIsKeptIsForgottenWhereTheMasterHasDrifted(t *testing.T) {
	c := bridled(t, 2)
	broken(t, c[0], c[1], 5<<20)
	c[0].sql(t, "SET session_replication_role = replica", "UPDATE config.domain SET comment = 'by hand' WHERE name LIKE 'd7%'")
	p := peer(t, c[1], 1)
	if _, err := c[0].Push(t.Context(), p, nil); !errors.Is(err, db.ErrDrift) {
		t.Errorf("push: %v", err)
	}
	if n := kept(t, c[1]); n != 0 || len(names(t, c[1].DB)) != 0 {
		t.Errorf("%d rows are kept", n)
	}
	tidy(t, c[1])
	if _, _, err := c[0].Verify(t.Context()); err != nil {
		t.Fatal(err)
	}
	push(t, c[0], c[1])
	same(t, c[0], c[1])
}

func TestWhatIsKeptGoesWithTheCluster(t *testing.T) {
	for name, do := range map[string]func(t *testing.T, c []*node) error{
		"left": func(t *testing.T, c []*node) error {
			return c[1].Leave(t.Context(), db.LeaveParams{ClusterID: clusterID, NextKey: publicOf(nodeKey(9)), Author: author})
		},
		"a promote": func(t *testing.T, c []*node) error {
			promote(t, c[1], config.Epoch{N: 2, Owner: 2})
			return nil
		},
		"a push of a few rows": func(t *testing.T, c []*node) error {
			c[0].sql(t, "DELETE FROM config.domain", "SET session_replication_role = replica; DELETE FROM config.change; DELETE FROM config.history",
				"SELECT node.recount()", "UPDATE node.position SET applied_digest = NULL")
			push(t, c[0], c[1])
			return nil
		},
	} {
		t.Run(name, func(t *testing.T) {
			c := bridled(t, 2)
			before := c[1].state(t).Position.Digest
			broken(t, c[0], c[1], 5<<20)
			if _, rows, err := c[1].Verify(t.Context()); err != nil || rows != before {
				t.Errorf("digest %v, want %v, %v", rows, before, err)
			}
			if err := do(t, c); err != nil {
				t.Fatal(err)
			}
			if n := one[int](t, c[1].dsn, "SELECT count(*) FROM node.kept"); n != 0 {
				t.Errorf("%d tables are kept", n)
			}
			tidy(t, c[1])
		})
	}
}

func TestWhatAPusherMayNotDoWithWhatIsKept(t *testing.T) {
	c := bridled(t, 2)
	broken(t, c[0], c[1], 5<<20)
	rel := one[string](t, c[1].dsn, "SELECT rel FROM node.kept LIMIT 1")
	for sql, want := range map[string]string{
		"SELECT * FROM node.kept":                                          "42501",
		"SELECT * FROM node." + rel:                                        "42501",
		"DELETE FROM node." + rel:                                          "42501",
		"SELECT node.drop_kept(NULL)":                                      "42501",
		"SELECT node.hold_kept()":                                          "42501",
		"SELECT node.resume(1, 'x', 'domain', '{}', '{}')":                 "MP008",
		"SELECT node.resume(2, '" + clusterID + "', 'domain', '{}', '{}')": "MP003",
		"SELECT node.forget_kept(1, 'x')":                                  "MP008",
		"SELECT node.begin_push(1, '" + clusterID + "'), node.keep_copy('domain', '{}', '{}', 0)": "P0002",
	} {
		conn := as(t, c[1], 1)
		if _, err := conn.Exec(t.Context(), sql); code(err) != want {
			t.Errorf("%s: %v, want %s", sql, err, want)
		}
		conn.Close(t.Context())
	}
	if kept(t, c[1]) == 0 {
		t.Error("nothing is kept any more")
	}
}

func TestTwoPushesDoNotFillOneTable(t *testing.T) {
	c := bridled(t, 2)
	broken(t, c[0], c[1], 5<<20)
	other := as(t, c[1], 1)
	asked := one[string](t, c[1].dsn, "SELECT format('SELECT node.resume(1, %L, %L, %L, %L)', $1::text, tab, cols, types) FROM node.kept LIMIT 1", clusterID)
	if _, err := other.Exec(t.Context(), asked); err != nil {
		t.Fatal(err)
	}
	const holders = `SELECT count(DISTINCT pid) FROM pg_locks l JOIN pg_database d ON d.oid = l.database
		WHERE locktype = 'advisory' AND datname = current_database()`
	held := one[int](t, c[1].dsn, holders) == 1
	p := peer(t, c[1], 1)
	if _, err := c[0].Push(t.Context(), p, nil); !held || !errors.Is(err, db.ErrBusy) {
		t.Errorf("a second push: %v", err)
	}
	other.Close(t.Context())
	if _, err := c[0].Push(t.Context(), p, nil); err != nil {
		t.Fatal(err)
	}
	same(t, c[0], c[1])
	if n := one[int](t, c[1].dsn, holders); n != 0 {
		t.Error("who has pushed is in the way still")
	}
}

// A commit of many rows to a slave that is in sync goes on after a break, too.
func TestAPushOfALargeCommitGoesOnWhereItWas(t *testing.T) {
	c := cluster(t, 2)
	push(t, c[0], c[1])
	for _, x := range c {
		x.SetPart(time.Millisecond)
	}
	c[0].sql(t, "INSERT INTO config.domain (name, comment) SELECT 'd' || i || '.test', md5(i::text) FROM generate_series(1, 40000) i")
	broken(t, c[0], c[1], 3<<20)
	had := kept(t, c[1])
	s := push(t, c[0], c[1])
	if s.Resumed == 0 || s.Journalled != 0 || c[1].state(t).Position != c[0].state(t).Position {
		t.Errorf("%d rows were kept, and then %+v", had, s)
	}
	// Of a large table a few rows are sent by what history says.
	c[0].sql(t, "UPDATE config.domain SET comment = 'x' WHERE name LIKE 'd1%'")
	if s := push(t, c[0], c[1]); !s.Full {
		t.Errorf("a quarter of a table: %+v", s)
	}
	c[0].sql(t, "UPDATE config.domain SET comment = 'y' WHERE name LIKE 'd11%'")
	if s := push(t, c[0], c[1]); s.Full || c[1].state(t).Position != c[0].state(t).Position {
		t.Errorf("a part of a table: %+v", s)
	}
}
