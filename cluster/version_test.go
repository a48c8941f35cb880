package cluster

import (
	"strings"
	"testing"
	"testing/fstest"
)

// tomorrow is what the next version of this program brings: a column and a table that this one does not know.
var tomorrow = fstest.MapFS{"00900_tomorrow.sql": {Data: []byte(`-- +goose Up
ALTER TABLE config.domain ADD COLUMN tomorrow text;
CREATE TABLE config.tomorrow (name text PRIMARY KEY, value text NOT NULL);`)}}

// upgrade brings a node's schema to that of the next version, as its daemon does when it starts.
func (n *testNode) upgrade() {
	n.t.Helper()
	n.stopDaemon()
	if err := n.db.Migrate(n.t.Context(), tomorrow); err != nil {
		n.t.Fatal(err)
	}
	n.start()
}

// upgradeOf is the remedy that the master's row in a report names, where it wants a node upgraded.
func upgradeOf(r Report) string {
	for _, row := range r.Rows {
		for _, p := range row.Problems {
			if strings.Contains(p.Remedy, "upgrade mailproxy on node") {
				return p.Remedy
			}
		}
	}
	return ""
}

// An upgrade that takes the slaves first, one at a time, and the master last is without a pause for anybody.
func TestSlavesOfANewerVersionArePushedTo(t *testing.T) {
	nodes := newCluster(t, 3)
	nodes[2].upgrade()
	nodes[0].mustPutDomain("a.test")
	inSync(t, nodes...)
	nodes[1].upgrade()
	if _, err := nodes[0].operator().PushTo(t.Context(), 3, true, nil); err != nil {
		t.Errorf("a full push to a newer slave: %v", err)
	}
	nodes[0].mustPutDomain("b.test")
	nodes[0].upgrade()
	nodes[0].mustPutDomain("c.test")
	nodes[0].psql("SET session_replication_role = origin; INSERT INTO config.tomorrow VALUES ('a', 'b')")
	inSync(t, nodes...)
	for _, n := range nodes {
		if kept, rows, err := n.db.Verify(t.Context()); err != nil || kept != rows || !n.hasDomain("c.test") {
			t.Errorf("%s: %v %v %v", n.local.Name, kept, rows, err)
		}
	}
	if r := nodes[1].status(StatusParams{}); upgradeOf(r) != "" {
		t.Errorf("status wants %q", upgradeOf(r))
	}
}

func TestASlaveOfAnOlderVersionKeepsWhatItHasAndStatusNamesIt(t *testing.T) {
	nodes := newCluster(t, 3)
	nodes[0].mustPutDomain("before.test")
	inSync(t, nodes...)
	old, before := nodes[1], nodes[1].state()
	nodes[2].upgrade()
	nodes[0].upgrade()
	// Rows that the old version knows too: that they would fit is not what counts.
	nodes[0].mustPutDomain("after.test")
	inSync(t, nodes[0], nodes[2])
	eventually(t, "status names the node to upgrade", func() bool {
		r := nodes[2].status(StatusParams{})
		return strings.HasPrefix(upgradeOf(r), "upgrade mailproxy on node 2;") && row(t, r, 2).State == Behind
	})
	if now := old.state(); now.Position != before.Position || !old.hasDomain("before.test") || old.hasDomain("after.test") {
		t.Errorf("the old node was at %v, and is at %v", before.Position, now.Position)
	}
	if kept, rows, err := old.db.Verify(t.Context()); err != nil || kept != rows {
		t.Errorf("the old node's rows: %v %v %v", kept, rows, err)
	}
	old.upgrade()
	inSync(t, nodes...)
	eventually(t, "status wants no upgrade any more", func() bool {
		r := nodes[2].status(StatusParams{})
		return upgradeOf(r) == "" && r.InSync
	})
}
