package cluster

import (
	"context"
	"errors"
	"fmt"
	"sync"

	"mailproxy/config"
	"mailproxy/db"
)

// Synced is one node that Sync has brought to the master's position, or not.
type Synced struct {
	Node  config.Node
	Stats db.PushStats
	Err   error
}

// Confirm asks the operator whether what the sentence names may be overwritten; nil: it may.
type Confirm func(overwrites string) bool

func (c Confirm) ok(format string, args ...any) bool {
	return c == nil || c(fmt.Sprintf(format, args...))
}

// Sync makes positions equal now. On the master it pushes to every slave and waits for the end; for a drifted one it asks first, and also
// where its own rows are those that were changed by hand, which become a commit. On a
// slave it takes what is missing from the master, and overwrites nothing: ErrWouldOverwrite where rows or commits are here that the master
// does not have. ErrNotInSync where some node could not be brought there; the list says which.
func (o *Operator) Sync(ctx context.Context, confirm Confirm) ([]Synced, error) {
	st, s, err := o.readyToSync(ctx)
	if err != nil {
		return nil, err
	}
	if st.IsMaster() {
		if st, err = o.commitDrift(ctx, st, confirm); err != nil {
			return nil, err
		}
		return o.pushAll(ctx, st, s.Nodes, confirm)
	}
	done, err := o.catchUp(ctx, st, s.Nodes)
	return []Synced{done}, err
}

// readyToSync gives the own state and configuration, with rows that were changed by hand seen.
func (o *Operator) readyToSync(ctx context.Context) (db.State, *config.Snapshot, error) {
	if _, err := o.clusterState(ctx); err != nil {
		return db.State{}, nil, err
	}
	if err := o.needDaemon(ctx); err != nil {
		return db.State{}, nil, err
	}
	if _, _, err := o.DB.Verify(ctx); err != nil {
		return db.State{}, nil, err
	}
	st, err := o.clusterState(ctx)
	if err != nil {
		return st, nil, err
	}
	s, err := o.DB.Load(ctx)
	return st, s, err
}

// commitDrift makes a commit of rows that were changed by hand on this master, after it has asked: under the old position they would be
// drift on every slave that they are pushed to.
func (o *Operator) commitDrift(ctx context.Context, st db.State, confirm Confirm) (db.State, error) {
	drifted, err := o.DB.Drifted(ctx)
	if err != nil || !drifted {
		return st, err
	}
	if !confirm.ok("every slave with this master's rows, which were changed by hand") {
		return st, ErrNotConfirmed
	}
	st.Position, err = o.DB.Commit(ctx, o.Author, func(ctx context.Context, tx *db.Tx) error { return tx.Renew(ctx) }, nil)
	if err != nil {
		return st, err
	}
	o.say("rows that were changed by hand here are commit %v", st.Position)
	return st, nil
}

// pushAll pushes to all slaves, side by side.
func (o *Operator) pushAll(ctx context.Context, st db.State, nodes []config.Node, confirm Confirm) ([]Synced, error) {
	var out []Synced
	for _, n := range nodes {
		if n.CID != st.CID {
			out = append(out, Synced{Node: n})
		}
	}
	for i, there := range o.verifiedStates(ctx, out) {
		if relate(st.Position, there.Position) == Drifted && !confirm.ok("rows that were changed by hand on %s", label(out[i].Node)) {
			return nil, ErrNotConfirmed
		}
	}
	var all sync.WaitGroup
	for i := range out {
		all.Go(func() { out[i].Stats, out[i].Err = o.pushTo(ctx, out[i].Node, o.DB.Push) })
	}
	all.Wait()
	for _, s := range out {
		if s.Err != nil {
			return out, ErrNotInSync
		}
	}
	return out, nil
}

