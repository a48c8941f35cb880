package db_test

import (
	"context"
	"errors"
	"net"
	"strconv"
	"strings"
	"sync"
	"testing"
	"testing/fstest"
	"time"

	"github.com/jackc/pgx/v5"

	"mailproxy/config"
	"mailproxy/db"
	"mailproxy/internal/pgtest"
)

func itoa(n int64) string { return strconv.FormatInt(n, 10) }

// as opens a raw session as a peer has it, through Backend.
func as(t testing.TB, to *node, from config.CID) *pgx.Conn {
	t.Helper()
	c, err := tryAs(t, to, from)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close(context.Background()) })
	return c
}

func tryAs(t testing.TB, to *node, from config.CID) (*pgx.Conn, error) {
	t.Helper()
	conf, err := pgx.ParseConfig("host=peer user=postgres dbname=postgres sslmode=disable")
	if err != nil {
		t.Fatal(err)
	}
	dial := dialer(t, to.DB, from)
	conf.LookupFunc = func(_ context.Context, h string) ([]string, error) { return []string{h}, nil }
	conf.DialFunc = func(ctx context.Context, _, _ string) (net.Conn, error) { return dial(ctx) }
	return pgx.ConnectConfig(context.Background(), conf)
}

func TestWhatPeersMayNotDo(t *testing.T) {
	c := cluster(t, 3)
	commit(t, c[0].DB, func(ctx context.Context, tx *db.Tx) error { return tx.PutSecret(ctx, "s", []byte("x")) })
	push(t, c[0], c[1])
	refused := map[string]string{
		"SELECT * FROM config.secret":                          "42501",
		"SELECT * FROM config.secret_key":                      "42501",
		"SELECT * FROM config.domain":                          "42501",
		"SELECT * FROM node.position":                          "42501",
		"SELECT * FROM node.journal":                           "42501",
		"UPDATE config.domain SET comment = 'x'":               "42501",
		"INSERT INTO config.domain VALUES ('x')":               "42501",
		"DELETE FROM config.revoked":                           "42501",
		"TRUNCATE config.domain":                               "42501",
		"UPDATE node.position SET promised_n = 0":              "42501",
		"SET ROLE postgres":                                    "42501",
		"SET SESSION AUTHORIZATION postgres":                   "42501",
		"CREATE TEMP TABLE x (a int)":                          "42501",
		"CREATE TABLE public.x (a int)":                        "42501",
		"CREATE SCHEMA x":                                      "42501",
		"COPY (SELECT 1) TO PROGRAM 'cat'":                     "42501",
		"COPY (SELECT 1) TO '/tmp/x'":                          "42501",
		"SELECT lo_create(0)":                                  "42501",
		"SELECT lo_from_bytea(0, '')":                          "42501",
		"SELECT pg_advisory_lock(1)":                           "42501",
		"SELECT pg_try_advisory_xact_lock(1)":                  "42501",
		"SELECT pg_logical_emit_message(false, '', 'x')":       "42501",
		"SELECT pg_read_file('/etc/passwd')":                   "42501",
		"DO $$ BEGIN END $$":                                   "42501",
		"SELECT node.promise_self(9, 9)":                       "42501",
		"SELECT node.set_promise(NULL, 9, 9)":                  "42501",
		"SELECT node.begin_apply()":                            "42501",
		"SELECT node.recount()":                                "42501",
		"SELECT node.enter('x', 9, 9, 9)":                      "42501",
		"SELECT node.apply_staged(9, 9, 9, '', '{}', 9, 9)":    "42501",
		"SELECT node.ensure_role('push', 9)":                   "42501",
		"ALTER ROLE CURRENT_USER SUPERUSER":                    "42501",
		"CREATE ROLE x":                                        "42501",
		"SET session_replication_role = replica":               "42501",
		"SELECT node.role('push', 1); SELECT node.caller('x')": "42501",
	}
	peerOnly := map[string]string{
		"SELECT node.push(1, '', 9, '', '{}')": "42501",
		"SELECT node.begin_push(1, '')":        "42501",
	}
	peer, push := as(t, c[1], 3), as(t, c[1], 1)
	for _, who := range []*pgx.Conn{peer, push} {
		for sql, want := range refused {
			if _, err := who.Exec(t.Context(), sql); code(err) != want {
				t.Errorf("%s: %v", sql, err)
			}
		}
	}
	for sql, want := range peerOnly {
		if _, err := peer.Exec(t.Context(), sql); code(err) != want {
			t.Errorf("%s: %v", sql, err)
		}
	}
	// with a staging table it has no more rights there than to fill it
	if _, err := push.Exec(t.Context(), "SELECT node.begin_push(1, '"+clusterID+"')"); err != nil {
		t.Error(err)
	}
	for _, sql := range []string{"CREATE TEMP TABLE x (a int)", "CREATE TABLE pg_temp.x (a int)", "SELECT * FROM pg_temp.staging", "DROP TABLE pg_temp.staging",
		"CREATE FUNCTION pg_temp.x() RETURNS int LANGUAGE sql AS 'SELECT 1'", "CREATE RULE x AS ON INSERT TO pg_temp.staging DO NOTHING"} {
		if _, err := push.Exec(t.Context(), sql); code(err) != "42501" {
			t.Errorf("%s: %v", sql, err)
		}
	}
	for who, want := range map[*pgx.Conn]string{peer: "peer_3_", push: "push_1_"} {
		var user string
		if err := who.QueryRow(t.Context(), "SELECT session_user").Scan(&user); err != nil || !strings.HasPrefix(user, want) {
			t.Errorf("logged in as %q, %v", user, err)
		}
	}
	// what they may
	for _, who := range []*pgx.Conn{peer, push} {
		for _, sql := range []string{"SELECT * FROM node.position()", "SELECT count(*) FROM node.export_config(1, 1, " +
			itoa(c[1].state(t).Position.Serial) + ")", "SELECT node.heartbeat(1, 1, 1, '')"} {
			if _, err := who.Exec(t.Context(), sql); err != nil {
				t.Errorf("%s: %v", sql, err)
			}
		}
	}
}

