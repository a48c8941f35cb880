package db_test

import (
	"context"
	"errors"
	"fmt"
	"net"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"

	"mailproxy/config"
	"mailproxy/db"
)

func TestPushFillsAJoinedNodeAndThenSendsOnlyWhatChanged(t *testing.T) {
	c := cluster(t, 2)
	put(t, c[0].DB, "a.test", "b.test")
	first := push(t, c[0], c[1])
	if !first.Full || first.To != c[0].state(t).Position || len(first.Tables) == 0 {
		t.Errorf("first push: %+v", first)
	}
	same(t, c[0], c[1])
	if s := push(t, c[0], c[1]); !s.InSync() || s.Rows != 0 {
		t.Errorf("nothing to do, yet %+v", s)
	}
	commit(t, c[0].DB, func(ctx context.Context, tx *db.Tx) error {
		if err := tx.DeleteDomain(ctx, "a.test"); err != nil {
			return err
		}
		return tx.PutDomain(ctx, config.Domain{Name: "b.test", Comment: "changed"})
	})
	put(t, c[0].DB, "c.test")
	s := push(t, c[0], c[1])
	// two commits: two rows of history, three of change, and the three domains
	if s.Full || s.Rows != 8 {
		t.Errorf("delta: %+v", s)
	}
	same(t, c[0], c[1])
	if got := names(t, c[1].DB); !slices.Equal(got, []string{"b.test", "c.test"}) {
		t.Errorf("domains %v", got)
	}
	if c[1].state(t).PushedAt.IsZero() {
		t.Error("the slave does not know when it was pushed to")
	}
}

// turns counts how often a conn is read from after it was written to: round trips.
type turns struct {
	net.Conn
	wrote atomic.Bool
	n     atomic.Int64
}

func (c *turns) Write(b []byte) (int, error) {
	c.wrote.Store(true)
	return c.Conn.Write(b)
}

func (c *turns) Read(b []byte) (int, error) {
	if c.wrote.Swap(false) {
		c.n.Add(1)
	}
	return c.Conn.Read(b)
}

// Over a far link a change is as late as it takes round trips.
func TestAChangeIsPushedInTwoRoundTrips(t *testing.T) {
	c := cluster(t, 2)
	put(t, c[0].DB, "a.test")
	push(t, c[0], c[1])
	var far *turns
	dial := dialer(t, c[1].DB, c[0].cid)
	p, err := db.OpenPeer(t.Context(), func(ctx context.Context) (net.Conn, error) {
		conn, err := dial(ctx)
		far = &turns{Conn: conn}
		return far, err
	})
	if err != nil {
		t.Fatal(err)
	}
	defer p.Close()
	for i := range 2 { // at first the statements are prepared
		put(t, c[0].DB, fmt.Sprintf("b%d.test", i), fmt.Sprintf("c%d.test", i))
		far.n.Store(0)
		if s, err := c[0].Push(t.Context(), p, nil); err != nil || s.Full || s.InSync() {
			t.Fatalf("push: %+v, %v", s, err)
		}
	}
	if got := far.n.Load(); got != 2 {
		t.Errorf("%d round trips, want 2: the peer's state, and the rows", got)
	}
	same(t, c[0], c[1])
}

// Many rows are not held in memory, and a change that is refused is undone as a whole.
func TestPushOfManyChanges(t *testing.T) {
	c := cluster(t, 2)
	put(t, c[0].DB, "a.test")
	push(t, c[0], c[1])
	for _, n := range []int{199, 201, 1000} {
		commit(t, c[0].DB, func(ctx context.Context, tx *db.Tx) error {
			for i := range n {
				if err := tx.PutDomain(ctx, config.Domain{Name: fmt.Sprintf("d%d-%d.test", n, i)}); err != nil {
					return err
				}
			}
			return nil
		})
		if s := push(t, c[0], c[1]); s.Full || s.Rows != int64(2*n+1) {
			t.Errorf("%d changes: %+v", n, s)
		}
		same(t, c[0], c[1])
	}
	big := strings.Repeat("x", 1<<16)
	commit(t, c[0].DB, func(ctx context.Context, tx *db.Tx) error {
		return tx.PutDomain(ctx, config.Domain{Name: "big.test", Comment: big})
	})
	push(t, c[0], c[1])
	same(t, c[0], c[1])
}

