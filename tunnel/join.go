package tunnel

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"slices"
	"strings"
	"time"
	"unicode"

	"golang.org/x/crypto/ssh"

	"mailproxy/config"
)

const (
	// joinChannel carries one request and one answer, both JSON, each ended by the end of the stream.
	joinChannel = "join@mailproxy"
	joinVersion = 1
	// checkVersion is that of a dry run: a node that knows none refuses it, and does not take it for a join.
	checkVersion    = 2
	maxRequestBytes = 64 << 10
	maxReplyBytes   = 4 << 20
)

// JoinRequest is what a node that wants to join says of itself. Node has CID 0; its PublicKey must be the key of the connection.
type JoinRequest struct {
	Version int    `json:"version"`
	Token   string `json:"token"`
	// Password is root's on the answering host, instead of a token.
	Password string      `json:"password,omitempty"`
	Node     config.Node `json:"node"`
	// DryRun asks whether a join would be let in, and changes nothing: see CheckJoin.
	DryRun bool `json:"dry_run,omitempty"`
	// Schema is the newest migration of the node's database; 0: not said.
	Schema int64 `json:"schema,omitempty"`
	// Client is the address that the request came from; set by the answering side.
	Client string `json:"-"`
}

// JoinReply is what makes a node a member.
type JoinReply struct {
	ClusterID string          `json:"cluster_id"`
	CID       config.CID      `json:"cid"`
	Certs     Certs           `json:"certs"`
	Nodes     []config.Node   `json:"nodes"` // all members, the new one among them
	CAs       []config.CA     `json:"cas"`
	Epoch     config.Epoch    `json:"epoch"`
	Position  config.Position `json:"position"`
	// Tunnel is what carries the connections from here on; empty is TunnelSSH.
	Tunnel config.TunnelKind `json:"tunnel,omitempty"`
	// Rows is about how many rows the node will be pushed; 0: not said.
	Rows int64 `json:"rows,omitempty"`
}

// JoinCheck is what a join would make of a node that passed every check of the other side.
type JoinCheck struct {
	ClusterID string          `json:"cluster_id"`
	CID       config.CID      `json:"cid"`
	Members   int             `json:"members"` // as there are without it
	Position  config.Position `json:"position"`
	Rows      int64           `json:"rows"` // about how many it would be pushed
}

// Identity gives what SaveIdentity keeps of the reply.
func (r JoinReply) Identity() Identity {
	return Identity{ClusterID: r.ClusterID, CID: r.CID, Certs: r.Certs, Nodes: r.Nodes, CAs: r.CAs, Tunnel: r.Tunnel}
}

// JoinCode says why a join was refused; it is what travels, and what errors.Is goes by.
type JoinCode string

// The codes of this package. A cluster may send others.
const (
	CodeTokenUnknown  JoinCode = "token_unknown"
	CodeTokenUsed     JoinCode = "token_used"
	CodeTokenExpired  JoinCode = "token_expired"
	CodeNotMaster     JoinCode = "not_master"
	CodeNoCluster     JoinCode = "no_cluster"
	CodeRevoked       JoinCode = "revoked"
	CodeOtherIdentity JoinCode = "other_identity"
	CodeBadRequest    JoinCode = "bad_request"
	CodeTooMany       JoinCode = "too_many"
	CodeInternal      JoinCode = "internal"
)

// sentinel gives the error that stands for a code, nil for a cluster's own.
func (c JoinCode) sentinel() error {
	switch c {
	case CodeTokenUnknown:
		return ErrTokenUnknown
	case CodeTokenUsed:
		return ErrTokenUsed
	case CodeTokenExpired:
		return ErrTokenExpired
	case CodeNotMaster:
		return ErrNotMaster
	case CodeNoCluster:
		return ErrNoCluster
	case CodeRevoked:
		return ErrRevoked
	case CodeOtherIdentity:
		return ErrOtherIdentity
	case CodeBadRequest:
		return ErrBadRequest
	case CodeTooMany:
		return ErrTooManyJoins
	case CodeInternal:
		return ErrJoinFailed
	}
	return nil
}

// A JoinError is the other side's refusal.
type JoinError struct {
	Code JoinCode `json:"code"`
	// Text is for people; never anything secret.
	Text string `json:"text"`
	// MasterName and MasterAddress (host:port) are set with CodeNotMaster where the master is known.
	MasterName    string `json:"master_name,omitempty"`
	MasterAddress string `json:"master_address,omitempty"`
}

// Error gives the text, or what the code means.
func (e *JoinError) Error() string {
	switch s := e.Code.sentinel(); {
	case e.Text != "":
		return e.Text
	case s != nil:
		return s.Error()
	}
	return "join refused: " + string(e.Code)
}