// PushTo brings one slave to this master's rows, and asks before. With full every table is sent, whatever the digests say. ErrNotMaster,
// ErrNoSuchNode.
func (o *Operator) PushTo(ctx context.Context, cid config.CID, full bool, confirm Confirm) (Synced, error) {
	if _, err := o.masterState(ctx); err != nil {
		return Synced{}, err
	}
	st, s, err := o.readyToSync(ctx)
	if err != nil {
		return Synced{}, err
	}
	node, ok := memberOf(s.Nodes, cid)
	if !ok {
		return Synced{}, fmt.Errorf("%w (cid == %d does not exist)", ErrNoSuchNode, cid)
	}
	if cid == st.CID {
		return Synced{}, fmt.Errorf("push to itself: %w", ErrAlreadyMaster)
	}
	if st, err = o.commitDrift(ctx, st, confirm); err != nil {
		return Synced{}, err
	}
	if !confirm.ok("on %s whatever differs from this master's configuration %v", label(node), st.Position) {
		return Synced{}, ErrNotConfirmed
	}
	if _, err := o.verifiedState(ctx, cid); err != nil {
		return Synced{Node: node, Err: err}, fmt.Errorf("%s: %w", label(node), err)
	}
	done := Synced{Node: node}
	push := o.DB.Push
	if full {
		push = o.DB.PushFull
	}
	done.Stats, err = o.pushTo(ctx, node, push)
	return done, err
}

// verifiedStates is verifiedState for many, side by side: the looks at all rows, and the waits for those that do not answer, do not add up.
// Of one that gives none the state is that of a node that joins; a push to it says why.
func (o *Operator) verifiedStates(ctx context.Context, of []Synced) []db.State {
	states := make([]db.State, len(of))
	var all sync.WaitGroup
	for i := range of {
		all.Go(func() {
			if st, err := o.verifiedState(ctx, of[i].Node.CID); err == nil {
				states[i] = st
			}
		})
	}
	all.Wait()
	return states
}

// verifiedState gives a peer's state after it has computed its digest from its rows: rows that were changed by hand show, and a push
// replaces them.
func (o *Operator) verifiedState(ctx context.Context, cid config.CID) (db.State, error) {
	ask, cancel := context.WithTimeout(ctx, verifyTimeout)
	defer cancel()
	if _, err := o.fetchStatus(ask, o.Local.PeerDir(cid)+"/control.sock", true); err != nil {
		return db.State{}, fmt.Errorf("%w: %w", ErrPeerUnreachable, err)
	}
	return o.peerState(ctx, cid)
}

type pushFunc func(ctx context.Context, p *db.Peer, progress db.Progress) (db.PushStats, error)

func (o *Operator) pushTo(ctx context.Context, node config.Node, push pushFunc) (db.PushStats, error) {
	p, err := o.openPeerSoon(ctx, node.CID)
	if err != nil {
		return db.PushStats{}, err
	}
	defer p.Close()
	if o.Progress == nil {
		return push(ctx, p, nil)
	}
	return push(ctx, p, func(sent, of int64) { o.Progress(node, sent, of) })
}

// catchUp takes from the master that this node last heard of what is missing here.
func (o *Operator) catchUp(ctx context.Context, st db.State, nodes []config.Node) (Synced, error) {
	master, ok := memberOf(nodes, st.Promised.Owner)
	if !ok {
		return Synced{}, fmt.Errorf("%w: node %d, the master", ErrNoSuchNode, st.Promised.Owner)
	}
	there, err := o.peerState(ctx, master.CID)
	if err != nil {
		return Synced{Node: master, Err: err}, fmt.Errorf("the master %s: %w", label(master), err)
	}
	switch relate(there.Position, st.Position) {
	case Drifted:
		return Synced{}, fmt.Errorf("%w: rows were changed by hand here", ErrWouldOverwrite)
	case Ahead:
		return Synced{}, fmt.Errorf("%w: this node is at %v, the master %s at %v", ErrWouldOverwrite, st.Position, label(master), there.Position)
	}
	return o.take(ctx, master)
}

// Pull overwrites this slave's configuration with the master's, or with that of the node cid, which may be another slave only while the
// master does not answer. Commits and rows that only this node has go to its journal. It asks before. ErrLocalMaster on the master;
// ErrMasterAnswers.
func (o *Operator) Pull(ctx context.Context, cid config.CID, confirm Confirm) (Synced, error) {
	st, s, err := o.readyToSync(ctx)
	if err != nil {
		return Synced{}, err
	}
	if st.IsMaster() {
		return Synced{}, ErrLocalMaster
	}
	master := st.Promised.Owner
	if cid == 0 {
		cid = master
	}
	node, ok := memberOf(s.Nodes, cid)
	if !ok || cid == st.CID {
		return Synced{}, fmt.Errorf("%w: %d", ErrNoSuchNode, cid)
	}
	if cid != master {
		if m, err := o.peerState(ctx, master); err == nil && m.IsMaster() {
			return Synced{}, fmt.Errorf("%w: node %d", ErrMasterAnswers, master)
		}
	}
	there, err := o.peerState(ctx, cid)
	if err != nil {
		return Synced{Node: node, Err: err}, err
	}
	if there.Position != st.Position && !confirm.ok("this node's configuration %v with that of %s, %v", st.Position, label(node), there.Position) {
		return Synced{}, ErrNotConfirmed
	}
	return o.take(ctx, node)
}

