package smtpd

import (
	"bufio"
	"context"
	"crypto/tls"
	"errors"
	"io"
	"net"
	"os"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/rs/zerolog"

	"mailproxy/config"
	"mailproxy/filter"
)

// dialKind opens a listener of a kind and connects to it.
func (g *rig) dialKind(kind Kind) *peer {
	g.t.Helper()
	l := g.listen()
	g.serveKind(l, kind)
	return dialTo(g.t, l.Addr().String())
}

func TestListenersTakeMailByTheirPurpose(t *testing.T) {
	h := newHop(t)
	ours := func() *config.Snapshot { return snapshot("one.test", h.addr()) }
	trusting := ours()
	trusting.Networks = []config.Network{loopback}
	for _, c := range []struct {
		name     string
		snapshot *config.Snapshot
		purpose  Purpose
		greeting string
		here     string // a recipient of our domain
		away     string // one elsewhere
	}{
		{"any, a stranger", ours(), Any, "220", "250", "554 5.7.1"},
		{"any, from our networks", trusting, Any, "220", "250", "250"},
		{"mx, a stranger", ours(), MX, "220", "250", "554 5.7.1"},
		{"mx, from our networks", trusting, MX, "220", "250", "554 5.7.1"},
		{"internal, from our networks", trusting, Internal, "220", "250", "250"},
		{"internal, a stranger", ours(), Internal, "554 5.7.1", "", ""},
	} {
		t.Run(c.name, func(t *testing.T) {
			g := newRig(t, c.snapshot, nil)
			p := g.dialKind(Kind{Purpose: c.purpose})
			p.want(c.greeting)
			if c.here == "" {
				p.wantEnd()
				return
			}
			p.ask("EHLO client.test", "250")
			p.ask("MAIL FROM:<a@sender.test>", "250")
			p.ask("RCPT TO:<x@one.test>", c.here)
			p.ask("RCPT TO:<x@elsewhere.test>", c.away)
			waitFor(t, "the log names the listener", func() bool {
				return strings.Contains(g.log.String(), `"listener":"`+c.purpose.String()+`"`)
			})
		})
	}
}

// A session that is open while its network is taken away is not served on.
func TestTheInternalListenerAsksForEachTransaction(t *testing.T) {
	h := newHop(t)
	s := snapshot("one.test", h.addr())
	s.Networks = []config.Network{loopback}
	g := newRig(t, s, nil)
	p := g.dialKind(Kind{Purpose: Internal})
	p.want("220")
	p.ask("EHLO client.test", "250")
	g.use(snapshot("one.test", h.addr()))
	p.ask("MAIL FROM:<a@sender.test>", "250")
	p.ask("RCPT TO:<x@one.test>", "554 5.7.1")
	p.ask("RCPT TO:<x@elsewhere.test>", "554 5.7.1")
}

func TestTLSFromTheFirstOctet(t *testing.T) {
	h := newHop(t)
	g := newRig(t, snapshot("one.test", h.addr()), func(o *Options) { o.TLS = selfSigned(t) })
	p := g.dialKind(Kind{TLS: true})
	c := tls.Client(p.Conn, &tls.Config{InsecureSkipVerify: true, ServerName: "mx.test"})
	if err := c.Handshake(); err != nil {
		t.Fatal(err)
	}
	p.Conn, p.r = c, bufio.NewReader(c)
	p.want("220")
	if got := p.ask("EHLO client.test", "250"); strings.Contains(got, "STARTTLS") {
		t.Errorf("STARTTLS is offered inside TLS: %s", got)
	}
	p.ask("STARTTLS", "503")
	p.begin("x@one.test")
	p.send("x\r\n.\r\nQUIT\r\n")
	p.want("250")
	p.want("221")
	p.wantEnd()
	if m := h.messages(); len(m) != 1 || !strings.Contains(m[0].wire, " with ESMTPS id ") {
		t.Errorf("%+v", m)
	}
}

// Nothing is said in clear on a port for TLS, whoever comes.
func TestAPortForTLSSaysNothingInClear(t *testing.T) {
	g := newRig(t, with(snapshot(), "max_sessions", "1"), func(o *Options) { o.TLS = selfSigned(t) })
	clear := g.dialKind(Kind{TLS: true})
	clear.send("EHLO client.test\r\n")
	if got := clear.read(); strings.Contains(got, "220") || strings.Contains(got, "250") {
		t.Errorf("in clear: %q", got)
	}
	waitFor(t, "the session has ended", func() bool { return g.server.Stats().Open == 0 })
	g.dial().want("220")
	over := g.dialKind(Kind{TLS: true})
	if got := over.read(); strings.Contains(got, "421") {
		t.Errorf("in clear: %q", got)
	}
}

// shortListener finds no room for its first connection.
type shortListener struct {
	net.Listener
	short atomic.Bool
}

func (l *shortListener) Accept() (net.Conn, error) {
	if l.short.CompareAndSwap(false, true) {
		return nil, &net.OpError{Op: "accept", Net: "tcp", Err: os.NewSyscallError("accept4", syscall.EMFILE)}
	}
	return l.Listener.Accept()
}

func TestAcceptingGoesOnWhereThereWasNoRoom(t *testing.T) {
	g := newRig(t, snapshot(), nil)
	l := &shortListener{Listener: g.listen()}
	g.serve(l)
	dialTo(t, l.Addr().String()).want("220")
	if !l.short.Load() || !strings.Contains(g.log.String(), "too many open files") {
		t.Error("it was not short, or says nothing")
	}
}

func TestAPanicEndsItsSessionAlone(t *testing.T) {
	rules, err := filter.Compile(snapshot())
	if err != nil {
		t.Fatal(err)
	}
	var broken atomic.Bool
	g := newRig(t, snapshot(), func(o *Options) {
		o.Rules = func() *filter.Ruleset {
			if broken.Load() {
				panic("broken")
			}
			return rules
		}
	})
	other, p, q := g.hello(), g.dial(), g.hello()
	p.want("220")
	broken.Store(true)
	p.ask("EHLO client.test", "421 4.3.0") // before go-smtp has it, and after
	p.wantEnd()
	q.ask("MAIL FROM:<a@b.test>", "421 4.3.0")
	q.wantEnd()
	broken.Store(false)
	other.ask("MAIL FROM:<a@b.test>", "250")
	waitFor(t, "the sessions have ended", func() bool { return g.server.Stats().Open == 1 })
}

func TestASessionThatIsHandedOverAtTheEndIsClosed(t *testing.T) {
	g := newRig(t, snapshot(), nil)
	near, far := net.Pipe()
	h := newHandoff()
	_ = h.Close()
	h.give(newConn(g.server, near, Kind{}, g.rules.Load()))
	_ = far.SetReadDeadline(time.Now().Add(patience))
	if _, err := far.Read(make([]byte, 1)); !errors.Is(err, io.EOF) {
		t.Errorf("read: %v", err)
	}
	if _, err := h.Accept(); !errors.Is(err, net.ErrClosed) {
		t.Errorf("accept: %v", err)
	}
}

// A daemon that is stopped as soon as it has started ends.
func TestAServerThatIsClosedAtOnceEnds(t *testing.T) {
	gone, stop := context.WithCancel(t.Context())
	stop()
	for range 100 {
		l, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		s, ended := New(Options{Log: zerolog.Nop()}), make(chan error, 1)
		go func() { ended <- errors.Join(s.Serve(gone, l, Kind{}), s.Drain(t.Context())) }()
		select {
		case err := <-ended:
			if err != nil {
				t.Error(err)
			}
		case <-time.After(10 * time.Second):
			t.Fatal("it does not end")
		}
	}
}