// Is finds the code's sentinel.
func (e *JoinError) Is(target error) bool { return target != nil && e.Code.sentinel() == target }

// joinAnswer is what travels back: one of the three.
type joinAnswer struct {
	Error *JoinError `json:"error,omitempty"`
	Reply *JoinReply `json:"reply,omitempty"`
	Check *JoinCheck `json:"check,omitempty"`
}

// decodeRequest reads a request and checks the shape of what strangers may say.
func decodeRequest(data []byte) (JoinRequest, error) {
	var r JoinRequest
	if len(data) > maxRequestBytes {
		return r, fmt.Errorf("%w: longer than %d bytes", ErrBadRequest, maxRequestBytes)
	}
	if err := json.Unmarshal(data, &r); err != nil {
		return r, fmt.Errorf("%w: no JSON request", ErrBadRequest)
	}
	if want := versionOf(r); r.Version != want {
		return r, fmt.Errorf("%w: version %d of the exchange, want %d", ErrBadRequest, r.Version, want)
	}
	if r.Node.CID != 0 {
		return r, fmt.Errorf("%w: it has a CID", ErrBadRequest)
	}
	if err := checkPassword(r); err != nil {
		return r, err
	}
	if len(r.Node.Services) > 16 {
		return r, fmt.Errorf("%w: %d services", ErrBadRequest, len(r.Node.Services))
	}
	for _, f := range append([]field{
		{"token", r.Token, 256}, {"name", r.Node.Name, 253}, {"address", r.Node.Address, 300}, {"machine id", r.Node.MachineID, 64},
		{"UUID", r.Node.UUID, 64},
	}, serviceFields(r.Node.Services)...) {
		if err := f.check(); err != nil {
			return r, err
		}
	}
	if host, port, err := net.SplitHostPort(r.Node.Address); err != nil || host == "" || port == "" {
		return r, fmt.Errorf("%w: address is not host:port", ErrBadRequest)
	}
	if _, err := parsePublic(r.Node.PublicKey); err != nil {
		return r, fmt.Errorf("%w: public key: %w", ErrBadRequest, err)
	}
	return r, nil
}

// maxPassword bounds a password in octets, as PAM does (PAM_MAX_RESP_SIZE).
const maxPassword = 512

// checkPassword refuses what cannot be typed, without showing it.
func checkPassword(r JoinRequest) error {
	switch {
	case r.Password != "" && r.Token != "":
		return fmt.Errorf("%w: both a token and a password", ErrBadRequest)
	case len(r.Password) > maxPassword:
		return fmt.Errorf("%w: password is longer than %d bytes", ErrBadRequest, maxPassword)
	case strings.ContainsFunc(r.Password, unicode.IsControl):
		return fmt.Errorf("%w: password has control characters", ErrBadRequest)
	}
	return nil
}

// versionOf is the version of the exchange that a request is made in.
func versionOf(r JoinRequest) int {
	if r.DryRun {
		return checkVersion
	}
	return joinVersion
}

// A field of a request: a short word.
type field struct {
	name, value string
	max         int
}

func serviceFields(services []string) []field {
	var all []field
	for _, s := range services {
		all = append(all, field{"service", s, 32})
	}
	return all
}

func (f field) check() error {
	if len(f.value) > f.max {
		return fmt.Errorf("%w: %s is longer than %d bytes", ErrBadRequest, f.name, f.max)
	}
	if strings.ContainsFunc(f.value, func(r rune) bool { return r <= ' ' || r > '~' }) {
		return fmt.Errorf("%w: %s has characters that are not printable ASCII", ErrBadRequest, f.name)
	}
	return nil
}

// decodeReply reads an answer to the request of the node with this key, from the node with the host key that was pinned.
func decodeReply(data []byte, own, host ssh.PublicKey) (JoinReply, error) {
	a, err := decodeAnswer(data)
	switch {
	case err != nil:
		return JoinReply{}, err
	case a.Reply == nil:
		return JoinReply{}, fmt.Errorf("%w: neither a reply nor an error", ErrBadReply)
	}
	return *a.Reply, a.Reply.check(own, host)
}

// decodeCheck reads an answer to a dry run.
func decodeCheck(data []byte) (JoinCheck, error) {
	a, err := decodeAnswer(data)
	switch {
	case err != nil:
		return JoinCheck{}, err
	case a.Check == nil || a.Check.CID <= 0 || len(a.Check.ClusterID) > 64:
		return JoinCheck{}, fmt.Errorf("%w: no outcome of a check", ErrBadReply)
	}
	a.Check.ClusterID = cleaned(a.Check.ClusterID, 64)
	return *a.Check, nil
}

