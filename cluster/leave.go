package cluster

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"

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
// configuration. A node that was deleted is let go without a word, and so is a master that has no other node, or was deleted. confirm,
// unless nil, is asked before anything is changed. Killed anywhere it can be run again:
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
	if st.CID != 0 && st.IsMaster() && (begun == nil || id.CID != 0) {
		if err := o.masterMayLeave(ctx, st); err != nil {
			_ = os.Remove(o.leavePath()) // of a leave that was begun as a slave
			return err
		}
	}
	if begun == nil {
		if begun, err = o.beginLeave(ctx, st, confirm); err != nil {
			return err
		}
	}
	if id.CID != 0 && st.CID != 0 && !st.IsMaster() { // without an identity the master has let us go already: that is removed behind its word only
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
	if st.CID == 0 {
		return nil, ErrNoCluster
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

// masterMayLeave refuses where other nodes would be left without a master: not where there are none, and not where this one was deleted
// while it was away, and is master for itself alone.
func (o *Operator) masterMayLeave(ctx context.Context, st db.State) error {
	s, err := o.DB.Load(ctx)
	if err != nil {
		return err
	}
	if len(s.Nodes) < 2 {
		return nil
	}
	if err := o.needDaemon(ctx); err != nil {
		return err
	}
	if !o.shutOut(ctx, st.CID) {
		return ErrMasterLeaves
	}
	o.say("the other nodes do not know this one any more")
	return nil
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

// shutOut says whether the master, this node's or itself, has no say about this node any more: the master does not let it in, or nobody does.
func (o *Operator) shutOut(ctx context.Context, master config.CID) bool {
	out := false
	poll(ctx, o.patience(), func() bool {
		asked, cancel := context.WithTimeout(ctx, statusTimeout)
		defer cancel()
		self, err := o.fetchStatus(asked, o.Local.ControlSocket(), false)
		if err != nil {
			return false
		}
		var known bool
		out, known = sentAway(self.Peers, master)
		return known
	})
	return out
}

// sentAway is shutOut by what the tunnels know, as soon as they know it. Something else at a peer's address counts, too, since it is an
// operator who wants to leave: nobody whom this node knows may be a member any more.
func sentAway(peers []Peer, master config.CID) (out, known bool) {
	some, answers := false, false
	for _, p := range peers {
		if p.CID == master && (p.NotLetIn || p.Tunnel) {
			return p.NotLetIn, true
		}
		some, answers = some || p.Tunnel, answers || p.NotLetIn || p.NotTrusted
	}
	listed := slices.ContainsFunc(peers, func(p Peer) bool { return p.CID == master })
	return answers && !some, answers && !some || some && !listed
}
