package cluster

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"
	"unicode"

	"mailproxy/config"
	"mailproxy/db"
	"mailproxy/tunnel"
)

// HandleJoin is the master's side of a join: it takes the token, gives the node its CID and certificates, and writes its row, in one
// commit. The same key gets the same CID again. The tunnel has made sure that the node holds its key, and that what it says of itself
// has a sound shape.
// Errors are *tunnel.JoinError.
func (n *Node) HandleJoin(ctx context.Context, req tunnel.JoinRequest) (tunnel.JoinReply, error) {
	reply, again, err := n.admit(ctx, req)
	if err != nil {
		je := joinError(err)
		n.o.Log.Warn().Str("name", req.Node.Name).Str("address", req.Node.Address).Str("code", string(je.Code)).Err(err).Msg("join.refused")
		return tunnel.JoinReply{}, je
	}
	n.o.Log.Info().Int("node", int(reply.CID)).Str("name", req.Node.Name).Str("address", req.Node.Address).Bool("again", again).
		Stringer("epoch", reply.Epoch).Int64("serial", reply.Position.Serial).Msg("node.joined")
	n.Changed()
	return reply, nil
}

// HandleCheckJoin is HandleJoin as a dry run: the same checks in the same transaction, which is then taken back.
// Errors are *tunnel.JoinError.
func (n *Node) HandleCheckJoin(ctx context.Context, req tunnel.JoinRequest) (tunnel.JoinCheck, error) {
	check, err := n.checkJoin(ctx, req)
	if err != nil {
		je := joinError(err)
		n.o.Log.Info().Str("name", req.Node.Name).Str("address", req.Node.Address).Str("code", string(je.Code)).Err(err).Msg("join.checked")
		return tunnel.JoinCheck{}, je
	}
	n.o.Log.Info().Str("name", req.Node.Name).Str("address", req.Node.Address).Msg("join.checked")
	return check, nil
}

// errChecked takes a transaction back in which every check has passed.
var errChecked = errors.New("a dry run")

func (n *Node) checkJoin(ctx context.Context, req tunnel.JoinRequest) (tunnel.JoinCheck, error) {
	st, rows, err := n.mayAdmit(ctx, req)
	if err != nil {
		return tunnel.JoinCheck{}, err
	}
	check := tunnel.JoinCheck{ClusterID: st.ClusterID, Position: st.Position, Rows: rows}
	_, err = n.o.DB.Commit(ctx, joinAuthor(req), func(ctx context.Context, tx *db.Tx) error {
		e, err := n.enrol(ctx, tx, req)
		if err != nil {
			return err
		}
		check.CID = e.node.CID
		for _, m := range e.snap.Nodes {
			if m.CID != check.CID {
				check.Members++
			}
		}
		return errChecked
	}, nil)
	if !errors.Is(err, errChecked) {
		return tunnel.JoinCheck{}, err
	}
	return check, nil
}

func joinAuthor(req tunnel.JoinRequest) db.Author {
	a := db.Author{Who: "node " + req.Node.Name, Command: "pmgcm join"}
	if req.Password != "" {
		a.Command += " with root's password"
	}
	return a
}

// mayAdmit makes the checks that need no transaction, that of a password at last, and gives about how many rows a new node will be pushed.
func (n *Node) mayAdmit(ctx context.Context, req tunnel.JoinRequest) (db.State, int64, error) {
	if req.Node.Name == "" || req.Node.UUID == "" {
		return db.State{}, 0, fmt.Errorf("%w: no name or no UUID", ErrBadRequest)
	}
	st, err := n.ownState(ctx)
	switch {
	case err != nil:
		return st, 0, err
	case st.CID == 0:
		return st, 0, ErrNoCluster
	case !st.IsMaster():
		return st, 0, n.notMaster(st)
	}
	rows, schema, err := n.o.DB.Size(ctx)
	switch {
	case err != nil:
	case req.Schema != 0 && req.Schema < schema:
		err = fmt.Errorf("%w: schema %d here, %d on the master", ErrOlderVersion, req.Schema, schema)
	case req.Password != "":
		err = n.checkPassword(ctx, req)
	}
	return st, rows, err
}

// An enrolment is a node as its row says, and the configuration with that.
type enrolment struct {
	node  config.Node
	snap  *config.Snapshot
	again bool // the same key was let in before
}

