package db

import (
	"context"
	"crypto/ed25519"
	"fmt"

	"github.com/jackc/pgx/v5"

	"mailproxy/config"
)

// CreateParams are what the first node of a cluster is made of.
type CreateParams struct {
	ClusterID string      // UUID
	Node      config.Node // this node, CID 1
	CA        config.CA   // the CA that it made
	// Tunnel is what shall carry the connections between nodes; empty: as the setting says.
	Tunnel config.TunnelKind
}

// CreateCluster makes a single node the master of a new cluster, in epoch 1.1. All its rows stay. ErrExists where it is in one. It is a
// configuration commit, and gives the errors of Commit where its connection is lost.
func (d *DB) CreateCluster(ctx context.Context, p CreateParams) error {
	_, err := d.marked(ctx, func(tx pgx.Tx) (mark, error) {
		if err := d.createIn(ctx, tx, p); err != nil {
			return mark{}, err
		}
		return markNow(ctx, tx)
	})
	if err != nil {
		return fmt.Errorf("create cluster: %w", err)
	}
	return nil
}

func (d *DB) createIn(ctx context.Context, tx pgx.Tx, p CreateParams) error {
	if err := begin(ctx, tx, Author{Who: "root", Command: "pmgcm create"}); err != nil {
		return err
	}
	if _, err := tx.Exec(ctx, "SELECT node.create_cluster($1, $2)", p.ClusterID, p.Node.CID); err != nil {
		return err
	}
	t := &Tx{tx: tx, db: d}
	if err := t.PutNode(ctx, p.Node); err != nil {
		return err
	}
	if p.Tunnel != "" {
		if err := t.PutSetting(ctx, config.Setting{Name: "tunnel", Value: string(p.Tunnel)}); err != nil {
			return err
		}
	}
	return t.PutCA(ctx, p.CA)
}

// EnterParams are what a joining node was told by the master.
type EnterParams struct {
	CID       config.CID
	ClusterID string
	Epoch     config.Epoch // the master's
}

// Enter makes this node an empty slave that has promised the master's epoch. Its configuration and history are gone. The same again
// changes nothing; ErrExists where it is in another cluster, or in this one by another CID. Where the answer to COMMIT is lost it is run
// again; ErrDisconnected, ErrInDoubt.
func (d *DB) Enter(ctx context.Context, p EnterParams) error {
	err := d.repeatable(ctx, func(tx pgx.Tx) error {
		_, err := tx.Exec(ctx, "SELECT node.enter($1, $2, $3, $4)", p.ClusterID, p.CID, p.Epoch.N, p.Epoch.Owner)
		return err
	})
	if err != nil {
		return fmt.Errorf("enter cluster: %w", err)
	}
	return nil
}

// LeaveParams say what a node leaves, and as who.
type LeaveParams struct {
	// ClusterID is the cluster that it is in.
	ClusterID string
	// NextKey is the key that the node will have in place of its revoked one: its secrets open with that one.
	NextKey ed25519.PublicKey
	// Author is for the history, where the secrets are sealed anew.
	Author Author
}

// Leave makes this node a single one with all of its configuration, where it is in that cluster. The same again changes
// nothing; ErrExists where it is in another one. A lost answer is as with Enter.
func (d *DB) Leave(ctx context.Context, p LeaveParams) error {
	err := d.repeatable(ctx, func(tx pgx.Tx) error {
		if err := begin(ctx, tx, p.Author); err != nil {
			return err
		}
		if _, err := tx.Exec(ctx, "SELECT node.leave($1)", p.ClusterID); err != nil {
			return err
		}
		return (&Tx{tx: tx, db: d}).leaveWith(ctx, p.NextKey)
	})
	if err != nil {
		return fmt.Errorf("leave cluster: %w", err)
	}
	return nil
}

// Promise makes this node refuse every epoch below e, durably. The same again is no error; ErrStale where it has
// promised a higher one. A lost answer is as with Enter.
func (d *DB) Promise(ctx context.Context, e config.Epoch) (State, error) {
	var s State
	err := d.repeatable(ctx, func(tx pgx.Tx) error {
		if _, err := tx.Exec(ctx, "SELECT node.promise_self($1, $2)", e.N, e.Owner); err != nil {
			return err
		}
		var err error
		s, err = readState(ctx, tx)
		return err
	})
	if err != nil {
		return State{}, fmt.Errorf("promise epoch %v: %w", e, err)
	}
	return s, nil
}

// A Mandate is what an epoch begins on.
type Mandate string

// A majority's promises are a lease from the start. A forced epoch goes without one until a majority is heard.
const (
	ByMajority Mandate = "majority"
	ByForce    Mandate = "force"
)

// BeginEpoch puts the epoch that this node has promised to itself in force, as a new commit. ErrStale where it has promised another,
// and the errors of Commit where its connection is lost.
func (d *DB) BeginEpoch(ctx context.Context, e config.Epoch, m Mandate, a Author) (config.Position, error) {
	at, err := d.marked(ctx, func(tx pgx.Tx) (mark, error) {
		if err := begin(ctx, tx, a); err != nil {
			return mark{}, err
		}
		if _, err := tx.Exec(ctx, "SELECT node.begin_epoch($1, $2, $3, $4)", e.N, e.Owner, LeaseTerm, m == ByForce); err != nil {
			return mark{}, err
		}
		return markNow(ctx, tx)
	})
	if err != nil {
		return config.Position{}, fmt.Errorf("begin epoch %v: %w", e, err)
	}
	return at, nil
}
