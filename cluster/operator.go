package cluster

import (
	"context"
	"crypto/rand"
	"crypto/sha256"
	"encoding/base32"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"mailproxy/config"
	"mailproxy/db"
)

// An Operator carries out what an administrator asks for with pmgcm, in that command's own process: on this node's database, and on
// the peers through the sockets that this node's daemon keeps in the run directory. It is used by one goroutine.
type Operator struct {
	Local *config.Local
	DB    *db.DB
	// Version is the software's.
	Version string
	// Author is who does it and with which command line (without secrets), for the history.
	Author db.Author
	// Say shows a line of progress; nil: none is shown.
	Say func(line string)
	// Progress shows how far the push to a node is, in rows; nil: it is not shown. It may be called by several goroutines at once.
	Progress func(node config.Node, sent, of int64)
	// NotDeleted is an operator's word that nobody has deleted this node, whatever other nodes say; for Promote with force.
	NotDeleted bool
	// Patience bounds how long a command waits for other nodes to know of what it did: 0 is 10 s.
	Patience time.Duration

	// awaited: the database is not being made ready any more.
	awaited bool
	// far is how far the peers are, as the daemon said when it was last asked.
	far struct {
		sync.Mutex
		asked     time.Time
		halfTrips map[config.CID]time.Duration // half of the round trip
	}
}

// Bounds of what is asked of other nodes and of the daemon.
const (
	statusTimeout  = 2 * time.Second
	maxStatusBytes = 1 << 20
	pollEvery      = 100 * time.Millisecond
	// readyTimeout bounds how long a command waits for a database that the daemon is making: initdb takes 1.4-3 s.
	readyTimeout = 30 * time.Second
)

func (o *Operator) say(format string, args ...any) {
	if o.Say != nil {
		o.Say(fmt.Sprintf(format, args...))
	}
}

func (o *Operator) patience() time.Duration {
	if o.Patience > 0 {
		return o.Patience
	}
	return 10 * time.Second
}

// AwaitDatabase waits as long as the daemon says that it is making the database ready, for 30 s at most; ErrNoDatabase then. So
// commands that follow the daemon's start at once do not fail.
func (o *Operator) AwaitDatabase(ctx context.Context) error {
	o.awaited = o.awaited || poll(ctx, readyTimeout, func() bool {
		ctx, cancel := context.WithTimeout(ctx, statusTimeout)
		defer cancel()
		s, err := o.fetchStatus(ctx, o.Local.ControlSocket(), false)
		return err != nil || !s.Starting
	})
	if !o.awaited {
		return fmt.Errorf("%w: the daemon is still making it ready", ErrNoDatabase)
	}
	return nil
}

// state reads this node's state; ErrNoDatabase, or ErrNoDaemon, where PostgreSQL does not answer.
func (o *Operator) state(ctx context.Context) (db.State, error) {
	if err := o.AwaitDatabase(ctx); err != nil {
		return db.State{}, err
	}
	ctx, cancel := context.WithTimeout(ctx, askTimeout)
	defer cancel()
	st, err := o.DB.State(ctx)
	if err == nil {
		return st, nil
	}
	if o.Local.Database.DSN == "" { // a private PostgreSQL is away because its daemon is
		if down := o.needDaemon(context.WithoutCancel(ctx)); down != nil {
			return st, down
		}
	}
	return st, fmt.Errorf("%w: %w", ErrNoDatabase, err)
}

// clusterState is state on a node that must be in a cluster.
func (o *Operator) clusterState(ctx context.Context) (db.State, error) {
	st, err := o.state(ctx)
	if err == nil && st.CID == 0 {
		err = ErrNoCluster
	}
	return st, err
}

// masterState is state on a node that must be the master; the error names the master.
func (o *Operator) masterState(ctx context.Context) (db.State, error) {
	st, err := o.clusterState(ctx)
	if err != nil || st.IsMaster() {
		return st, err
	}
	return st, o.notMaster(ctx, st)
}

