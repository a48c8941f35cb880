package db_test

import (
	"bytes"
	"context"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"mailproxy/config"
	"mailproxy/db"
	"mailproxy/internal/pgtest"
	"mailproxy/secret"
)

// theSecret is looked for as it is, in hexadecimal as bytea is written, and in base64.
const theSecret = "hunter2-correct-horse"

func putSecret(t testing.TB, n *node, name, value string) {
	t.Helper()
	commit(t, n.DB, func(ctx context.Context, tx *db.Tx) error { return tx.PutSecret(ctx, name, []byte(value)) })
}

func wantSecret(t testing.TB, n *node, name, want string) {
	t.Helper()
	if got, err := n.Secret(t.Context(), name); err != nil || string(got) != want {
		t.Errorf("node %d: secret %s is %q, %v, want %q", n.cid, name, got, err, want)
	}
}

// keys gives the public keys that hold a data key, sorted, and how many data keys there are.
func keyHolders(t testing.TB, n *node) (holders string, ids string) {
	t.Helper()
	return one[string](t, n.dsn, "SELECT coalesce(string_agg(public_key, ',' ORDER BY public_key), '') FROM config.secret_key"),
		one[string](t, n.dsn, "SELECT coalesce(string_agg(DISTINCT key_id, ','), '') FROM config.secret_key")
}

func wantHolders(t testing.TB, n *node, cids ...config.CID) (id string) {
	t.Helper()
	holders, id := keyHolders(t, n)
	if strings.Count(holders, ",")+1 != len(cids) || len(id) != 16 {
		t.Errorf("node %d: data keys %q are held by %s, want one, by %v", n.cid, id, holders, cids)
	}
	for _, cid := range cids {
		if !strings.Contains(holders, publicText(nodeKey(cid))) {
			t.Errorf("node %d: CID %d holds no data key", n.cid, cid)
		}
	}
	return id
}

func TestEveryMemberOpensASecret(t *testing.T) {
	c := cluster(t, 3)
	putSecret(t, c[0], "dkim", "one")
	wantHolders(t, c[0], 1, 2, 3)
	for _, n := range c[1:] {
		push(t, c[0], n)
		same(t, c[0], n)
		wantSecret(t, n, "dkim", "one")
	}
	if _, err := c[1].Secret(t.Context(), "none"); !errors.Is(err, db.ErrNoSuch) {
		t.Errorf("a secret that is not there: %v, want ErrNoSuch", err)
	}
	rows, err := c[2].Secrets(t.Context())
	if err != nil || len(rows) != 1 || rows[0] != (db.SecretRow{Name: "dkim"}) {
		t.Errorf("%+v, %v", rows, err)
	}
	// Another one, and the same once more, by the same data key.
	_, before := keyHolders(t, c[0])
	putSecret(t, c[0], "smtp", "two")
	if _, id := keyHolders(t, c[0]); id != before {
		t.Error("a second secret made a second data key")
	}
	// With the last secret the data key goes.
	for _, name := range []string{"dkim", "smtp"} {
		wantHolders(t, c[0], 1, 2, 3)
		commit(t, c[0].DB, func(ctx context.Context, tx *db.Tx) error { return tx.DeleteSecret(ctx, name) })
	}
	if holders, _ := keyHolders(t, c[0]); holders != "" {
		t.Errorf("held by %s", holders)
	}
}

func TestANodeThatEntersOpensWhatWasThere(t *testing.T) {
	c := cluster(t, 1)
	putSecret(t, c[0], "dkim", theSecret)
	id := wantHolders(t, c[0], 1)
	// A single node before it, too: its data key goes on.
	enter := func(ctx context.Context, tx *db.Tx) error { return tx.PutNode(ctx, member(2)) }
	commit(t, c[0].DB, enter)
	if again := wantHolders(t, c[0], 1, 2); again != id {
		t.Error("a node that enters changed the data key")
	}
	before := c[0].state(t).Position
	if at := commit(t, c[0].DB, enter); at != before { // a join that was killed half-way and is run again
		t.Errorf("the same node again takes a commit: %v, was %v", at, before)
	}
	dsn := pgtest.New(t)
	slave := &node{DB: openAs(t, dsn, nodeKey(2)), dsn: dsn, cid: 2}
	slave.enter(t, config.Epoch{N: 1, Owner: 1})
	push(t, c[0], slave)
	wantSecret(t, slave, "dkim", theSecret)
}

