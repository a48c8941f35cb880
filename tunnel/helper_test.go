package tunnel

import (
	"bytes"
	"context"
	"encoding/json"
	"io"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/rs/zerolog"
	"go.uber.org/goleak"

	"mailproxy/config"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

const testCluster = "5f0c1c1e-0000-4000-8000-000000000001"

// quick is the timing of tests that wait for time to pass.
func quick() timing {
	c := defaultTiming()
	// Long enough for a machine that does much else.
	c.keepAlive, c.measure, c.idle, c.dead = 100*time.Millisecond, 200*time.Millisecond, 500*time.Millisecond, 1200*time.Millisecond
	c.backoffMin, c.backoffMax, c.second, c.surplus = 10*time.Millisecond, 100*time.Millisecond, 20*time.Millisecond, 50*time.Millisecond
	c.kick, c.steady, c.linger = 10*time.Millisecond, 50*time.Millisecond, time.Second
	c.handshake, c.startup, c.join = 3*time.Second, 300*time.Millisecond, 5*time.Second
	c.unlike = 500 * time.Millisecond
	c.repeatedEvery = time.Nanosecond
	return c
}

// logged is a log that tests can search.
type logged struct {
	mu  sync.Mutex
	buf bytes.Buffer
}

func (l *logged) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.buf.Write(p)
}

func (l *logged) text() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.buf.String()
}

// events gives the logged events of a name.
func (l *logged) events(name string) []map[string]any {
	l.mu.Lock()
	defer l.mu.Unlock()
	var all []map[string]any
	for line := range strings.Lines(l.buf.String()) {
		var e map[string]any
		if json.Unmarshal([]byte(line), &e) == nil && e["message"] == name {
			all = append(all, e)
		}
	}
	return all
}

// has says whether an event of that name has the value in the field.
func (l *logged) has(name, field, value string) bool {
	for _, e := range l.events(name) {
		if s, _ := e[field].(string); strings.Contains(s, value) {
			return true
		}
	}
	return false
}

// A node is one tunnel of a test.
type node struct {
	*Tunnel
	t    *testing.T
	cid  config.CID
	dir  string
	run  string
	key  *Key
	addr string
	log  *logged
	stop func() // ends Run and waits for it
}

// newNode makes a node that is in no cluster, listening, not running.
func newNode(t *testing.T, o Options) *node {
	t.Helper()
	n := &node{t: t, dir: filepath.Join(t.TempDir(), "keys"), log: &logged{}}
	var err error
	// Short, for the sake of 107 bytes.
	if n.run, err = os.MkdirTemp("", "tun"); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(n.run) })
	o.KeyDir, o.Log = n.dir, zerolog.New(n.log)
	if o.Listen == nil {
		o.Listen = []string{"127.0.0.1:0"}
	}
	if o.Services == nil {
		o.Services = map[string]Handler{"echo": echo, "who": tellWho, ServiceControl: echo}
	}
	o.PeerDir = func(cid config.CID) string { return filepath.Join(n.run, "peer", strconv.Itoa(int(cid))) }
	n.Tunnel = New(o)
	n.setTiming(quick())
	if err := n.Listen(); err != nil {
		t.Fatal(err)
	}
	if addrs := n.Addrs(); len(addrs) > 0 {
		n.addr = addrs[0].String()
	}
	if n.key, err = LoadOrMakeKey(n.dir); err != nil {
		t.Fatal(err)
	}
	return n
}

func (n *node) start() {
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- n.Run(ctx) }()
	var once sync.Once
	n.stop = func() {
		once.Do(func() {
			cancel()
			select {
			case err := <-done:
				if err != nil {
					n.t.Errorf("node %d: Run: %v", n.cid, err)
				}
			case <-time.After(10 * time.Second):
				n.t.Errorf("node %d: Run did not return", n.cid)
			}
		})
	}
	n.t.Cleanup(n.stop)
	eventually(n.t, "the tunnel runs", 5*time.Second, func() bool {
		n.mu.Lock()
		defer n.mu.Unlock()
		return n.running
	})
}

func (n *node) row() config.Node {
	return config.Node{
		CID: n.cid, Name: "node" + strconv.Itoa(int(n.cid)) + ".test", Address: n.addr, PublicKey: n.key.Public(),
		Services: []string{"smtp"}, Promotable: true,
	}
}

