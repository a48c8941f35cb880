package cluster

import (
	"context"
	"fmt"
	"time"

	"mailproxy/config"
	"mailproxy/db"
)

// restored says what a node lacks that was brought back from a backup with its identity: nobody has pushed to it yet.
func (n *Node) restored(ctx context.Context, st db.State) []Problem {
	if !joining(st) {
		return nil
	}
	ctx, cancel := context.WithTimeout(ctx, selfTimeout)
	defer cancel()
	r, err := n.o.DB.Restored(ctx)
	if err != nil || r == nil { // an error is that of a database that is away, which is said
		return nil
	}
	if !r.Keys {
		return []Problem{{"a restore was begun here and is not finished: the keys are missing", "run the same `mailproxy restore --identity` again"}}
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	return restoredProblem(r, n.views)
}

// restoredProblem says what is to be done by what the peers are. A master in reach pushes by itself; where there is none, this node was it,
// or it is lost too, and the newest of the others is to be promoted: this node has no vote, and is never taken for the newest.
func restoredProblem(r *db.Restored, views map[config.CID]*view) []Problem {
	newest, at := config.CID(0), config.Position{}
	for cid, v := range views {
		if !v.answered || v.err != nil || joining(v.state) {
			continue
		}
		if v.state.IsMaster() {
			return []Problem{{
				fmt.Sprintf("restored from a backup of %s, and not pushed to yet", r.MadeAt.UTC().Format(time.RFC3339)),
				fmt.Sprintf("none: node %d is master and pushes by itself", cid),
			}}
		}
		if c := v.state.Position.Compare(at); newest == 0 || c > 0 || c == 0 && cid < newest {
			newest, at = cid, v.state.Position
		}
	}
	what := fmt.Sprintf("restored from a backup of %s at %v: no configuration is taken here before a master has pushed to this node",
		r.MadeAt.UTC().Format(time.RFC3339), r.Position)
	switch {
	case newest == 0:
		return []Problem{{what, "bring another node back, and run `pmgcm promote` there; where none is left, " +
			"restore without --identity on a fresh node, and `pmgcm create`"}}
	case at.Compare(r.Position) > 0:
		what = fmt.Sprintf("rolled back: node %d holds %v, and this node was ", newest, at) + what
	}
	return []Problem{{what, fmt.Sprintf("`pmgcm promote` on node %d", newest)}}
}
