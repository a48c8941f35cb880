package cluster

import (
	"context"
	"net"
	"sync"
	"time"

	"mailproxy/config"
	"mailproxy/db"
)

// openPeer opens a session on a peer's PostgreSQL.
func (n *Node) openPeer(ctx context.Context, cid config.CID) (*db.Peer, error) {
	return db.OpenPeer(ctx, func(ctx context.Context) (net.Conn, error) { return n.o.Tunnel.Dial(ctx, cid, "postgres") })
}

// openBulk opens one for what may be much, which nothing else shall wait behind.
func (n *Node) openBulk(ctx context.Context, cid config.CID) (*db.Peer, error) {
	return db.OpenPeer(ctx, func(ctx context.Context) (net.Conn, error) { return n.o.Tunnel.DialBulk(ctx, cid, "postgres") })
}

// probers keeps one prober per peer, as the member list has them.
func (n *Node) probers(ctx context.Context) error {
	n.perPeer(ctx, n.probe)
	return ctx.Err()
}

// perPeer runs f once for each peer until ctx ends, begins with new members and ends those of deleted ones. It returns when all
// have ended.
func (n *Node) perPeer(ctx context.Context, f func(ctx context.Context, node config.Node, k *kicks)) {
	var running sync.WaitGroup
	defer running.Wait()
	type run struct {
		node config.Node
		end  context.CancelFunc
	}
	runs := map[config.CID]run{}
	defer func() {
		for _, r := range runs {
			r.end()
		}
	}()
	for ctx.Err() == nil {
		changed := n.nextPeers()
		peers := n.peers()
		for cid, r := range runs {
			if _, ok := memberOf(peers, cid); !ok {
				r.end()
				delete(runs, cid)
			}
		}
		for _, p := range peers {
			if _, ok := runs[p.CID]; ok {
				continue
			}
			c, end := context.WithCancel(ctx)
			runs[p.CID] = run{p, end}
			k := n.kicksOf(p.CID)
			running.Go(func() { f(c, p, k) })
		}
		n.forget(peers)
		n.pauseUntil(ctx, n.o.Timing.Confirm, changed)
	}
}

func (n *Node) kicksOf(cid config.CID) *kicks {
	n.mu.Lock()
	defer n.mu.Unlock()
	k := n.kicks[cid]
	if k == nil {
		k = newKicks()
		n.kicks[cid] = k
	}
	return k
}

// forget drops what is kept of nodes that are no longer members.
func (n *Node) forget(peers []config.Node) {
	n.mu.Lock()
	defer n.mu.Unlock()
	for cid := range n.views {
		if _, ok := memberOf(peers, cid); !ok {
			delete(n.views, cid)
			delete(n.kicks, cid)
			delete(n.pushErrs, cid)
		}
	}
}

// probe asks one peer for its position again and again, and learns from the answer: a master every few seconds, since its lease hangs on
// the answers; a slave its master as often as that confirms it, and the other slaves so seldom that there is as much to ask in a large
// cluster as in a small one.
func (n *Node) probe(ctx context.Context, node config.Node, k *kicks) {
	var p *db.Peer
	defer func() {
		if p != nil {
			p.Close()
		}
	}()
	for ctx.Err() == nil {
		var st db.State
		var err error
		asked := time.Now()
		if p, st, err = n.askPeer(ctx, p, node.CID, n.openPeer, (*db.Peer).State); ctx.Err() == nil {
			n.see(node.CID, asked, st, err)
			if err == nil {
				n.learn(ctx, st)
			}
		}
		every, soon := n.probePace(node.CID)
		if !soon && p != nil { // an open stream has the tunnel looked at every few seconds
			p.Close()
			p = nil
		}
		n.pause(ctx, every, k.probe)
	}
}

// slavesProbe is how often a slave asks another one, in Probes and for each other member. It would learn of a new epoch even if neither
// its master nor the old one could tell it. The pace is taken anew whenever the own epoch or promise changes.
const slavesProbe = 10

