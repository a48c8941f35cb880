package cluster

import (
	"context"
	"errors"
	"fmt"
	"time"

	"mailproxy/config"
	"mailproxy/db"
)

// errPromisedElsewhere: a slave refuses us since it has promised a higher epoch, which may or may not be in force.
var errPromisedElsewhere = errors.New("it has promised a higher epoch")

// push keeps one slave at our position: as soon as a commit is visible, when the slave comes back, and every few seconds.
func (n *Node) push(ctx context.Context, node config.Node, k *kicks) {
	var p *db.Peer
	defer func() {
		if p != nil {
			p.Close()
		}
	}()
	first := n.o.Timing.Retry / 20
	retry := first
	for ctx.Err() == nil {
		var err error
		p, err = n.pushOnce(ctx, p, node.CID)
		n.pushed(node.CID, err)
		if err == nil {
			retry = first
			n.pause(ctx, n.o.Timing.Confirm, k.dirty, k.up)
			continue
		}
		if p != nil {
			p.Close()
			p = nil
		}
		n.warn(ctx, "push.refused", node.CID, err)
		// Not woken by commits: a slave that is away is not asked more often because there is more for it. One that has come back is asked
		// often anew: its PostgreSQL is a second behind its tunnel.
		woken := n.pause(ctx, retry, k.up)
		if retry = min(2*retry, n.o.Timing.Retry); woken {
			retry = first
		}
	}
}

// pushed keeps how the last push to a slave ended, for status.
func (n *Node) pushed(cid config.CID, err error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	delete(n.pushErrs, cid)
	if err != nil {
		n.pushErrs[cid] = err
	}
}

// pushOnce reads both positions, compares, and pushes what is missing. It gives back the session to use next time.
func (n *Node) pushOnce(ctx context.Context, p *db.Peer, cid config.CID) (*db.Peer, error) {
	mine, err := n.ownState(ctx)
	if err != nil {
		return p, fmt.Errorf("read own position: %w", err)
	}
	if !mine.IsMaster() {
		n.Wake() // the role loop ends us
		return p, db.ErrNotMaster
	}
	asked := time.Now()
	ask := (*db.Peer).StateForPush
	if n.lastHeard(cid) == mine.Position {
		ask = (*db.Peer).State
	}
	p, theirs, err := n.askPeer(ctx, p, cid, n.openBulk, ask)
	n.see(cid, asked, theirs, err)
	if err != nil {
		return p, err
	}
	if theirs.Position.Epoch.Compare(mine.Position.Epoch) > 0 {
		n.learn(ctx, theirs)
		return p, fmt.Errorf("node %d is in epoch %v: %w", cid, theirs.Position.Epoch, db.ErrStale)
	}
	if theirs.Promised.Compare(mine.Promised) > 0 {
		return p, fmt.Errorf("node %d: %w (%v)", cid, errPromisedElsewhere, theirs.Promised)
	}
	switch relate(mine.Position, theirs.Position) {
	case InSync:
		return p, n.confirm(ctx, p, cid, mine.Position)
	case Drifted, Ahead: // shown by status; an operator decides
		return p, nil
	}
	return p, n.send(ctx, p, cid, theirs)
}

// lastHeard is the position at which a peer was last heard.
func (n *Node) lastHeard(cid config.CID) config.Position {
	n.mu.Lock()
	defer n.mu.Unlock()
	if v := n.views[cid]; v != nil {
		return v.state.Position
	}
	return config.Position{}
}

// confirm lets a slave that is in sync note that it is.
func (n *Node) confirm(ctx context.Context, p *db.Peer, cid config.CID, at config.Position) error {
	ctx, cancel := context.WithTimeout(ctx, n.askBound(cid))
	defer cancel()
	return p.Heartbeat(ctx, at)
}

// send brings a slave that is behind to our position; one that was away when this epoch began is made to promise it first. What the slave
// is then is known without another question.
func (n *Node) send(ctx context.Context, p *db.Peer, cid config.CID, theirs db.State) error {
	asked := time.Now()
	stats, err := n.o.DB.Push(ctx, p, nil)
	if err != nil {
		return fmt.Errorf("push to node %d: %w", cid, err)
	}
	e := n.o.Log.Info().Int("node", int(cid)).Stringer("epoch", stats.To.Epoch).Int64("serial", stats.To.Serial).
		Stringer("digest", stats.To.Digest).Stringer("from", stats.From).Strs("tables", stats.Tables).Int64("rows", stats.Rows).
		Int64("bytes", stats.Bytes).Bool("full", stats.Full).Int64("took_ms", stats.Took.Milliseconds())
	if stats.Journalled > 0 {
		e = e.Int("journalled", stats.Journalled)
	}
	if stats.Resumed > 0 {
		e = e.Int64("resumed", stats.Resumed)
	}
	e.Msg("push.done")
	theirs.Position, theirs.Promised = stats.To, stats.To.Epoch
	theirs.JournalLen += stats.Journalled
	n.see(cid, asked, theirs, nil)
	return nil
}

// ownState reads the own state with a bound.
func (n *Node) ownState(ctx context.Context) (db.State, error) {
	ctx, cancel := context.WithTimeout(ctx, askTimeout)
	defer cancel()
	return n.o.DB.State(ctx)
}

// watchPromises runs the promote round where this node was the last master it knows of, is refused for a promise, and nobody in
// reach has made that promise good for a while: a promote died half-way, and without this nobody could configure the cluster. It is of
// no role, since the round itself takes the role away and gives it back.
func (n *Node) watchPromises(ctx context.Context) error {
	var since time.Time
	for ctx.Err() == nil {
		n.pause(ctx, min(n.o.Timing.Poll, n.o.Timing.Grace/4))
		if !n.wedged() {
			since = time.Time{}
			continue
		}
		now := time.Now()
		if since.IsZero() {
			since = now
		}
		if now.Sub(since) < n.o.Timing.Grace {
			continue
		}
		since = time.Time{} // the next attempt waits the grace again
		n.recoverEpoch(ctx)
	}
	return ctx.Err()
}

// wedged says whether we were the last master in force, as far as anybody in reach knows, and a promise stands in our way.
func (n *Node) wedged() bool {
	n.mu.Lock()
	defer n.mu.Unlock()
	st := n.state
	if st.CID == 0 || n.stateErr != nil || st.Position.Epoch.Owner != st.CID {
		return false
	}
	refused := deposed(st)
	for _, v := range n.views {
		if !v.answered {
			continue
		}
		if v.state.Position.Epoch.Compare(st.Position.Epoch) > 0 {
			return false
		}
		refused = refused || v.err == nil && v.state.Promised.Compare(st.Promised) > 0
	}
	return refused
}

// recoverEpoch begins a new epoch of our own, with a majority as always.
func (n *Node) recoverEpoch(ctx context.Context) {
	r := &round{
		db: n.o.DB, open: n.openPeer, bound: n.askBound, author: db.Author{Who: "mailproxy", Command: "recover from a promote that was not finished"},
		say: func(string, ...any) {}, recovers: true,
	}
	out, err := r.run(ctx, false)
	if err != nil {
		n.warn(ctx, "promote.refused", 0, err)
		return
	}
	n.o.Log.Warn().Stringer("epoch", out.Epoch).Int64("serial", out.Position.Serial).Msg("promote.recovered")
	n.Wake()
}