func TestASingleNodeTakesItsSecretsIntoACluster(t *testing.T) {
	dsn := pgtest.New(t)
	n := &node{DB: openAs(t, dsn, nodeKey(1)), dsn: dsn, cid: 1}
	putSecret(t, n, "dkim", theSecret)
	id := wantHolders(t, n, 1)
	err := n.CreateCluster(t.Context(), db.CreateParams{ClusterID: clusterID, Node: member(1), CA: config.CA{Fingerprint: "SHA256:a", PublicKey: "x", CID: 1}})
	if err != nil {
		t.Fatal(err)
	}
	if wantHolders(t, n, 1) != id {
		t.Error("a create changed the data key")
	}
	wantSecret(t, n, "dkim", theSecret)
}

// A deleted node has its database, its key, and whatever it can read later, say from a stolen dump of another: it opens what it knew, and
// nothing that was set since.
func TestADeletedNodeOpensNothingThatIsSetLater(t *testing.T) {
	c := cluster(t, 3)
	putSecret(t, c[0], "dkim", "old")
	push(t, c[0], c[1])
	push(t, c[0], c[2])
	before := wantHolders(t, c[0], 1, 2, 3)
	commit(t, c[0].DB, func(ctx context.Context, tx *db.Tx) error { return tx.Revoke(ctx, 3) })
	if wantHolders(t, c[0], 1, 2) == before {
		t.Error("the data key is still the one that the deleted node knows")
	}
	at := c[2].state(t).Position
	if _, err := c[0].Push(t.Context(), peer(t, c[2], 1), nil); !errors.Is(err, db.ErrNotMember) || c[2].state(t).Position != at {
		t.Errorf("a push to the deleted node, before its tunnel is cut: %v, it is at %v, was at %v", err, c[2].state(t).Position, at)
	}
	putSecret(t, c[0], "dkim", "new")
	push(t, c[0], c[1])
	for _, n := range c[:2] {
		wantSecret(t, n, "dkim", "new")
		if old := one[int64](t, n.dsn, "SELECT count(*) FROM config.secret WHERE key_id = $1", before); old != 0 {
			t.Errorf("node %d: %d secrets are still sealed with the old data key", n.cid, old)
		}
	}
	wantSecret(t, c[2], "dkim", "old") // which is why it was to be changed
	if rows, err := openAs(t, c[1].dsn, nodeKey(3)).Secrets(t.Context()); err != nil || !errors.Is(rows[0].Err, db.ErrNoDataKey) {
		t.Errorf("the deleted node's key on another's rows: %+v, %v, want ErrNoDataKey", rows, err)
	}
	// And with the data key that it has.
	wraps := one[[]byte](t, c[2].dsn, "SELECT wrapped FROM config.secret_key WHERE public_key = $1", publicText(nodeKey(3)))
	key, err := secret.Unwrap([]secret.Wrap{{KeyID: before, PublicKey: publicText(nodeKey(3)), Wrapped: wraps}}, nodeKey(3))
	if err != nil {
		t.Fatal(err)
	}
	for _, column := range []string{"dkim"} {
		if v, err := key.Open(column, one[[]byte](t, c[1].dsn, "SELECT value FROM config.secret WHERE name = $1", column)); err == nil {
			t.Errorf("it opens %s: %q", column, v)
		}
	}
}

// A slave that was promoted has the data key, and gives the others another one when it deletes the master that was.
func TestANewMasterRotatesTheDataKey(t *testing.T) {
	c := cluster(t, 2)
	putSecret(t, c[0], "dkim", "old")
	push(t, c[0], c[1])
	before := wantHolders(t, c[1], 1, 2)
	e := config.Epoch{N: 2, Owner: 2}
	if _, err := c[1].Promise(t.Context(), e); err != nil {
		t.Fatal(err)
	}
	if _, err := c[1].BeginEpoch(t.Context(), e, db.ByForce, author); err != nil {
		t.Fatal(err)
	}
	c[1].sql(t, "UPDATE node.position SET lease_waived = true")
	commit(t, c[1].DB, func(ctx context.Context, tx *db.Tx) error { return tx.Revoke(ctx, 1) })
	if wantHolders(t, c[1], 2) == before {
		t.Error("the data key is still the one that the deleted master knows")
	}
	wantSecret(t, c[1], "dkim", "old")
}

