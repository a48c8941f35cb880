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

// Sync makes positions equal now. On the master it pushes to every slave, also to drifted ones, and waits for the end. On a slave it
// takes the master's configuration over what is here. ErrNotInSync where some node could not be brought there; the list says which.
func (o *Operator) Sync(ctx context.Context) ([]Synced, error) {
	st, err := o.clusterState(ctx)
	if err != nil {
		return nil, err
	}
	if err := o.needDaemon(ctx); err != nil {
		return nil, err
	}
	s, err := o.DB.Load(ctx)
	if err != nil {
		return nil, err
	}
	if _, _, err := o.DB.Verify(ctx); err != nil { // so that rows changed by hand are seen and overwritten
		return nil, err
	}
	if st.IsMaster() {
		return o.pushAll(ctx, st, s.Nodes)
	}
	done, err := o.fetchMaster(ctx, st, s.Nodes)
	return []Synced{done}, err
}

// pushAll pushes to all slaves, side by side.
func (o *Operator) pushAll(ctx context.Context, st db.State, nodes []config.Node) ([]Synced, error) {
	var out []Synced
	for _, n := range nodes {
		if n.CID != st.CID {
			out = append(out, Synced{Node: n})
		}
	}
	var all sync.WaitGroup
	for i := range out {
		all.Go(func() { out[i].Stats, out[i].Err = o.pushTo(ctx, out[i].Node.CID) })
	}
	all.Wait()
	for _, s := range out {
		if s.Err != nil {
			return out, ErrNotInSync
		}
	}
	return out, nil
}

func (o *Operator) pushTo(ctx context.Context, cid config.CID) (db.PushStats, error) {
	asked, cancel := context.WithTimeout(ctx, askTimeout)
	defer cancel()
	p, err := o.openPeer(asked, cid)
	if err != nil {
		return db.PushStats{}, err
	}
	defer p.Close()
	return o.DB.Push(ctx, p, nil)
}

// fetchMaster takes over the configuration of the master that this node last heard of.
func (o *Operator) fetchMaster(ctx context.Context, st db.State, nodes []config.Node) (Synced, error) {
	master, ok := memberOf(nodes, st.Promised.Owner)
	if !ok {
		return Synced{}, fmt.Errorf("%w: node %d, the master", ErrNoSuchNode, st.Promised.Owner)
	}
	done := Synced{Node: master}
	p, err := o.openPeerSoon(ctx, master.CID)
	if err != nil {
		done.Err = err
		return done, fmt.Errorf("the master %s: %w", label(master), err)
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
		if !there.IsMaster() {
			err = fmt.Errorf("%s: %w", label(master), ErrHostNotMaster)
			break
		}
		if done.Stats, err = o.DB.Adopt(ctx, p, there.Position); err == nil {
			return done, nil
		}
		if !errors.Is(err, db.ErrMoved) && !errors.Is(err, db.ErrStale) {
			break
		}
	}
	done.Err = err
	return done, fmt.Errorf("take over from the master %s: %w", label(master), err)
}

func (o *Operator) openPeerSoon(ctx context.Context, cid config.CID) (*db.Peer, error) {
	ctx, cancel := context.WithTimeout(ctx, askTimeout)
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
