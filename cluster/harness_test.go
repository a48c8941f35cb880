package cluster

import (
	"context"
	"crypto/ed25519"
	"encoding/json"
	"fmt"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/rs/zerolog"

	"mailproxy/config"
	"mailproxy/db"
	"mailproxy/internal/pgtest"
	"mailproxy/tunnel"
)

func TestMain(m *testing.M) { os.Exit(pgtest.Main(m)) }

// patience bounds every wait of these tests; it is long since the machine may be busy, and no test waits it out to pass.
const patience = 30 * time.Second

// quick makes everything that waits for seconds wait for parts of one. Not the grace: a promote of these tests may take long on a
// busy machine.
func quick() Timing {
	return Timing{
		Poll: 100 * time.Millisecond, Probe: 200 * time.Millisecond, Confirm: 500 * time.Millisecond, Retry: 500 * time.Millisecond,
		Drift: 300 * time.Millisecond, Lease: 200 * time.Millisecond, Renew: 200 * time.Millisecond, Grace: patience,
	}
}

// A testNode is a node as the daemon has it, but for the mail path: database, tunnel, control socket, cluster.
type testNode struct {
	t     *testing.T
	local *config.Local
	dsn   string
	db    *db.DB // for the test and the operator; the daemon has its own
	log   *logBuffer
	// timing is that of the daemon when it is started.
	timing Timing
	// skew is how far its clock is ahead; it jumps when that is changed.
	skew atomic.Int64

	stop func() // ends the daemon; nil while it does not run
	node *Node  // of the running daemon
}

// logBuffer keeps what a node logs.
type logBuffer struct {
	mu    sync.Mutex
	lines []string
}

func (l *logBuffer) Write(b []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.lines = append(l.lines, string(b))
	return len(b), nil
}

func (l *logBuffer) has(event string) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	return slices.ContainsFunc(l.lines, func(s string) bool { return strings.Contains(s, `"message":"`+event+`"`) })
}

func (l *logBuffer) contains(text string) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	return slices.ContainsFunc(l.lines, func(s string) bool { return strings.Contains(s, text) })
}

func freePort(t *testing.T) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	return l.Addr().String()
}

// newTestNode makes a single node with an empty database; its daemon does not run yet.
func newTestNode(t *testing.T, name string) *testNode {
	t.Helper()
	dir, err := os.MkdirTemp("", "mpc") // t.TempDir's path is too long for sockets
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	n := &testNode{t: t, dsn: pgtest.New(t), log: &logBuffer{}, timing: quick(), local: &config.Local{
		Name: name, Address: "127.0.0.1", StateDir: filepath.Join(dir, "state"), RunDir: filepath.Join(dir, "run"), Services: []string{"smtp"},
		Tunnel: config.Listen{Listen: []string{freePort(t)}},
	}}
	for _, d := range []string{n.local.StateDir, n.local.RunDir} {
		if err := os.Mkdir(d, 0o700); err != nil {
			t.Fatal(err)
		}
	}
	if n.db, err = db.Open(db.Options{DSN: n.dsn, NodeKey: n.key, Log: zerolog.Nop()}); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(n.db.Close)
	return n
}

func (n *testNode) key() (ed25519.PrivateKey, error) { return tunnel.PrivateKey(n.local.KeyDir()) }

