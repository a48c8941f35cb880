package cluster

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"

	"mailproxy/config"
	"mailproxy/db"
)

// Deleted is what Delete did.
type Deleted struct {
	Node config.Node
	// Already says that it was deleted before; of Node only CID and Name are set then.
	Already bool
	// Missing are members that do not know of it yet; they learn it first of all when they are back.
	Missing []config.Node
	// Majority says whether a majority of the old member list knows.
	Majority bool
	// Secrets are the names of what the node knew, to be rotated.
	Secrets []string
}

// Delete takes a node out of the cluster, on the master: its row goes, its CID and key are revoked for ever, and the secrets get a data
// key that it does not know, in one commit. ErrNoDataKey where this node cannot open them. Then
// it waits until a majority of the old member list holds that. confirm, unless nil, is asked before anything is changed. Again it does what
// is left: it waits, and names the secrets.
func (o *Operator) Delete(ctx context.Context, cid config.CID, confirm func(config.Node) bool) (Deleted, error) {
	var d Deleted
	st, err := o.masterState(ctx)
	if err != nil {
		return d, err
	}
	s, err := o.DB.Load(ctx)
	if err != nil {
		return d, err
	}
	node, ok := memberOf(s.Nodes, cid)
	if i := slices.IndexFunc(s.Revoked, func(r config.Revoked) bool { return r.CID == cid }); !ok && i >= 0 {
		d.Already, d.Node = true, config.Node{CID: cid, Name: s.Revoked[i].Name}
		if d.Secrets, err = o.DB.SecretNames(ctx); err == nil {
			d.Missing, d.Majority = o.waitHeld(ctx, append(s.Nodes, d.Node), st.Position, cid)
		}
		return d, err
	}
	if !ok {
		return d, fmt.Errorf("%w (cid == %d does not exist)", ErrNoSuchNode, cid)
	}
	if cid == st.CID {
		return d, ErrDeleteSelf
	}
	d.Node = node
	if d.Secrets, err = o.DB.SecretNames(ctx); err != nil {
		return d, err
	}
	if confirm != nil && !confirm(node) {
		return d, ErrNotConfirmed
	}
	pos, err := o.DB.Commit(ctx, o.Author, func(ctx context.Context, tx *db.Tx) error { return tx.Revoke(ctx, cid) }, nil)
	if errors.Is(err, db.ErrNoSuch) {
		return d, fmt.Errorf("%w (cid == %d does not exist)", ErrNoSuchNode, cid)
	}
	if err != nil {
		return d, fmt.Errorf("revoke node %d: %w", cid, withDataKey(err))
	}
	o.say("%s is revoked at %v", label(node), pos)
	d.Missing, d.Majority = o.waitHeld(ctx, s.Nodes, pos, cid)
	return d, nil
}

// waitHeld waits until every member in reach but except holds what was committed at pos; and for those out of reach as long as no majority of the
// list holds it, until the patience is over. It gives those that do not hold it, and whether a majority does, or all do that could.
func (o *Operator) waitHeld(ctx context.Context, members []config.Node, pos config.Position, except config.CID) ([]config.Node, bool) {
	own, err := o.state(ctx)
	if err != nil {
		return members, false
	}
	left := map[config.CID]config.Node{}
	for _, m := range members {
		if m.CID != own.CID && m.CID != except {
			left[m.CID] = m
		}
	}
	others := 0 // members that do not count as holding it: the one that was deleted
	if _, in := memberOf(members, except); in {
		others = 1
	}
	enough := func() bool {
		return len(left) == 0 || len(members)-others-len(left) >= majority(len(members))
	}
	poll(ctx, o.patience(), func() bool {
		unreachable := o.askHeld(ctx, left, pos)
		return len(left) == unreachable && enough()
	})
	var missing []config.Node
	for _, m := range members {
		if _, ok := left[m.CID]; ok {
			missing = append(missing, m)
		}
	}
	return missing, enough()
}

// askHeld asks all that are left, side by side, takes those that hold pos off the list, and counts those that did not answer.
func (o *Operator) askHeld(ctx context.Context, left map[config.CID]config.Node, pos config.Position) (unreachable int) {
	var mu sync.Mutex
	var all sync.WaitGroup
	var told []config.CID
	for cid := range left {
		all.Go(func() {
			st, err := o.peerState(ctx, cid)
			mu.Lock()
			defer mu.Unlock()
			switch {
			case err != nil:
				unreachable++
			case holds(st, pos):
				told = append(told, cid)
			}
		})
	}
	all.Wait()
	for _, cid := range told {
		delete(left, cid)
	}
	return unreachable
}

func labels(nodes []config.Node) string {
	var s []string
	for _, n := range nodes {
		s = append(s, label(n))
	}
	return strings.Join(s, ", ")
}