// The push role is not enough: who has it must own the highest promised epoch at that moment.
func TestAPushSessionIsWorthNothingAfterAHigherPromise(t *testing.T) {
	c := cluster(t, 3)
	push(t, c[0], c[1])
	s := as(t, c[1], 1)
	if _, err := c[1].Promise(t.Context(), config.Epoch{N: 2, Owner: 3}); err != nil {
		t.Fatal(err)
	}
	for _, sql := range []string{"SELECT node.begin_push(1, '" + clusterID + "')", "SELECT node.push(1, '" + clusterID + "', 9, '', '{}')"} {
		if _, err := s.Exec(t.Context(), sql); code(err) != "MP002" {
			t.Errorf("%s: %v", sql, err)
		}
	}
	if _, err := s.Exec(t.Context(), "SELECT node.push(3, '"+clusterID+"', 9, '', '{}')"); code(err) != "MP003" {
		t.Errorf("an epoch that nobody promised: %v", err)
	}
}

func TestADeletedNodeGetsNoSession(t *testing.T) {
	c := cluster(t, 3)
	push(t, c[0], c[1])
	p := peer(t, c[1], 3)
	if _, err := p.State(t.Context()); err != nil {
		t.Fatal(err)
	}
	commit(t, c[0].DB, func(ctx context.Context, tx *db.Tx) error { return tx.Revoke(ctx, 3) })
	push(t, c[0], c[1])
	if _, err := p.State(t.Context()); !errors.Is(err, db.ErrNotMember) {
		t.Errorf("its open session: %v", err)
	}
	if err := c[1].EnsurePeerRoles(t.Context()); err != nil {
		t.Fatal(err)
	}
	if _, err := p.State(t.Context()); err == nil {
		t.Error("its session is still there")
	}
	if _, _, err := c[1].Backend(t.Context(), 3); !errors.Is(err, db.ErrNotMember) {
		t.Errorf("a new session: %v", err)
	}
	if n := one[int64](t, c[1].dsn, "SELECT count(*) FROM pg_roles WHERE rolname IN (node.role('peer', 3), node.role('push', 3))"); n != 0 {
		t.Errorf("%d roles left", n)
	}
	for _, cid := range []config.CID{0, -1, 4} {
		if _, _, err := c[1].Backend(t.Context(), cid); !errors.Is(err, db.ErrNotMember) {
			t.Errorf("CID %d: %v", cid, err)
		}
	}
}

