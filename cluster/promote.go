package cluster

import (
	"context"
	"errors"
	"fmt"

	"mailproxy/config"
	"mailproxy/db"
	"mailproxy/tunnel"
)

// Promoted is what Promote did.
type Promoted struct {
	Outcome
	// Untold are members that do not know of the new master yet.
	Untold []config.Node
}

// Promote makes this node the master. With the old master in reach it is an orderly hand-over that loses nothing; without, a majority
// of the members must promise; with force, none. It waits until the reachable nodes are told. A master that has lost its lease, and with it
// the right to change the configuration, can be promoted again. ErrAlreadyMaster, ErrNoMajority
// (a *NoMajorityError), ErrNotLetIn, ErrNotPromotable, ErrJoining.
func (o *Operator) Promote(ctx context.Context, force bool) (Promoted, error) {
	st, err := o.clusterState(ctx)
	if err != nil {
		return Promoted{}, err
	}
	if st.IsMaster() {
		held, err := o.DB.HasLease(ctx)
		if err != nil {
			return Promoted{}, err
		}
		if held {
			return Promoted{}, ErrAlreadyMaster
		}
	}
	if err := o.needDaemon(ctx); err != nil {
		return Promoted{}, err
	}
	r := &round{db: o.DB, open: o.openPeer, bound: o.askBound, author: o.Author, say: o.say, recovers: st.IsMaster()}
	if !o.NotDeleted {
		r.notLetInBy = o.notLetInBy
	}
	out, err := r.run(ctx, force)
	if err != nil {
		return Promoted{}, err
	}
	o.say("epoch %v begins at %v", out.Epoch, out.Position)
	var pos config.Position
	poll(ctx, o.patience(), func() bool { // the lease of a large cluster comes with the first pushes
		pos, err = o.addOwnCA(ctx, out)
		return !errors.Is(err, db.ErrNoLease)
	})
	if err != nil {
		// The node is master all the same; HandleJoin adds the CA where it is missing.
		o.say("own CA not added yet: %v", err)
		pos = out.Position
	}
	var reached []config.Node // who gave no promise is not in reach, and is not waited for
	for _, m := range out.Members {
		if _, missing := memberOf(out.Missing, m.CID); !missing {
			reached = append(reached, m)
		}
	}
	untold, _ := o.waitHeld(ctx, reached, pos, 0)
	return Promoted{Outcome: out, Untold: append(untold, out.Missing...)}, nil
}

// notLetInBy asks the daemon which members answer and do not let this node in.
func (o *Operator) notLetInBy(ctx context.Context) []string {
	ctx, cancel := context.WithTimeout(ctx, statusTimeout)
	defer cancel()
	self, err := o.fetchStatus(ctx, o.Local.ControlSocket(), false)
	if err != nil {
		return nil // it answered a moment ago, and a forced promote must not hang on it
	}
	return notLetInBy(self.Peers)
}

// addOwnCA lets the cluster trust this node's CA, so that it can take nodes in without the old master's.
func (o *Operator) addOwnCA(ctx context.Context, out Outcome) (config.Position, error) {
	ca, err := tunnel.LoadOrMakeCA(o.Local.KeyDir())
	if err != nil {
		return config.Position{}, fmt.Errorf("make CA: %w", err)
	}
	return o.DB.Commit(ctx, o.Author, func(ctx context.Context, tx *db.Tx) error {
		s, err := tx.Snapshot(ctx)
		if err != nil {
			return err
		}
		return putOwnCA(ctx, tx, s, ca.Config(out.Epoch.Owner))
	}, nil)
}
