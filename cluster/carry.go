package cluster

import (
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"time"

	"mailproxy/config"
	"mailproxy/db"
)

// carryTimeout bounds one command at the master: a text of any size.
const carryTimeout = 30 * time.Minute

// A MasterAwayError says that a command could not be carried to the master.
type MasterAwayError struct {
	Master config.Node
	// Since is when it was last heard; zero: not since this node's daemon started.
	Since time.Time
	Cause error
	// Deleted says that it does not answer since this node was deleted.
	Deleted bool
}

func (e *MasterAwayError) Error() string {
	since := "since this node started"
	if !e.Since.IsZero() {
		since = "since " + e.Since.UTC().Format(time.DateTime) + " UTC"
	}
	return fmt.Sprintf("%v: the master %s at %s does not answer %s (%v)", ErrMasterAway, label(e.Master), hostOf(e.Master.Address), since, e.Cause)
}

// Is makes it an ErrNotLetIn, too, on a node that was deleted: it has another remedy.
func (e *MasterAwayError) Is(target error) bool { return target == ErrNotLetIn && e.Deleted }

// Unwrap makes it an ErrMasterAway.
func (e *MasterAwayError) Unwrap() error { return ErrMasterAway }

// Carry lets a configuration command run on the master, whether that is this node or another one, and waits until this node holds what it
// changed. The reply says how it ended there. A *MasterAwayError where the master is not in reach: then nothing was done, unless it was lost
// while it did it, which the error says.
func (o *Operator) Carry(ctx context.Context, c config.Command) (config.CommandReply, error) {
	st, err := o.clusterState(ctx)
	if err != nil && !errors.Is(err, ErrNoCluster) {
		return config.CommandReply{}, err
	}
	if err := o.needDaemon(ctx); err != nil {
		return config.CommandReply{}, err
	}
	socket, master := o.Local.ControlSocket(), config.Node{CID: st.CID}
	if st.CID != 0 && !st.IsMaster() {
		s, err := o.DB.Load(ctx)
		if err != nil {
			return config.CommandReply{}, err
		}
		var ok bool
		if master, ok = memberOf(s.Nodes, st.Promised.Owner); !ok || master.CID == st.CID {
			return config.CommandReply{}, &NotMasterError{}
		}
		socket = o.Local.PeerDir(master.CID) + "/control.sock"
		if _, err := o.fetchStatus(ctx, socket, false); err != nil { // so that one that is away costs 2 s, and nothing is in doubt
			return config.CommandReply{}, o.masterAway(ctx, master, err)
		}
	}
	ctx, cancel := context.WithTimeout(ctx, carryTimeout)
	defer cancel()
	c.Schema = cmp.Or(c.Schema, db.OwnSchema())
	reply, err := postCommand(ctx, socket, c)
	if err != nil {
		if !errors.Is(err, errNotTaken) {
			err = fmt.Errorf("it was lost while it did it; `mailproxy config history` there shows whether it was done: %w", err)
		}
		return reply, o.masterAway(ctx, master, err)
	}
	if reply.Code == 0 && !poll(ctx, o.patience(), func() bool {
		mine, err := o.state(ctx)
		return err == nil && mine.Position.Compare(reply.At) >= 0
	}) {
		o.say("done on the master; this node does not hold it yet, \"pmgcm status\" says why")
	}
	return reply, nil
}

func (o *Operator) masterAway(ctx context.Context, master config.Node, cause error) error {
	e := &MasterAwayError{Master: master, Cause: cause}
	if self, err := o.fetchStatus(context.WithoutCancel(ctx), o.Local.ControlSocket(), false); err == nil {
		e.Deleted = deleted(self.Peers)
		for _, p := range self.Peers {
			if p.CID == master.CID {
				e.Since = p.LastSeen
			}
		}
	}
	return e
}

// errNotTaken is a command that was not begun: a daemon answers 200 OK once it has run one, and anything else before.
var errNotTaken = errors.New("it did not take the command")

// postCommand gives a command to the daemon behind a control socket.
func postCommand(ctx context.Context, socket string, c config.Command) (config.CommandReply, error) {
	var reply config.CommandReply
	body, err := json.Marshal(c)
	if err != nil {
		return reply, err
	}
	resp, err := request(ctx, http.MethodPost, socket, "/command", bytes.NewReader(body))
	if err != nil {
		return reply, err
	}
	defer func() { _ = resp.Body.Close() }()
	if resp.StatusCode != http.StatusOK {
		return reply, fmt.Errorf("%w: %s", errNotTaken, resp.Status)
	}
	if err := json.NewDecoder(io.LimitReader(resp.Body, config.MaxCommandBytes)).Decode(&reply); err != nil {
		return reply, fmt.Errorf("read its answer: %w", err)
	}
	reply.Output, reply.Error, reply.Hint = cleanLines(reply.Output), cleanLines(reply.Error), clean(reply.Hint)
	return reply, nil
}