// A peer can take the time limit off its own session; the node ends what runs too long.
func TestLongStatementsOfPeersAreEnded(t *testing.T) {
	c := cluster(t, 3)
	push(t, c[0], c[1])
	s := as(t, c[1], 3)
	var limit string
	if err := s.QueryRow(t.Context(), "SHOW statement_timeout").Scan(&limit); err != nil || limit != "1min" {
		t.Errorf("limit %q, %v", limit, err)
	}
	if _, err := s.Exec(t.Context(), "SET statement_timeout = 0"); err != nil {
		t.Fatal(err)
	}
	ended := make(chan error, 1)
	go func() {
		_, err := s.Exec(context.Background(), "SELECT pg_sleep(600)")
		ended <- err
	}()
	deadline := time.Now().Add(30 * time.Second)
	for one[int64](t, c[1].dsn, "SELECT node.end_long('0.05 s')") == 0 {
		if time.Now().After(deadline) {
			t.Fatal("nothing was found to end")
		}
	}
	if err := <-ended; err == nil {
		t.Error("the statement came to its end")
	}
}

// Anyone who may log in may NOTIFY, and commits do as well: wake-ups must not keep the limit from being looked at.
func TestLongStatementsAreEndedUnderAFloodOfWakeUps(t *testing.T) {
	c := cluster(t, 3)
	push(t, c[0], c[1])
	ctx, cancel := context.WithCancel(t.Context())
	var all sync.WaitGroup
	defer all.Wait()
	defer cancel()
	all.Go(func() { _ = c[1].ListenOnce(ctx, func() {}, 200*time.Millisecond, 50*time.Millisecond) })
	noisy, err := pgx.Connect(ctx, c[1].dsn)
	if err != nil {
		t.Fatal(err)
	}
	all.Go(func() {
		defer noisy.Close(context.Background())
		for ctx.Err() == nil {
			_, _ = noisy.Exec(ctx, "NOTIFY mailproxy")
		}
	})
	bounded, stop := context.WithTimeout(ctx, 30*time.Second)
	defer stop()
	if _, err := as(t, c[1], 3).Exec(bounded, "SELECT pg_sleep(600)"); err == nil || bounded.Err() != nil {
		t.Errorf("it ran on: %v", err)
	}
}

// A push that was left in the middle holds the lock that commits and promises wait for.
func TestAPushThatIsLeftOpenIsEnded(t *testing.T) {
	c := cluster(t, 2)
	push(t, c[0], c[1])
	s := as(t, c[1], 1)
	for _, sql := range []string{"SET idle_in_transaction_session_timeout = 0", "BEGIN", "SELECT node.promise(1)"} {
		if _, err := s.Exec(t.Context(), sql); err != nil {
			t.Fatal(err)
		}
	}
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	for one[int64](t, c[1].dsn, "SELECT node.end_long('0.05 s')") == 0 {
		if ctx.Err() != nil {
			t.Fatal("nothing was found to end")
		}
	}
	if _, err := c[1].Promise(ctx, config.Epoch{N: 2, Owner: 2}); err != nil {
		t.Errorf("a promise after that: %v", err)
	}
}

// All peers come at once when a node starts, and each makes its role.
func TestFirstSessionsOfManyPeersAtOnce(t *testing.T) {
	c := cluster(t, 1)
	commit(t, c[0].DB, func(ctx context.Context, tx *db.Tx) error {
		var err error
		for cid := config.CID(2); cid < 10; cid++ {
			err = errors.Join(err, tx.PutNode(ctx, member(cid)))
		}
		return err
	})
	as(t, c[0], 9) // the database is a copy, and is hardened now
	var all sync.WaitGroup
	for cid := config.CID(2); cid < 9; cid++ {
		for range 2 {
			all.Go(func() {
				conn, _, err := c[0].Backend(context.Background(), cid)
				if err != nil {
					t.Errorf("CID %d: %v", cid, err)
					return
				}
				_ = conn.Close()
			})
		}
	}
	all.Go(func() {
		if err := c[0].EnsurePeerRoles(context.Background()); err != nil {
			t.Error(err)
		}
	})
	all.Wait()
}

func TestOneRoleHasFewConnections(t *testing.T) {
	c := cluster(t, 3)
	push(t, c[0], c[1])
	for i := range 9 {
		conn, _, err := c[1].Backend(t.Context(), 3)
		if err == nil {
			defer conn.Close()
		}
		if (err == nil) != (i < 8) {
			t.Errorf("connection %d: %v", i+1, err)
		}
	}
}