// enrol takes the token, where mayAdmit has not seen the password instead, and writes the node's row.
func (n *Node) enrol(ctx context.Context, tx *db.Tx, req tunnel.JoinRequest) (enrolment, error) {
	e := enrolment{node: req.Node}
	var err error
	if e.snap, err = tx.Snapshot(ctx); err != nil {
		return e, err
	}
	if req.Password == "" {
		if err := tx.TakeToken(ctx, tokenHash(req.Token), e.node.PublicKey); err != nil {
			return e, err
		}
	}
	if e.node.CID, e.again, err = place(e.snap, e.node); err != nil {
		return e, err
	}
	if !e.again {
		highest, err := tx.MaxCID(ctx)
		if err != nil {
			return e, err
		}
		e.node.CID, e.node.JoinedAt = highest+1, n.o.Now().UTC().Truncate(time.Microsecond)
	} else if old, ok := memberOf(e.snap.Nodes, e.node.CID); ok {
		e.node.JoinedAt, e.node.Promotable = old.JoinedAt, old.Promotable
	}
	return e, tx.PutNode(ctx, e.node)
}

func (n *Node) admit(ctx context.Context, req tunnel.JoinRequest) (reply tunnel.JoinReply, again bool, err error) {
	st, rows, err := n.mayAdmit(ctx, req)
	if err != nil {
		return reply, false, err
	}
	ca, err := tunnel.LoadOrMakeCA(n.o.Local.KeyDir())
	if err != nil {
		return reply, false, err
	}
	var e enrolment
	reply.Position, err = n.o.DB.Commit(ctx, joinAuthor(req), func(ctx context.Context, tx *db.Tx) error {
		var err error
		if e, err = n.enrol(ctx, tx, req); err != nil {
			return err
		}
		if err := putOwnCA(ctx, tx, e.snap, ca.Config(st.CID)); err != nil {
			return err
		}
		e.snap, err = tx.Snapshot(ctx)
		return err
	}, nil)
	if err != nil {
		return reply, false, err
	}
	reply.Tunnel, reply.Rows = e.snap.Tunnel(), rows
	reply.ClusterID, reply.CID, reply.Epoch, reply.Nodes, reply.CAs = st.ClusterID, e.node.CID, reply.Position.Epoch, e.snap.Nodes, e.snap.CAs
	reply.Certs, err = ca.Sign(e.node.PublicKey, e.node.CID, st.ClusterID, certValidity)
	return reply, e.again, err
}

// putOwnCA makes the cluster trust this node's CA, where it does not yet.
func putOwnCA(ctx context.Context, tx *db.Tx, s *config.Snapshot, own config.CA) error {
	for _, ca := range s.CAs {
		if ca.Fingerprint == own.Fingerprint {
			return nil
		}
	}
	return tx.PutCA(ctx, own)
}

// place finds the CID of a node that was here before, by its key, and refuses one that may not enter.
func place(s *config.Snapshot, node config.Node) (cid config.CID, again bool, err error) {
	for _, r := range s.Revoked {
		if r.PublicKey == node.PublicKey {
			return 0, false, fmt.Errorf("%w: %s(%d), deleted on %s", ErrKeyRevoked, r.Name, r.CID, r.RevokedAt.UTC().Format(time.DateOnly))
		}
	}
	for _, m := range s.Nodes {
		if m.PublicKey == node.PublicKey {
			cid, again = m.CID, true
			continue
		}
		if m.MachineID != "" && m.MachineID == node.MachineID {
			return 0, false, fmt.Errorf("%w: %s, which must be deleted first", ErrGhost, label(m))
		}
	}
	node.CID = cid
	return cid, again, taken(s.Nodes, node)
}

// notMaster says who is, as far as this node knows.
func (n *Node) notMaster(st db.State) error {
	e := &NotMasterError{}
	if st.Promised.Owner != st.CID {
		e.Master, _ = memberOf(n.members(), st.Promised.Owner)
	}
	return e
}

// The codes of a join that are the cluster's own; they cross the wire.
const (
	codeNameTaken    tunnel.JoinCode = "name_taken"
	codeAddressTaken tunnel.JoinCode = "address_taken"
	codeGhost        tunnel.JoinCode = "ghost"
	codeOlderVersion tunnel.JoinCode = "older_version"
	codeNoLease      tunnel.JoinCode = "no_lease"
	codeNoDataKey    tunnel.JoinCode = "no_data_key"

	codeWrongPassword     tunnel.JoinCode = "wrong_password"
	codePasswordsOff      tunnel.JoinCode = "passwords_off"
	codePasswordUnchecked tunnel.JoinCode = "password_unchecked"
	codeManyPasswords     tunnel.JoinCode = "many_passwords"
)

