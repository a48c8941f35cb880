package db_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"
	"testing/fstest"
	"time"

	"mailproxy/config"
	"mailproxy/db"
	"mailproxy/internal/pgtest"
)

// A dumped is what Dump gave, kept.
type dumped struct {
	db.Dump
	rows map[string][][]byte
}

func dump(t testing.TB, d *db.DB, logs db.Logs) dumped {
	t.Helper()
	x := dumped{rows: map[string][][]byte{}}
	err := d.Dump(context.Background(), logs, func(head db.Dump) error { x.Dump = head; return nil }, x.keep)
	if err != nil {
		t.Fatal(err)
	}
	return x
}

func (x *dumped) keep(t db.Table, row []byte) error {
	x.rows[t.Name] = append(x.rows[t.Name], bytes.Clone(row))
	return nil
}

// feed gives the rows back.
func (x *dumped) feed(put func(table string, row []byte) error) error {
	for name, rows := range x.rows {
		for _, r := range rows {
			if err := put(name, r); err != nil {
				return err
			}
		}
	}
	return nil
}

func (x *dumped) params() db.RestoreParams {
	return db.RestoreParams{Dump: x.Dump, MadeAt: time.Unix(1e9, 0), NodeKey: nodeKey(x.State.CID), Author: db.Author{Who: "root", Command: "mailproxy restore"}}
}

func (x *dumped) table(t testing.TB, name string) db.Table {
	t.Helper()
	at := slices.IndexFunc(x.Tables, func(t db.Table) bool { return t.Name == name })
	if at < 0 {
		t.Fatalf("no table %s in %+v", name, x.Tables)
	}
	return x.Tables[at]
}

func TestADumpIsOfOneMoment(t *testing.T) {
	d := open(t)
	before := put(t, d, "before.test")
	x := dumped{rows: map[string][][]byte{}}
	err := d.Dump(t.Context(), db.WithoutLogs, func(head db.Dump) error {
		x.Dump = head
		put(t, d, "meanwhile.test")
		return nil
	}, x.keep)
	if err != nil {
		t.Fatal(err)
	}
	if x.State.Position != before {
		t.Errorf("it is at %v, want %v", x.State.Position, before)
	}
	for _, table := range x.Tables {
		size := int64(0)
		for _, r := range x.rows[table.Name] {
			size += int64(len(r)) + 1
			if bytes.Contains(r, []byte("meanwhile.test")) || bytes.ContainsRune(r, '\n') {
				t.Errorf("%s: %s", table.Name, r)
			}
		}
		if n := int64(len(x.rows[table.Name])); n != table.Rows || size != table.Bytes {
			t.Errorf("%s: %d rows of %d bytes, the head says %d of %d", table.Name, n, size, table.Rows, table.Bytes)
		}
	}
	if n := x.table(t, "config.domain").Rows; n != 1 {
		t.Errorf("%d domains, want 1", n)
	}
}

// What is hard to bring through a text.
const odd = "a\\b \"c\" \t\u00fc \u2028 \\. \\N"