// start runs the node's daemon until stopDaemon or the end of the test.
func (n *testNode) start() *testNode {
	n.t.Helper()
	log := zerolog.New(n.log)
	d, err := db.Open(db.Options{DSN: n.dsn, NodeKey: n.key, Log: log})
	if err != nil {
		n.t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	var snapshot atomic.Pointer[config.Snapshot]
	var node *Node
	tun := tunnel.New(tunnel.Options{
		Listen: n.local.Tunnel.Listen, KeyDir: n.local.KeyDir(), PeerDir: n.local.PeerDir, Log: log, Now: n.now(),
		Join: func(ctx context.Context, r tunnel.JoinRequest) (tunnel.JoinReply, error) {
			return node.HandleJoin(ctx, r)
		},
		CheckJoin: func(ctx context.Context, r tunnel.JoinRequest) (tunnel.JoinCheck, error) {
			return node.HandleCheckJoin(ctx, r)
		},
		Services: map[string]tunnel.Handler{
			tunnel.ServicePostgres: tunnel.ServePostgres(d.Backend),
			tunnel.ServiceControl: func(ctx context.Context, from config.CID, c net.Conn) {
				serveOne(ctx, c, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
					if r.Method == http.MethodPost {
						node.ServeMember(from, w, r)
						return
					}
					statusHandler(node).ServeHTTP(w, r)
				}))
			},
		},
	})
	if err := tun.Listen(); err != nil {
		n.t.Fatal(err)
	}
	node = New(Options{Local: n.local, DB: d, Tunnel: tun, Version: "test", Snapshot: snapshot.Load, Timing: n.timing, Log: log, Now: n.now()})
	if s, err := config.LoadSnapshot(n.local.SnapshotFile()); err == nil {
		snapshot.Store(s)
		tun.Reload(s)
	}
	_ = os.Remove(n.local.ControlSocket())
	control, err := net.Listen("unix", n.local.ControlSocket())
	if err != nil {
		n.t.Fatal(err)
	}
	server := &http.Server{Handler: statusHandler(node)}
	reload := make(chan struct{}, 1)
	var all sync.WaitGroup
	all.Go(func() { _ = server.Serve(control) })
	all.Go(func() { _ = tun.Run(ctx) })
	all.Go(func() { _ = node.Run(ctx) })
	all.Go(func() { _ = d.Listen(ctx, func() { node.Changed(); kick(reload) }) })
	all.Go(func() {
		for {
			select {
			case <-ctx.Done():
				return
			case <-reload:
			}
			if s, err := d.Load(ctx); err == nil && !node.TakenBack(ctx, s) {
				snapshot.Store(s)
				_ = s.Save(n.local.SnapshotFile())
				tun.Reload(s)
				node.Wake()
			}
		}
	})
	n.node = node
	var once sync.Once
	n.stop = func() {
		once.Do(func() {
			cancel()
			_ = server.Close()
			all.Wait()
			d.Close()
		})
	}
	n.t.Cleanup(n.stop)
	return n
}

// now is the node's clock.
func (n *testNode) now() func() time.Time {
	return func() time.Time { return time.Now().Add(time.Duration(n.skew.Load())) }
}

// stopDaemon cuts the node off: no tunnel, no pushes; its database can still be written by commands.
func (n *testNode) stopDaemon() { n.stop() }

func statusHandler(node *Node) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		_ = json.NewEncoder(w).Encode(node.Self(r.Context(), r.URL.Query().Has("verify")))
	})
}

// serveOne serves HTTP on one connection.
func serveOne(ctx context.Context, c net.Conn, h http.Handler) {
	done := make(chan struct{})
	l := &oneListener{conn: c, closed: make(chan struct{})}
	s := &http.Server{Handler: h, ConnState: func(_ net.Conn, st http.ConnState) {
		if st == http.StateClosed {
			l.close()
		}
	}}
	go func() { defer close(done); _ = s.Serve(l) }()
	select {
	case <-ctx.Done():
	case <-l.closed:
	}
	_ = s.Close()
	l.close()
	<-done
}

type oneListener struct {
	conn   net.Conn
	given  atomic.Bool
	once   sync.Once
	closed chan struct{}
}

func (l *oneListener) Accept() (net.Conn, error) {
	if l.given.CompareAndSwap(false, true) {
		return l.conn, nil
	}
	<-l.closed
	return nil, net.ErrClosed
}
func (l *oneListener) close()         { l.once.Do(func() { close(l.closed) }) }
func (l *oneListener) Close() error   { return nil }
func (l *oneListener) Addr() net.Addr { return l.conn.LocalAddr() }

// operator is pmgcm on this node.
func (n *testNode) operator() *Operator {
	return &Operator{
		Local: n.local, DB: n.db, Version: "test", Author: db.Author{Who: "tester", Command: "pmgcm"}, Patience: patience,
		Say: func(line string) { n.t.Logf("%s: %s", n.local.Name, line) },
	}
}

// state reads the node's state.
func (n *testNode) state() db.State {
	n.t.Helper()
	st, err := n.db.State(n.t.Context())
	if err != nil {
		n.t.Fatalf("%s: %v", n.local.Name, err)
	}
	return st
}

// putDomain commits a domain on this node.
func (n *testNode) putDomain(name string) (config.Position, error) {
	return n.db.Commit(n.t.Context(), db.Author{Who: "tester", Command: "domain add " + name}, func(ctx context.Context, tx *db.Tx) error {
		return tx.PutDomain(ctx, config.Domain{Name: name, Hosts: []string{"127.0.0.1:25"}})
	}, nil)
}