// joinCodes are the refusals of a join; both sides read this table.
var joinCodes = []struct {
	code tunnel.JoinCode
	from error // on the master
	to   error // on the joining node
}{
	{tunnel.CodeNotMaster, ErrNotMaster, ErrTargetNotMaster},
	{tunnel.CodeNotMaster, db.ErrNotMaster, ErrTargetNotMaster},
	{tunnel.CodeNoCluster, ErrNoCluster, ErrTargetNotMaster},
	{tunnel.CodeTokenUnknown, db.ErrTokenUnknown, ErrTokenUnknown},
	{tunnel.CodeTokenUsed, db.ErrTokenUsed, ErrTokenUsed},
	{tunnel.CodeTokenExpired, db.ErrTokenExpired, ErrTokenExpired},
	{tunnel.CodeRevoked, ErrKeyRevoked, ErrKeyRevoked},
	{codeNameTaken, ErrNameTaken, ErrNameTaken},
	{codeAddressTaken, ErrAddressTaken, ErrAddressTaken},
	{codeGhost, ErrGhost, ErrGhost},
	{codeOlderVersion, ErrOlderVersion, ErrOlderVersion},
	{codeNoLease, db.ErrNoLease, ErrMasterAlone},
	{codeNoDataKey, db.ErrNoDataKey, ErrNoDataKey},
	{codeWrongPassword, ErrWrongPassword, ErrWrongPassword},
	{codePasswordsOff, ErrPasswordsOff, ErrPasswordsOff},
	{codePasswordUnchecked, ErrPasswordUnchecked, ErrPasswordUnchecked},
	{codeManyPasswords, ErrManyPasswords, ErrManyPasswords},
	{tunnel.CodeBadRequest, ErrBadRequest, ErrBadRequest},
	{tunnel.CodeOtherIdentity, tunnel.ErrOtherIdentity, ErrBadRequest},
	{tunnel.CodeTooMany, tunnel.ErrTooManyJoins, ErrTooManyJoins},
}

// joinError is what the joining node is told. What is not in the table is our own trouble, and only its kind goes out.
func joinError(err error) *tunnel.JoinError {
	for _, c := range joinCodes {
		if !errors.Is(err, c.from) {
			continue
		}
		je := &tunnel.JoinError{Code: c.code, Text: textFrom(err, c.from)}
		var nm *NotMasterError
		if errors.As(err, &nm) && nm.Master.CID != 0 {
			je.MasterName, je.MasterAddress = nm.Master.Name, nm.Master.Address
		}
		return je
	}
	return &tunnel.JoinError{Code: tunnel.CodeInternal, Text: "the master could not write the new node; its log says why"}
}

// textFrom gives the text of an error without what was put in front of the sentinel on its way here.
func textFrom(err, sentinel error) string {
	for e := err; e != nil; e = errors.Unwrap(e) {
		if strings.HasPrefix(e.Error(), sentinel.Error()) {
			return e.Error()
		}
	}
	return sentinel.Error()
}

// fromJoinError gives the other side's refusal as our sentinel, with what its text says more.
func fromJoinError(je *tunnel.JoinError) error {
	to, more := ErrJoinFailed, clean(je.Text)
	if more != "" {
		more = ": " + more
	}
	for _, c := range joinCodes {
		if c.code != je.Code {
			continue
		}
		to = c.to
		for _, said := range []error{c.to, c.from} { // only what the text says more is wanted
			if rest, ok := strings.CutPrefix(more, ": "+said.Error()); ok {
				more = rest
				break
			}
		}
	}
	switch {
	case je.MasterAddress != "":
		return fmt.Errorf("%w, %s at %s is", to, clean(je.MasterName), clean(je.MasterAddress))
	case more == "" || to == ErrTokenUnknown || to == ErrTokenUsed || to == ErrTokenExpired:
		return to
	}
	return fmt.Errorf("%w%s", to, more)
}

// maxForeignText bounds a text of another node that is shown to an operator.
const maxForeignText = 300

// clean makes a text from the network fit for a terminal.
func clean(s string) string {
	s = cleanText(s)
	if len(s) > maxForeignText {
		s = strings.ToValidUTF8(s[:maxForeignText], "") + "…"
	}
	return s
}

// cleanLines is clean for a text of several lines, of any length.
func cleanLines(s string) string {
	lines := strings.Split(s, "\n")
	for i := range lines {
		lines[i] = cleanText(lines[i])
	}
	return strings.Join(lines, "\n")
}

func cleanText(s string) string {
	return strings.Map(func(r rune) rune {
		if unicode.IsPrint(r) {
			return r
		}
		return ' '
	}, s)
}