// One migration file is all that a new table needs.
func TestATableAddedByAMigration(t *testing.T) {
	c := cluster(t, 2)
	put(t, c[0].DB, "a.test")
	push(t, c[0], c[1])
	before := c[0].state(t).Position
	file := fstest.MapFS{"00900_extra.sql": {Data: []byte(`-- +goose Up
CREATE TABLE config.extra (a int, b text, c timestamptz, d numeric, e jsonb, f bytea, "order" bool, PRIMARY KEY (b, a));`)}}
	for _, n := range c {
		if err := n.Migrate(t.Context(), file); err != nil {
			t.Fatal(err)
		}
		if err := n.Migrate(t.Context(), file); err != nil {
			t.Fatalf("again: %v", err)
		}
	}
	if after := c[0].state(t).Position; after != before {
		t.Errorf("an empty table changed the position: %v %v", before, after)
	}
	c[0].sql(t, `INSERT INTO config.extra SELECT i, 'x', now(), i / 7.0, '{"k": [1, null]}', '\x00ff', true FROM generate_series(1, 10) i`)
	if s := push(t, c[0], c[1]); s.Full || s.Rows != 21 {
		t.Errorf("delta %+v", s)
	}
	same(t, c[0], c[1])
	c[0].sql(t, `UPDATE config.extra SET d = NULL, a = a + 100 WHERE a > 5`, `DELETE FROM config.extra WHERE a = 1`)
	if s := push(t, c[0], c[1]); s.Full {
		t.Errorf("delta %+v", s)
	}
	same(t, c[0], c[1])
	if n := one[int64](t, c[1].dsn, "SELECT count(*) FROM config.extra"); n != 9 {
		t.Errorf("%d rows", n)
	}
	h, err := c[1].History(t.Context(), 1)
	if err != nil || h[0].Changes[0].Table != "extra" {
		t.Errorf("history %+v, %v", h, err)
	}
	if err := c[1].trySQL("DELETE FROM config.extra"); code(err) != "MP001" {
		t.Errorf("guard: %v", err)
	}
	c[1].sql(t, "ALTER TABLE config.extra DISABLE TRIGGER ALL", "DELETE FROM config.extra WHERE a = 2", "ALTER TABLE config.extra ENABLE TRIGGER ALL")
	if kept, rows, err := c[1].Verify(t.Context()); err != nil || kept == rows {
		t.Errorf("verify %v %v %v", kept, rows, err)
	}
	if s := push(t, c[0], c[1]); !s.Full || len(s.Tables) != 1 {
		t.Errorf("repair %+v", s)
	}
	same(t, c[0], c[1])
}

func TestAPeerWithAnOlderSchemaIsNotPushedTo(t *testing.T) {
	c := cluster(t, 2)
	push(t, c[0], c[1])
	newer := fstest.MapFS{"00900_x.sql": {Data: []byte("-- +goose Up\nALTER TABLE config.domain ADD COLUMN extra text;")}}
	if err := c[0].Migrate(t.Context(), newer); err != nil {
		t.Fatal(err)
	}
	push(t, c[0], c[1]) // nothing to do: it is heard, and is in sync
	before := c[1].state(t)
	put(t, c[0].DB, "b.test")
	for name, f := range map[string]func(context.Context, *db.Peer, db.Progress) (db.PushStats, error){"push": c[0].Push, "full push": c[0].PushFull} {
		if _, err := f(t.Context(), peer(t, c[1], 1), nil); !errors.Is(err, db.ErrNewer) || !strings.Contains(err.Error(), ", 900 here") {
			t.Errorf("%s: %v", name, err)
		}
	}
	if after := c[1].state(t); after.Position != before.Position {
		t.Errorf("changed from %+v to %+v", before, after)
	}
	if err := c[1].Migrate(t.Context(), newer); err != nil {
		t.Fatal(err)
	}
	push(t, c[0], c[1])
	same(t, c[0], c[1])
}

func TestMigrateTwiceAtOnce(t *testing.T) {
	dsn := pgtest.NewEmpty(t)
	errs := make(chan error, 3)
	for range cap(errs) {
		d := openDSN(t, dsn)
		go func() { errs <- d.Migrate(context.Background()) }()
	}
	for range cap(errs) {
		if err := <-errs; err != nil {
			t.Error(err)
		}
	}
	put(t, openDSN(t, dsn), "a.test")
}