// take makes this node's configuration that of another one, which may move on meanwhile.
func (o *Operator) take(ctx context.Context, node config.Node) (Synced, error) {
	done := Synced{Node: node}
	p, err := o.openPeerSoon(ctx, node.CID)
	if err != nil {
		done.Err = err
		return done, fmt.Errorf("%s: %w", label(node), err)
	}
	defer p.Close()
	for range roundAttempts {
		var there, here db.State
		if there, err = p.State(ctx); err != nil {
			break
		}
		if here, err = o.state(ctx); err != nil {
			break
		}
		if here.Position == there.Position {
			done.Stats.To = there.Position
			return done, nil
		}
		if there.Position.Epoch != here.Promised {
			err = fmt.Errorf("%s is in epoch %v, and %v is promised here: %w", label(node), there.Position.Epoch, here.Promised, ErrHostNotMaster)
			break
		}
		if done.Stats, err = o.DB.Adopt(ctx, p, here.Position, there.Position); err == nil {
			return done, nil
		}
		if !errors.Is(err, db.ErrMoved) && !errors.Is(err, db.ErrStale) {
			break
		}
	}
	done.Err = err
	return done, fmt.Errorf("take over from %s: %w", label(node), err)
}

func (o *Operator) openPeerSoon(ctx context.Context, cid config.CID) (*db.Peer, error) {
	ctx, cancel := context.WithTimeout(ctx, o.askBound(cid))
	defer cancel()
	return o.openPeer(ctx, cid)
}

// SyncWith tells this node of a new master at an address, without its port: its epoch is promised here, so that it may push. It waits
// for that push. ErrLocalMaster on the master.
func (o *Operator) SyncWith(ctx context.Context, address string) (Synced, error) {
	st, err := o.clusterState(ctx)
	if err != nil {
		return Synced{}, err
	}
	if st.IsMaster() {
		return Synced{}, ErrLocalMaster
	}
	if err := o.needDaemon(ctx); err != nil {
		return Synced{}, err
	}
	s, err := o.DB.Load(ctx)
	if err != nil {
		return Synced{}, err
	}
	node, ok := memberAt(s.Nodes, address)
	if !ok {
		return Synced{}, fmt.Errorf("%w: %s", ErrNotMember, address)
	}
	done := Synced{Node: node}
	there, err := o.peerState(ctx, node.CID)
	if err != nil {
		return done, fmt.Errorf("%w: %s", ErrPeerUnreachable, label(node))
	}
	if !there.IsMaster() {
		return done, fmt.Errorf("%s: %w", label(node), ErrHostNotMaster)
	}
	switch there.Position.Epoch.Compare(st.Promised) {
	case -1:
		return done, fmt.Errorf("%s is master of epoch %v, but here epoch %v is promised: %w", label(node), there.Position.Epoch, st.Promised, ErrHostNotMaster)
	case 1:
		if _, err := o.DB.Promise(ctx, there.Position.Epoch); err != nil {
			return done, fmt.Errorf("promise epoch %v: %w", there.Position.Epoch, err)
		}
		o.say("told of the master %s in epoch %v", label(node), there.Position.Epoch)
	}
	var mine db.State
	if !poll(ctx, o.patience(), func() bool {
		mine, err = o.state(ctx)
		return err == nil && mine.Position.Compare(there.Position) >= 0
	}) {
		return done, fmt.Errorf("%w: own position %v, the master's %v", ErrNotInSync, mine.Position, there.Position)
	}
	done.Stats.To = mine.Position
	return done, nil
}

// memberAt finds the member at an address or of a name; where the address has no port, or another one, by its host alone.
func memberAt(nodes []config.Node, address string) (config.Node, bool) {
	for _, n := range nodes {
		if n.Address == address || n.Name == address {
			return n, true
		}
	}
	for _, n := range nodes {
		if hostOf(n.Address) == hostOf(address) {
			return n, true
		}
	}
	return config.Node{}, false
}