func TestPushRepairsDrift(t *testing.T) {
	c := cluster(t, 2)
	put(t, c[0].DB, "a.test", "b.test")
	push(t, c[0], c[1])
	c[1].sql(t, "ALTER TABLE config.domain DISABLE TRIGGER ALL", "UPDATE config.domain SET comment = 'by hand' WHERE name = 'a.test'",
		"ALTER TABLE config.domain ENABLE TRIGGER ALL")
	kept, rows, err := c[1].Verify(t.Context())
	if err != nil || kept == rows {
		t.Fatalf("verify: kept %v, rows %v, %v", kept, rows, err)
	}
	if c[1].state(t).Position.Digest != rows {
		t.Error("the kept digest was not set right")
	}
	if got := loadDomain(t, c[1].DB, "a.test").Comment; got != "by hand" {
		t.Errorf("loaded %q: a change without a commit was missed", got)
	}
	s := push(t, c[0], c[1])
	if !s.Full || !slices.Equal(s.Tables, []string{"domain"}) {
		t.Errorf("repair: %+v", s)
	}
	same(t, c[0], c[1])
	if got := loadDomain(t, c[1].DB, "a.test").Comment; got != "" {
		t.Errorf("loaded %q after the repair", got)
	}
}

// A delta that leads to another digest is undone, and whole tables follow in the same call.
func TestPushOfADriftedNodeThatIsBehind(t *testing.T) {
	c := cluster(t, 2)
	put(t, c[0].DB, "a.test", "b.test")
	push(t, c[0], c[1])
	c[1].sql(t, "ALTER TABLE config.domain DISABLE TRIGGER a_guard", "ALTER TABLE config.domain DISABLE TRIGGER c_record_delete",
		"DELETE FROM config.domain WHERE name = 'a.test'", "ALTER TABLE config.domain ENABLE TRIGGER ALL")
	names(t, c[1].DB)
	put(t, c[0].DB, "c.test")
	s := push(t, c[0], c[1])
	if !s.Full || !slices.Contains(s.Tables, "domain") || slices.Contains(s.Tables, "node") {
		t.Errorf("repair: %+v", s)
	}
	same(t, c[0], c[1])
	if got := names(t, c[1].DB); !slices.Equal(got, []string{"a.test", "b.test", "c.test"}) {
		t.Errorf("domains %v", got)
	}
}

