package cluster

import (
	"crypto/ed25519"
	"errors"
	"os"
	"path/filepath"
	"testing"

	"github.com/rs/zerolog"

	"mailproxy/db"
)

// openKeyOf opens the database of one node with the key of another, as somebody does who has stolen both.
func openKeyOf(t *testing.T, rows, key *testNode) *db.DB {
	t.Helper()
	d, err := db.Open(db.Options{DSN: rows.dsn, NodeKey: func() (ed25519.PrivateKey, error) { return key.key() }, Log: zerolog.Nop()})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(d.Close)
	return d
}

// A secret goes with a cluster through its life: from the single node, over a join, a promote, the delete of the master that was, and a
// new node of the new master's.
func TestASecretThroughALife(t *testing.T) {
	one := newTestNode(t, "mx1").start()
	one.operator() // its daemon has made the key
	eventually(t, "the node has a key", func() bool { _, err := one.key(); return err == nil })
	one.putSecret("dkim", "from the start")
	if _, err := one.operator().Create(t.Context(), CreateParams{}); err != nil {
		t.Fatal(err)
	}
	two := newTestNode(t, "mx2").start()
	if _, err := two.join(one.joinParams()); err != nil {
		t.Fatal(err)
	}
	inSync(t, one, two)
	two.wantSecret("dkim", "from the start")
	if _, err := two.operator().Promote(t.Context(), true); err != nil {
		t.Fatal(err)
	}
	inSync(t, two, one)
	one.stopDaemon()
	if _, err := two.operator().Delete(t.Context(), 1, nil); err != nil {
		t.Fatal(err)
	}
	two.putSecret("dkim", "after the delete")
	one.wantSecret("dkim", "from the start")
	if _, err := openKeyOf(t, two, one).Secret(t.Context(), "dkim"); !errors.Is(err, db.ErrNoDataKey) {
		t.Errorf("the old master's key opens it: %v", err)
	}
	three := newTestNode(t, "mx3").start()
	if _, err := three.join(two.joinParams()); err != nil {
		t.Fatal(err)
	}
	inSync(t, two, three)
	three.wantSecret("dkim", "after the delete")
}

// A master that has lost its key says so to whoever wants in, out, or another out, and nothing is changed.
func TestAMasterThatCannotOpenTheSecretsSaysSo(t *testing.T) {
	nodes := newCluster(t, 2)
	master, slave := nodes[0], nodes[1]
	master.putSecret("dkim", "x")
	inSync(t, nodes...)
	params := master.joinParams()
	key := filepath.Join(master.local.KeyDir(), "node.key")
	text, err := os.ReadFile(key)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.Remove(key); err != nil {
		t.Fatal(err)
	}
	before := master.state().Position
	third := newTestNode(t, "mx3").start()
	if _, err := third.join(params); !errors.Is(err, ErrNoDataKey) {
		t.Errorf("join: %v, want ErrNoDataKey", err)
	}
	if _, err := master.operator().Delete(t.Context(), 2, nil); !errors.Is(err, ErrNoDataKey) {
		t.Errorf("delete: %v, want ErrNoDataKey", err)
	}
	if err := slave.operator().Leave(t.Context(), nil); !errors.Is(err, ErrNoDataKey) {
		t.Errorf("leave: %v, want ErrNoDataKey", err)
	}
	if at := master.state().Position; at != before {
		t.Errorf("the master is at %v, was at %v", at, before)
	}
	// With the key back, the same commands go on.
	if err := os.WriteFile(key, text, 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := third.join(params); err != nil {
		t.Fatal(err)
	}
	inSync(t, master, slave, third)
	third.wantSecret("dkim", "x")
}
