package db_test

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"sync"
	"testing"
	"time"

	"mailproxy/config"
	"mailproxy/db"
	"mailproxy/internal/pgtest"
)

func TestACommitTakesOneSerialAndSaysWhatItChanged(t *testing.T) {
	d := open(t)
	start, err := d.State(t.Context())
	if err != nil || !start.IsMaster() || start.Position.Serial != 0 {
		t.Fatalf("a fresh node: %+v, %v", start, err)
	}
	p := put(t, d, "a.test", "b.test")
	if p.Serial != 1 || p.Digest == start.Position.Digest {
		t.Errorf("position %v %v", p, p.Digest)
	}
	commit(t, d, func(ctx context.Context, tx *db.Tx) error {
		return errors.Join(tx.PutDomain(ctx, config.Domain{Name: "a.test", Comment: "c"}), tx.DeleteDomain(ctx, "b.test"))
	})
	h, err := d.History(t.Context(), 5)
	if err != nil || len(h) != 2 {
		t.Fatalf("history %+v, %v", h, err)
	}
	if h[0].Serial != 2 || h[0].Who != "root" || h[0].Command != "test" || time.Since(h[0].At) > time.Minute {
		t.Errorf("entry %+v", h[0])
	}
	var ops []string
	for _, c := range h[0].Changes {
		ops = append(ops, c.Op+" "+c.Table)
	}
	if !slices.Equal(ops, []string{"update domain", "delete domain"}) {
		t.Errorf("changes %v", ops)
	}
	var old, now config.Domain
	if err := errors.Join(json.Unmarshal(h[0].Changes[0].Old, &old), json.Unmarshal(h[0].Changes[0].New, &now)); err != nil {
		t.Fatal(err)
	}
	if old.Comment != "" || now.Comment != "c" || h[0].Changes[1].New != nil {
		t.Errorf("images %+v %+v %s", old, now, h[0].Changes[1].New)
	}
}

func TestACommitThatChangesNothingTakesNoSerial(t *testing.T) {
	d := open(t)
	before := put(t, d, "a.test")
	if after := put(t, d, "a.test"); after != before {
		t.Errorf("from %v to %v", before, after)
	}
}

func TestACheckSeesTheOutcomeAndRefusesIt(t *testing.T) {
	d := open(t)
	before := put(t, d, "a.test")
	if _, err := d.Load(t.Context()); err != nil { // what Load keeps must not learn of it either
		t.Fatal(err)
	}
	refused := errors.New("refused")
	var seen []string
	_, err := d.Commit(t.Context(), author, func(ctx context.Context, tx *db.Tx) error {
		return errors.Join(tx.DeleteDomain(ctx, "a.test"), tx.PutDomain(ctx, config.Domain{Name: "b.test"}))
	}, func(s *config.Snapshot) error {
		for x := range s.Domains.All() {
			seen = append(seen, x.Name)
		}
		return refused
	})
	if !errors.Is(err, refused) || !slices.Equal(seen, []string{"b.test"}) {
		t.Errorf("%v, saw %v", err, seen)
	}
	if st, err := d.State(t.Context()); err != nil || st.Position != before {
		t.Errorf("position %v, %v; was %v", st.Position, err, before)
	}
	if got := names(t, d); !slices.Equal(got, []string{"a.test"}) {
		t.Errorf("domains %v", got)
	}
}

