package cluster

import (
	"context"
	"fmt"
	"slices"

	"mailproxy/config"
	"mailproxy/db"
)

// A master whose store was rolled back lacks commits that it has made itself, and what it would commit now would bear their numbers. It is
// known by a slave that holds them, or by what this node had loaded before, which lies in a file beside the database.

// rolledBack says whether another member holds commits of our own epoch which we lack.
func rolledBack(mine config.Position, others []standing) bool {
	return slices.ContainsFunc(others, func(o standing) bool {
		return !o.answered.IsZero() && o.state.Position.Epoch == mine.Epoch && o.state.Position.Serial > mine.Serial
	})
}

// takenBack says whether a master's database is behind what this node had loaded from it. held must have been there before mine was read.
func takenBack(held *config.Snapshot, mine db.State) bool {
	return held != nil && mine.IsMaster() && held.ClusterID == mine.ClusterID && mine.Position.Compare(held.Position) < 0
}

// TakenBack says whether s, which was just read, would take a master's configuration back: then what was loaded before is to stay in force,
// and in the file, until a new epoch begins. Only a new epoch has positions above all that were lost.
func (n *Node) TakenBack(ctx context.Context, s *config.Snapshot) bool {
	held := n.o.Snapshot()
	if held == nil || held.ClusterID != s.ClusterID || s.Position.Compare(held.Position) >= 0 {
		return false
	}
	mine, err := n.ownState(ctx)
	return err != nil || takenBack(held, mine) // where the state cannot be read, the next reload tells
}

// rolledBack names what holds commits of our own epoch which we lack. Whether there is such a thing renewLease finds out, which takes the lease
// for it: what was heard since st was read may hold what was committed since.
func (n *Node) rolledBack(st db.State) []Problem {
	held := n.o.Snapshot()
	n.mu.Lock()
	defer n.mu.Unlock()
	if roleOf(st) != Master || !n.noLease {
		return nil
	}
	var out []Problem
	for cid, v := range n.views {
		p := v.state.Position
		if v.answered && v.err == nil && p.Epoch == st.Position.Epoch && p.Serial > st.Position.Serial {
			out = append(out, Problem{
				fmt.Sprintf("rolled back: node %d holds %v, this master %v of the same epoch; no configuration is taken here", cid, p, st.Position),
				fmt.Sprintf("`pmgcm promote` on node %d", cid),
			})
		}
	}
	if len(out) == 0 && takenBack(held, st) {
		out = append(out, Problem{
			fmt.Sprintf("rolled back: this master's database is at %v, and it had %v, which stays in force; no configuration is taken here",
				st.Position, held.Position),
			"bring back a node that holds it, and run `pmgcm promote` there; where none is left: `pmgcm promote --force` here, then enter again what is missing",
		})
	}
	return out
}
