package cluster

import (
	"context"
	"encoding/json"
	"errors"
	"strings"
	"testing"
	"time"

	"mailproxy/config"
	"mailproxy/db"
)

// knowsItWasDeleted waits until status on the node names that and one remedy, and wants everything else to lead there and nowhere else.
func knowsItWasDeleted(t *testing.T, n *testNode, cid config.CID) {
	t.Helper()
	var r Report
	eventually(t, "status says that it was deleted", func() bool {
		r = n.status(StatusParams{})
		p := row(t, r, cid).Problems
		return len(p) > 0 && strings.HasPrefix(p[0].What, "this node was deleted") && strings.HasPrefix(p[0].Remedy, "`pmgcm leave` here")
	})
	if own := row(t, r, cid); own.State != Stale {
		t.Errorf("state %s", own.State)
	}
	problems := 0
	for _, row := range r.Rows {
		for _, p := range row.Problems {
			if !strings.Contains(p.What, "set aside here") {
				problems++
			}
			if strings.Contains(p.Remedy, "promote") || problems > 1 {
				t.Errorf("node %d: %+v", row.CID, p)
			}
		}
	}
	before := n.state()
	for _, force := range []bool{false, true} {
		if _, err := n.operator().Promote(t.Context(), force); !errors.Is(err, ErrNotLetIn) {
			t.Errorf("promote, forced %v: %v", force, err)
		}
	}
	if after := n.state(); after.Promised != before.Promised || after.Position != before.Position {
		t.Errorf("a refused promote changed %+v to %+v", before, after)
	}
}

// signedBy waits until the nodes have certificates of node cid's newest CA, which one that was away does not know.
func signedBy(t *testing.T, cid config.CID, nodes ...*testNode) {
	t.Helper()
	eventually(t, "certificates of the new CA", func() bool {
		s, err := nodes[0].db.Load(t.Context())
		if err != nil {
			return false
		}
		ca, ok := signer(s.CAs, cid)
		for _, n := range nodes {
			own := n.node.o.Tunnel.Certificate()
			ok = ok && own != nil && own.CA == ca.Fingerprint
		}
		return ok
	})
}

func TestAnOldMasterThatWasDeletedWhileItWasAwayIsNoSecondMaster(t *testing.T) {
	nodes := newCluster(t, 3)
	old := nodes[0]
	old.stopDaemon()
	old.mustPutDomain("only-here.test")
	if _, err := nodes[1].operator().Promote(t.Context(), false); err != nil {
		t.Fatal(err)
	}
	if _, err := nodes[1].operator().Delete(t.Context(), 1, nil); err != nil {
		t.Fatal(err)
	}
	signedBy(t, 2, nodes[1], nodes[2])
	old.psql("DELETE FROM node.lease") // as 10 s later
	old.start()
	knowsItWasDeleted(t, old, 1)
	if err := old.operator().Leave(t.Context(), nil); err != nil {
		t.Fatal(err)
	}
	left(t, old, "only-here.test")
	if cid, err := old.join(nodes[1].joinParams()); err != nil || cid != 4 {
		t.Errorf("join: CID %d, %v", cid, err)
	}
	inSync(t, nodes[1], nodes[2], old)
}

func TestASlaveThatWasDeletedWhileItWasAwayIsLedToLeave(t *testing.T) {
	nodes := newCluster(t, 3)
	nodes[0].mustPutDomain("example.test")
	inSync(t, nodes...)
	slave := nodes[2]
	slave.stopDaemon()
	if _, err := nodes[0].operator().Delete(t.Context(), 3, nil); err != nil {
		t.Fatal(err)
	}
	if _, _, err := nodes[0].operator().AddCA(t.Context()); err != nil {
		t.Fatal(err)
	}
	signedBy(t, 1, nodes[0], nodes[1])
	slave.start()
	knowsItWasDeleted(t, slave, 3)
	body, _ := json.Marshal(nodeChange{Name: "mx9"})
	err := slave.operator().askMaster(t.Context(), slave.state(), "/member/node", body, nil)
	if !errors.Is(err, ErrNotLetIn) || !errors.Is(err, ErrMasterAway) {
		t.Errorf("what the master is asked: %v", err)
	}
	// The master is lost: who is left still says no.
	nodes[0].stopDaemon()
	eventually(t, "the master is away", func() bool {
		p := slave.node.Self(t.Context(), false).Peers
		return !p[0].NotLetIn && p[1].NotLetIn
	})
	knowsItWasDeleted(t, slave, 3)
	if err := slave.operator().Leave(t.Context(), nil); err != nil {
		t.Fatal(err)
	}
	left(t, slave, "example.test")
}

// Two nodes, and the other one was put back to before this one joined: only an operator can know.
func TestAnOperatorsWordMakesANodeMasterThatIsNotLetIn(t *testing.T) {
	nodes := newCluster(t, 2)
	if _, err := nodes[0].operator().Delete(t.Context(), 2, nil); err != nil {
		t.Fatal(err)
	}
	knowsItWasDeleted(t, nodes[1], 2)
	o := nodes[1].operator()
	o.NotDeleted = true
	if _, err := o.Promote(t.Context(), false); !errors.Is(err, ErrNoMajority) {
		t.Errorf("not forced: %v", err)
	}
	if _, err := o.Promote(t.Context(), true); err != nil {
		t.Errorf("forced: %v", err)
	}
	// And then it can still leave.
	if err := o.Leave(t.Context(), nil); err != nil {
		t.Errorf("leave: %v", err)
	}
}

// A delete that was killed once the node was revoked has yet to wait, and to name what is to be changed.
func TestADeleteThatWasKilledGoesOn(t *testing.T) {
	nodes := newCluster(t, 3)
	if _, err := nodes[0].db.Commit(t.Context(), db.Author{Who: "t"}, func(ctx context.Context, tx *db.Tx) error {
		return tx.PutSecret(ctx, "dkim-key", []byte("x"))
	}, nil); err != nil {
		t.Fatal(err)
	}
	inSync(t, nodes...)
	nodes[1].stopDaemon()
	revoke := func(ctx context.Context, tx *db.Tx) error { return tx.Revoke(ctx, 3) }
	if _, err := nodes[0].db.Commit(t.Context(), db.Author{Who: "t"}, revoke, nil); err != nil {
		t.Fatal(err)
	}
	o := nodes[0].operator()
	o.Patience = time.Second
	unasked := func(config.Node) bool { t.Error("it is asked again"); return false }
	d, err := o.Delete(t.Context(), 3, unasked)
	if err != nil || !d.Already || d.Node.Name != "mx3" || d.Majority || len(d.Missing) != 1 || d.Missing[0].CID != 2 {
		t.Errorf("while less than a majority can know: %+v, %v", d, err)
	}
	nodes[1].start()
	if d, err = nodes[0].operator().Delete(t.Context(), 3, unasked); err != nil || !d.Majority || len(d.Missing) > 0 || len(d.Secrets) != 1 {
		t.Errorf("once the other is back: %+v, %v", d, err)
	}
}
