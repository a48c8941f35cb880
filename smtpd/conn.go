package smtpd

import (
	"bytes"
	"context"
	"crypto/tls"
	"io"
	"net"
	"net/netip"
	"sync"
	"time"

	"github.com/rs/zerolog"

	"mailproxy/filter"
	"mailproxy/mail"
)

// A phase is where a session stands; see the package comment.
type phase uint8

const (
	phaseGreeting phase = iota
	phaseCommand
	phaseBody
	phaseDot
	phaseEnded
)

const (
	maxCommand   = 2048            // octets of a command with its CRLF; RFC 5321 §4.5.3.1.4 wants 512 and more for extensions
	maxHeld      = 16 << 10        // octets of replies that are held
	writeTimeout = time.Minute     // for a client to take replies
	lingerTime   = 2 * time.Second // for a client to read why it was cut off
	lingerBytes  = 1 << 20         // octets read and dropped meanwhile
)

// A conn is one session: the net.Conn that go-smtp talks to, and the door to the wire. All of it belongs to the one goroutine of
// this session, but base, which is for deadlines and closing from outside.
type conn struct {
	server *Server
	kind   Kind
	log    zerolog.Logger
	id     string
	client netip.Addr
	port   uint16 // the client's; 0 where it is not known
	key    clientKey
	side   side
	before netip.Addr // who has connected, where that is one who speaks for its clients and has yet to say for whom
	front  netip.Addr // who the client was before XCLIENT
	opened time.Time
	idle   time.Duration // of the settings at the session's start, as are the next two
	expiry time.Time
	faults int // refused commands that are left

	unknown int  // recipients that were refused for good
	harvest bool // too many of these: nothing more is told
	blind   int  // recipients refused since

	base   net.Conn             // the TCP connection
	unread *peeker              // of base
	stream net.Conn             // base, or TLS over it
	tls    *tls.ConnectionState // nil in clear
	in     input
	out    []byte // replies held
	alone  bool   // the reply at out[turn:] is one that the client must wait for before it sends on
	turn   int

	phase  phase
	handed []byte      // what go-smtp has still to read
	behind []byte      // what it has to read behind that
	unsaid int         // replies of go-smtp's that the client has had already
	wrote  []byte      // a line of go-smtp's that is not complete
	answer *mail.Reply // what go-smtp's next positive reply, or the session's refusal, becomes on the wire
	linger bool        // the client may be sending still
	once   sync.Once   // Close

	helo  string // "" before EHLO and after STARTTLS
	esmtp bool
	said  xclient      // by XCLIENT
	name  *lookup      // the client's
	named time.Time    // until when a message waits for it
	next  command      // what MAIL or RCPT said, for the session
	tx    *transaction // nil outside of a transaction
	count int          // transactions so far
	ctx   context.Context
}

func newConn(s *Server, raw net.Conn, kind Kind, rules *filter.Ruleset) *conn {
	v := rules.Settings()
	now := time.Now()
	c := &conn{
		server: s, kind: kind, id: mail.NewID(now), opened: now, idle: v.IdleTimeout,
		expiry: now.Add(v.SessionTimeout), faults: v.MaxErrors, base: raw, unread: newPeeker(raw), stream: raw, ctx: s.killed,
	}
	c.is(remoteOf(raw), rules)
	c.log = s.log.With().Str("session", c.id).Logger()
	return c
}

// is says who the client is.
func (c *conn) is(from netip.AddrPort, rules *filter.Ruleset) {
	client := from.Addr()
	c.client, c.port, c.key, c.side = client, from.Port(), keyOf(client), outside
	if c.kind.Purpose != MX && rules.Trusted(client) {
		c.side = inside
	}
}

// Read gives go-smtp its next line.
func (c *conn) Read(p []byte) (int, error) {
	if len(c.handed) == 0 {
		c.handed, c.behind = c.behind, nil
	}
	if len(c.handed) == 0 {
		switch c.phase {
		case phaseEnded:
			return 0, io.EOF
		case phaseDot:
			c.phase = phaseCommand
			c.handed = wireDot
		case phaseBody:
			// The session took no body and gave no word: what follows is not commands.
			c.abort(replyInternal)
			return 0, io.EOF
		default:
			if c.handed = c.nextCommand(); c.handed == nil {
				return 0, io.EOF
			}
		}
	}
	n := copy(p, c.handed)
	c.handed = c.handed[n:]
	return n, nil
}

// Write takes go-smtp's replies, of which only the codes are used.
func (c *conn) Write(p []byte) (int, error) {
	for rest := p; ; {
		i := bytes.IndexByte(rest, '\n')
		if i < 0 {
			if len(c.wrote)+len(rest) <= maxCommand { // only the codes are needed
				c.wrote = append(c.wrote, rest...)
			}
			return len(p), nil
		}
		line := rest[:i]
		if len(c.wrote) > 0 {
			line = append(c.wrote, line...)
		}
		rest = rest[i+1:]
		if len(line) >= 4 && line[3] != '-' {
			c.answered(int(line[0]-'0')*100 + int(line[1]-'0')*10 + int(line[2]-'0'))
		}
		c.wrote = c.wrote[:0]
	}
}