func (o *Operator) notMaster(ctx context.Context, st db.State) error {
	e := &NotMasterError{}
	if s, err := o.DB.Load(ctx); err == nil && st.Promised.Owner != st.CID {
		e.Master, _ = memberOf(s.Nodes, st.Promised.Owner)
	}
	ctx, cancel := context.WithTimeout(ctx, statusTimeout)
	defer cancel()
	self, err := o.fetchStatus(ctx, o.Local.ControlSocket(), false)
	if err != nil || len(notLetInBy(self.Peers)) > 0 { // nothing is known; or nobody is to be led to promote a node that was deleted
		return e
	}
	for _, p := range self.Peers {
		e.Away = e.Away || p.CID == e.Master.CID && p.Error != ""
	}
	return e
}

// openPeer opens a session on a peer's PostgreSQL, through the socket that the daemon keeps for it.
func (o *Operator) openPeer(ctx context.Context, cid config.CID) (*db.Peer, error) {
	socket := filepath.Join(o.Local.PeerDir(cid), ".s.PGSQL.5432")
	p, err := db.OpenPeer(ctx, func(ctx context.Context) (net.Conn, error) {
		var d net.Dialer
		return d.DialContext(ctx, "unix", socket)
	})
	if err != nil {
		return nil, fmt.Errorf("%w: node %d: %w", ErrPeerUnreachable, cid, err)
	}
	return p, nil
}

// peerState asks a peer for its state once.
func (o *Operator) peerState(ctx context.Context, cid config.CID) (db.State, error) {
	ctx, cancel := context.WithTimeout(ctx, o.askBound(cid))
	defer cancel()
	p, err := o.openPeer(ctx, cid)
	if err != nil {
		return db.State{}, err
	}
	defer p.Close()
	return p.State(ctx)
}

// askBound bounds one question to a peer, by the round trip that the daemon last measured.
func (o *Operator) askBound(cid config.CID) time.Duration {
	f := &o.far
	f.Lock()
	defer f.Unlock()
	if time.Since(f.asked) > halfTripsAge {
		ctx, cancel := context.WithTimeout(context.Background(), selfTimeout)
		defer cancel()
		if s, err := o.fetchStatus(ctx, o.Local.ControlSocket(), false); err == nil {
			f.halfTrips = map[config.CID]time.Duration{}
			for _, p := range s.Peers {
				f.halfTrips[p.CID] = time.Duration(p.ClockWithinMS) * time.Millisecond
			}
		}
		f.asked = time.Now()
	}
	return askBound(f.halfTrips[cid])
}

// halfTripsAge is how old the daemon's answer may be.
const halfTripsAge = 3 * time.Second

// needDaemon refuses where the local daemon does not answer, since without it there are no tunnels.
func (o *Operator) needDaemon(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, statusTimeout)
	defer cancel()
	if _, err := o.fetchStatus(ctx, o.Local.ControlSocket(), false); err != nil {
		return daemonError(err)
	}
	return nil
}

// errNoAnswer is a control socket that takes a question and leaves it.
var errNoAnswer = fmt.Errorf("no answer in %v", statusTimeout)

// daemonError says in which way the local daemon is away.
func daemonError(err error) error {
	if errors.Is(err, errNoAnswer) {
		return fmt.Errorf("%w: %w", ErrDaemonSilent, err)
	}
	return fmt.Errorf("%w: %w", ErrNoDaemon, err)
}

// fetchStatus asks the daemon behind a control socket how it sees itself.
func (o *Operator) fetchStatus(ctx context.Context, socket string, verify bool) (NodeStatus, error) {
	var s NodeStatus
	path := "/status"
	if verify {
		path += "?verify=1"
	}
	return s, getJSON(ctx, socket, path, maxStatusBytes, &s)
}

// getJSON reads what the daemon behind a control socket answers, no more than most bytes of it.
func getJSON(ctx context.Context, socket, path string, most int64, v any) error {
	resp, err := request(ctx, http.MethodGet, socket, path, nil)
	if err != nil {
		return err
	}
	defer func() { _ = resp.Body.Close() }()
	if resp.StatusCode != http.StatusOK {
		return fmt.Errorf("%s answered %s", path[1:], resp.Status)
	}
	if err := json.NewDecoder(io.LimitReader(resp.Body, most)).Decode(v); err != nil {
		return fmt.Errorf("read %s: %w", path[1:], err)
	}
	return nil
}

