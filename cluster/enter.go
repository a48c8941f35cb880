package cluster

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"syscall"
	"time"

	"mailproxy/config"
	"mailproxy/db"
	"mailproxy/internal/durable"
	"mailproxy/tunnel"
)

// JoinParams is what an operator says on the new node.
type JoinParams struct {
	// Address is the master's, with or without a port.
	Address string
	// Fingerprint is that of the master's key, "SHA256:…"; empty: Confirm is asked.
	Fingerprint string
	// Token is the one-time token that join-cmd printed; empty: Password is asked.
	Token string
	// Password gives root's password on the master. It is asked once the master's key is known to be the right one.
	Password func() (string, error)
	// Confirm shows the fingerprint that was found and gives the operator's word for it. Nothing secret is sent before.
	Confirm func(fingerprint string) bool
}

// How long Join waits: for the tunnel to come up, for a push that makes no progress, and for the others to know of us.
const (
	tunnelPatience = 60 * time.Second
	pushPatience   = 5 * time.Minute
)

// drainPatience is more than what the daemon leaves a message that is on its way.
const drainPatience = 6 * time.Minute

// begunJoin is kept while a join is under way, so that the very same command can be run again.
type begunJoin struct {
	Address     string `json:"address"`
	Fingerprint string `json:"fingerprint"`
}

func (o *Operator) joinFile() string { return filepath.Join(o.Local.StateDir, "join.json") }

func (o *Operator) joinBegun() bool {
	_, err := os.Stat(o.joinFile())
	return err == nil
}

func (o *Operator) endJoin() { _ = os.Remove(o.joinFile()) }

// Join makes this node a member of the master's cluster. The configuration that it held is destroyed and filled from the master;
// it returns once the own position equals the master's. Killed anywhere it can be run again: the same key gets the same CID.
func (o *Operator) Join(ctx context.Context, p JoinParams) (config.CID, error) {
	st, req, err := o.readyToJoin(ctx, &p)
	if err != nil {
		return 0, err
	}
	key, err := tunnel.LoadOrMakeKey(o.Local.KeyDir())
	if err != nil {
		return 0, fmt.Errorf("make node key: %w", err)
	}
	if err := o.beginJoin(p); err != nil {
		return 0, err
	}
	req.Node = selfNode(o.Local, key.Public(), time.Now())
	reply, err := tunnel.Join(ctx, p.Address, p.Fingerprint, key, req, p.Confirm)
	if err != nil {
		if st.CID == 0 {
			o.endJoin() // nothing was begun that another join could not begin anew
		}
		return 0, o.joinFailed(p.Address, err)
	}
	if err := sameJoin(st, reply.ClusterID, reply.CID); err != nil {
		return 0, err
	}
	o.say("%s took this node in as number %d", p.Address, reply.CID)
	if err := o.enter(ctx, reply); err != nil {
		return 0, err
	}
	if err := o.firstPush(ctx, reply); err != nil {
		return 0, err
	}
	o.waitKnown(ctx, reply)
	o.endJoin()
	return reply.CID, nil
}

// readyToJoin makes the checks of this side, completes the address, and gives what this node asks with, but for itself.
func (o *Operator) readyToJoin(ctx context.Context, p *JoinParams) (db.State, tunnel.JoinRequest, error) {
	req := tunnel.JoinRequest{Token: p.Token}
	st, err := o.state(ctx)
	if err != nil {
		return st, req, err
	}
	if err := o.needDaemon(ctx); err != nil {
		return st, req, err
	}
	p.Address = withPort(p.Address, config.DefaultTunnelPort)
	if err := o.mayJoin(st, *p); err != nil {
		return st, req, err
	}
	if _, req.Schema, err = o.DB.Size(ctx); err != nil {
		return st, req, err
	}
	if p.Token == "" && p.Password != nil {
		req.Password, err = o.askPassword(ctx, p)
	}
	return st, req, err
}

