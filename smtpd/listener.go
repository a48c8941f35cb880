package smtpd

import (
	"errors"
	"net"
	"net/netip"
	"sync"
	"syscall"
	"time"

	"mailproxy/config"
	"mailproxy/filter"
	"mailproxy/mail"
)

// Purpose is whom a listener takes mail from, and where to.
type Purpose uint8

const (
	// Any takes mail from everyone to our domains, and from our networks to anywhere.
	Any Purpose = iota
	// MX takes mail from everyone to our domains, and nothing else.
	MX
	// Internal takes mail from our networks to anywhere, and sends everyone else away.
	Internal
)

// String is the purpose's word in the log.
func (p Purpose) String() string { return [...]string{"any", "mx", "internal"}[p] }

// Kind says what a listener is.
type Kind struct {
	Purpose Purpose
	// TLS begins with the first octet.
	TLS bool
}

// A listener is one that a Server serves.
type listener struct {
	net.Listener
	kind   Kind
	closed chan struct{}
	once   sync.Once
	err    error
}

// Close stops accepting; again it does nothing.
func (l *listener) Close() error {
	l.once.Do(func() {
		close(l.closed)
		l.err = l.Listener.Close()
	})
	return l.err
}

// wasClosed says whether Close was called.
func (l *listener) wasClosed() bool {
	select {
	case <-l.closed:
		return true
	default:
		return false
	}
}

// acceptPause is how long accepting rests where the system has no room for one more connection.
const acceptPause = 100 * time.Millisecond

// accept begins a session for each connection that is admitted. Those over a limit are answered and closed here, before they cost a
// goroutine. It ends with the listener, whose error it gives unless that was closed.
func (s *Server) accept(l *listener) error {
	for {
		raw, err := l.Listener.Accept()
		switch {
		case err == nil:
			if c := s.admit(raw, l.kind); c != nil {
				go s.begin(c) // waited for by its place in the registry
			}
		case l.wasClosed():
			return nil
		case isShortage(err):
			s.log.Error().Err(err).Msg("session.error")
			rest := time.NewTimer(acceptPause)
			select {
			case <-rest.C:
			case <-l.closed:
				rest.Stop()
			}
		default:
			return err
		}
	}
}

// isShortage says whether accepting may go well later.
func isShortage(err error) bool {
	for _, e := range []error{syscall.EMFILE, syscall.ENFILE, syscall.ENOBUFS, syscall.ENOMEM, syscall.ECONNABORTED, syscall.EAGAIN, syscall.EINTR} {
		if errors.Is(err, e) {
			return true
		}
	}
	return false
}

// clientKey is what sessions are counted by: an IPv4 address, or one /64 of IPv6.
type clientKey = netip.Prefix

func keyOf(a netip.Addr) clientKey {
	bits := 32
	if a.Is6() {
		bits = 64
	}
	p, _ := a.WithZone("").Prefix(bits) // the zero Prefix for no address at all
	return p
}

// networkOf is what clients are counted by beside that: one /24 of IPv4, or one /64 of IPv6.
func networkOf(a netip.Addr) netip.Prefix {
	bits := 24
	if a.Is6() {
		bits = 64
	}
	p, _ := a.WithZone("").Prefix(bits)
	return p
}

// remoteOf is the other end of a connection; the zero AddrPort where that is not TCP's.
func remoteOf(raw net.Conn) netip.AddrPort {
	if tcp, ok := raw.RemoteAddr().(*net.TCPAddr); ok {
		a := tcp.AddrPort()
		return netip.AddrPortFrom(a.Addr().Unmap(), a.Port())
	}
	return netip.AddrPort{}
}

// admit makes a session of a connection, or refuses and closes it.
func (s *Server) admit(raw net.Conn, kind Kind) *conn {
	rules := s.o.Rules()
	if rules == nil {
		s.refuse(raw, kind, replyNotReady)
		return nil
	}
	c := newConn(s, raw, kind, rules)
	balancer := rules.Balancer(c.client)
	if balancer || rules.Frontend(c.client) {
		c.before = c.client
	}
	var reply *mail.Reply
	if balancer {
		reply = s.place(c, rules.Settings()) // the rest when it has said who its client is
	} else {
		reply = s.seat(c, rules)
	}
	if reply != nil {
		s.refuse(raw, kind, reply)
		return nil
	}
	if !balancer {
		c.opens()
	}
	return c
}

// opens counts and logs a session whose client is known.
func (c *conn) opens() {
	c.server.count.sessions.Add(1)
	e := c.log.Info().Stringer("client", c.client).Stringer("listener", c.kind.Purpose)
	if base := remoteOf(c.base).Addr(); base != c.client {
		e.Stringer("balancer", base)
	}
	e.Msg("session.open")
}

// seat takes a session in whose client is known. The reply refuses.
func (s *Server) seat(c *conn, rules *filter.Ruleset) *mail.Reply {
	if c.kind.Purpose == Internal && !rules.Trusted(c.client) {
		return replyNotOurs
	}
	if reply := s.place(c, rules.Settings()); reply != nil {
		return reply
	}
	now := time.Now()
	c.name, c.named = s.names.of(c.client, now), now.Add(nameWait)
	return nil
}

// reseat goes over to another client, whom the one before speaks for.
func (s *Server) reseat(c *conn, client netip.AddrPort, rules *filter.Ruleset) *mail.Reply {
	s.sessions.remove(c)
	c.before = netip.Addr{}
	c.is(client, rules)
	c.unknown, c.harvest, c.blind = 0, false, 0
	return s.seat(c, rules)
}

// place takes a session in by the limits of its side. The reply refuses.
func (s *Server) place(c *conn, v config.Values) *mail.Reply {
	bounds, now := limitsOf(&v, c.side), time.Now()
	if c.before.IsValid() { // a single address for many clients
		bounds = &config.Limits{MaxSessions: bounds.MaxSessions, MaxSessionsPerAddress: bounds.MaxSessions, MaxSessionsPerNetwork: bounds.MaxSessions}
	}
	over, open := s.sessions.add(c, bounds)
	switch {
	case !open:
		return replyDraining
	case over < limitCount:
	case !s.rates[c.side].take(c.key, rateConnections, bounds.MaxConnectionsPerMinute, time.Minute, now):
		over = limitConnections
	case !c.before.IsValid() && s.rates[c.side].isSpent(c.key, rateUnknown, v.MaxUnknownPerHour, unknownTime, now):
		over = limitUnknown
	default:
		return nil
	}
	s.sessions.remove(c)
	s.limited(over, c.client)
	return overReplies[over]
}

// overReplies are what a client hears that comes while a limit is met.
var overReplies = map[limit]*mail.Reply{
	limitSessions: replyTooManySessions, limitAddress: replyTooManyFromClient, limitNetwork: replyTooManyFromNetwork,
	limitConnections: replyTooOften, limitUnknown: replyHarvest,
}

// refuse answers, where TLS need not come first, and closes. The socket is fresh, so the write has room and does not wait.
func (s *Server) refuse(raw net.Conn, kind Kind, reply *mail.Reply) {
	s.count.refused.Add(1)
	s.log.Debug().Stringer("client", remoteOf(raw).Addr()).Int("code", reply.Code).Str("reason", reply.Text).Msg("session.refused")
	_ = raw.SetWriteDeadline(time.Now().Add(time.Second))
	if !kind.TLS {
		_, _ = raw.Write(appendReply(nil, reply))
	}
	_ = raw.Close()
}