// Of what a commit was checked by nothing is read again.
func TestACheckedCommitIsTheBaseOfTheNextLoad(t *testing.T) {
	d := open(t)
	var checked *config.Snapshot
	_, err := d.Commit(t.Context(), author, func(ctx context.Context, tx *db.Tx) error {
		return tx.PutDomain(ctx, config.Domain{Name: "a.test", Hosts: []string{"h:25"}})
	}, func(s *config.Snapshot) error {
		checked = s
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	s, err := d.Load(t.Context())
	if err != nil || s.Domains.Get("a.test") == nil || s.Domains.Get("a.test") != checked.Domains.Get("a.test") {
		t.Errorf("read again: %+v, %v", s, err)
	}
}

func TestDeletingWhatIsNotThere(t *testing.T) {
	d := open(t)
	for name, edit := range map[string]func(ctx context.Context, tx *db.Tx) error{
		"domain":    func(ctx context.Context, tx *db.Tx) error { return tx.DeleteDomain(ctx, "x") },
		"transport": func(ctx context.Context, tx *db.Tx) error { return tx.DeleteTransport(ctx, "x") },
		"network": func(ctx context.Context, tx *db.Tx) error {
			return tx.DeleteNetwork(ctx, netip.MustParsePrefix("10.0.0.0/8"))
		},
		"setting":     func(ctx context.Context, tx *db.Tx) error { return tx.DeleteSetting(ctx, "x") },
		"CA":          func(ctx context.Context, tx *db.Tx) error { return tx.DeleteCA(ctx, "x") },
		"certificate": func(ctx context.Context, tx *db.Tx) error { return tx.DeleteCertificate(ctx, "x") },
		"sender":      func(ctx context.Context, tx *db.Tx) error { return tx.DeleteTLSSender(ctx, "x") },
		"secret":      func(ctx context.Context, tx *db.Tx) error { return tx.DeleteSecret(ctx, "x") },
		"node":        func(ctx context.Context, tx *db.Tx) error { return tx.Revoke(ctx, 9) },
	} {
		if _, err := d.Commit(t.Context(), author, edit, nil); !errors.Is(err, db.ErrNoSuch) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestLoadGivesEverythingInOrder(t *testing.T) {
	d := open(t)
	at := time.Date(2026, 1, 2, 3, 4, 5, 6000, time.UTC)
	n := config.Node{CID: 2, UUID: "u", Name: "n", Address: "[::1]:7025", PublicKey: "k", MachineID: "m", Services: []string{"web", "smtp"}, JoinedAt: at}
	commit(t, d, func(ctx context.Context, tx *db.Tx) error {
		return errors.Join(
			tx.PutNode(ctx, member(3)), tx.PutNode(ctx, n), tx.PutCA(ctx, config.CA{Fingerprint: "f", PublicKey: "k", CID: 2, CreatedAt: at}),
			tx.PutSetting(ctx, config.Setting{Name: "b", Value: "1"}), tx.PutSetting(ctx, config.Setting{Name: "a", Value: "2"}),
			tx.PutNetwork(ctx, config.Network{Prefix: netip.MustParsePrefix("2001:db8::1/32"), Comment: "six"}),
			tx.PutNetwork(ctx, config.Network{Prefix: netip.MustParsePrefix("10.0.0.0/8")}),
			tx.PutTransport(ctx, config.Transport{Name: "t", Hosts: []string{"a:25", "b:25"}, TLS: config.TLSVerify, QueueLife: config.Duration(36 * time.Hour)}),
			tx.PutTransport(ctx, config.Transport{Name: "u", Hosts: []string{"c:25"}, Order: config.OrderRoundRobin, TLS: config.TLSEncrypt, User: "us",
				Password: "secret:x", Tell: config.TellProxy}),
			tx.PutDomain(ctx, config.Domain{Name: "z.test", Transport: "t"}), tx.PutDomain(ctx, config.Domain{Name: "a.test", Hosts: []string{"h:25"}}),
			tx.PutDomain(ctx, config.Domain{Name: "_.test"}), tx.Revoke(ctx, 3))
	})
	s, err := d.Load(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if len(s.Nodes) != 1 || fmt.Sprint(s.Nodes[0]) != fmt.Sprint(n) {
		t.Errorf("nodes %+v", s.Nodes)
	}
	if len(s.Revoked) != 1 || s.Revoked[0].CID != 3 || s.Revoked[0].PublicKey != member(3).PublicKey {
		t.Errorf("revoked %+v", s.Revoked)
	}
	got := fmt.Sprint(s.CAs, s.Settings, s.Networks, s.Transports, s.Domains.List())
	want := "[{f k 2 2026-01-02 03:04:05.000006 +0000 UTC}] [{a 2} {b 1}] [{10.0.0.0/8 } {2001:db8::/32 six}] [{t [a:25 b:25]  verify    1d12h} {u [c:25] round-robin encrypt us secret:x proxy }] " +
		"[{_.test  [] } {a.test  [h:25] } {z.test t [] }]"
	if got != want {
		t.Errorf("loaded\n%s, want\n%s", got, want)
	}
}

// What Load makes of the last snapshot and the changes since is what it reads anew.
func TestLoadPatchesWhatItHas(t *testing.T) {
	dsn := pgtest.New(t)
	d := openDSN(t, dsn)
	names(t, d)
	for i, edit := range []func(ctx context.Context, tx *db.Tx) error{
		func(ctx context.Context, tx *db.Tx) error {
			return errors.Join(tx.PutDomain(ctx, config.Domain{Name: "m.test"}), tx.PutDomain(ctx, config.Domain{Name: "c.test"}))
		},
		func(ctx context.Context, tx *db.Tx) error {
			return errors.Join(tx.PutDomain(ctx, config.Domain{Name: "a.test"}), tx.PutDomain(ctx, config.Domain{Name: "z.test"}),
				tx.PutDomain(ctx, config.Domain{Name: "m.test", Comment: "x"}), tx.DeleteDomain(ctx, "c.test"))
		},
		func(ctx context.Context, tx *db.Tx) error { return tx.DeleteDomain(ctx, "z.test") },
		func(ctx context.Context, tx *db.Tx) error {
			return errors.Join(tx.DeleteDomain(ctx, "a.test"), tx.PutDomain(ctx, config.Domain{Name: "a.test", Transport: "again"}),
				tx.PutDomain(ctx, config.Domain{Name: "q.test"}), tx.DeleteDomain(ctx, "q.test"), tx.PutSetting(ctx, config.Setting{Name: "s"}))
		},
		func(ctx context.Context, tx *db.Tx) error {
			return errors.Join(tx.PutRecipients(ctx, "m.test", []string{"b", "d", "*"}), tx.PutRecipients(ctx, "a.test", []string{"x"}))
		},
		func(ctx context.Context, tx *db.Tx) error {
			return errors.Join(tx.SetRecipients(ctx, "m.test", []string{"a", "c", "d", "\"e f"}), tx.PutRecipients(ctx, "z.test", []string{"a", "ä"}))
		},
		func(ctx context.Context, tx *db.Tx) error {
			return errors.Join(tx.DeleteDomain(ctx, "a.test"), tx.DeleteRecipients(ctx, "m.test", []string{"c", "nobody"}),
				tx.DeleteRecipients(ctx, "z.test", []string{"a"}), tx.PutRecipients(ctx, "z.test", []string{"a"}))
		},
		func(ctx context.Context, tx *db.Tx) error {
			many := make([]string, 6000) // more than are patched
			for i := range many {
				many[i] = fmt.Sprint("r", i)
			}
			return tx.SetRecipients(ctx, "m.test", many)
		},
		func(ctx context.Context, tx *db.Tx) error { return tx.SetRecipients(ctx, "z.test", nil) },
		func(ctx context.Context, tx *db.Tx) error {
			return errors.Join(tx.PutCertificate(ctx, config.Certificate{Name: "mx.test", Chain: "c", Key: "secret:k"}),
				tx.PutTLSSender(ctx, config.TLSSender{Domain: "b.test"}), tx.PutTLSSender(ctx, config.TLSSender{Domain: "a.test", Comment: "x"}))
		},
		func(ctx context.Context, tx *db.Tx) error {
			return errors.Join(tx.PutCertificate(ctx, config.Certificate{Name: "*.test", Chain: "d", Key: "secret:l"}),
				tx.DeleteCertificate(ctx, "mx.test"), tx.DeleteTLSSender(ctx, "b.test"))
		},
	} {
		commit(t, d, edit)
		patched, err := d.Load(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		fresh, err := openDSN(t, dsn).Load(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		if a, b := fmt.Sprintf("%+v", *patched), fmt.Sprintf("%+v", *fresh); a != b {
			t.Errorf("step %d: patched\n%s\nread anew\n%s", i, a, b)
		}
	}
}

func TestTheGuardRefusesASlave(t *testing.T) {
	c := cluster(t, 2)
	put(t, c[0].DB, "a.test")
	push(t, c[0], c[1])
	before := c[1].state(t).Position
	_, err := c[1].Commit(t.Context(), author, func(ctx context.Context, tx *db.Tx) error { return tx.DeleteDomain(ctx, "a.test") }, nil)
	if nm, ok := errors.AsType[*db.NotMasterError](err); !ok || nm.Master != 1 {
		t.Errorf("commit: %v", err)
	}
	for _, sql := range []string{
		"DELETE FROM config.domain", "TRUNCATE config.domain", "UPDATE config.domain SET comment = 'x'", "INSERT INTO config.domain VALUES ('x')",
		"COPY config.domain FROM PROGRAM 'echo x'", "DELETE FROM config.history", "TRUNCATE config.history", "TRUNCATE config.revoked", "UPDATE config.epoch SET owner = 2", "DELETE FROM config.secret",
		"BEGIN; SET LOCAL mailproxy.who = 'push_1'; SET LOCAL session_replication_role = origin; DELETE FROM config.domain",
		"SET SESSION AUTHORIZATION pg_monitor; RESET SESSION AUTHORIZATION; DELETE FROM config.domain",
	} {
		if err := c[1].trySQL(sql); code(err) != "MP001" {
			t.Errorf("%s: %v", sql, err)
		}
	}
	if after := c[1].state(t).Position; after != before {
		t.Errorf("moved from %v to %v", before, after)
	}
}

func TestTheGuardRefusesAMasterThatHasPromised(t *testing.T) {
	c := cluster(t, 2)
	if _, err := c[0].Promise(t.Context(), config.Epoch{N: 2, Owner: 2}); err != nil {
		t.Fatal(err)
	}
	if err := c[0].trySQL("INSERT INTO config.domain VALUES ('x')"); code(err) != "MP001" {
		t.Errorf("insert: %v", err)
	}
	_, err := c[0].Commit(t.Context(), author, func(ctx context.Context, tx *db.Tx) error { return nil }, nil)
	if nm, ok := errors.AsType[*db.NotMasterError](err); !ok || nm.Master != 2 {
		t.Errorf("commit: %v", err)
	}
}

// An edit by psql is a commit as any other.
func TestSQLByHandIsACommit(t *testing.T) {
	dsn := pgtest.New(t)
	d := openDSN(t, dsn)
	n := &node{DB: d, dsn: dsn}
	woken := make(chan struct{}, 100)
	ctx, cancel := context.WithCancel(t.Context())
	var wg sync.WaitGroup
	wg.Go(func() { _ = d.Listen(ctx, func() { woken <- struct{}{} }) })
	defer wg.Wait()
	defer cancel()
	wait(t, woken)
	n.sql(t, "BEGIN; INSERT INTO config.domain (name) VALUES ('a'), ('b'), ('c'); UPDATE config.domain SET name = 'd' WHERE name = 'a'; "+
		"UPDATE config.domain SET comment = '' ; TRUNCATE config.domain; INSERT INTO config.setting VALUES ('x', 'y'); COMMIT")
	wait(t, woken)
	h, err := d.History(t.Context(), 5)
	if err != nil || len(h) != 1 {
		t.Fatalf("history %+v, %v", h, err)
	}
	var ops []string
	for _, c := range h[0].Changes {
		ops = append(ops, c.Op+" "+string(c.Key))
	}
	slices.Sort(ops[5:8]) // TRUNCATE has no order
	want := []string{`insert {"name": "a"}`, `insert {"name": "b"}`, `insert {"name": "c"}`, `delete {"name": "a"}`, `insert {"name": "d"}`,
		`delete {"name": "b"}`, `delete {"name": "c"}`, `delete {"name": "d"}`, `insert {"name": "x"}`}
	if !slices.Equal(ops, want) {
		t.Errorf("changes %v", ops)
	}
	if h[0].Who != "postgres" || h[0].Serial != 1 {
		t.Errorf("entry %+v", h[0])
	}
}

func wait(t testing.TB, c <-chan struct{}) {
	t.Helper()
	select {
	case <-c:
	case <-time.After(20 * time.Second):
		t.Fatal("not woken")
	}
}

// A savepoint that is rolled back takes its serial along.
func TestSerialsHaveNoGaps(t *testing.T) {
	dsn := pgtest.New(t)
	d := openDSN(t, dsn)
	n := &node{DB: d, dsn: dsn}
	n.sql(t, "BEGIN; SAVEPOINT a; INSERT INTO config.setting VALUES ('x', 'y'); ROLLBACK TO a; INSERT INTO config.setting VALUES ('z', 'y'); COMMIT",
		"BEGIN; INSERT INTO config.setting VALUES ('lost', 'y'); ROLLBACK")
	if p := put(t, d, "a.test"); p.Serial != 2 {
		t.Errorf("serial %d", p.Serial)
	}
	var wg sync.WaitGroup
	for i := range 8 {
		wg.Go(func() {
			for j := range 5 {
				_, err := d.Commit(context.Background(), author, func(ctx context.Context, tx *db.Tx) error {
					return tx.PutDomain(ctx, config.Domain{Name: fmt.Sprintf("d%d-%d", i, j)})
				}, nil)
				if err != nil {
					t.Error(err)
				}
			}
		})
	}
	wg.Wait()
	if n := one[int64](t, dsn, "SELECT count(*) FROM config.history WHERE serial BETWEEN 1 AND 42"); n != 42 {
		t.Errorf("%d commits, want 42", n)
	}
	if kept, rows, err := d.Verify(t.Context()); err != nil || kept != rows {
		t.Errorf("verify %v %v %v", kept, rows, err)
	}
}

func TestATokenIsTakenByOneKey(t *testing.T) {
	d := open(t)
	good, old := []byte("good"), []byte("old")
	commit(t, d, func(ctx context.Context, tx *db.Tx) error {
		return errors.Join(tx.PutToken(ctx, good, time.Now().Add(time.Hour)), tx.PutToken(ctx, old, time.Now().Add(-time.Second)))
	})
	take := func(hash []byte, key string) error {
		_, err := d.Commit(context.Background(), author, func(ctx context.Context, tx *db.Tx) error { return tx.TakeToken(ctx, hash, key) }, nil)
		return err
	}
	if err := take([]byte("other"), "k"); !errors.Is(err, db.ErrTokenUnknown) {
		t.Errorf("unknown token: %v", err)
	}
	if err := take(old, "k"); !errors.Is(err, db.ErrTokenExpired) {
		t.Errorf("expired token: %v", err)
	}
	var wg sync.WaitGroup
	var mu sync.Mutex
	var winners []string
	for i := range 8 {
		wg.Go(func() {
			key := fmt.Sprint("key", i)
			if err := take(good, key); err == nil {
				mu.Lock()
				winners = append(winners, key)
				mu.Unlock()
			} else if !errors.Is(err, db.ErrTokenUsed) {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	if len(winners) != 1 {
		t.Fatalf("taken by %v", winners)
	}
	if err := take(good, winners[0]); err != nil {
		t.Errorf("again by the same key: %v", err)
	}
}

func TestCIDsAreNeverGivenAgain(t *testing.T) {
	d := open(t)
	commit(t, d, func(ctx context.Context, tx *db.Tx) error {
		return errors.Join(tx.PutNode(ctx, member(1)), tx.PutNode(ctx, member(2)), tx.Revoke(ctx, 2))
	})
	commit(t, d, func(ctx context.Context, tx *db.Tx) error {
		if cid, err := tx.MaxCID(ctx); err != nil || cid != 2 {
			t.Errorf("highest CID %d, %v", cid, err)
		}
		return nil
	})
}

func TestListenIsWokenAgainAfterItsConnectionBroke(t *testing.T) {
	d := open(t)
	woken := make(chan struct{}, 100)
	ctx, cancel := context.WithCancel(t.Context())
	var wg sync.WaitGroup
	wg.Go(func() {
		if err := d.Listen(ctx, func() { woken <- struct{}{} }); err != nil {
			t.Error(err)
		}
	})
	wait(t, woken)
	if err := d.KillListeners(ctx); err != nil {
		t.Fatal(err)
	}
	wait(t, woken)
	put(t, d, "a.test")
	wait(t, woken)
	cancel()
	wg.Wait()
}

// A standby that takes over without the last commit gives its number to the next one. What was loaded before is no base then.
func TestAfterAFailoverThatLostACommitEverythingIsLoaded(t *testing.T) {
	dsn := pgtest.New(t)
	d := openDSN(t, dsn)
	put(t, d, "a.test")
	put(t, d, "lost.test")
	if got := names(t, d); !slices.Equal(got, []string{"a.test", "lost.test"}) {
		t.Fatalf("domains %v", got)
	}
	n := &node{DB: d, dsn: dsn}
	n.sql(t, "SET session_replication_role = replica", // as the standby has it
		"DELETE FROM config.domain WHERE name = 'lost.test'", "DELETE FROM config.change WHERE serial = 2", "DELETE FROM config.history WHERE serial = 2",
		"SELECT node.recount()", "UPDATE node.position SET serial = 1, rewrites = rewrites - 1")
	put(t, d, "b.test")
	put(t, d, "c.test")
	woken := make(chan struct{}, 100)
	ctx, cancel := context.WithCancel(t.Context())
	var wg sync.WaitGroup
	wg.Go(func() { _ = d.Listen(ctx, func() { woken <- struct{}{} }) })
	defer wg.Wait()
	defer cancel()
	wait(t, woken)
	if got := names(t, d); !slices.Equal(got, []string{"a.test", "b.test", "c.test"}) {
		t.Errorf("domains %v", got)
	}
}

func TestEveryMethodFailsWhileTheServerIsAway(t *testing.T) {
	d, err := db.Open(db.Options{DSN: "host=" + t.TempDir() + " user=x dbname=x"})
	if err != nil {
		t.Fatal(err)
	}
	defer d.Close()
	if _, err := d.State(t.Context()); err == nil {
		t.Error("State works without a server")
	}
	if err := d.Ping(t.Context()); err == nil {
		t.Error("Ping works without a server")
	}
}