func TestASingleNodeTakesTheConfigurationAndNotTheCluster(t *testing.T) {
	c := cluster(t, 2)
	master := c[0]
	commit(t, master.DB, func(ctx context.Context, tx *db.Tx) error {
		if err := tx.PutSecret(ctx, "dkim", []byte{0, 1, '\\', '\n', 255}); err != nil {
			return err
		}
		return tx.PutDomain(ctx, config.Domain{Name: "odd.test", Hosts: []string{"10.0.0.1:25", "[::1]:25"}, Comment: odd})
	})
	put(t, master.DB, "one.test", "two.test")
	x := dump(t, master.DB, db.WithoutLogs)

	other := nodeKey(7)
	fresh := &node{DB: openAs(t, pgtest.New(t), other)}
	put(t, fresh.DB, "own.test")
	commit(t, fresh.DB, func(ctx context.Context, tx *db.Tx) error { return tx.PutSecret(ctx, "own", []byte("x")) })
	at, err := fresh.RestoreSingle(t.Context(), x.params(), x.feed)
	if err != nil {
		t.Fatal(err)
	}
	st := fresh.state(t)
	if st.CID != 0 || st.ClusterID != "" || !st.IsMaster() || st.Position != at || at.Serial != x.State.Position.Serial+1 || at.Epoch.N != 0 {
		t.Errorf("after it: %+v, was at %v", st, x.State.Position)
	}
	kept, rows, err := fresh.Verify(t.Context())
	if err != nil || kept != rows {
		t.Errorf("kept %v, rows %v, %v", kept, rows, err)
	}
	if got := names(t, fresh.DB); !slices.Equal(got, []string{"odd.test", "one.test", "two.test"}) {
		t.Errorf("domains: %q", got)
	}
	s, err := fresh.Load(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if d := s.Domains.Get("odd.test"); d.Comment != odd || len(d.Hosts) != 2 {
		t.Errorf("odd.test: %+v", d)
	}
	if secret, err := fresh.Secret(t.Context(), "dkim"); err != nil || !bytes.Equal(secret, []byte{0, 1, '\\', '\n', 255}) {
		t.Errorf("secret: %q, %v", secret, err)
	}
	if len(s.Nodes)+len(s.CAs)+len(s.Revoked) != 0 || s.ClusterID != "" {
		t.Errorf("of the cluster came back: %+v", s)
	}
	history, err := fresh.History(t.Context(), 10)
	if err != nil || len(history) < 3 || history[0].Command != "mailproxy restore" || history[1].Epoch.N != 0 || history[1].Serial != at.Serial-1 {
		t.Errorf("history: %+v, %v", history, err)
	}

	// Then it is the first of a cluster as any single node is, and a slave takes all of it without setting anything aside.
	first := member(1)
	first.PublicKey = publicText(other)
	err = fresh.CreateCluster(t.Context(), db.CreateParams{ClusterID: clusterID, Node: first, CA: config.CA{Fingerprint: "SHA256:b", PublicKey: "x", CID: 1, CreatedAt: time.Unix(1e9, 0)}})
	if err != nil {
		t.Fatal(err)
	}
	fresh.cid = 1
	if err := fresh.RenewLease(t.Context(), config.Epoch{N: 1, Owner: 1}, 0, true); err != nil {
		t.Fatal(err)
	}
	commit(t, fresh.DB, func(ctx context.Context, tx *db.Tx) error { return tx.PutNode(ctx, member(2)) })
	slave := &node{DB: openAs(t, pgtest.New(t), nodeKey(2)), cid: 2}
	slave.enter(t, config.Epoch{N: 1, Owner: 1})
	for range 2 { // the second is a delta
		put(t, fresh.DB, "more.test", "even-more.test")
		if p := push(t, fresh, slave); p.Journalled != 0 {
			t.Errorf("set aside: %+v", p)
		}
		same(t, fresh, slave)
	}
	if secret, err := slave.Secret(t.Context(), "dkim"); err != nil || !bytes.Equal(secret, []byte{0, 1, '\\', '\n', 255}) {
		t.Errorf("secret on the slave: %q, %v", secret, err)
	}
	if _, err := fresh.RestoreSingle(t.Context(), x.params(), x.feed); !errors.Is(err, db.ErrExists) {
		t.Errorf("in a cluster: %v, want ErrExists", err)
	}
	if err := slave.RestoreIdentity(t.Context(), x.params(), x.feed); !errors.Is(err, db.ErrExists) {
		t.Errorf("in a cluster, with identity: %v, want ErrExists", err)
	}
}

// A serial that was used is not used again, also where the backup is behind what is here.
func TestSerialsDoNotGoBackInARestore(t *testing.T) {
	old := open(t)
	put(t, old, "one.test")
	x := dump(t, old, db.WithoutLogs)
	fresh := open(t)
	for _, name := range []string{"a.test", "b.test", "c.test"} {
		put(t, fresh, name)
	}
	at, err := fresh.RestoreSingle(t.Context(), x.params(), x.feed)
	if err != nil || at.Serial != 4 {
		t.Errorf("it is at %v, %v; want 0.0/4", at, err)
	}
}

// restored makes a fresh node the one of a dump.
func restored(t testing.TB, x dumped) *node {
	t.Helper()
	dsn := pgtest.New(t)
	n := &node{DB: openAs(t, dsn, nodeKey(x.State.CID)), dsn: dsn, cid: x.State.CID}
	if err := n.RestoreIdentity(context.Background(), x.params(), x.feed); err != nil {
		t.Fatal(err)
	}
	return n
}

func TestARestoredMasterIsNoMasterAndHasNoVote(t *testing.T) {
	c := cluster(t, 2)
	put(t, c[0].DB, "one.test")
	push(t, c[0], c[1])
	x := dump(t, c[0].DB, db.WithoutLogs)
	back := restored(t, x)
	st := back.state(t)
	if st.CID != 1 || st.ClusterID != clusterID || st.IsMaster() || st.Position.Epoch.N != 0 || st.Position.Serial != 0 || st.Promised != x.State.Promised {
		t.Errorf("it comes back as %+v", st)
	}
	_, err := back.Commit(t.Context(), author, func(ctx context.Context, tx *db.Tx) error { return tx.DeleteDomain(ctx, "one.test") }, nil)
	if !errors.Is(err, db.ErrNotMaster) {
		t.Errorf("a commit: %v, want ErrNotMaster", err)
	}
	if err := back.trySQL("DELETE FROM config.domain"); err == nil {
		t.Error("psql may write")
	}
	r, err := back.Restored(t.Context())
	if err != nil || r == nil || r.Keys || r.Position.Epoch != x.State.Position.Epoch || r.Position.Serial != x.State.Position.Serial {
		t.Errorf("restored: %+v, %v", r, err)
	}

	// The same again, and what was promised meanwhile stays promised.
	if _, err := back.Promise(t.Context(), config.Epoch{N: 7, Owner: 2}); err != nil {
		t.Fatal(err)
	}
	if err := back.RestoreIdentity(t.Context(), x.params(), x.feed); err != nil {
		t.Fatal(err)
	}
	if st := back.state(t); st.Promised != (config.Epoch{N: 7, Owner: 2}) {
		t.Errorf("after the same again it has promised %v", st.Promised)
	}
	if err := back.KeysRestored(t.Context()); err != nil {
		t.Fatal(err)
	}
	if r, err := back.Restored(t.Context()); err != nil || !r.Keys {
		t.Errorf("with its keys: %+v, %v", r, err)
	}
	if _, err := back.RestoreSingle(t.Context(), x.params(), x.feed); !errors.Is(err, db.ErrExists) {
		t.Errorf("a single node's restore: %v, want ErrExists", err)
	}
}

// The one commit that only the lost master had is in the backup, and others came in its place since: nothing of it is lost.
func TestARestoredMasterIsPushedToAndItsOwnCommitsAreSetAside(t *testing.T) {
	c := cluster(t, 2)
	put(t, c[0].DB, "one.test")
	push(t, c[0], c[1])
	put(t, c[0].DB, "only-master.test")
	x := dump(t, c[0].DB, db.WithoutLogs)
	if _, err := c[1].Promise(t.Context(), config.Epoch{N: 2, Owner: 2}); err != nil {
		t.Fatal(err)
	}
	if _, err := c[1].BeginEpoch(t.Context(), config.Epoch{N: 2, Owner: 2}, db.ByForce, author); err != nil {
		t.Fatal(err)
	}
	put(t, c[1].DB, "since.test")

	back := restored(t, x)
	if p := push(t, c[1], back); p.Journalled != 1 {
		t.Errorf("the push set %d commits aside, want 1: %+v", p.Journalled, p)
	}
	same(t, c[1], back)
	if r, err := back.Restored(t.Context()); err != nil || r != nil {
		t.Errorf("after a push it still counts as restored: %+v, %v", r, err)
	}
	journal, err := back.Journal(t.Context())
	if err != nil || len(journal) != 1 || !strings.Contains(string(journal[0].Changes[0].New), "only-master.test") {
		t.Fatalf("journal: %+v, %v", journal, err)
	}

	// The journal is in the next backup, and comes back with it, on any node.
	y := dump(t, back.DB, db.WithoutLogs)
	single := open(t)
	if _, err := single.RestoreSingle(t.Context(), y.params(), y.feed); err != nil {
		t.Fatal(err)
	}
	for _, again := range []*db.DB{restored(t, y).DB, single} {
		got, err := again.Journal(t.Context())
		if err != nil || len(got) != 1 || got[0].Serial != journal[0].Serial || len(got[0].Changes) != len(journal[0].Changes) {
			t.Errorf("journal: %+v, %v", got, err)
		}
	}

	// What is set aside next has a number of its own.
	back = restored(t, y)
	back.sql(t, "INSERT INTO node.journal (epoch_n, epoch_owner, serial, at, who, node, command, by_n, by_owner) VALUES (1, 1, 1, now(), '', 1, '', 1, 1)")
	if got, err := back.Journal(t.Context()); err != nil || len(got) != 2 || got[1].ID <= got[0].ID {
		t.Errorf("journal: %+v, %v", got, err)
	}
}

// A schema that has gone on: a column that must not be NULL, a table, and a table of logs.
var later = fstest.MapFS{"00900_later.sql": {Data: []byte(`-- +goose Up
ALTER TABLE config.domain ADD COLUMN kind text NOT NULL DEFAULT 'plain';
CREATE TABLE config.later (name text PRIMARY KEY);
CREATE TABLE mail.log (cid integer, seq bigint, what text, PRIMARY KEY (cid, seq)) PARTITION BY RANGE (seq);
CREATE TABLE mail.log_1 PARTITION OF mail.log FOR VALUES FROM (0) TO (1000);`)}}

func TestABackupOfAnOlderSchemaIsTaken(t *testing.T) {
	old := open(t)
	put(t, old, "one.test")
	x := dump(t, old, db.WithLogs)
	dsn := pgtest.New(t)
	n := &node{DB: openDSN(t, dsn), dsn: dsn}
	if err := n.Migrate(t.Context(), later); err != nil {
		t.Fatal(err)
	}
	n.sql(t, "INSERT INTO config.later VALUES ('here before')")
	if _, err := n.RestoreSingle(t.Context(), x.params(), x.feed); err != nil {
		t.Fatal(err)
	}
	if got := one[string](t, dsn, "SELECT name || ' ' || kind || ' ' || (SELECT count(*) FROM config.later) FROM config.domain"); got != "one.test plain 0" {
		t.Errorf("after it: %s", got)
	}
	if kept, rows, err := n.Verify(t.Context()); err != nil || kept != rows {
		t.Errorf("kept %v, rows %v, %v", kept, rows, err)
	}

	// The other way round it is refused, and changes nothing.
	y := dump(t, n.DB, db.WithoutLogs)
	put(t, old, "two.test")
	if _, err := old.RestoreSingle(t.Context(), y.params(), y.feed); !errors.Is(err, db.ErrNewerBackup) {
		t.Errorf("a newer backup: %v, want ErrNewerBackup", err)
	}
	z := x
	z.Schema++ // where the tables are the same, what they mean may not be
	if _, err := old.RestoreSingle(t.Context(), z.params(), z.feed); !errors.Is(err, db.ErrNewerBackup) {
		t.Errorf("a newer schema: %v, want ErrNewerBackup", err)
	}
	y.Schema = x.Schema // whatever it says of itself
	if _, err := old.RestoreSingle(t.Context(), y.params(), y.feed); !errors.Is(err, db.ErrNewerBackup) {
		t.Errorf("a newer backup that hides it: %v, want ErrNewerBackup", err)
	}
	if got := names(t, old); !slices.Equal(got, []string{"one.test", "two.test"}) {
		t.Errorf("after refusals: %q", got)
	}
}

func TestLogsComeAlongWhereTheyAreAskedFor(t *testing.T) {
	var nodes []*node
	for range 2 {
		dsn := pgtest.New(t)
		n := &node{DB: openDSN(t, dsn), dsn: dsn}
		if err := n.Migrate(t.Context(), later); err != nil {
			t.Fatal(err)
		}
		nodes = append(nodes, n)
	}
	nodes[0].sql(t, "INSERT INTO mail.log VALUES (1, 1, 'taken'), (1, 2, 'sent')")
	nodes[1].sql(t, "INSERT INTO mail.log VALUES (1, 2, 'own'), (2, 1, 'own')")
	without := dump(t, nodes[0].DB, db.WithoutLogs)
	if slices.ContainsFunc(without.Tables, func(x db.Table) bool { return strings.HasPrefix(x.Name, "mail.") }) {
		t.Errorf("without logs: %+v", without.Tables)
	}
	x := dump(t, nodes[0].DB, db.WithLogs)
	if n := x.table(t, "mail.log").Rows; n != 2 || len(x.rows["mail.log_1"]) != 0 {
		t.Errorf("%d rows, want 2; of a part alone: %d", n, len(x.rows["mail.log_1"]))
	}
	if _, err := nodes[1].RestoreSingle(t.Context(), x.params(), x.feed); err != nil {
		t.Fatal(err)
	}
	if got := one[string](t, nodes[1].dsn, "SELECT string_agg(concat(cid, seq, what), ',' ORDER BY cid, seq) FROM mail.log"); got != "11taken,12own,21own" {
		t.Errorf("its log: %s", got)
	}
}

// A file may say what it likes: nothing but configuration, journal and logs is written.
func TestOnlyTablesOfABackupAreRestored(t *testing.T) {
	d := open(t)
	put(t, d, "one.test")
	x := dump(t, d, db.WithoutLogs)
	for _, name := range []string{"node.position", "pg_catalog.pg_class", "config.domain; DROP TABLE config.domain", "domain"} {
		y := x
		y.Tables = append(slices.Clone(x.Tables), db.Table{Name: name, Columns: []string{"serial"}})
		if _, err := d.RestoreSingle(t.Context(), y.params(), y.feed); !errors.Is(err, db.ErrNewerBackup) {
			t.Errorf("%s: %v, want ErrNewerBackup", name, err)
		}
	}
	broken := errors.New("broken")
	_, err := d.RestoreSingle(t.Context(), x.params(), func(put func(string, []byte) error) error {
		return errors.Join(put("config.setting", []byte(`{"name": "x", "value": "y"}`)), broken)
	})
	if !errors.Is(err, broken) {
		t.Errorf("a feed that ends early: %v", err)
	}
	if got := names(t, d); !slices.Equal(got, []string{"one.test"}) {
		t.Errorf("after refusals: %q", got)
	}
}

// A node that has a journal of its own keeps it, and takes the backup's beside it, also where both have given the same numbers.
func TestARestoreTakesNeitherJournalForTheOther(t *testing.T) {
	entry := func(n *node, command string, domains ...string) {
		n.sql(t, `INSERT INTO node.journal (epoch_n, epoch_owner, serial, at, who, node, command, by_n, by_owner)
			VALUES (1, 1, 7, '2026-01-01', 'root', 1, '`+command+`', 2, 2)`)
		for i, d := range domains {
			n.sql(t, fmt.Sprintf(`INSERT INTO node.journal_change SELECT max(id), %d, 'domain', 'insert', '{"name": "%s"}', NULL, '{"name": "%s"}' FROM node.journal`,
				i+1, d, d))
		}
	}
	old := &node{dsn: pgtest.New(t)}
	old.DB = openDSN(t, old.dsn)
	put(t, old.DB, "a.test")
	entry(old, "theirs", "b.test", "c.test")
	x := dump(t, old.DB, db.WithoutLogs)
	own := &node{dsn: pgtest.New(t)}
	own.DB = openDSN(t, own.dsn)
	entry(own, "ours", "d.test")
	journal := func() (all []string) {
		entries, err := own.Journal(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		for _, e := range entries {
			text := e.Command
			for _, c := range e.Changes {
				text += " " + string(c.Key)
			}
			all = append(all, text)
		}
		return all
	}
	want := []string{`ours {"name": "d.test"}`, `theirs {"name": "b.test"} {"name": "c.test"}`}
	for range 2 {
		if _, err := own.RestoreSingle(t.Context(), x.params(), x.feed); err != nil {
			t.Fatal(err)
		}
		if got := journal(); !slices.Equal(got, want) {
			t.Errorf("journal %q, want %q", got, want)
		}
	}
}