func TestANodeThatLeavesKeepsItsSecretsUnderItsNextKey(t *testing.T) {
	c := cluster(t, 2)
	putSecret(t, c[0], "dkim", theSecret)
	push(t, c[0], c[1])
	before := wantHolders(t, c[1], 1, 2)
	leave := func(key config.CID) {
		t.Helper()
		next := openAs(t, c[1].dsn, nodeKey(key)) // whichever key file is there when it is run again
		err := next.Leave(t.Context(), db.LeaveParams{ClusterID: clusterID, NextKey: publicOf(nodeKey(20)), Author: author})
		if err != nil {
			t.Fatal(err)
		}
	}
	leave(2)
	if wantHolders(t, c[1], 20) == before {
		t.Error("its data key is the cluster's")
	}
	leave(2)
	leave(20)
	n := &node{DB: openAs(t, c[1].dsn, nodeKey(20)), dsn: c[1].dsn}
	wantSecret(t, n, "dkim", theSecret)
	putSecret(t, n, "smtp", "own")
	wantSecret(t, n, "smtp", "own")
	if kept, rows, err := n.Verify(t.Context()); err != nil || kept != rows {
		t.Errorf("kept %v, rows %v, %v", kept, rows, err)
	}
}

// Whoever cannot open its secrets leaves all the same.
func TestANodeWithoutItsKeyLeaves(t *testing.T) {
	c := cluster(t, 2)
	putSecret(t, c[0], "dkim", theSecret)
	push(t, c[0], c[1])
	lost := &node{DB: openAs(t, c[1].dsn, nodeKey(9)), dsn: c[1].dsn}
	err := lost.Leave(t.Context(), db.LeaveParams{ClusterID: clusterID, NextKey: publicOf(nodeKey(20)), Author: author})
	if st := lost.state(t); err != nil || st.CID != 0 {
		t.Errorf("%+v, %v", st, err)
	}
	// What is lost can be removed, and then all is well again.
	n := &node{DB: openAs(t, c[1].dsn, nodeKey(20)), dsn: c[1].dsn}
	if _, err := n.Secret(t.Context(), "dkim"); !errors.Is(err, db.ErrNoDataKey) {
		t.Errorf("%v, want ErrNoDataKey", err)
	}
	commit(t, n.DB, func(ctx context.Context, tx *db.Tx) error { return tx.DeleteSecret(ctx, "dkim") })
	putSecret(t, n, "dkim", "again")
	wantSecret(t, n, "dkim", "again")
}

func TestTamperingIsSeen(t *testing.T) {
	c := cluster(t, 2)
	n := c[0]
	putSecret(t, n, "a", "value of a")
	putSecret(t, n, "b", "value of b")
	n.sql(t, `UPDATE config.secret s SET value = o.value FROM config.secret o WHERE o.name <> s.name`)
	for _, name := range []string{"a", "b"} {
		if v, err := n.Secret(t.Context(), name); !errors.Is(err, secret.ErrSealed) || v != nil {
			t.Errorf("%s: %q, %v, want ErrSealed", name, v, err)
		}
	}
	rows, err := n.Secrets(t.Context())
	if err != nil || !errors.Is(rows[0].Err, secret.ErrSealed) {
		t.Errorf("%+v, %v", rows, err)
	}
	// What is lost keeps no node in.
	putSecret(t, n, "a", "again")
	commit(t, n.DB, func(ctx context.Context, tx *db.Tx) error { return tx.Revoke(ctx, 2) })
	wantHolders(t, n, 1)
	wantSecret(t, n, "a", "again")
	if _, err := n.Secret(t.Context(), "b"); !errors.Is(err, secret.ErrSealed) {
		t.Errorf("b: %v, want ErrSealed", err)
	}
}

// A master whose key opens nothing lets nobody in and out, and stores no secret; and says why.
func TestWithoutItsKeyAMasterChangesNothing(t *testing.T) {
	c := cluster(t, 2)
	putSecret(t, c[0], "dkim", theSecret)
	before := c[0].state(t).Position
	for what, d := range map[string]*db.DB{"another key": openAs(t, c[0].dsn, nodeKey(9)), "no key": openWithout(t, c[0].dsn)} {
		for step, edit := range map[string]func(ctx context.Context, tx *db.Tx) error{
			"let in":   func(ctx context.Context, tx *db.Tx) error { return tx.PutNode(ctx, member(3)) },
			"delete":   func(ctx context.Context, tx *db.Tx) error { return tx.Revoke(ctx, 2) },
			"a secret": func(ctx context.Context, tx *db.Tx) error { return tx.PutSecret(ctx, "x", []byte("y")) },
		} {
			if _, err := d.Commit(t.Context(), author, edit, nil); !errors.Is(err, db.ErrNoDataKey) {
				t.Errorf("%s, %s: %v, want ErrNoDataKey", what, step, err)
			}
		}
		if _, err := d.Secret(t.Context(), "dkim"); !errors.Is(err, db.ErrNoDataKey) {
			t.Errorf("%s: %v, want ErrNoDataKey", what, err)
		}
		commit(t, d, func(ctx context.Context, tx *db.Tx) error { return tx.PutNode(ctx, member(2)) }) // needs no key
	}
	if at := c[0].state(t).Position; at != before {
		t.Errorf("it is at %v, was at %v", at, before)
	}
	wantSecret(t, c[0], "dkim", theSecret)
}

