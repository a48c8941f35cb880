package db_test

import (
	"context"
	"fmt"
	"strings"
	"testing"

	"github.com/jackc/pgx/v5"
	"golang.org/x/sys/unix"
	"pgregory.net/rapid"

	"mailproxy/config"
	"mailproxy/internal/pgtest"
)

// The digest is of the rows alone: their order and their past do not count.
func TestEqualRowsHaveEqualDigests(t *testing.T) {
	rows := func(order ...string) config.Digest {
		dsn := pgtest.New(t)
		n := &node{DB: openDSN(t, dsn), dsn: dsn}
		n.sql(t, "UPDATE node.position SET apply_xid = NULL") // nothing to do with rows
		for _, sql := range order {
			n.sql(t, "BEGIN; UPDATE node.position SET apply_xid = pg_current_xact_id(), apply_at = transaction_timestamp(); "+sql+"; COMMIT")
		}
		return n.state(t).Position.Digest
	}
	a := rows("INSERT INTO config.domain (name) VALUES ('a'), ('b')", "INSERT INTO config.setting VALUES ('s', '1')")
	b := rows("INSERT INTO config.setting VALUES ('s', '2')", "INSERT INTO config.domain (name) VALUES ('b'), ('x')",
		"UPDATE config.domain SET name = 'a' WHERE name = 'x'", "TRUNCATE config.setting", "INSERT INTO config.setting VALUES ('s', '1')",
		"SET LOCAL datestyle = 'German'; SET LOCAL timezone = 'Asia/Tokyo'; INSERT INTO config.cluster VALUES ('x', '2026-01-01')",
		"DELETE FROM config.cluster")
	if a != b {
		t.Errorf("digests %v and %v", a, b)
	}
	if c := rows("INSERT INTO config.domain (name) VALUES ('a'), ('c')", "INSERT INTO config.setting VALUES ('s', '1')"); c == a {
		t.Error("other rows have the same digest")
	}
	// a value that looks like another column is not taken for it
	x := rows(`INSERT INTO config.domain (name, transport) VALUES ('a', 'btransport=c')`)
	y := rows(`INSERT INTO config.domain (name, transport) VALUES ('atransport=b', 'c')`)
	if x == y {
		t.Error("columns run into each other")
	}
}

// Settings of the session that writes do not change what is kept.
func TestDigestsDoNotDependOnTheSession(t *testing.T) {
	dsn := pgtest.New(t)
	n := &node{DB: openDSN(t, dsn), dsn: dsn}
	n.sql(t, `SET datestyle = 'German'; SET timezone = 'Asia/Tokyo'; SET bytea_output = 'escape'; SET search_path = '';
		INSERT INTO config.token VALUES ('\x00ff', '2026-01-01', '2026-07-01'); UPDATE config.token SET used_at = '2026-03-03'`)
	if kept, rows, err := n.Verify(t.Context()); err != nil || kept != rows {
		t.Errorf("kept %v, rows %v, %v", kept, rows, err)
	}
}

// Looking at all rows in the background gives way to mail and to changes, and the pool's connections do not.
func TestWhatNobodyWaitsForGivesWay(t *testing.T) {
	n := &node{DB: openDSN(t, pgtest.New(t))}
	priority := func(read func(context.Context, func(pgx.Tx) error) error) (nice int) {
		t.Helper()
		err := read(t.Context(), func(tx pgx.Tx) error {
			var pid int
			if err := tx.QueryRow(t.Context(), "SELECT pg_backend_pid()").Scan(&pid); err != nil {
				return err
			}
			p, err := unix.Getpriority(unix.PRIO_PROCESS, pid)
			nice = 20 - p // as the system call gives it
			return err
		})
		if err != nil {
			t.Fatal(err)
		}
		return nice
	}
	before := priority(n.Read)
	if aside := priority(n.ReadAside); aside <= before {
		t.Errorf("nice %d, of other connections %d", aside, before)
	}
	if after := priority(n.Read); after != before {
		t.Errorf("the pool's connections are at nice %d, were at %d", after, before)
	}
}

