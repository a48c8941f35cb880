package cluster

import (
	"os/exec"
	"strconv"
	"strings"
	"testing"
	"time"

	"mailproxy/config"
	"mailproxy/db"
)

func TestHeldByAll(t *testing.T) {
	heard := func(p config.Position) standing {
		return standing{asked: true, answered: time.Unix(1e9, 0), state: db.State{CID: 9, Position: p}}
	}
	for _, c := range []struct {
		name   string
		others []standing
		want   int64
		ok     bool
	}{
		{"alone", nil, 9, true},
		{"the one that is furthest behind counts", []standing{heard(at(2, 1, 8, 7)), heard(at(2, 1, 5, 7)), heard(at(2, 1, 9, 7))}, 5, true},
		{"one was never heard", []standing{heard(at(2, 1, 9, 7)), {asked: true}}, 0, false},
		{"one is in another epoch", []standing{heard(at(1, 1, 9, 7))}, 0, false},
		{"one has not been pushed to", []standing{heard(config.Position{})}, 0, false},
		{"one is ahead of us", []standing{heard(at(2, 1, 10, 7))}, 0, false},
	} {
		t.Run(c.name, func(t *testing.T) {
			held, ok := heldByAll(at(2, 1, 9, 7), c.others)
			if ok != c.ok || ok && (held.Serial != c.want || held.Epoch != (config.Epoch{N: 2, Owner: 1})) {
				t.Errorf("held %v, %v", held, ok)
			}
		})
	}
}

// query runs a statement on the node's database as an administrator with psql does, and gives what it prints.
func (n *testNode) query(sql string) string {
	n.t.Helper()
	out, err := exec.Command("psql", "-v", "ON_ERROR_STOP=1", "-qAt", n.dsn, "-c", sql).CombinedOutput()
	if err != nil {
		n.t.Fatalf("psql: %v: %s", err, out)
	}
	return strings.TrimSpace(string(out))
}

func TestTrimmedCommitsAreKeptOnlyForMembersThatLackThem(t *testing.T) {
	nodes := newCluster(t, 3)
	kept := func() int {
		n, err := strconv.Atoi(nodes[0].query("SELECT count(*) FROM node.trimmed"))
		if err != nil {
			t.Fatal(err)
		}
		return n
	}
	nodes[2].stopDaemon()
	nodes[0].query(`DO $$ BEGIN FOR i IN 1..1100 LOOP INSERT INTO config.domain (name) VALUES ('d' || i || '.test'); COMMIT; END LOOP; END $$`)
	if n := kept(); n < 100 {
		t.Fatalf("%d commits are kept", n)
	}
	inSync(t, nodes[:2]...)
	eventually(t, "what both had before is forgotten", func() bool { return kept() <= 100 })
	nodes[0].mustPutDomain("more.test")
	if n := kept(); n < 100 {
		t.Errorf("%d are kept, though a member lacks them", n)
	}
	if _, err := nodes[0].operator().Delete(t.Context(), 3, nil); err != nil {
		t.Fatal(err)
	}
	eventually(t, "nothing is kept for a member that was deleted", func() bool { return kept() == 0 })
	nodes[0].mustPutDomain("last.test")
	inSync(t, nodes[:2]...)
	eventually(t, "nothing is kept in a cluster that is in sync", func() bool { return kept() == 0 })
}
