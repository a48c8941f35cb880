package cluster

import (
	"errors"
	"io/fs"
	"os"
	"strings"
	"testing"

	"mailproxy/config"
	"mailproxy/db"
	"mailproxy/tunnel"
)

// left says what a node that has left must be.
func left(t *testing.T, n *testNode, domain string) {
	t.Helper()
	if st := n.state(); st.CID != 0 || st.ClusterID != "" || !st.IsMaster() {
		t.Errorf("state %+v, want a single node's", st)
	}
	if _, err := tunnel.LoadIdentity(n.local.KeyDir()); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("identity: %v, want none", err)
	}
	if _, err := os.Stat(n.operator().leavePath()); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("the note: %v, want none", err)
	}
	s, err := n.db.Load(t.Context())
	if err != nil || len(s.Nodes)+len(s.CAs)+len(s.Revoked) != 0 || !n.hasDomain(domain) {
		t.Errorf("%+v, %v: want the configuration without the cluster", s, err)
	}
	if _, _, err := n.db.Verify(t.Context()); err != nil {
		t.Error(err)
	}
	n.mustPutDomain("own-" + domain)
}

func TestALeaveThatWasKilledGoesOn(t *testing.T) {
	nodes := newCluster(t, 2)
	master, slave := nodes[0], nodes[1]
	master.mustPutDomain("example.test")
	master.putSecret("dkim", "known to both")
	inSync(t, nodes...)
	o, st := slave.operator(), slave.state()
	revoked, err := slave.key()
	if err != nil {
		t.Fatal(err)
	}

	// Killed behind the note: status names it.
	if _, err := o.beginLeave(t.Context(), st, nil); err != nil {
		t.Fatal(err)
	}
	p := row(t, slave.status(StatusParams{}), 2).Problems
	if len(p) != 1 || !strings.Contains(p[0].What, "a leave was begun") || !strings.Contains(p[0].Remedy, "pmgcm leave") {
		t.Errorf("problems: %+v", p)
	}
	// Killed behind the master's word, which may have come or not.
	if err := o.sayGoodbye(t.Context(), st); err != nil {
		t.Fatal(err)
	}
	if err := o.sayGoodbye(t.Context(), st); err != nil {
		t.Fatalf("a second time: %v", err)
	}
	// Killed when the identity was gone, and the row not.
	if err := tunnel.RemoveIdentity(slave.local.KeyDir()); err != nil {
		t.Fatal(err)
	}
	// Killed when the database had left, and the key not: the secrets are sealed for the next one.
	next, err := tunnel.NextKey(slave.local.KeyDir())
	if err != nil {
		t.Fatal(err)
	}
	if err := o.DB.Leave(t.Context(), db.LeaveParams{ClusterID: st.ClusterID, NextKey: next, Author: o.Author}); err != nil {
		t.Fatal(err)
	}
	if _, err := slave.db.Secret(t.Context(), "dkim"); !errors.Is(err, db.ErrNoDataKey) {
		t.Errorf("with the key of the cluster: %v, want ErrNoDataKey", err)
	}
	if err := o.Leave(t.Context(), nil); err != nil {
		t.Fatal(err)
	}
	left(t, slave, "example.test")
	slave.wantSecret("dkim", "known to both")
	if key, err := slave.key(); err != nil || key.Equal(revoked) || !next.Equal(key.Public()) {
		t.Errorf("its key is not the next one: %v", err)
	}
	master.putSecret("dkim", "of the master alone")
	slave.putSecret("dkim", "its own")
	slave.wantSecret("dkim", "its own")
	eventually(t, "the master is alone", func() bool { return len(master.status(StatusParams{}).Rows) == 1 })
	if err := o.Leave(t.Context(), nil); !errors.Is(err, ErrNoCluster) {
		t.Errorf("again: %v", err)
	}
}

// What was secret stays so: a node that leaves opens what it knew, with a key that its cluster never saw, and the cluster goes on without it.
func TestANodeThatLeavesKeepsItsSecrets(t *testing.T) {
	nodes := newCluster(t, 2)
	master, slave := nodes[0], nodes[1]
	master.putSecret("dkim", "known to both")
	inSync(t, nodes...)
	if err := slave.operator().Leave(t.Context(), nil); err != nil {
		t.Fatal(err)
	}
	slave.wantSecret("dkim", "known to both")
	for _, n := range nodes {
		n.putSecret("dkim", "of "+n.local.Name)
	}
	for i, n := range nodes {
		n.wantSecret("dkim", "of "+n.local.Name)
		if _, err := openKeyOf(t, n, nodes[1-i]).Secret(t.Context(), "dkim"); !errors.Is(err, db.ErrNoDataKey) {
			t.Errorf("%s's rows with the other's key: %v, want ErrNoDataKey", n.local.Name, err)
		}
	}
	if err := slave.operator().Leave(t.Context(), nil); !errors.Is(err, ErrNoCluster) {
		t.Errorf("again: %v", err)
	}
	if _, err := slave.operator().Create(t.Context(), CreateParams{}); err != nil {
		t.Fatal(err)
	}
	slave.wantSecret("dkim", "of mx2")
}