func (n *testNode) mustPutDomain(name string) config.Position {
	n.t.Helper()
	p, err := n.putDomain(name)
	if err != nil {
		n.t.Fatalf("%s: commit %s: %v", n.local.Name, name, err)
	}
	return p
}

func (n *testNode) hasDomain(name string) bool {
	s, err := n.db.Load(n.t.Context())
	return err == nil && s.Domains.Get(name) != nil
}

func (n *testNode) putSecret(name, value string) {
	n.t.Helper()
	_, err := n.db.Commit(n.t.Context(), db.Author{Who: "tester", Command: "secret set " + name}, func(ctx context.Context, tx *db.Tx) error {
		return tx.PutSecret(ctx, name, []byte(value))
	}, nil)
	if err != nil {
		n.t.Fatalf("%s: secret %s: %v", n.local.Name, name, err)
	}
}

func (n *testNode) wantSecret(name, want string) {
	n.t.Helper()
	if got, err := n.db.Secret(n.t.Context(), name); err != nil || string(got) != want {
		n.t.Errorf("%s: secret %s: %q, %v, want %q", n.local.Name, name, got, err, want)
	}
}

// psql runs SQL on the node's database as its superuser, with all triggers off.
func (n *testNode) psql(sql string) {
	n.t.Helper()
	out, err := exec.Command("psql", "-v", "ON_ERROR_STOP=1", "-q", n.dsn, "-c", "SET session_replication_role = replica; "+sql).CombinedOutput()
	if err != nil {
		n.t.Fatalf("psql: %v: %s", err, out)
	}
}

// eventually waits for a condition.
func eventually(t *testing.T, what string, f func() bool) {
	t.Helper()
	if !poll(t.Context(), patience, f) {
		t.Fatalf("not in %v: %s", patience, what)
	}
}

// inSync waits until all nodes hold the first one's position.
func inSync(t *testing.T, nodes ...*testNode) {
	t.Helper()
	eventually(t, "all in sync", func() bool {
		want := nodes[0].state().Position
		for _, n := range nodes[1:] {
			if n.state().Position != want {
				return false
			}
		}
		return true
	})
}

// newCluster makes a cluster of n running nodes, the first its master, all in sync.
func newCluster(t *testing.T, n int) []*testNode {
	t.Helper()
	return newClusterWith(t, n, quick())
}

func newClusterWith(t *testing.T, n int, timing Timing) []*testNode {
	t.Helper()
	node := func(i int) *testNode {
		n := newTestNode(t, fmt.Sprintf("mx%d", i))
		n.timing = timing
		return n.start()
	}
	nodes := []*testNode{node(1)}
	if _, err := nodes[0].operator().Create(t.Context(), CreateParams{}); err != nil {
		t.Fatal(err)
	}
	for i := 2; i <= n; i++ {
		node := node(i)
		if cid, err := node.join(nodes[0].joinParams()); err != nil || cid != config.CID(i) {
			t.Fatalf("join of mx%d: CID %d, %v", i, cid, err)
		}
		nodes = append(nodes, node)
	}
	inSync(t, nodes...)
	return nodes
}

// joinParams is what join-cmd prints, as join takes it.
func (n *testNode) joinParams() JoinParams {
	n.t.Helper()
	line, err := n.operator().JoinCommand(n.t.Context(), time.Hour)
	if err != nil {
		n.t.Fatal(err)
	}
	words := strings.Fields(line)
	if len(words) != 7 || strings.Join(words[:2], " ") != "pmgcm join" || words[3] != "--fingerprint" || words[5] != "--token" {
		n.t.Fatalf("join-cmd printed %q", line)
	}
	return JoinParams{Address: words[2], Fingerprint: words[4], Token: words[6]}
}

func (n *testNode) join(p JoinParams) (config.CID, error) { return n.operator().Join(n.t.Context(), p) }

// status is `pmgcm status` on this node.
func (n *testNode) status(p StatusParams) Report {
	n.t.Helper()
	r, err := n.operator().Status(n.t.Context(), p)
	if err != nil {
		n.t.Fatal(err)
	}
	return r
}

// row is one node in a report.
func row(t *testing.T, r Report, cid config.CID) Row {
	t.Helper()
	for _, row := range r.Rows {
		if row.CID == cid {
			return row
		}
	}
	t.Fatalf("no row for node %d in %+v", cid, r)
	return Row{}
}
