package cluster

import (
	"context"
	"slices"
	"time"

	"mailproxy/config"
	"mailproxy/db"
)

// A standing is how one other member stands to a master, as that last heard.
type standing struct {
	asked    bool      // at least once
	answered time.Time // when that was asked which it answered last; zero: never
	state    db.State  // what it answered
}

// leaseFrom says from when on a master may count its lease: the last time that a majority of the voters, itself one of them, was known
// to hold its epoch and to have promised none above. Two nodes have a majority only together, so that the one which is left counts from now, without majority,
// once it has asked the other and was told of no other promise.
func leaseFrom(self config.Epoch, now time.Time, others []standing) (heard time.Time, byMajority, ok bool) {
	voters, refused, asked := 1, false, true
	var times []time.Time
	for _, o := range others {
		asked = asked && o.asked
		switch {
		case o.answered.IsZero():
			voters++
		case joining(o.state):
		case o.state.Promised.Compare(self) > 0:
			voters++
			refused = true
		case o.state.Promised != self || o.state.Position.Epoch != self: // it was not pushed to in this epoch
			voters++
		default:
			voters++
			times = append(times, o.answered)
		}
	}
	wanted := majority(voters) - 1
	if wanted == 0 {
		return now, true, true
	}
	if len(times) >= wanted {
		slices.SortFunc(times, func(a, b time.Time) int { return b.Compare(a) })
		// Of two the one that is left need not wait for the end of what both had.
		if heard = times[wanted-1]; now.Sub(heard) < db.LeaseTerm/2 || voters > 2 && now.Sub(heard) < db.LeaseTerm {
			return heard, true, true
		}
	}
	return now, false, voters < 3 && asked && !refused
}

// keepLease renews the lease of a master, for as long as it is one. The write guard reads what it leaves: mail is not touched.
func (n *Node) keepLease(ctx context.Context) {
	defer n.setLease(true)
	for ctx.Err() == nil {
		n.renewLease(ctx)
		n.pause(ctx, n.o.Timing.Lease, n.heard)
	}
}

func (n *Node) renewLease(ctx context.Context) {
	ctx, cancel := context.WithTimeout(ctx, askTimeout)
	defer cancel()
	others, held := n.standings(), n.o.Snapshot()
	mine, err := n.o.DB.State(ctx) // after the others' answers: what one of them has more than we have by now, we have lost
	if err != nil {
		n.warn(ctx, "lease.renew", 0, err)
		return
	}
	epoch, now := mine.Position.Epoch, time.Now()
	if rolledBack(mine.Position, others) || takenBack(held, mine) {
		if err := n.o.DB.EndLease(ctx); err != nil {
			n.warn(ctx, "lease.renew", 0, err)
			return
		}
	} else if heard, byMajority, ok := leaseFrom(epoch, now, others); ok {
		if err := n.o.DB.RenewLease(ctx, epoch, now.Sub(heard), byMajority); err != nil {
			n.warn(ctx, "lease.renew", 0, err)
			return
		}
	}
	has, err := n.o.DB.HasLease(ctx)
	if err != nil {
		n.warn(ctx, "lease.renew", 0, err)
		return
	}
	if was := n.setLease(has); was != has {
		e, event := n.o.Log.Info(), "lease.held"
		if !has {
			e, event = n.o.Log.Warn(), "lease.lost"
		}
		e.Stringer("epoch", epoch).Msg(event)
	}
}

// standings are the other members as this node last heard them.
func (n *Node) standings() []standing {
	peers := n.peers()
	n.mu.Lock()
	defer n.mu.Unlock()
	others := make([]standing, len(peers))
	for i, p := range peers {
		if v := n.views[p.CID]; v != nil {
			others[i] = standing{asked: true, answered: v.askedAt, state: v.state}
		}
	}
	return others
}

// setLease notes whether the master holds its lease, and says what was noted before.
func (n *Node) setLease(has bool) (was bool) {
	n.mu.Lock()
	defer n.mu.Unlock()
	was, n.noLease = !n.noLease, !has
	return was
}

// leaseProblem says that no configuration is taken for want of a majority.
func (n *Node) leaseProblem(st db.State) []Problem {
	n.mu.Lock()
	defer n.mu.Unlock()
	if !n.noLease || roleOf(st) != Master {
		return nil
	}
	return []Problem{{
		"no configuration is taken here: no majority of the nodes was heard lately; mail goes on",
		"bring the others back; where they are lost for good: `pmgcm promote --force` here, then `pmgcm delete` each of them",
	}}
}
