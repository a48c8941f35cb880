package cluster

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"mailproxy/config"
	"mailproxy/db"
	"mailproxy/internal/durable"
	"mailproxy/tunnel"
)

// leaveFile is there while a leave is under way, with what it needs to go on.
const leaveFile = "leave.json"

// begunLeave is that file.
type begunLeave struct {
	ClusterID string `json:"cluster_id"`
}

// Leave takes this node, a slave, out of its cluster: the master revokes it, and it goes on as a single node with its mail and its
// configuration. confirm, unless nil, is asked before anything is changed. Killed anywhere it can be run again:
//
//  1. a note that it has begun;
//  2. the master revokes this node, or has done so already (then it does not let us in);
//  3. the identity goes, so that the daemon closes its tunnels;
//  4. the database becomes that of a single node, with its secrets sealed for the key that is next;
//  5. that key takes the place of the one that was revoked;
//  6. the note goes.
func (o *Operator) Leave(ctx context.Context, confirm func() bool) error {
	st, err := o.state(ctx)
	if err != nil {
		return err
	}
	id, err := tunnel.LoadIdentity(o.Local.KeyDir())
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("read identity: %w", err)
	}
	begun, err := o.leaveBegun()
	if err != nil {
		return err
	}
	if begun != nil && (id.CID != 0 && id.ClusterID != begun.ClusterID || st.CID != 0 && st.ClusterID != begun.ClusterID) {
		begun = nil // of an earlier cluster, which was left to the last step
	}
	if begun == nil {
		if begun, err = o.beginLeave(ctx, st, confirm); err != nil {
			return err
		}
	}
	if id.CID != 0 && st.CID != 0 { // without an identity the master has let us go already: that is removed behind its word only
		if err := o.sayGoodbye(ctx, st); err != nil {
			return err
		}
	}
	if err := tunnel.RemoveIdentity(o.Local.KeyDir()); err != nil {
		return fmt.Errorf("remove identity: %w", err)
	}
	next, err := tunnel.NextKey(o.Local.KeyDir())
	if err != nil {
		return fmt.Errorf("make the next key: %w", err)
	}
	if err := o.DB.Leave(ctx, db.LeaveParams{ClusterID: begun.ClusterID, NextKey: next, Author: o.Author}); err != nil {
		return err
	}
	if err := tunnel.RenewKey(o.Local.KeyDir()); err != nil {
		return fmt.Errorf("put the next key in place: %w", err)
	}
	if err := os.Remove(o.leavePath()); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return durable.SyncDir(o.Local.StateDir)
}

func (o *Operator) leavePath() string { return filepath.Join(o.Local.StateDir, leaveFile) }

// leaveBegun reads the note; nil where there is none.
func (o *Operator) leaveBegun() (*begunLeave, error) {
	text, err := os.ReadFile(o.leavePath())
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	var b begunLeave
	if err := json.Unmarshal(text, &b); err != nil {
		return nil, fmt.Errorf("%s: %w", o.leavePath(), err)
	}
	return &b, nil
}

func (o *Operator) beginLeave(ctx context.Context, st db.State, confirm func() bool) (*begunLeave, error) {
	switch {
	case st.CID == 0:
		return nil, ErrNoCluster
	case st.IsMaster():
		return nil, ErrMasterLeaves
	}
	if err := o.needDaemon(ctx); err != nil {
		return nil, err
	}
	if confirm != nil && !confirm() {
		return nil, ErrNotConfirmed
	}
	b := &begunLeave{st.ClusterID}
	text, err := json.Marshal(b)
	if err == nil {
		err = durable.WriteFile(o.leavePath(), text, 0o600)
	}
	if err != nil {
		return nil, fmt.Errorf("note the leave: %w", err)
	}
	return b, nil
}

// sayGoodbye lets the master revoke this node. The tunnel is cut in the middle of that, so that an answer that is lost is no failure where
// the master does not let us in any more. Where it could not be asked at all, the note goes again: nothing was begun.
func (o *Operator) sayGoodbye(ctx context.Context, st db.State) error {
	body, err := json.Marshal(nodeChange{Who: o.Author.Who})
	if err != nil {
		return err
	}
	var pos config.Position
	err = o.askMaster(ctx, st, "/member/leave", body, &pos)
	if err == nil {
		o.say("the master has let this node go at %v", pos)
		return nil
	}
	if errors.Is(err, ErrMasterAway) && o.shutOut(ctx, st.Promised.Owner) {
		o.say("the master does not know this node any more")
		return nil
	}
	_ = os.Remove(o.leavePath()) // nothing but the next leave looks at it
	return err
}

// shutOut says whether the master answers this node's tunnel and does not let it in.
func (o *Operator) shutOut(ctx context.Context, master config.CID) bool {
	out := false
	poll(ctx, o.patience(), func() bool {
		asked, cancel := context.WithTimeout(ctx, statusTimeout)
		defer cancel()
		self, err := o.fetchStatus(asked, o.Local.ControlSocket(), false)
		if err != nil {
			return false
		}
		for _, p := range self.Peers {
			if p.CID == master {
				out = p.NotLetIn
				return p.NotLetIn || p.Tunnel
			}
		}
		return true // no longer a peer
	})
	return out
}
