package cluster

import (
	"errors"
	"strings"
	"testing"
	"time"

	"mailproxy/config"
	"mailproxy/db"
)

func TestARestoredNodeSaysWhatIsToBeDone(t *testing.T) {
	at := func(n int64, owner config.CID, serial int64) config.Position {
		return config.Position{Epoch: config.Epoch{N: n, Owner: owner}, Serial: serial}
	}
	r := &db.Restored{MadeAt: time.Unix(1e9, 0), Position: at(1, 1, 5), Keys: true}
	slave := func(cid config.CID, p config.Position) *view {
		return &view{answered: true, state: db.State{CID: cid, Position: p, Promised: p.Epoch}}
	}
	away := slave(2, at(1, 1, 9))
	away.err = errors.New("away")
	for _, c := range []struct {
		name   string
		views  map[config.CID]*view
		what   string
		remedy string
	}{
		{"nobody was heard", nil, "restored from a backup of 2001-09-09T01:46:40Z at 1.1/5: no configuration", "bring another node back"},
		{"who is away now may not promote itself", map[config.CID]*view{2: away}, "restored", "bring another node back"},
		{"others that were restored know no more", map[config.CID]*view{2: slave(2, at(0, 0, 0))}, "restored", "bring another node back"},
		{"slaves where the backup was", map[config.CID]*view{3: slave(3, at(1, 1, 5)), 2: slave(2, at(1, 1, 5))}, "restored from", "`pmgcm promote` on node 2"},
		{"slaves behind the backup", map[config.CID]*view{2: slave(2, at(1, 1, 4))}, "restored from", "`pmgcm promote` on node 2"},
		{"slaves ahead of the backup", map[config.CID]*view{2: slave(2, at(1, 1, 7)), 3: slave(3, at(1, 1, 9))},
			"rolled back: node 3 holds 1.1/9, and this node was restored from", "`pmgcm promote` on node 3"},
		{"a master that reigns", map[config.CID]*view{2: slave(2, at(2, 2, 9)), 3: slave(3, at(2, 2, 12))}, "not pushed to yet", "none: node 2 is master"},
	} {
		t.Run(c.name, func(t *testing.T) {
			got := restoredProblem(r, c.views)
			if len(got) != 1 || !strings.HasPrefix(got[0].What, c.what) && !strings.HasSuffix(got[0].What, c.what) || !strings.HasPrefix(got[0].Remedy, c.remedy) {
				t.Errorf("got %+v, want %q and %q", got, c.what, c.remedy)
			}
		})
	}
}