// askPassword asks the operator for root's password there, and pins the master's key before.
func (o *Operator) askPassword(ctx context.Context, p *JoinParams) (password string, err error) {
	if p.Fingerprint, err = tunnel.Pin(ctx, p.Address, p.Fingerprint, p.Confirm); err != nil {
		return "", o.joinFailed(p.Address, err)
	}
	if password, err = p.Password(); err == nil && password == "" {
		err = ErrWrongPassword // the master would take it for a token that is missing
	}
	return password, err
}

// A JoinOutlook is what a join would do.
type JoinOutlook struct {
	tunnel.JoinCheck
	// Own is the configuration of this node, which it would destroy, and Secrets how many secrets go with it.
	Own     *config.Snapshot
	Secrets int
}

// CheckJoin is Join as a dry run: all checks are made on both sides, and nothing is changed, here or there. The token stays unused.
func (o *Operator) CheckJoin(ctx context.Context, p JoinParams) (JoinOutlook, error) {
	st, req, err := o.readyToJoin(ctx, &p)
	if err != nil {
		return JoinOutlook{}, err
	}
	key, err := tunnel.LoadOrLendKey(o.Local.KeyDir())
	if err != nil {
		return JoinOutlook{}, fmt.Errorf("read node key: %w", err)
	}
	req.Node = selfNode(o.Local, key.Public(), time.Now())
	check, err := tunnel.CheckJoin(ctx, p.Address, p.Fingerprint, key, req, p.Confirm)
	if err != nil {
		return JoinOutlook{}, o.joinFailed(p.Address, err)
	}
	if err := sameJoin(st, check.ClusterID, check.CID); err != nil {
		return JoinOutlook{}, err
	}
	own, err := o.DB.Load(ctx)
	if err != nil {
		return JoinOutlook{}, err
	}
	secrets, err := o.DB.SecretNames(ctx)
	return JoinOutlook{JoinCheck: check, Own: own, Secrets: len(secrets)}, err
}

// sameJoin refuses to finish a join at another cluster, or as another node, than it was begun.
func sameJoin(st db.State, clusterID string, cid config.CID) error {
	if st.CID != 0 && (st.ClusterID != clusterID || st.CID != cid) {
		return fmt.Errorf("%w: here is node %d of cluster %s, there we would be node %d of %s", ErrOtherJoin, st.CID, st.ClusterID, cid, clusterID)
	}
	return nil
}

// mayJoin refuses on a node that is in a cluster, unless this very join was begun here and is not finished.
func (o *Operator) mayJoin(st db.State, p JoinParams) error {
	if st.CID == 0 {
		return nil
	}
	b, err := os.ReadFile(o.joinFile())
	if err != nil {
		return o.clusterExists(st)
	}
	var begun begunJoin
	if json.Unmarshal(b, &begun) != nil || begun.Address == p.Address || begun.Fingerprint != "" && begun.Fingerprint == p.Fingerprint {
		return nil
	}
	return fmt.Errorf("%w: to %s", ErrOtherJoin, begun.Address)
}

// beginJoin notes the join durably, in a file of the state directory's owner.
func (o *Operator) beginJoin(p JoinParams) error {
	b, err := json.Marshal(begunJoin{p.Address, p.Fingerprint})
	if err == nil {
		err = durable.WriteFile(o.joinFile(), b, 0o600)
	}
	if err != nil {
		return fmt.Errorf("note the join: %w", err)
	}
	return nil
}

// joinFailed gives our sentinel for what the other side or the way to it said.
func (o *Operator) joinFailed(address string, err error) error {
	var je *tunnel.JoinError
	var ne net.Error
	switch {
	case errors.As(err, &je):
		return fromJoinError(je)
	case errors.Is(err, tunnel.ErrNotConfirmed):
		return ErrKeyNotConfirmed
	case errors.Is(err, tunnel.ErrFingerprint):
		return fmt.Errorf("%w: %w", ErrFingerprint, err)
	case errors.As(err, &ne), errors.Is(err, syscall.ECONNREFUSED), errors.Is(err, syscall.EHOSTUNREACH), errors.Is(err, context.DeadlineExceeded):
		return fmt.Errorf("%w: %s: %w", ErrJoinUnreachable, address, plainCause(err))
	}
	return fmt.Errorf("join %s: %w", address, err)
}