// A cluster of which nobody has stored a secret needs no key for anything.
func TestWithoutSecretsNoKeyIsRead(t *testing.T) {
	c := cluster(t, 1)
	d := openWithout(t, c[0].dsn)
	commit(t, d, func(ctx context.Context, tx *db.Tx) error { return tx.PutNode(ctx, member(2)) })
	commit(t, d, func(ctx context.Context, tx *db.Tx) error { return tx.Revoke(ctx, 2) })
	if rows, err := d.Secrets(t.Context()); err != nil || len(rows) != 0 {
		t.Errorf("%+v, %v", rows, err)
	}
}

func TestWhatAnEarlierVersionStoredIsReadAndThenSealed(t *testing.T) {
	c := cluster(t, 1)
	c[0].sql(t, `INSERT INTO config.secret (name, value) VALUES ('old', 'stored before')`)
	wantSecret(t, c[0], "old", "stored before")
	if rows, err := c[0].Secrets(t.Context()); err != nil || !rows[0].Clear {
		t.Errorf("%+v, %v", rows, err)
	}
	putSecret(t, c[0], "new", "x")
	c[0].sql(t, `INSERT INTO config.secret (name, value) VALUES ('by hand', 'and again')`)
	putSecret(t, c[0], "newer", "y")
	rows, err := c[0].Secrets(t.Context())
	if err != nil || len(rows) != 4 {
		t.Fatalf("%+v, %v", rows, err)
	}
	for _, r := range rows {
		if r.Clear || r.Err != nil {
			t.Errorf("%+v", r)
		}
	}
	wantSecret(t, c[0], "old", "stored before")
	wantSecret(t, c[0], "by hand", "and again")
}

// Nowhere at the server does a secret stand as it is: not in a dump, not in the files of the database, nor in its log of changes.
func TestASecretReachesTheServerSealed(t *testing.T) {
	pair := pgtest.NewPair(t)
	dsn := "host=" + pair.Primary.SocketDir + " user=postgres dbname=mailproxy"
	n := &node{DB: openAs(t, dsn, nodeKey(1)), dsn: dsn, cid: 1}
	putSecret(t, n, "dkim", theSecret)
	putSecret(t, n, "dkim", theSecret+" once more")
	n.sql(t, "CREATE TABLE public.canary AS SELECT 'a-canary-in-the-files'::text", "CHECKPOINT")
	wantSecret(t, n, "dkim", theSecret+" once more")

	out, err := exec.Command("pg_dump", dsn).CombinedOutput()
	if err != nil {
		t.Fatalf("pg_dump: %v: %s", err, out)
	}
	nowhere(t, "pg_dump", out, true)
	found := false
	err = filepath.WalkDir(filepath.Join(pair.Primary.SocketDir, "data"), func(path string, d os.DirEntry, err error) error {
		if err != nil || !d.Type().IsRegular() {
			return err
		}
		b, err := os.ReadFile(path)
		if errors.Is(err, os.ErrNotExist) {
			return nil
		}
		found = nowhere(t, path, b, false) || found
		return err
	})
	if err != nil || !found {
		t.Errorf("the files were not read: canary found: %v, %v", found, err)
	}
}

// nowhere wants no form of theSecret in what a server keeps, and says whether the canary is there, which is wanted in a dump.
func nowhere(t *testing.T, where string, b []byte, canary bool) bool {
	t.Helper()
	for _, form := range []string{theSecret, "68756e746572322d636f7272656374", "aHVudGVyMi1jb3JyZWN0"} {
		if bytes.Contains(bytes.ToLower(b), []byte(form)) || bytes.Contains(b, []byte(form)) {
			t.Errorf("%s holds the secret as %s", where, form)
		}
	}
	has := bytes.Contains(b, []byte("a-canary-in-the-files"))
	if canary && !has {
		t.Errorf("%s lacks the canary", where)
	}
	return has
}