func TestPushCarriesEveryKindOfValue(t *testing.T) {
	c := cluster(t, 2)
	odd := "tab\there, line\nbreak, back\\slash, quote ' \" and \u00fc\u2603\U0001f4e7, \\N"
	commit(t, c[0].DB, func(ctx context.Context, tx *db.Tx) error {
		for _, d := range []config.Domain{
			{Name: "a.test", Comment: odd, Hosts: []string{odd, "", "NULL", "{}", `a,"b"`}},
			{Name: "b.test"},
		} {
			if err := tx.PutDomain(ctx, d); err != nil {
				return err
			}
		}
		return errors.Join(tx.PutSecret(ctx, "dkim", []byte{0, 1, 2, 255, '\n'}), tx.PutSetting(ctx, config.Setting{Name: "x", Value: odd}))
	})
	push(t, c[0], c[1])
	same(t, c[0], c[1])
	a, err := c[0].Load(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	b, err := c[1].Load(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if x, y := fmt.Sprintf("%+v", *a), fmt.Sprintf("%+v", *b); x != y {
		t.Errorf("loaded\n%s\nand\n%s", x, y)
	}
	if v, err := c[1].Secret(t.Context(), "dkim"); err != nil || string(v) != "\x00\x01\x02\xff\n" {
		t.Errorf("secret %q, %v", v, err)
	}
}

func TestSecretsAreInNoHistory(t *testing.T) {
	c := cluster(t, 2)
	commit(t, c[0].DB, func(ctx context.Context, tx *db.Tx) error { return tx.PutSecret(ctx, "dkim", []byte("hunter2")) })
	push(t, c[0], c[1])
	commit(t, c[0].DB, func(ctx context.Context, tx *db.Tx) error { return tx.PutSecret(ctx, "dkim", []byte("hunter3")) })
	if s := push(t, c[0], c[1]); s.Full || s.InSync() {
		t.Errorf("a new secret was not sent as a delta: %+v", s)
	}
	same(t, c[0], c[1])
	if v, err := c[1].Secret(t.Context(), "dkim"); err != nil || string(v) != "hunter3" {
		t.Errorf("secret %q, %v", v, err)
	}
	h, err := c[1].History(t.Context(), 10)
	if err != nil {
		t.Fatal(err)
	}
	if len(h[0].Changes) != 1 || h[0].Changes[0].Op != "update" || h[0].Changes[0].Table != "secret" {
		t.Errorf("history %+v", h[0])
	}
	all := one[string](t, c[1].dsn, "SELECT string_agg(c::text, '') FROM config.change c")
	if strings.Contains(all, "68756e746572") || strings.Contains(all, "hunter") || strings.Contains(all, `"value"`) {
		t.Errorf("history holds the secret: %s", all)
	}
}

func TestPushOnlyFromTheMaster(t *testing.T) {
	c := cluster(t, 3)
	push(t, c[0], c[1])
	p := peer(t, c[2], 2)
	_, err := c[1].Push(t.Context(), p, nil)
	nm, ok := errors.AsType[*db.NotMasterError](err)
	if !ok || nm.Master != 1 || !errors.Is(err, db.ErrNotMaster) {
		t.Errorf("push from a slave: %v", err)
	}
}

func TestPushFromAStaleMasterIsRefused(t *testing.T) {
	c := cluster(t, 3)
	put(t, c[0].DB, "a.test")
	push(t, c[0], c[1])
	push(t, c[0], c[2])
	before := c[2].state(t).Position
	p := peer(t, c[2], 1)
	if _, err := c[2].Promise(t.Context(), config.Epoch{N: 2, Owner: 2}); err != nil {
		t.Fatal(err)
	}
	put(t, c[0].DB, "stale.test")
	if _, err := c[0].Push(t.Context(), p, nil); !errors.Is(err, db.ErrStale) {
		t.Errorf("stale push: %v", err)
	}
	if got := c[2].state(t).Position; got != before {
		t.Errorf("moved from %v to %v", before, got)
	}
}

// The refusal that counts is the one in the transaction that applies: the promise comes between the look and the rows.
func TestAPromiseDuringAPushRefusesIt(t *testing.T) {
	c := cluster(t, 2)
	put(t, c[0].DB, "a.test")
	push(t, c[0], c[1])
	put(t, c[0].DB, "late.test")
	before := c[1].state(t).Position
	p := peer(t, c[1], 1)
	_, err := c[0].Push(t.Context(), p, func(int64, int64) {
		if _, err := c[1].Promise(context.Background(), config.Epoch{N: 2, Owner: 2}); err != nil {
			t.Errorf("promise while rows are on their way: %v", err)
		}
	})
	if !errors.Is(err, db.ErrStale) {
		t.Errorf("push over a promise: %v", err)
	}
	if got := c[1].state(t).Position; got != before {
		t.Errorf("moved from %v to %v", before, got)
	}
}

func TestPushToANodeThatIsAheadInOurEpoch(t *testing.T) {
	c := cluster(t, 2)
	put(t, c[0].DB, "a.test")
	push(t, c[0], c[1])
	// the master's store is rolled back to before its last commit
	c[0].sql(t, "ALTER TABLE config.domain DISABLE TRIGGER ALL", "DELETE FROM config.domain", "UPDATE node.position SET serial = serial - 1")
	p := peer(t, c[1], 1)
	if _, err := c[0].Push(t.Context(), p, nil); !errors.Is(err, db.ErrAhead) {
		t.Errorf("push: %v", err)
	}
	if got := names(t, c[1].DB); !slices.Equal(got, []string{"a.test"}) {
		t.Errorf("the slave lost what the master forgot: %v", got)
	}
}

func TestPushToAnotherClusterIsRefused(t *testing.T) {
	c := cluster(t, 2)
	c[1].sql(t, "UPDATE node.position SET cluster_id = 'another'")
	p := peer(t, c[1], 1)
	if _, err := c[0].Push(t.Context(), p, nil); !errors.Is(err, db.ErrOtherCluster) {
		t.Errorf("push: %v", err)
	}
}

func TestPushAfterHistoryWasTrimmed(t *testing.T) {
	c := cluster(t, 2)
	put(t, c[0].DB, "a.test")
	push(t, c[0], c[1])
	// 1,001 commits on, history does not reach back; each is a transaction of its own
	c[0].sql(t, `DO $$ BEGIN FOR i IN 1..1001 LOOP
		INSERT INTO config.domain (name) VALUES ('d' || i || '.test'); COMMIT; END LOOP; END $$`)
	if n := one[int64](t, c[0].dsn, "SELECT count(*) FROM config.history"); n != 1000 {
		t.Errorf("%d commits kept, want 1000", n)
	}
	if s := push(t, c[0], c[1]); !s.Full {
		t.Errorf("push: %+v", s)
	}
	same(t, c[0], c[1])
	// from here on both trim alike, and a delta is enough
	put(t, c[0].DB, "b.test")
	if s := push(t, c[0], c[1]); s.Full {
		t.Errorf("push: %+v", s)
	}
	same(t, c[0], c[1])
}

// After a commit of many rows, of which PostgreSQL has no statistics yet.
func TestWhatAPushAsksForIsFoundByTheIndexAndByOneProcess(t *testing.T) {
	n := cluster(t, 1)[0]
	n.sql(t, "ALTER TABLE config.change SET (autovacuum_enabled = off)",
		"INSERT INTO config.domain (name) SELECT 'd' || i || '.test' FROM generate_series(1, 20000) i")
	to := put(t, n.DB, "one.test").Serial
	err := n.Read(t.Context(), func(tx pgx.Tx) error {
		_, err := tx.Exec(t.Context(), "SET LOCAL parallel_setup_cost = 0; SET LOCAL parallel_tuple_cost = 0; SET LOCAL min_parallel_index_scan_size = 0; "+
			"SET LOCAL min_parallel_table_scan_size = 0")
		if err != nil {
			return err
		}
		var delta string
		if err := tx.QueryRow(t.Context(), "SELECT node.delta_sql($1)", to-1).Scan(&delta); err != nil {
			return err
		}
		much := strings.NewReplacer("$1", fmt.Sprint(to-1), "$2", fmt.Sprint(to), "$3", "1000").Replace(db.MuchTouched)
		for _, sql := range []string{much, delta} {
			rows, err := tx.Query(t.Context(), "EXPLAIN "+sql)
			if err != nil {
				return err
			}
			lines, err := pgx.CollectRows(rows, pgx.RowTo[string])
			if err != nil {
				return err
			}
			if plan := strings.Join(lines, "\n"); strings.Contains(plan, "Seq Scan on change") || strings.Contains(plan, "Gather") {
				t.Errorf("%s\n%s", sql, plan)
			}
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
}

// What only one push asks leaves no prepared statement behind, in any connection.
func TestPushesLeaveNoStatementsBehind(t *testing.T) {
	c := cluster(t, 2)
	push(t, c[0], c[1])
	for _, name := range []string{"a.test", "b.test"} {
		put(t, c[0].DB, name)
		if s := push(t, c[0], c[1]); s.Full || s.Rows != 3 {
			t.Fatalf("%+v", s)
		}
	}
	var look func(connections int32) error
	look = func(connections int32) error {
		if connections == 0 {
			return nil
		}
		return c[0].Read(t.Context(), func(tx pgx.Tx) error {
			var left []string
			err := tx.QueryRow(t.Context(), "SELECT coalesce(array_agg(statement), '{}') FROM pg_prepared_statements WHERE statement LIKE $1",
				"%FROM config.history row_ WHERE serial > %").Scan(&left)
			if err != nil || len(left) > 0 {
				t.Errorf("%q, %v", left, err)
			}
			return look(connections - 1)
		})
	}
	if err := look(c[0].MaxConns()); err != nil {
		t.Fatal(err)
	}
}

func loadDomain(t testing.TB, d *db.DB, name string) config.Domain {
	t.Helper()
	s, err := d.Load(context.Background())
	if err != nil {
		t.Fatal(err)
	}
	found := s.Domains.Get(name)
	if found == nil {
		t.Fatalf("no domain %s", name)
	}
	return *found
}

// A push of the touched rows, and one of whole tables, both say before the first row how many there will be.
func TestAPushSaysHowFarItIs(t *testing.T) {
	c := cluster(t, 2)
	push(t, c[0], c[1])
	c[0].sql(t, "INSERT INTO config.domain (name) SELECT 'd' || i || '.test' FROM generate_series(1, 9000) i")
	p := peer(t, c[1], 1)
	for _, one := range []struct {
		name string
		push func(context.Context, *db.Peer, db.Progress) (db.PushStats, error)
	}{{"the touched rows", c[0].Push}, {"whole tables", c[0].PushFull}} {
		var sent, of int64
		told := 0
		stats, err := one.push(t.Context(), p, func(now, all int64) {
			if now < sent || of != 0 && all != of || now > all {
				t.Errorf("%s: %d of %d after %d of %d", one.name, now, all, sent, of)
			}
			sent, of = now, all
			told++
		})
		if err != nil || stats.Full != (one.name == "whole tables") || told < 3 || sent != stats.Rows || of != stats.Rows || of < 9000 {
			t.Errorf("%s: told %d times, at last %d of %d; %+v, %v", one.name, told, sent, of, stats, err)
		}
	}
}

// A deafConn takes what is written to it from some time on, and passes nothing on: a peer that is there and does not answer.
type deafConn struct {
	net.Conn
	deaf *atomic.Bool
}

func (c *deafConn) Write(b []byte) (int, error) {
	if c.deaf.Load() {
		return len(b), nil
	}
	return c.Conn.Write(b)
}

// A push takes as long as the slave does. However many of them do not end, the master goes on.
func TestPushesThatDoNotEndHoldNothingElseUp(t *testing.T) {
	for name, settings := range map[string]string{"as a node has it": "", "few connections": " pool_max_conns=3"} {
		t.Run(name, func(t *testing.T) {
			c := cluster(t, 2)
			push(t, c[0], c[1])
			put(t, c[0].DB, "a.test")
			master := openDSN(t, c[0].dsn+settings)
			var deaf atomic.Bool
			var peers []*db.Peer
			var conns []net.Conn
			dial := dialer(t, c[1].DB, c[0].cid)
			for range 8 { // of one role there are no more
				p, err := db.OpenPeer(t.Context(), func(ctx context.Context) (net.Conn, error) {
					conn, err := dial(ctx)
					conns = append(conns, conn)
					return &deafConn{conn, &deaf}, err
				})
				if err != nil {
					t.Fatal(err)
				}
				if _, err := p.StateForPush(t.Context()); err != nil {
					t.Fatal(err)
				}
				peers = append(peers, p)
			}
			deaf.Store(true)
			var pushes sync.WaitGroup
			defer pushes.Wait()
			defer func() {
				for _, conn := range conns {
					conn.Close()
				}
			}()
			for _, p := range peers {
				pushes.Go(func() {
					_, _ = master.Push(t.Context(), p, nil)
					p.Close()
				})
			}
			held := func() int64 {
				return one[int64](t, c[0].dsn, `SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND state = 'idle in transaction'`)
			}
			until := time.Now().Add(5 * time.Second)
			for held() == 0 && time.Now().Before(until) {
				<-time.After(10 * time.Millisecond)
			}
			for range 20 { // others may still begin
				bounded, cancel := context.WithTimeout(t.Context(), 2*time.Second)
				if _, err := master.State(bounded); err != nil {
					t.Fatalf("with %d pushes under way: %v", held(), err)
				}
				cancel()
			}
		})
	}
}
