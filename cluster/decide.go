package cluster

import (
	"sort"

	"mailproxy/config"
	"mailproxy/db"
)

// A Relation says what one node's configuration is beside another's.
type Relation string

// The relations, as status shows them. Ahead is a node that holds commits of the master's own epoch which the master lacks: the
// master's store was rolled back. Stale is a node of an epoch that is over, or one whose database cannot confirm where it is.
const (
	InSync      Relation = "in sync"
	Behind      Relation = "behind"
	Drifted     Relation = "drifted"
	Ahead       Relation = "ahead"
	Stale       Relation = "stale"
	Joining     Relation = "joining"
	Unreachable Relation = "unreachable"
)

// relate says what theirs is beside master, which is the newest master's position.
func relate(master, theirs config.Position) Relation {
	switch c := theirs.Compare(master); {
	case theirs.Epoch.N == 0:
		return Joining
	case theirs.Epoch.Compare(master.Epoch) > 0:
		return Ahead
	case c > 0:
		return Ahead
	case c < 0:
		return Behind
	case theirs.Digest != master.Digest:
		return Drifted
	}
	return InSync
}

// joining says whether a member has not been pushed to yet: it has no vote.
func joining(s db.State) bool { return s.CID != 0 && s.Position.Epoch.N == 0 }

// A Role is what a node is in its cluster.
type Role string

// The roles. Single is a node that is in no cluster; it takes configuration as a master does.
const (
	Single Role = "single"
	Master Role = "master"
	Slave  Role = "slave"
)

// roleOf reads the role from the one row that decides it.
func roleOf(s db.State) Role {
	switch {
	case s.CID == 0:
		return Single
	case s.IsMaster():
		return Master
	}
	return Slave
}

// deposed says whether s was the last master that it knows of, and has since given a promise that nobody has made good.
func deposed(s db.State) bool {
	return s.CID != 0 && s.Position.Epoch.Owner == s.CID && s.Promised.Compare(s.Position.Epoch) > 0
}

// majority is the smallest number of members of which any two sets share one.
func majority(members int) int { return members/2 + 1 }

// An answer is what one member said when it was asked.
type answer struct {
	node     config.Node
	state    db.State
	err      error
	promised bool // it has promised the epoch that was asked for
}

// voters is the number of members that have a vote: all but those that answered that they are still joining.
func voters(answers []answer) int {
	n := 0
	for _, a := range answers {
		if a.err != nil || !joining(a.state) {
			n++
		}
	}
	return n
}

// votes counts the members that answered and have a vote; with promised, only those that gave the promise.
func votes(answers []answer, promised bool) int {
	n := 0
	for _, a := range answers {
		if a.err == nil && !joining(a.state) && (a.promised || !promised) {
			n++
		}
	}
	return n
}

// nextEpoch is the epoch after every one that the answers know of, in force or promised.
func nextEpoch(self config.CID, answers []answer) config.Epoch {
	var n int64
	for _, a := range answers {
		if a.err == nil {
			n = max(n, a.state.Promised.N, a.state.Position.Epoch.N)
		}
	}
	return config.Epoch{N: n + 1, Owner: self}
}

// adoptFrom chooses among the promisers the one whose configuration the new epoch starts from: the newest position. Where
// several hold that position with different digests (drift), the word of the epoch's owner counts, then the digest that most
// hold; then self before others, since nothing need be fetched; then the lowest CID.
func adoptFrom(self config.CID, answers []answer) (answer, bool) {
	var best []answer
	for _, a := range answers {
		if a.err != nil || !a.promised || joining(a.state) {
			continue
		}
		if len(best) > 0 {
			switch a.state.Position.Compare(best[0].state.Position) {
			case -1:
				continue
			case 1:
				best = best[:0]
			}
		}
		best = append(best, a)
	}
	if len(best) == 0 {
		return answer{}, false
	}
	held := map[config.Digest]int{}
	var owners config.Digest
	hasOwner := false
	for _, a := range best {
		d := a.state.Position.Digest
		held[d]++
		if a.node.CID == a.state.Position.Epoch.Owner {
			owners, hasOwner = d, true
		}
	}
	rank := func(a answer) (r [3]int) {
		if hasOwner && a.state.Position.Digest == owners {
			r[0] = 1
		}
		r[1] = held[a.state.Position.Digest]
		if a.node.CID == self {
			r[2] = 1
		}
		return r
	}
	sort.SliceStable(best, func(i, j int) bool {
		a, b := rank(best[i]), rank(best[j])
		for k := range a {
			if a[k] != b[k] {
				return a[k] > b[k]
			}
		}
		return best[i].node.CID < best[j].node.CID
	})
	return best[0], true
}

// holds says whether a member has a commit from the master that made it, so that it counts for the majority which no later promote
// can pass by. A position alone does not say so: one that took it over for a round of its own has promised more, and another round that it
// had promised before may begin without; and a higher epoch may have begun from an older position.
func holds(theirs db.State, pos config.Position) bool {
	return theirs.Promised == pos.Epoch && theirs.Position.Epoch == pos.Epoch && theirs.Position.Serial >= pos.Serial
}

// sameMembers says whether two member lists hold the same nodes.
func sameMembers(a, b []config.Node) bool {
	if len(a) != len(b) {
		return false
	}
	have := map[config.CID]bool{}
	for _, n := range a {
		have[n.CID] = true
	}
	for _, n := range b {
		if !have[n.CID] {
			return false
		}
	}
	return true
}

// memberOf finds a member by its CID.
func memberOf(nodes []config.Node, cid config.CID) (config.Node, bool) {
	for _, n := range nodes {
		if n.CID == cid {
			return n, true
		}
	}
	return config.Node{}, false
}