// enter stores who this node is now. The identity comes first: the database's own notification then finds it, and the daemon opens
// the tunnel.
func (o *Operator) enter(ctx context.Context, r tunnel.JoinReply) error {
	if err := tunnel.SaveIdentity(o.Local.KeyDir(), r.Identity()); err != nil {
		return fmt.Errorf("save identity: %w", err)
	}
	err := o.DB.Enter(ctx, db.EnterParams{CID: r.CID, ClusterID: r.ClusterID, Epoch: r.Epoch})
	if err != nil {
		return fmt.Errorf("enter the cluster: %w", err)
	}
	o.say("own configuration emptied, waiting for the tunnel to node %d", r.Epoch.Owner)
	return nil
}

// firstPush waits until this node is where the master is.
func (o *Operator) firstPush(ctx context.Context, r tunnel.JoinReply) error {
	master := r.Epoch.Owner
	var lastErr error
	var there db.State
	up := poll(ctx, tunnelPatience, func() bool {
		there, lastErr = o.peerState(ctx, master)
		return lastErr == nil
	})
	if !up {
		return fmt.Errorf("%w: no tunnel to node %d: %w", ErrNoFirstPush, master, errors.Join(ctx.Err(), lastErr))
	}
	o.say("tunnel is up, receiving the configuration, serial %d", there.Position.Serial)
	var mine db.State
	seen := &arrival{of: r.Rows}
	done := poll(ctx, pushPatience, func() bool {
		if line := seen.look(o.DB.Incoming(ctx)); line != "" {
			o.say("%s", line)
		}
		if mine, lastErr = o.state(ctx); lastErr != nil || joining(mine) {
			return false
		}
		there, lastErr = o.peerState(ctx, master)
		return lastErr == nil && mine.Position.Compare(there.Position) >= 0 || mine.Position.Epoch.Compare(r.Epoch) > 0
	})
	if !done {
		return fmt.Errorf("%w: own position %v, the master's %v: %w", ErrNoFirstPush, mine.Position, there.Position, errors.Join(ctx.Err(), lastErr))
	}
	o.say("in sync with node %d at %v", master, mine.Position)
	return nil
}

// An arrival is how far the rows of the first push are.
type arrival struct {
	of   int64 // how many there will be, about; 0: not known
	rows int64 // what was said last
	next time.Time
}

// look gives a line for what has come in by now, at most one a second, and none while nothing new has.
func (a *arrival) look(rows, bytes int64, err error) string {
	if err != nil || rows <= a.rows || time.Now().Before(a.next) { // an error is that of the next look at the own position, too
		return ""
	}
	a.rows, a.next = rows, time.Now().Add(time.Second)
	of := ""
	if a.of >= rows {
		of = fmt.Sprintf(" of about %d", a.of)
	}
	return fmt.Sprintf("received %d%s rows, %.1f MB", rows, of, float64(bytes)/1e6)
}

// waitKnown waits until a majority of the members that were there before holds this node's row, and says who does not yet.
func (o *Operator) waitKnown(ctx context.Context, r tunnel.JoinReply) {
	var before []config.Node
	for _, n := range r.Nodes {
		if n.CID != r.CID {
			before = append(before, n)
		}
	}
	if missing, _ := o.waitHeld(ctx, before, r.Position, 0); len(missing) > 0 {
		o.say("not told yet (they learn of it when they are back): %s", labels(missing))
	}
}

// withPort gives address a port where it has none.
func withPort(address, port string) string {
	if _, _, err := net.SplitHostPort(address); err == nil {
		return address
	}
	if len(address) > 1 && address[0] == '[' && address[len(address)-1] == ']' {
		address = address[1 : len(address)-1]
	}
	return net.JoinHostPort(address, port)
}