// request sends one request to the daemon behind a control socket.
func request(ctx context.Context, method, socket, path string, body io.Reader) (*http.Response, error) {
	client := http.Client{Transport: &http.Transport{
		DisableKeepAlives: true,
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			var d net.Dialer
			return d.DialContext(ctx, "unix", socket)
		},
	}}
	req, err := http.NewRequestWithContext(ctx, method, "http://node"+path, body)
	if err != nil {
		return nil, err
	}
	resp, err := client.Do(req)
	if err != nil {
		return nil, plainCause(err)
	}
	return resp, nil
}

// plainCause takes the address and socket path off a network error: an operator wants to read "connection refused".
func plainCause(err error) error {
	var sys *os.SyscallError
	switch {
	case errors.Is(err, context.DeadlineExceeded):
		return errNoAnswer
	case errors.As(err, &sys):
		return sys.Err
	case errors.Is(err, io.EOF), errors.Is(err, io.ErrUnexpectedEOF):
		return errors.New("connection closed without an answer")
	}
	return err
}

// poll calls f every 100 ms until it says true, ctx ends or the bound has passed; it says whether f said true.
func poll(ctx context.Context, bound time.Duration, f func() bool) bool {
	t := time.NewTimer(bound)
	defer t.Stop()
	tick := time.NewTicker(pollEvery)
	defer tick.Stop()
	for {
		if f() {
			return true
		}
		select {
		case <-ctx.Done():
			return false
		case <-t.C:
			return false
		case <-tick.C:
		}
	}
}

// newClusterID makes a UUID, version 4 (RFC 9562 §5.4).
func newClusterID() string {
	var b [16]byte
	_, _ = rand.Read(b[:]) // never fails (crypto/rand)
	return uuidText(b, 4)
}

// nodeUUID makes the node's UUID from its public key, version 8 (RFC 9562 §5.8): the same key is the same node, and a command that
// is killed and run again makes no second one.
func nodeUUID(publicKey string) string {
	sum := sha256.Sum256([]byte("mailproxy node " + publicKey))
	return uuidText([16]byte(sum[:16]), 8)
}

func uuidText(b [16]byte, version byte) string {
	b[6] = b[6]&0x0f | version<<4
	b[8] = b[8]&0x3f | 0x80
	return fmt.Sprintf("%x-%x-%x-%x-%x", b[:4], b[4:6], b[6:8], b[8:10], b[10:])
}

// machineID names this machine and state directory, so that a node that is installed again is known. The machine's own ID is not
// given away (machine-id(5) wants that), and several nodes on one machine differ.
func machineID(l *config.Local) string {
	id, err := os.ReadFile("/etc/machine-id")
	if err != nil || len(strings.TrimSpace(string(id))) == 0 {
		return ""
	}
	dir, err := filepath.Abs(l.StateDir)
	if err != nil {
		dir = l.StateDir
	}
	sum := sha256.Sum256([]byte("mailproxy machine " + strings.TrimSpace(string(id)) + " " + dir))
	return hex.EncodeToString(sum[:16])
}

// tokenBytes of randomness make a token: 160 bits, 32 characters.
const tokenBytes = 20

// newToken makes a join token and the hash that is kept of it.
func newToken() (token string, hash []byte) {
	var b [tokenBytes]byte
	_, _ = rand.Read(b[:]) // never fails (crypto/rand)
	token = strings.ToLower(base32.StdEncoding.WithPadding(base32.NoPadding).EncodeToString(b[:]))
	return token, tokenHash(token)
}

func tokenHash(token string) []byte {
	sum := sha256.Sum256([]byte("mailproxy token " + token))
	return sum[:]
}

// selfNode is this node's row, but for its CID.
func selfNode(l *config.Local, publicKey string, now time.Time) config.Node {
	return config.Node{
		UUID: nodeUUID(publicKey), Name: l.Name, Address: l.TunnelAddress(), PublicKey: publicKey, MachineID: machineID(l),
		Services: l.Services, Promotable: true, JoinedAt: now.UTC().Truncate(time.Microsecond),
	}
}