// answered puts the reply that stands behind go-smtp's code.
func (c *conn) answered(code int) {
	if c.phase == phaseEnded {
		return
	}
	if c.unsaid > 0 {
		c.unsaid--
		return
	}
	if code == replyStart.Code && c.answer == nil { // go-smtp's own, for DATA
		c.phase = phaseBody
		c.put(replyStart)
		return
	}
	reply := c.answer
	c.answer = nil
	switch {
	case reply != nil && reply.Code == code:
		c.put(reply)
	default:
		c.put(fallback(code))
	}
}

func (c *conn) greeting() *mail.Reply {
	return &mail.Reply{Code: 220, Text: c.server.o.Hostname + " ESMTP"}
}

// put holds a reply until the next read from the wire, and ends a session that had too many refusals.
func (c *conn) put(reply *mail.Reply) {
	if c.phase == phaseEnded {
		return
	}
	c.out = appendReply(c.out, reply)
	if reply.Code >= 400 && reply != replyTooManyRcpt && reply != replyUnknownMany { // a list that is too long is no error of its client's
		if c.faults--; c.faults < 0 {
			c.server.limited(limitErrors, c.client)
			c.end(replyTooManyErrors)
			return
		}
	}
	if len(c.out) > maxHeld {
		c.flush()
	}
}

// mustWait says that the client may send nothing more before it has the next reply: flush looks.
func (c *conn) mustWait() { c.alone, c.turn = true, len(c.out) }

// flush writes what is held; a client that does not take it is gone. One that has not waited for it where it must is told so instead, and
// the session ends: in clear, what it has sent may be another's.
func (c *conn) flush() {
	if len(c.out) == 0 {
		return
	}
	if c.alone {
		if c.alone = false; c.hasSent() {
			c.out = c.out[:c.turn]
			c.abort(replyOutOfStep)
			return
		}
	}
	_ = c.base.SetWriteDeadline(time.Now().Add(writeTimeout))
	_, err := c.stream.Write(c.out)
	if cap(c.out) > maxHeld/8 {
		c.out = nil // an idle session keeps little
	} else {
		c.out = c.out[:0]
	}
	if err != nil {
		c.phase = phaseEnded
	}
}

// end says a last reply and ends the session.
func (c *conn) end(reply *mail.Reply) {
	if c.phase == phaseEnded {
		return
	}
	c.log.Debug().Int("code", reply.Code).Str("reason", reply.Text).Msg("session.ended")
	c.alone = false // nothing is read any more
	c.out = appendReply(c.out, reply)
	c.flush()
	c.phase = phaseEnded
}

// abort ends the session in front of a client that may be sending still.
func (c *conn) abort(reply *mail.Reply) {
	if c.phase == phaseEnded {
		return
	}
	c.server.count.framing.Add(1)
	if reply == replyTooSlow {
		c.server.limited(limitSlow, c.client)
	}
	c.linger = true
	c.end(reply)
}

// hangUp ends the session without a word: whoever is there does not speak SMTP.
func (c *conn) hangUp() {
	c.server.count.framing.Add(1)
	c.out = nil
	c.phase = phaseEnded
}

// Close ends the session; again it does nothing.
func (c *conn) Close() error {
	c.once.Do(func() {
		c.flush()
		c.phase = phaseEnded
		if c.tls != nil {
			_ = c.stream.(*tls.Conn).CloseWrite() // says close_notify
		}
		if c.linger {
			c.lingerOn()
		}
		_ = c.base.Close()
		c.in.release()
		c.server.sessions.remove(c)
		c.log.Debug().Int64("took_ms", time.Since(c.opened).Milliseconds()).Msg("session.close")
	})
	return nil
}

// lingerOn reads and drops what the client sends for a bounded while, so that it can read our last reply: closing with octets
// unread would reset the connection and take the reply with it.
func (c *conn) lingerOn() {
	if w, ok := c.base.(interface{ CloseWrite() error }); ok && w.CloseWrite() != nil {
		return
	}
	if c.base.SetReadDeadline(time.Now().Add(lingerTime)) != nil {
		return
	}
	var scratch [4 << 10]byte
	for n := 0; n < lingerBytes; {
		m, err := c.base.Read(scratch[:])
		if err != nil {
			return
		}
		n += m
	}
}

// drain wakes a session that waits for a command. It is called from outside.
func (c *conn) drain() { _ = c.base.SetReadDeadline(longAgo) }

// LocalAddr is base's.
func (c *conn) LocalAddr() net.Addr { return c.base.LocalAddr() }

// RemoteAddr is base's.
func (c *conn) RemoteAddr() net.Addr { return c.base.RemoteAddr() }

// SetDeadline does nothing: deadlines are conn's own. So do the next two.
func (c *conn) SetDeadline(time.Time) error { return nil }

// SetReadDeadline does nothing.
func (c *conn) SetReadDeadline(time.Time) error { return nil }

// SetWriteDeadline does nothing.
func (c *conn) SetWriteDeadline(time.Time) error { return nil }
