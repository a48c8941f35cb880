package cluster

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net/http"
	"strings"
	"syscall"

	"mailproxy/config"
)

// Drain takes a node out of service: it takes no new SMTP sessions, ends those that are open between two commands, lets messages that
// are on their way finish, and stays so over a restart. cid 0 is this node. Another node does it for the master alone: ErrNotMaster.
// It needs no database, here or there. Again it changes nothing.
func (o *Operator) Drain(ctx context.Context, cid config.CID) (NodeStatus, error) {
	return o.switchDrain(ctx, http.MethodPost, cid)
}

// Undrain puts a node back into service.
func (o *Operator) Undrain(ctx context.Context, cid config.CID) (NodeStatus, error) {
	return o.switchDrain(ctx, http.MethodDelete, cid)
}

// switchDrain asks the daemon that it is about, and gives what that says of itself afterwards.
func (o *Operator) switchDrain(ctx context.Context, method string, cid config.CID) (NodeStatus, error) {
	var there NodeStatus
	socket, by, err := o.whoDrains(ctx, cid)
	if err != nil {
		return there, err
	}
	body, err := json.Marshal(map[string]string{"by": by})
	if err != nil {
		return there, err
	}
	ctx, cancel := context.WithTimeout(ctx, 2*statusTimeout)
	defer cancel()
	err = o.order(ctx, method, socket, "/drain", body, nil)
	if errors.Is(err, ErrNotMaster) {
		if st, noDatabase := o.state(ctx); noDatabase == nil {
			err = o.notMaster(ctx, st)
		}
	}
	if err != nil {
		return there, err
	}
	there, err = o.fetchStatus(ctx, socket, false)
	return sanitize(there), err
}

// whoDrains gives the control socket of the node that is meant, and who it is told wants it.
func (o *Operator) whoDrains(ctx context.Context, cid config.CID) (socket, by string, err error) {
	ctx, cancel := context.WithTimeout(ctx, statusTimeout)
	defer cancel()
	self, err := o.fetchStatus(ctx, o.Local.ControlSocket(), false)
	if err != nil {
		return "", "", daemonError(err)
	}
	if cid == 0 || cid == self.CID {
		return o.Local.ControlSocket(), o.Author.Who, nil
	}
	for _, p := range self.Peers {
		if p.CID == cid {
			return o.Local.PeerDir(cid) + "/control.sock", fmt.Sprintf("%s at %s(%d)", o.Author.Who, self.Name, self.CID), nil
		}
	}
	return "", "", fmt.Errorf("%w (cid == %d does not exist)", ErrNoSuchNode, cid)
}

// WaitDrained waits until a node that drains has no session left; it says whether that is so.
func (o *Operator) WaitDrained(ctx context.Context, cid config.CID) (bool, error) {
	socket, _, err := o.whoDrains(ctx, cid)
	if err != nil {
		return false, err
	}
	left := -1
	done := poll(ctx, drainPatience, func() bool {
		ctx, cancel := context.WithTimeout(ctx, statusTimeout)
		defer cancel()
		s, err := o.fetchStatus(ctx, socket, false)
		if err != nil || s.Draining == nil {
			return err == nil // put back meanwhile
		}
		if s.Draining.Sessions != left {
			left = s.Draining.Sessions
			o.say("%d sessions left", left)
		}
		return left == 0
	})
	return done, ctx.Err()
}

// order asks a daemon to change something. What a peer refuses is our sentinel; answer, unless nil, takes what it says.
func (o *Operator) order(ctx context.Context, method, socket, path string, body []byte, answer any) error {
	resp, err := request(ctx, method, socket, path, bytes.NewReader(body))
	local := socket == o.Local.ControlSocket()
	switch {
	case err != nil && local && (errors.Is(err, fs.ErrNotExist) || errors.Is(err, syscall.ECONNREFUSED)):
		return daemonError(err)
	case err != nil:
		return fmt.Errorf("%w: %w", ErrPeerUnreachable, err)
	}
	defer func() { _ = resp.Body.Close() }()
	text := io.LimitReader(resp.Body, maxStatusBytes)
	if resp.StatusCode/100 == 2 {
		if answer == nil {
			return nil
		}
		if err := json.NewDecoder(text).Decode(answer); err != nil { // cut off on its way
			return fmt.Errorf("%w: %w", ErrPeerUnreachable, err)
		}
		return nil
	}
	said, _ := io.ReadAll(text) // what there is of it
	var r refusal
	switch {
	case resp.StatusCode == http.StatusForbidden:
		return &NotMasterError{}
	case resp.StatusCode == http.StatusBadGateway: // the tunnel's own word
		return fmt.Errorf("%w: %s", ErrPeerUnreachable, clean(strings.TrimSpace(string(said))))
	case json.Unmarshal(said, &r) != nil || r.Error == "":
		return fmt.Errorf("%s answered %s", path[1:], resp.Status)
	}
	return r.sentinel()
}
