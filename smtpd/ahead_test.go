package smtpd

import (
	"bufio"
	"bytes"
	"crypto/tls"
	"io"
	"net"
	"strings"
	"testing"
)

// An aheadListener lets its client go ahead: once the server has read what ends with after, and before it can answer, ahead is sent and
// has come.
type aheadListener struct {
	net.Listener
	client       chan net.Conn
	after, ahead string
}

type aheadConn struct {
	*net.TCPConn
	l      *aheadListener
	client net.Conn
	read   []byte
}

// Accept gives the next connection, of the client that is told next.
func (l *aheadListener) Accept() (net.Conn, error) {
	c, err := l.Listener.Accept()
	if err != nil {
		return nil, err
	}
	return &aheadConn{TCPConn: c.(*net.TCPConn), l: l}, nil
}

// Read lets the client go ahead behind it.
func (c *aheadConn) Read(p []byte) (int, error) {
	n, err := c.TCPConn.Read(p)
	if c.read = append(c.read, p[:n]...); n == 0 || !bytes.HasSuffix(c.read, []byte(c.l.after)) {
		return n, err
	}
	if c.client == nil {
		c.client = <-c.l.client
	}
	_, _ = io.WriteString(c.client, c.l.ahead)
	for there, came := newPeeker(c.TCPConn), false; !came; {
		came, _ = there.peek()
	}
	return n, err
}

// Octets that have come before our reply count, also where they were not yet there when its command was read (RFC 2920 §3.1).
func TestWhoMustWaitForAReplyAndDoesNotIsRefused(t *testing.T) {
	for _, c := range []struct {
		name          string
		before, after string // what is said first, a line at a time; and that behind which the client goes ahead
		ahead         string
		want          []string
		refused       bool
	}{
		{"EHLO", "", "EHLO client.test\r\n", "RSET\r\n", []string{"554 5.5.0"}, true},
		{"HELO", "", "HELO client.test\r\n", "RSET\r\n", []string{"554 5.5.0"}, true},
		{"NOOP", "EHLO client.test\r\n", "NOOP\r\n", "RSET\r\n", []string{"554 5.5.0"}, true},
		{"VRFY", "EHLO client.test\r\n", "VRFY x\r\n", "RSET\r\n", []string{"554 5.5.0"}, true},
		{"EXPN", "EHLO client.test\r\n", "EXPN x\r\n", "RSET\r\n", []string{"554 5.5.0"}, true},
		{"TURN", "EHLO client.test\r\n", "TURN\r\n", "RSET\r\n", []string{"554 5.5.0"}, true},
		{"AUTH", "EHLO client.test\r\n", "AUTH PLAIN\r\n", "RSET\r\n", []string{"554 5.5.0"}, true},
		{"STARTTLS", "EHLO client.test\r\n", "STARTTLS\r\n", "RSET\r\n", []string{"554 5.5.0"}, true},
		{"DATA, behind the replies of its group", "EHLO client.test\r\n", "MAIL FROM:<a@sender.test>\r\nRCPT TO:<x@one.test>\r\nDATA\r\n", "x\r\n.\r\n",
			[]string{"250 2.1.0", "250 2.1.5", "554 5.5.0"}, true},
		{"RSET without PIPELINING", "HELO client.test\r\n", "RSET\r\n", "NOOP\r\n", []string{"554 5.5.0"}, true},
		{"MAIL and RCPT", "EHLO client.test\r\n", "MAIL FROM:<a@sender.test>\r\nRCPT TO:<x@one.test>\r\n", "RSET\r\n",
			[]string{"250 2.1.0", "250 2.1.5", "250 2.0.0"}, false},
		{"RSET", "EHLO client.test\r\n", "RSET\r\n", "NOOP\r\n", []string{"250 2.0.0", "250 2.0.0"}, false},
	} {
		t.Run(c.name, func(t *testing.T) {
			h := newHop(t)
			g := newRig(t, snapshot("one.test", h.addr()), func(o *Options) { o.TLS = selfSigned(t) })
			l := &aheadListener{Listener: g.listen(), client: make(chan net.Conn, 1), after: c.after, ahead: c.ahead}
			g.serve(l)
			p := dialTo(t, l.Addr().String())
			l.client <- p.Conn
			p.want("220")
			if c.before != "" {
				p.ask(strings.TrimSuffix(c.before, "\r\n"), "250")
			}
			p.send(c.after)
			for _, want := range c.want {
				p.want(want)
			}
			if c.refused {
				p.wantEnd()
			}
			if n := len(h.messages()); n != 0 {
				t.Errorf("%d messages taken", n)
			}
		})
	}
}

// A gatherer is a client's connection whose writes can be held, and then go out as one.
type gatherer struct {
	net.Conn
	early   bool // what ends the handshake is held: all behind the first write
	holding bool
	held    []byte
}

// Write holds p, or writes it.
func (g *gatherer) Write(p []byte) (int, error) {
	if g.holding {
		g.held = append(g.held, p...)
		return len(p), nil
	}
	g.holding = g.early
	return g.Conn.Write(p)
}

func (g *gatherer) release(t *testing.T) {
	t.Helper()
	g.early, g.holding = false, false
	if _, err := g.Write(g.held); err != nil {
		t.Fatal(err)
	}
}

// Inside TLS what was not waited for may have been read off the wire already, and nobody has asked TLS for it.
func TestWhoDoesNotWaitInsideTLSIsRefused(t *testing.T) {
	dial := func(t *testing.T, early bool) (*peer, *gatherer) {
		t.Helper()
		g := newRig(t, snapshot(), func(o *Options) { o.TLS = selfSigned(t) })
		p := g.dialKind(Kind{TLS: true})
		wire := &gatherer{Conn: p.Conn, early: early}
		c := tls.Client(wire, &tls.Config{InsecureSkipVerify: true, ServerName: "mx.test"})
		if err := c.Handshake(); err != nil {
			t.Fatal(err)
		}
		p.Conn, p.r = c, bufio.NewReader(c)
		return p, wire
	}
	t.Run("for the greeting", func(t *testing.T) {
		p, wire := dial(t, true)
		p.send("EHLO client.test\r\n")
		wire.release(t)
		p.want("554 5.5.0")
		p.wantEnd()
	})
	t.Run("for a reply", func(t *testing.T) {
		p, wire := dial(t, false)
		p.want("220")
		wire.holding = true
		p.send("EHLO client.test\r\n")
		p.send("RSET\r\n") // a record of its own
		wire.release(t)
		p.want("554 5.5.0")
		p.wantEnd()
	})
	t.Run("nobody who waits", func(t *testing.T) {
		p, _ := dial(t, false)
		p.want("220")
		p.ask("EHLO client.test", "250")
		p.ask("NOOP", "250")
		p.ask("QUIT", "221")
	})
}

// Who is sent away hears why, whatever it has sent: nothing of that is read.
func TestWhoIsSentAwayIsToldWhyThoughItDidNotWait(t *testing.T) {
	g := behind(t, with(snapshot(), "max_sessions_per_address", "1"), nil)
	first := g.dialFor("192.0.2.77")
	first.want("220")
	second := g.dial()
	second.send("PROXY TCP4 192.0.2.77 198.51.100.1 4096 25\r\nEHLO client.test\r\n")
	second.want("421 4.7.0 too many sessions from your address")
	second.wantEnd()
}