// After any statements the kept digest is that of the rows, and a peer that is pushed to at any time has the same.
func TestKeptDigestsAreThoseOfTheRows(t *testing.T) {
	c := cluster(t, 2)
	push(t, c[0], c[1])
	p := peer(t, c[1], 1)
	conn, err := pgx.Connect(context.Background(), c[0].dsn)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close(context.Background())
	name := rapid.SampledFrom([]string{"a", "b", "c", "d", "e"})
	text := rapid.SampledFrom([]string{"", "x", "\u00fc \n\\", "NULL"})
	statement := rapid.Custom(func(r *rapid.T) string {
		v, w, s := name.Draw(r, "v"), name.Draw(r, "w"), text.Draw(r, "s")
		return rapid.SampledFrom([]string{
			fmt.Sprintf("INSERT INTO config.domain (name, comment) VALUES ('%s', '%s') ON CONFLICT (name) DO UPDATE SET comment = excluded.comment", v, s),
			fmt.Sprintf("INSERT INTO config.domain (name) SELECT x FROM unnest(ARRAY['%s', '%s', 'f']) x ON CONFLICT DO NOTHING", v, w),
			fmt.Sprintf("UPDATE config.domain SET hosts = ARRAY['%s', NULL]", s),
			fmt.Sprintf("UPDATE config.domain SET name = name || '%s' WHERE name = '%s'", w, v),
			fmt.Sprintf("DELETE FROM config.domain WHERE name > '%s'", v),
			"TRUNCATE config.domain",
			"TRUNCATE config.domain, config.setting",
			fmt.Sprintf("WITH x AS (DELETE FROM config.domain WHERE name = '%s' RETURNING *) INSERT INTO config.setting SELECT name, comment FROM x "+
				"ON CONFLICT (name) DO UPDATE SET value = '%s'", v, s),
			fmt.Sprintf("INSERT INTO config.secret VALUES ('%s', '\\x%02x') ON CONFLICT (name) DO UPDATE SET value = excluded.value", v, len(s)),
			fmt.Sprintf("MERGE INTO config.setting s USING (VALUES ('%s'), ('%s')) n(x) ON s.name = n.x || '1' WHEN MATCHED THEN DELETE "+
				"WHEN NOT MATCHED THEN INSERT VALUES (x || '1', '%s')", v, v+w, s),
		}).Draw(r, "statement")
	})
	rapid.Check(t, func(r *rapid.T) {
		batch := rapid.SliceOfN(statement, 1, 4).Draw(r, "batch")
		end := rapid.SampledFrom([]string{"COMMIT", "COMMIT", "ROLLBACK"}).Draw(r, "end")
		if _, err := conn.Exec(context.Background(), "BEGIN; "+strings.Join(batch, "; ")+"; "+end); err != nil {
			if code(err) != "23505" { // a key that is there already
				r.Fatal(err)
			}
			if _, err := conn.Exec(context.Background(), "ROLLBACK"); err != nil {
				r.Fatal(err)
			}
		}
		if kept, rows, err := c[0].Verify(context.Background()); err != nil || kept != rows {
			r.Fatalf("kept %v, rows %v, %v", kept, rows, err)
		}
		if !rapid.Bool().Draw(r, "push") {
			return
		}
		s, err := c[0].Push(context.Background(), p, nil)
		if err != nil || s.Full {
			r.Fatalf("push %+v, %v", s, err)
		}
		if kept, rows, err := c[1].Verify(context.Background()); err != nil || kept != rows || kept != s.To.Digest {
			r.Fatalf("at the peer: kept %v, rows %v, %v", kept, rows, err)
		}
	})
}

// what a snapshot says of its position is what the node says
func TestLoadAndStateAgree(t *testing.T) {
	d := open(t)
	p := put(t, d, "a.test")
	s, err := d.Load(t.Context())
	if err != nil || s.Position != p {
		t.Errorf("loaded at %v, committed %v, %v", s.Position, p, err)
	}
}
