package cluster

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"time"

	"mailproxy/config"
	"mailproxy/db"
	"mailproxy/tunnel"
)

// certValidity is how long node certificates are good for. Deleting a node revokes it at once, so that this needs not be short.
const certValidity = 10 * 365 * 24 * time.Hour

// Created is what Create made.
type Created struct {
	ClusterID   string
	CID         config.CID
	Fingerprint string // of the CA
}

// CreateParams is what an operator may choose for a new cluster.
type CreateParams struct {
	// Tunnel is what carries the connections between nodes; empty: as this node's settings say, which is TunnelSSH unless changed.
	Tunnel config.TunnelKind
}

// Create makes this node the master of a new cluster of one, with CID 1. All its data is kept. ErrClusterExists where it is in a
// cluster, ErrWasMember where its database alone was made anew. Killed between two steps it goes on from there: keys and identity are found again, and the row that puts the node into
// the cluster comes last.
func (o *Operator) Create(ctx context.Context, p CreateParams) (Created, error) {
	st, err := o.state(ctx)
	if err != nil {
		return Created{}, err
	}
	if st.CID != 0 {
		return Created{}, o.clusterExists(st)
	}
	dir := o.Local.KeyDir()
	old, err := tunnel.LoadIdentity(dir)
	switch {
	case err == nil && !onlyOf(old):
		return Created{}, fmt.Errorf("%w: node %d of cluster %s", ErrWasMember, old.CID, old.ClusterID)
	case err != nil && !errors.Is(err, fs.ErrNotExist):
		return Created{}, fmt.Errorf("read identity: %w", err)
	}
	known := err == nil
	key, err := tunnel.LoadOrMakeKey(dir)
	if err != nil {
		return Created{}, fmt.Errorf("make node key: %w", err)
	}
	ca, err := tunnel.LoadOrMakeCA(dir)
	if err != nil {
		return Created{}, fmt.Errorf("make cluster CA: %w", err)
	}
	const cid = config.CID(1)
	node := selfNode(o.Local, key.Public(), time.Now())
	node.CID = cid
	clusterID := newClusterID()
	if known && old.CID == cid && !o.joinBegun() {
		clusterID = old.ClusterID // a create that was cut off
	}
	certs, err := ca.Sign(key.Public(), cid, clusterID, certValidity)
	if err != nil {
		return Created{}, fmt.Errorf("sign own certificate: %w", err)
	}
	row := ca.Config(cid)
	id := tunnel.Identity{ClusterID: clusterID, CID: cid, Certs: certs, Nodes: []config.Node{node}, CAs: []config.CA{row}, Tunnel: p.Tunnel}
	if err := tunnel.SaveIdentity(dir, id); err != nil {
		return Created{}, fmt.Errorf("save identity: %w", err)
	}
	o.say("keys and certificates made in %s", dir)
	if err := o.DB.CreateCluster(ctx, db.CreateParams{ClusterID: clusterID, Node: node, CA: row, Tunnel: p.Tunnel}); err != nil {
		if errors.Is(err, db.ErrExists) {
			return Created{}, ErrClusterExists
		}
		return Created{}, fmt.Errorf("write cluster: %w", err)
	}
	o.endJoin()
	return Created{clusterID, cid, row.Fingerprint}, nil
}

// onlyOf says whether an identity is known never to have had another node. Else its cluster lives on elsewhere, and its name must not be
// given to a second one: both would have an epoch 1.1.
func onlyOf(id tunnel.Identity) bool {
	return len(id.Nodes) == 1 && id.Nodes[0].CID == id.CID && len(id.Revoked) == 0
}

func (o *Operator) clusterExists(st db.State) error {
	return fmt.Errorf("%w: this is node %d of cluster %s", ErrClusterExists, st.CID, st.ClusterID)
}

// JoinCommand makes a fresh one-time token, good for ttl, and gives the command to paste on the new node.
func (o *Operator) JoinCommand(ctx context.Context, ttl time.Duration) (string, error) {
	st, err := o.masterState(ctx)
	if err != nil {
		return "", err
	}
	s, err := o.DB.Load(ctx)
	if err != nil {
		return "", err
	}
	me, ok := memberOf(s.Nodes, st.CID)
	if !ok {
		return "", fmt.Errorf("%w: node %d is not in the member list", ErrNoSuchNode, st.CID)
	}
	fingerprint, err := tunnel.Fingerprint(me.PublicKey)
	if err != nil {
		return "", fmt.Errorf("own key in the member list: %w", err)
	}
	token, hash := newToken()
	_, err = o.DB.Commit(ctx, o.Author, func(ctx context.Context, tx *db.Tx) error {
		return tx.PutToken(ctx, hash, time.Now().Add(ttl))
	}, nil)
	if err != nil {
		return "", fmt.Errorf("save token: %w", err)
	}
	return fmt.Sprintf("pmgcm join %s --fingerprint %s --token %s", me.Address, fingerprint, token), nil
}