// probePace is how often a peer is asked, and whether that is soon enough to keep the session.
func (n *Node) probePace(cid config.CID) (every time.Duration, soon bool) {
	st := n.known()
	switch {
	case st.CID == 0 || st.Position.Epoch.Owner == st.CID: // also a master that was deposed
		return n.o.Timing.Probe, true
	case st.Promised.Owner == cid || st.Position.Epoch.Owner == cid:
		return n.o.Timing.Confirm, true
	}
	return n.o.Timing.Probe * time.Duration(slavesProbe*len(n.peers())), false
}

// askPeer reads a peer's state over p, which it opens where it is nil. It gives back the session to use next time.
func (n *Node) askPeer(ctx context.Context, p *db.Peer, cid config.CID, open func(context.Context, config.CID) (*db.Peer, error),
	ask func(*db.Peer, context.Context) (db.State, error),
) (*db.Peer, db.State, error) {
	ctx, cancel := context.WithTimeout(ctx, n.askBound(cid))
	defer cancel()
	if p == nil {
		var err error
		if p, err = open(ctx, cid); err != nil {
			return nil, db.State{}, err
		}
	}
	st, err := ask(p, ctx)
	if err != nil {
		p.Close()
		return nil, db.State{}, err
	}
	return p, st, nil
}

// askBound bounds one question to a peer.
func (n *Node) askBound(cid config.CID) time.Duration { return askBound(n.o.Tunnel.Clock(cid).Within) }

// see keeps what a peer answered to what was asked then. A peer that comes back is pushed to at once.
func (n *Node) see(cid config.CID, asked time.Time, st db.State, err error) {
	now := n.o.Now()
	n.mu.Lock()
	defer n.mu.Unlock()
	v := n.views[cid]
	if v == nil {
		v = &view{since: now}
		n.views[cid] = v
		kick(n.heard)
	}
	if (err == nil) != (v.err == nil) {
		v.since = now
		if k := n.kicks[cid]; k != nil && err == nil {
			kick(k.up)
			kick(n.heard)
		}
	}
	v.err = err
	if err == nil && v.state.Position.Epoch != st.Position.Epoch {
		kick(n.heard)
	}
	if err == nil {
		v.state, v.answered, v.seenAt, v.askedAt = st, true, now, asked
	}
}

// learn promises an epoch that a peer has in force and that is higher than all that was promised here. The promise is durable
// when this returns; from then on the own guard refuses, and the owner of that epoch may push.
func (n *Node) learn(ctx context.Context, theirs db.State) {
	mine := n.known()
	e := theirs.Position.Epoch
	if mine.CID == 0 || e.Compare(mine.Promised) <= 0 {
		return
	}
	ctx, cancel := context.WithTimeout(ctx, askTimeout)
	defer cancel()
	if _, err := n.o.DB.Promise(ctx, e); err != nil {
		n.warn(ctx, "epoch.promise", theirs.CID, err)
		return
	}
	n.o.Log.Info().Int("node", int(theirs.CID)).Stringer("epoch", e).Stringer("was", mine.Promised).Msg("epoch.learned")
	n.Wake()
}

// watchTunnel wakes prober and pusher of a peer as soon as the tunnel to it comes up, and the prober when it goes down.
func (n *Node) watchTunnel(ctx context.Context) error {
	up := map[config.CID]bool{}
	for ctx.Err() == nil {
		changed := n.o.Tunnel.Changed()
		peers := n.o.Tunnel.Peers()
		n.clocks(ctx, peers)
		for _, p := range peers {
			if p.Connected == up[p.CID] {
				continue
			}
			up[p.CID] = p.Connected
			k := n.kicksOf(p.CID)
			kick(k.probe)
			if p.Connected {
				kick(k.up)
			}
		}
		n.pauseUntil(ctx, n.o.Timing.Confirm, changed) // clocks are measured meanwhile
	}
	return ctx.Err()
}
