package cluster

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/http"

	"mailproxy/config"
	"mailproxy/db"
)

// Changed is what a member's row is now, and who does not know it yet.
type Changed struct {
	Node config.Node
	// Missing are members that do not hold it yet; they learn it first of all when they are back.
	Missing []config.Node
}

// Rename gives a node another name: this node (cid 0 or its own), or on the master any. This node's own file gets it too. The same again
// does what is left.
func (o *Operator) Rename(ctx context.Context, cid config.CID, name string) (Changed, error) {
	return o.change(ctx, cid, "name", name, func(config.Node) nodeChange { return nodeChange{Name: name} })
}

// SetAddress gives a node another address, without a port: that stays, or for this node is the one of its file.
func (o *Operator) SetAddress(ctx context.Context, cid config.CID, address string) (Changed, error) {
	return o.change(ctx, cid, "address", address, func(now config.Node) nodeChange {
		_, port, err := net.SplitHostPort(now.Address)
		if _, own, ownErr := net.SplitHostPort(o.Local.TunnelAddress()); cid == 0 && ownErr == nil {
			port, err = own, nil
		}
		if err != nil {
			port = config.DefaultTunnelPort
		}
		return nodeChange{Address: net.JoinHostPort(address, port)}
	})
}

// change lets the master write the row, and waits until those in reach hold it. The file comes last: it is read at the next start, and a
// name that the cluster refused shall not be in it.
func (o *Operator) change(ctx context.Context, cid config.CID, key, value string, to func(now config.Node) nodeChange) (Changed, error) {
	var done Changed
	st, err := o.clusterState(ctx)
	if err != nil {
		return done, err
	}
	s, err := o.DB.Load(ctx)
	if err != nil {
		return done, err
	}
	own := cid == 0 || cid == st.CID
	if cid == 0 {
		cid = st.CID
	}
	if !own && !st.IsMaster() {
		return done, o.notMaster(ctx, st)
	}
	now, ok := memberOf(s.Nodes, cid)
	if !ok {
		return done, fmt.Errorf("%w (cid == %d does not exist)", ErrNoSuchNode, cid)
	}
	pos, err := o.changeAt(ctx, st, cid, to(now))
	if err != nil {
		return done, err
	}
	if own {
		if err := config.SetLocal(o.Local.File, key, value); err != nil {
			return done, fmt.Errorf("the cluster knows it, this node's file does not: %w", err)
		}
	}
	done.Missing, _ = o.waitHeld(ctx, s.Nodes, pos, 0)
	poll(ctx, o.patience(), func() bool {
		mine, err := o.state(ctx)
		return err == nil && mine.Position.Compare(pos) >= 0
	})
	if s, err = o.DB.Load(ctx); err == nil {
		done.Node, _ = memberOf(s.Nodes, cid)
	}
	return done, err
}

// changeAt makes the change here, on the master, or asks the master for it.
func (o *Operator) changeAt(ctx context.Context, st db.State, cid config.CID, c nodeChange) (config.Position, error) {
	if st.IsMaster() {
		return changeNode(ctx, o.DB, cid, c, o.Author)
	}
	c.Who, c.Command = o.Author.Who, o.Author.Command
	body, err := json.Marshal(c)
	if err != nil {
		return config.Position{}, err
	}
	var pos config.Position
	return pos, o.askMaster(ctx, st, "/member/node", body, &pos)
}

// askMaster asks the master for something that concerns this node alone. A *MasterAwayError where it is not in reach.
func (o *Operator) askMaster(ctx context.Context, st db.State, path string, body []byte, answer any) error {
	ctx, cancel := context.WithTimeout(ctx, o.patience())
	defer cancel()
	owner := st.Promised.Owner
	err := o.order(ctx, http.MethodPost, o.Local.PeerDir(owner)+"/control.sock", path, body, answer)
	if errors.Is(err, db.ErrNoLease) || errors.Is(err, db.ErrDiskFull) || errors.Is(err, db.ErrStale) {
		return fmt.Errorf("the master: %w", err) // it is not this node's disk
	}
	if !errors.Is(err, ErrPeerUnreachable) {
		return err
	}
	if down := o.needDaemon(ctx); down != nil {
		return down
	}
	master := config.Node{CID: owner}
	if s, loadErr := o.DB.Load(ctx); loadErr == nil {
		if m, ok := memberOf(s.Nodes, owner); ok {
			master = m
		}
	}
	return o.masterAway(ctx, master, err)
}