// decodeAnswer reads an answer; a refusal is a *JoinError.
func decodeAnswer(data []byte) (joinAnswer, error) {
	var a joinAnswer
	if len(data) > maxReplyBytes {
		return a, fmt.Errorf("%w: longer than %d bytes", ErrBadReply, maxReplyBytes)
	}
	if err := json.Unmarshal(data, &a); err != nil {
		return a, fmt.Errorf("%w: no JSON answer", ErrBadReply)
	}
	switch {
	case a.Error == nil:
		return a, nil
	case a.Reply != nil || a.Check != nil:
		return a, fmt.Errorf("%w: both a reply and an error", ErrBadReply)
	}
	e := *a.Error
	e.Code = JoinCode(cleaned(string(e.Code), 64))
	e.Text, e.MasterName, e.MasterAddress = cleaned(e.Text, 500), cleaned(e.MasterName, 253), cleaned(e.MasterAddress, 300)
	return a, &e
}

// check refuses a reply by which this node would not be let in, or would not know the node that let it in.
func (r *JoinReply) check(own, host ssh.PublicKey) error {
	id := r.Identity()
	if err := id.fits(own); err != nil {
		return fmt.Errorf("%w: %w", ErrBadReply, err)
	}
	has := func(key ssh.PublicKey, cid config.CID) bool {
		return slices.ContainsFunc(r.Nodes, func(n config.Node) bool {
			k, err := parsePublic(n.PublicKey)
			return err == nil && bytes.Equal(k.Marshal(), key.Marshal()) && (cid == 0 || n.CID == cid)
		})
	}
	if !has(own, r.CID) {
		return fmt.Errorf("%w: this node is not among the members", ErrBadReply)
	}
	if !has(host, 0) {
		return fmt.Errorf("%w: the answering node is not among the members", ErrBadReply)
	}
	cert, err := parseCert(r.Certs.User)
	if err != nil {
		return fmt.Errorf("%w: %w", ErrBadReply, err)
	}
	if !slices.ContainsFunc(r.CAs, func(ca config.CA) bool { return ca.PublicKey == publicText(cert.SignatureKey) }) {
		return fmt.Errorf("%w: certificate of a CA that is not listed", ErrBadReply)
	}
	return nil
}

// Join asks the node at addr (host:port) to let this one into its cluster. The host key must have the fingerprint; where that is
// empty, confirm is asked with the one that was found, on a connection of its own that then ends. Nothing secret is sent before; a
// mismatch is ErrFingerprint, a no ErrNotConfirmed. The other side's refusal is a *JoinError.
func Join(ctx context.Context, addr, fingerprint string, key *Key, req JoinRequest, confirm func(fingerprint string) bool,
) (JoinReply, error) {
	return joinWith(ctx, addr, fingerprint, key, req, confirm, defaultTiming())
}

func joinWith(ctx context.Context, addr, fingerprint string, key *Key, req JoinRequest, confirm func(fingerprint string) bool, c timing,
) (JoinReply, error) {
	answer, host, err := askJoin(ctx, addr, fingerprint, key, req, confirm, c)
	if err != nil {
		return JoinReply{}, err
	}
	return decodeReply(answer, key.signer.PublicKey(), host)
}

// CheckJoin is Join as a dry run: the other side makes every check, and neither side changes anything; the token stays unused.
func CheckJoin(ctx context.Context, addr, fingerprint string, key *Key, req JoinRequest, confirm func(fingerprint string) bool,
) (JoinCheck, error) {
	req.DryRun = true
	answer, _, err := askJoin(ctx, addr, fingerprint, key, req, confirm, defaultTiming())
	if err != nil {
		return JoinCheck{}, err
	}
	return decodeCheck(answer)
}

// askJoin gives the answer to a request, and the key of the host that gave it.
func askJoin(ctx context.Context, addr, fingerprint string, key *Key, req JoinRequest, confirm func(fingerprint string) bool, c timing,
) ([]byte, ssh.PublicKey, error) {
	if fingerprint == "" {
		var err error
		if fingerprint, err = Pin(ctx, addr, "", confirm); err != nil {
			return nil, nil, err
		}
	}
	req.Version = versionOf(req)
	req.Node.CID, req.Node.PublicKey = 0, key.Public()
	text, err := json.Marshal(req)
	if err != nil {
		return nil, nil, err
	}
	// What the other side would refuse is better said here.
	if _, err := decodeRequest(text); err != nil {
		return nil, nil, err
	}
	var host ssh.PublicKey
	pinned := func(_ string, _ net.Addr, presented ssh.PublicKey) error {
		if found := ssh.FingerprintSHA256(presented); found != fingerprint {
			return otherKey(addr, found, fingerprint)
		}
		host = presented
		return nil
	}
	ctx, cancel := context.WithTimeout(ctx, c.join)
	defer cancel()
	answer, err := exchange(ctx, addr, key, pinned, text)
	if err != nil {
		return nil, nil, fmt.Errorf("join at %s: %w", addr, err)
	}
	return answer, host, nil
}