// A note that the last step did not remove says nothing about the next cluster.
func TestANoteOfAnEarlierClusterDoesNotCount(t *testing.T) {
	nodes := newCluster(t, 2)
	slave := nodes[1]
	if err := os.WriteFile(slave.operator().leavePath(), []byte(`{"cluster_id":"another"}`), 0o600); err != nil {
		t.Fatal(err)
	}
	asked := false
	if err := slave.operator().Leave(t.Context(), func() bool { asked = true; return false }); !errors.Is(err, ErrNotConfirmed) || !asked {
		t.Errorf("%v, asked %v; want a leave from the start", err, asked)
	}
	if _, err := tunnel.LoadIdentity(slave.local.KeyDir()); err != nil {
		t.Errorf("identity: %v", err)
	}
	if err := nodes[0].operator().Leave(t.Context(), nil); !errors.Is(err, ErrMasterLeaves) {
		t.Errorf("the master: %v", err)
	}
}

func TestWhoMayLeaveWithoutAGoodbye(t *testing.T) {
	no, yes := Peer{CID: 1, NotLetIn: true}, Peer{CID: 1, Tunnel: true}
	away, other := Peer{CID: 2, Error: "connection refused"}, Peer{CID: 3, NotTrusted: true}
	as := func(p Peer, cid config.CID) Peer { p.CID = cid; return p }
	const self = 9
	for _, c := range []struct {
		name       string
		peers      []Peer
		master     config.CID
		out, known bool
	}{
		{"the master lets us in", []Peer{yes, as(no, 4)}, 1, false, true},
		{"the master does not", []Peer{no, as(yes, 4)}, 1, true, true},
		{"the master is away", []Peer{away, as(yes, 4)}, 2, false, false},
		{"the master is away, and the next one does not let us in", []Peer{away, as(no, 4)}, 2, true, true},
		{"another node answers at the master's address", []Peer{as(other, 1)}, 1, true, true},
		{"the master is no member any more", []Peer{yes}, 7, false, true},
		{"a master that a slave lets in", []Peer{yes, away, as(no, 4)}, self, false, true},
		{"a master that nobody lets in", []Peer{no, away}, self, true, true},
		{"a master whose slaves are away", []Peer{away}, self, false, false},
	} {
		t.Run(c.name, func(t *testing.T) {
			if out, known := sentAway(c.peers, c.master); out != c.out || known != c.known {
				t.Errorf("out %v, known %v", out, known)
			}
		})
	}
}

// A cluster made on the wrong host is no dead end.
func TestAMasterWithoutOtherNodesLeaves(t *testing.T) {
	nodes := newCluster(t, 2)
	if err := nodes[1].operator().Leave(t.Context(), nil); err != nil {
		t.Fatal(err)
	}
	nodes[0].mustPutDomain("example.test")
	asked := false
	if err := nodes[0].operator().Leave(t.Context(), func() bool { asked = true; return false }); !errors.Is(err, ErrNotConfirmed) || !asked {
		t.Errorf("not confirmed: %v, asked %v", err, asked)
	}
	if err := nodes[0].operator().Leave(t.Context(), nil); err != nil {
		t.Fatal(err)
	}
	left(t, nodes[0], "example.test")
	if _, err := nodes[0].operator().Create(t.Context(), CreateParams{}); err != nil {
		t.Errorf("a cluster of its own afterwards: %v", err)
	}
}

// A slave that was made master between two attempts to leave is one that others follow.
func TestALeaveThatWasBegunAsASlaveDoesNotTakeTheMasterAway(t *testing.T) {
	nodes := newCluster(t, 2)
	o := nodes[1].operator()
	if _, err := o.beginLeave(t.Context(), nodes[1].state(), nil); err != nil {
		t.Fatal(err)
	}
	if _, err := o.Promote(t.Context(), false); err != nil {
		t.Fatal(err)
	}
	if err := o.Leave(t.Context(), nil); !errors.Is(err, ErrMasterLeaves) {
		t.Errorf("leave: %v", err)
	}
	if _, err := os.Stat(o.leavePath()); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("the note: %v, want none", err)
	}
}
