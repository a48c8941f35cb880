package smtpd

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"io"
	"net"
	"net/netip"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/rs/zerolog"

	"mailproxy/config"
	"mailproxy/filter"
	"mailproxy/mail"
	"mailproxy/queue"
	"mailproxy/relay"
)

// patience bounds every wait of these tests.
const patience = 20 * time.Second

// A rig is a server with real relay and queue, and what a test wants to know of them.
type rig struct {
	t      testing.TB
	server *Server
	queue  *queue.Queue
	spool  string
	addr   string
	log    *logBuffer
	rules  atomic.Pointer[filter.Ruleset]
	served sync.WaitGroup
}

type logBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (l *logBuffer) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

func (l *logBuffer) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}

// snapshot relays for the domains given as name, host, name, host…
func snapshot(pairs ...string) *config.Snapshot {
	var list []config.Domain
	for i := 0; i < len(pairs); i += 2 {
		list = append(list, config.Domain{Name: pairs[i], Hosts: []string{pairs[i+1]}})
	}
	return &config.Snapshot{Domains: config.NewDomains(list)}
}

func newRig(t testing.TB, s *config.Snapshot, change func(*Options)) *rig {
	t.Helper()
	return newRigWithQueue(t, s, change, nil)
}

func newRigWithQueue(t testing.TB, s *config.Snapshot, change func(*Options), spool func(*queue.Options)) *rig {
	t.Helper()
	g := &rig{t: t, log: &logBuffer{}}
	g.use(s)
	logger := zerolog.New(g.log)
	client := relay.New(relay.Options{Hostname: "mx.test", Log: zerolog.Nop()})
	qo := queue.Options{
		Dir: t.TempDir(), Relay: client, Hostname: "mx.test", Log: zerolog.Nop(),
		Route: func(p mail.Path) (config.Transport, *mail.Reply) { return g.rules.Load().Route(p) },
	}
	if spool != nil {
		spool(&qo)
	}
	q, err := queue.Open(qo)
	if err != nil {
		t.Fatal(err)
	}
	g.queue, g.spool = q, qo.Dir
	o := Options{Hostname: "mx.test", Rules: g.rules.Load, Relay: client, Queue: q, TempDir: t.TempDir(), Log: logger}
	if change != nil {
		change(&o)
	}
	g.server = New(o)
	l := g.listen()
	g.addr = l.Addr().String()
	g.serve(l)
	t.Cleanup(func() {
		g.server.Close()
		g.served.Wait()
		client.Close()
		q.Close()
	})
	return g
}

func (g *rig) listen() net.Listener {
	g.t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		g.t.Fatal(err)
	}
	return l
}

func (g *rig) serve(l net.Listener) { g.serveKind(l, Kind{}) }

func (g *rig) serveKind(l net.Listener, kind Kind) {
	g.served.Go(func() {
		if err := g.server.Serve(context.Background(), l, kind); err != nil {
			g.t.Errorf("Serve: %v", err)
		}
	})
}

func (g *rig) use(s *config.Snapshot) {
	g.t.Helper()
	r, err := filter.Compile(s)
	if err != nil {
		g.t.Fatal(err)
	}
	g.rules.Store(r)
}

// A peer is a client of a test.
type peer struct {
	t testing.TB
	net.Conn
	r *bufio.Reader
}

// dial connects and, where a greeting is expected, reads it.
func (g *rig) dial() *peer {
	g.t.Helper()
	return dialTo(g.t, g.addr)
}

func dialTo(t testing.TB, addr string) *peer {
	t.Helper()
	c, err := net.Dial("tcp", addr)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	_ = c.SetDeadline(time.Now().Add(patience))
	return newPeer(t, c)
}

func newPeer(t testing.TB, c net.Conn) *peer { return &peer{t: t, Conn: c, r: bufio.NewReader(c)} }

// hello connects and says EHLO.
func (g *rig) hello() *peer {
	g.t.Helper()
	p := g.dial()
	p.want("220")
	p.send("EHLO client.test\r\n")
	p.want("250")
	return p
}

func (p *peer) send(s string) {
	p.t.Helper()
	if _, err := io.WriteString(p.Conn, s); err != nil {
		p.t.Fatalf("send: %v", err)
	}
}

// read gives one reply, all its lines; at the end of the connection what came, or "EOF".
func (p *peer) read() string {
	var all strings.Builder
	for {
		line, err := p.r.ReadString('\n')
		all.WriteString(strings.TrimSuffix(line, "\r\n"))
		if err != nil {
			return all.String() + nameEnd(err)
		}
		if len(line) < 4 || line[3] != '-' {
			return all.String()
		}
		all.WriteByte('\n')
	}
}

// nameEnd: a connection that the server has closed is no time-out.
func nameEnd(err error) string {
	switch {
	case errors.Is(err, io.EOF):
		return "EOF"
	case errors.Is(err, syscall.ECONNRESET):
		return "RESET"
	}
	return err.Error()
}

// want reads one reply that begins so, and gives it.
func (p *peer) want(prefix string) string {
	p.t.Helper()
	got := p.read()
	if !strings.HasPrefix(got, prefix) {
		p.t.Fatalf("got reply %q, want %q…", got, prefix)
	}
	return got
}

// ask sends a line and wants a reply.
func (p *peer) ask(line, prefix string) string {
	p.t.Helper()
	p.send(line + "\r\n")
	return p.want(prefix)
}

// wantEnd wants the connection closed by the server, with nothing more said.
func (p *peer) wantEnd() {
	p.t.Helper()
	if got := p.read(); got != "EOF" {
		p.t.Fatalf("got %q, want the end of the connection", got)
	}
}

// waitFor polls a condition.
func waitFor(t testing.TB, what string, cond func() bool) {
	t.Helper()
	tick := time.NewTicker(time.Millisecond)
	defer tick.Stop()
	deadline := time.After(patience)
	for !cond() {
		select {
		case <-deadline:
			t.Fatalf("not within %v: %s", patience, what)
		case <-tick.C:
		}
	}
}

var loopback = config.Network{Prefix: netip.MustParsePrefix("127.0.0.0/8")}

// withoutReceived takes our Received field off a message.
func withoutReceived(t testing.TB, wire string) string {
	t.Helper()
	if !strings.HasPrefix(wire, "Received: from ") {
		t.Fatalf("no Received field in front: %q", wire)
	}
	for i := 0; i < len(wire); i++ {
		if strings.HasPrefix(wire[i:], "\r\n") && !strings.HasPrefix(wire[i:], "\r\n\t") {
			return wire[i+2:]
		}
	}
	t.Fatalf("no end of the Received field: %q", wire)
	return ""
}

func (l *logBuffer) reset() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.b.Reset()
}