// Pin gives the fingerprint of the host key at addr: the one that is wanted, or, where that is empty, one that confirm said yes to.
// Another one is ErrFingerprint, a no ErrNotConfirmed.
func Pin(ctx context.Context, addr, wanted string, confirm func(fingerprint string) bool) (string, error) {
	found, err := HostFingerprint(ctx, addr)
	switch {
	case err != nil:
		return "", err
	case wanted != "" && found != wanted:
		return "", otherKey(addr, found, wanted)
	case wanted == "" && (confirm == nil || !confirm(found)):
		return "", fmt.Errorf("%w: %s at %s", ErrNotConfirmed, found, addr)
	}
	return found, nil
}

func otherKey(addr, found, wanted string) error {
	return fmt.Errorf("%w: %s has %s, not %s", ErrFingerprint, addr, found, wanted)
}

// HostFingerprint gives the fingerprint of the host key at addr; who has it is not proven.
func HostFingerprint(ctx context.Context, addr string) (string, error) {
	ctx, cancel := context.WithTimeout(ctx, defaultTiming().handshake)
	defer cancel()
	var found string
	seen := errors.New("seen")
	_, _, _, done, err := joinClient(ctx, addr, nil, func(_ string, _ net.Addr, presented ssh.PublicKey) error {
		found = ssh.FingerprintSHA256(presented)
		return seen
	})
	done()
	if found == "" {
		return "", fmt.Errorf("read host key of %s: %w", addr, err)
	}
	return found, nil
}

// joinClient connects as a node that wants to join; done ends the connection and is never nil.
func joinClient(ctx context.Context, addr string, key *Key, hostKey ssh.HostKeyCallback,
) (ssh.Conn, <-chan ssh.NewChannel, <-chan *ssh.Request, func(), error) {
	raw, err := (&net.Dialer{Timeout: defaultTiming().dial}).DialContext(ctx, "tcp", addr)
	if err != nil {
		return nil, nil, nil, func() {}, err
	}
	stop := context.AfterFunc(ctx, func() { raw.Close() }) // closed twice at worst
	done := func() { stop(); raw.Close() }                 // as above
	if at, ok := ctx.Deadline(); ok {
		raw.SetDeadline(at) //nolint:errcheck // a closed conn fails in the handshake
	}
	client := &ssh.ClientConfig{
		Config: algorithms(), User: joinUser, ClientVersion: version, HostKeyCallback: hostKey,
		HostKeyAlgorithms: []string{ssh.KeyAlgoED25519},
	}
	if key != nil {
		client.Auth = []ssh.AuthMethod{ssh.PublicKeys(key.signer)}
	}
	w := newWire(raw, defaultTiming().dead)
	c, channels, requests, err := ssh.NewClientConn(w, addr, client)
	if err == nil {
		w.guard(c)
	}
	return c, channels, requests, done, err
}

// exchange sends the request and gives the answer.
func exchange(ctx context.Context, addr string, key *Key, hostKey ssh.HostKeyCallback, request []byte) ([]byte, error) {
	c, channels, requests, done, err := joinClient(ctx, addr, key, hostKey)
	if err != nil {
		done()
		if ctx.Err() != nil {
			return nil, fmt.Errorf("%w: %w", err, ctx.Err())
		}
		return nil, err
	}
	var own owned
	defer own.wait()
	defer c.Close() // closed twice at worst
	defer done()
	own.spawn(func() { refuseChannels(channels) })
	own.spawn(func() { ssh.DiscardRequests(requests) })
	ch, channelRequests, err := openChannel(ctx, c, joinChannel, nil, time.Second)
	if err != nil {
		return nil, err
	}
	s, err := newConn(ch, channelRequests, Addr{0, joinUser}, Addr{0, joinUser}, time.Second, own.spawn, func(*conn) {})
	if err != nil {
		return nil, err
	}
	defer s.Close() // nothing is left to say
	if _, err := s.Write(request); err != nil {
		return nil, err
	}
	if err := s.CloseWrite(); err != nil {
		return nil, err
	}
	answer, err := io.ReadAll(io.LimitReader(s, maxReplyBytes+1))
	if err != nil && ctx.Err() != nil {
		return nil, fmt.Errorf("%w: %w", err, ctx.Err())
	}
	return answer, err
}

// refuseChannels turns all channels away until the connection ends.
func refuseChannels(channels <-chan ssh.NewChannel) {
	for n := range channels {
		n.Reject(ssh.Prohibited, "not allowed") //nolint:errcheck // the connection is gone, the loop ends
	}
}
