package web

import (
	"context"
	"errors"
	"io"
	"net"
	"sync/atomic"
	"testing"
	"time"
)

// agent serves the rig's agent listener and gives its address.
func (r *rig) agentListener(t *testing.T) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan error)
	go func() { ended <- r.ServeAgent(ctx, l) }()
	t.Cleanup(func() {
		cancel()
		if err := <-ended; err != nil {
			t.Error(err)
		}
	})
	return l.Addr().String()
}

func askAgent(t *testing.T, address string) string {
	t.Helper()
	c, err := net.Dial("tcp", address)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	_ = c.SetReadDeadline(time.Now().Add(10 * time.Second)) // a failure shows below
	line, err := io.ReadAll(c)
	if err != nil {
		t.Error(err)
	}
	return string(line)
}

func TestTheAgentsLineForEachState(t *testing.T) {
	var spool, smtp, database atomic.Bool
	check := func(name string, critical bool, broken *atomic.Bool) Check {
		return Check{Name: name, Critical: critical, Func: func(context.Context) error {
			if broken.Load() {
				return errors.New("do not tell\neverybody")
			}
			return nil
		}}
	}
	r := newRig(t, check("database", false, &database), check("spool", true, &spool), check("smtp", true, &smtp))
	var later atomic.Int64
	r.agent.now = func() time.Time { return time.Unix(later.Load(), 0) }
	address := r.agentListener(t)
	for _, c := range []struct {
		name                  string
		spool, smtp, database bool
		drained               string
		weight                int
		want                  string
	}{
		{name: "idle", weight: 100, want: "ready up 100%\n"},
		{name: "loaded", weight: 37, want: "ready up 37%\n"},
		{name: "full, and still in service", weight: 0, want: "ready up 1%\n"}, // 0% would be a drain
		{name: "a weight that cannot be", weight: 1000, want: "ready up 100%\n"},
		{name: "without its database", database: true, weight: 100, want: "ready up 100%\n"},
		{name: "spool out of service", spool: true, weight: 100, want: "ready down #spool\n"},
		{name: "no configuration", smtp: true, weight: 100, want: "ready down #smtp\n"},
		{name: "drained", drained: "root", weight: 100, want: "drain up\n"},
		{name: "drained and unfit", drained: "root", spool: true, weight: 100, want: "drain down #spool\n"},
		{name: "back in service", weight: 100, want: "ready up 100%\n"},
	} {
		spool.Store(c.spool)
		smtp.Store(c.smtp)
		database.Store(c.database)
		r.drained.Store(c.drained)
		r.weight.Store(int64(c.weight))
		later.Add(int64(healthAge / time.Second))
		if got := askAgent(t, address); got != c.want {
			t.Errorf("%s: %q, want %q", c.name, got, c.want)
		}
	}
	// Within the second in which the checks' answers are kept.
	spool.Store(true)
	r.drained.Store("root")
	if got := askAgent(t, address); got != "drain up\n" {
		t.Errorf("drained just now: %q", got)
	}
}

func TestNobodyHoldsTheAgentUp(t *testing.T) {
	r := newRig(t)
	r.weight.Store(100)
	address := r.agentListener(t)
	for range 3 * agentConns { // who neither say nor read anything, nor hang up
		c, err := net.Dial("tcp", address)
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
	}
	if got := askAgent(t, address); got != "ready up 100%\n" {
		t.Errorf("it says %q", got)
	}
}

// A check that hangs holds up those who ask, and no more of them than there may be.
func TestNoMoreThanSomeAskTheAgentAtOnce(t *testing.T) {
	release := make(chan struct{})
	var asked atomic.Int32
	r := newRig(t, Check{Name: "spool", Critical: true, Func: func(context.Context) error { asked.Add(1); <-release; return nil }})
	r.weight.Store(100)
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	counted := &countingListener{Listener: l}
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan error)
	go func() { ended <- r.ServeAgent(ctx, counted) }()
	var conns []net.Conn
	for range 2 * agentConns {
		c, err := net.Dial("tcp", l.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		conns = append(conns, c)
	}
	for deadline := time.Now().Add(10 * time.Second); counted.open.Load() < agentConns || asked.Load() == 0; {
		if time.Now().After(deadline) {
			t.Fatalf("%d are asking", counted.open.Load())
		}
		time.Sleep(time.Millisecond) // between two looks at a condition
	}
	close(release)
	for _, c := range conns { // all are answered in the end
		_ = c.SetReadDeadline(time.Now().Add(10 * time.Second)) // a failure shows below
		if line, err := io.ReadAll(c); err != nil || string(line) != "ready up 100%\n" {
			t.Errorf("%q, %v", line, err)
		}
	}
	cancel()
	if err := <-ended; err != nil {
		t.Error(err)
	}
	if n := counted.most.Load(); n != agentConns {
		t.Errorf("%d asked at once", n)
	}
}

// countingListener knows how many of its connections are open, and were at most.
type countingListener struct {
	net.Listener
	open, most atomic.Int32
}

func (l *countingListener) Accept() (net.Conn, error) {
	c, err := l.Listener.Accept()
	if err != nil {
		return nil, err
	}
	l.most.Store(max(l.most.Load(), l.open.Add(1))) // one goroutine accepts
	return &countedConn{c, l}, nil
}

type countedConn struct {
	net.Conn
	of *countingListener
}

func (c *countedConn) Close() error {
	c.of.open.Add(-1)
	return c.Conn.Close()
}