// enter makes the node a member with certificates of the CA.
func (n *node) enter(ca *CA, cid config.CID) {
	n.t.Helper()
	n.cid = cid
	certs, err := ca.Sign(n.key.Public(), cid, testCluster, time.Hour)
	if err != nil {
		n.t.Fatal(err)
	}
	if err := SaveIdentity(n.dir, Identity{ClusterID: testCluster, CID: cid, Certs: certs}); err != nil {
		n.t.Fatal(err)
	}
}

func newCA(t *testing.T) *CA {
	t.Helper()
	ca, err := LoadOrMakeCA(filepath.Join(t.TempDir(), "ca"))
	if err != nil {
		t.Fatal(err)
	}
	return ca
}

// snapshot is the configuration of a cluster of these nodes.
func snapshot(ca *CA, nodes ...*node) *config.Snapshot {
	s := &config.Snapshot{ClusterID: testCluster, CAs: []config.CA{ca.Config(1)}}
	for _, n := range nodes {
		s.Nodes = append(s.Nodes, n.row())
	}
	return s
}

// without is the snapshot after the node was deleted.
func without(s *config.Snapshot, cid config.CID) *config.Snapshot {
	after := *s
	after.Nodes = nil
	for _, n := range s.Nodes {
		if n.CID == cid {
			after.Revoked = append(after.Revoked, config.Revoked{CID: cid, Name: n.Name, PublicKey: n.PublicKey, RevokedAt: time.Now()})
			continue
		}
		after.Nodes = append(after.Nodes, n)
	}
	return &after
}

// cluster starts n members that know each other.
func cluster(t *testing.T, n int) (*CA, []*node, *config.Snapshot) {
	t.Helper()
	ca := newCA(t)
	nodes := make([]*node, n)
	for i := range nodes {
		nodes[i] = newNode(t, Options{})
		nodes[i].enter(ca, config.CID(i+1))
	}
	s := snapshot(ca, nodes...)
	for _, n := range nodes {
		n.start()
		n.Reload(s)
	}
	for _, a := range nodes {
		for _, b := range nodes {
			if a != b {
				a.waitUp(b.cid)
			}
		}
	}
	return ca, nodes, s
}

// eventually waits until the condition holds.
func eventually(t *testing.T, what string, within time.Duration, ok func() bool) {
	t.Helper()
	deadline := time.Now().Add(within)
	for !ok() {
		if time.Now().After(deadline) {
			t.Fatalf("not within %s: %s", within, what)
		}
		<-time.After(2 * time.Millisecond)
	}
}

// state gives how the node sees a peer.
func (n *node) state(cid config.CID) PeerState {
	for _, p := range n.Peers() {
		if p.CID == cid {
			return p
		}
	}
	return PeerState{}
}

func (n *node) waitUp(cid config.CID) {
	n.t.Helper()
	eventually(n.t, "connection of "+strconv.Itoa(int(n.cid))+" with "+strconv.Itoa(int(cid)), 5*time.Second,
		func() bool { return n.state(cid).Connected })
}

// dial opens a stream within a bound.
func (n *node) dial(cid config.CID, service string) (net.Conn, error) {
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
	defer cancel()
	return n.Dial(ctx, cid, service)
}

func (n *node) mustDial(cid config.CID, service string) net.Conn {
	n.t.Helper()
	n.waitUp(cid)
	c, err := n.dial(cid, service)
	if err != nil {
		n.t.Fatalf("node %d: dial %s at %d: %v", n.cid, service, cid, err)
	}
	n.t.Cleanup(func() { c.Close() })
	return c
}

// ping sends a line and wants it back.
func ping(t *testing.T, c net.Conn, text string) {
	t.Helper()
	c.SetDeadline(time.Now().Add(5 * time.Second))
	defer c.SetDeadline(time.Time{})
	if _, err := io.WriteString(c, text); err != nil {
		t.Fatalf("write: %v", err)
	}
	got := make([]byte, len(text))
	if _, err := io.ReadFull(c, got); err != nil || string(got) != text {
		t.Fatalf("read %q, %v; want %q", got, err, text)
	}
}

func echo(_ context.Context, _ config.CID, c net.Conn) {
	io.Copy(c, c)
	c.(interface{ CloseWrite() error }).CloseWrite()
}

func tellWho(_ context.Context, from config.CID, c net.Conn) { io.WriteString(c, cidPrincipal(from)) }
