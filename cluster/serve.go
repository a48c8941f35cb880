package cluster

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"strings"

	"mailproxy/config"
	"mailproxy/db"
)

// ServeMember answers what a member asks the master for itself: from is who the tunnel has proven it to be, and nothing in the request can
// make it another. A member can thus change its own name and address, and nobody else's.
func (n *Node) ServeMember(from config.CID, w http.ResponseWriter, r *http.Request) {
	do, ok := map[string]func(context.Context, config.CID, *http.Request) (any, error){
		"/member/node":        n.serveChange,
		"/member/leave":       n.serveLeave,
		"/member/certificate": n.serveCertificate,
	}[r.URL.Path]
	if !ok {
		http.NotFound(w, r)
		return
	}
	answer, err := do(r.Context(), from, r)
	code := http.StatusOK
	if err != nil {
		n.o.Log.Warn().Int("node", int(from)).Str("path", r.URL.Path).Err(err).Msg("member.refused")
		code, answer = http.StatusConflict, refusalOf(err)
	}
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(code)
	_ = json.NewEncoder(w).Encode(answer) // whoever asked may be gone
}

// A nodeChange is what is to be changed of a member's row; empty fields stay.
type nodeChange struct {
	Name    string `json:"name,omitempty"`
	Address string `json:"address,omitempty"` // host:port
	Who     string `json:"who"`
	Command string `json:"command"`
}

// maxAuthor bounds what the history keeps of who and with what command.
const maxAuthor = 200

func (n *Node) serveChange(ctx context.Context, from config.CID, r *http.Request) (any, error) {
	var c nodeChange
	if err := json.NewDecoder(r.Body).Decode(&c); err != nil || len(c.Who) > maxAuthor || len(c.Command) > maxAuthor {
		return nil, fmt.Errorf("%w: unreadable", ErrBadRequest)
	}
	st, err := n.ownState(ctx)
	if err != nil {
		return nil, err
	}
	if !st.IsMaster() {
		return nil, n.notMaster(st)
	}
	pos, err := changeNode(ctx, n.o.DB, from, c, db.Author{Who: clean(c.Who), Command: clean(c.Command), Node: from})
	if err != nil {
		return nil, err
	}
	n.Changed()
	return pos, nil
}

// serveLeave lets a member go: it is revoked, as by `pmgcm delete`, since its word is the same as the operator's. The tunnel to it is cut
// as soon as this is in force, perhaps before it has the answer.
func (n *Node) serveLeave(ctx context.Context, from config.CID, r *http.Request) (any, error) {
	var c nodeChange
	if err := json.NewDecoder(r.Body).Decode(&c); err != nil || len(c.Who) > maxAuthor {
		return nil, fmt.Errorf("%w: unreadable", ErrBadRequest)
	}
	st, err := n.ownState(ctx)
	if err != nil {
		return nil, err
	}
	if !st.IsMaster() {
		return nil, n.notMaster(st)
	}
	author := db.Author{Who: clean(c.Who), Command: "pmgcm leave", Node: from}
	pos, err := n.o.DB.Commit(ctx, author, func(ctx context.Context, tx *db.Tx) error { return tx.Revoke(ctx, from) }, nil)
	if errors.Is(err, db.ErrNoSuch) { // it asks again, and is not cut off yet
		return st.Position, nil
	}
	if err != nil {
		return nil, withDataKey(err)
	}
	n.o.Log.Info().Int("node", int(from)).Str("who", author.Who).Int64("serial", pos.Serial).Msg("node.left")
	n.Changed()
	return pos, nil
}

// changeNode changes a member's row in one commit; one that is so already takes none.
func changeNode(ctx context.Context, d *db.DB, cid config.CID, c nodeChange, author db.Author) (config.Position, error) {
	if err := c.check(); err != nil {
		return config.Position{}, err
	}
	pos, err := d.Commit(ctx, author, func(ctx context.Context, tx *db.Tx) error {
		s, err := tx.Snapshot(ctx)
		if err != nil {
			return err
		}
		node, ok := memberOf(s.Nodes, cid)
		if !ok {
			return fmt.Errorf("%w (cid == %d does not exist)", ErrNoSuchNode, cid)
		}
		before := [2]string{node.Name, node.Address}
		if c.Name != "" {
			node.Name = c.Name
		}
		if c.Address != "" {
			node.Address = c.Address
		}
		if before == [2]string{node.Name, node.Address} {
			return nil
		}
		if err := taken(s.Nodes, node); err != nil {
			return err
		}
		return tx.PutNode(ctx, node)
	}, nil)
	if errors.Is(err, db.ErrNotMaster) {
		return pos, &NotMasterError{}
	}
	return pos, err
}

// check is for what came over the network as for what was typed.
func (c nodeChange) check() error {
	if c.Name != "" {
		if name, err := config.NodeName(c.Name); err != nil || name != c.Name {
			return fmt.Errorf("%w: %q is not a node's name", ErrBadRequest, c.Name)
		}
	}
	if c.Address != "" {
		host := hostOf(c.Address)
		bare, err := config.NodeAddress(host)
		whole, err2 := config.NormalizeHost(c.Address, "")
		if err != nil || err2 != nil || bare != host || whole != c.Address {
			return fmt.Errorf("%w: %q is not a node's address", ErrBadRequest, c.Address)
		}
	}
	return nil
}

// taken refuses a name or an address that another member has.
func taken(nodes []config.Node, node config.Node) error {
	for _, m := range nodes {
		switch {
		case m.CID == node.CID:
		case strings.EqualFold(m.Name, node.Name):
			return fmt.Errorf("%w: %s", ErrNameTaken, label(m))
		case m.Address == node.Address:
			return fmt.Errorf("%w: %s by %s", ErrAddressTaken, m.Address, label(m))
		}
	}
	return nil
}
