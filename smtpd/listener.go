package smtpd

import (
	"net"
	"net/netip"
	"sync"
	"sync/atomic"
	"time"

	"mailproxy/mail"
)

// A listener accepts for go-smtp. Sessions over a limit are answered and closed here, before they cost a goroutine.
type listener struct {
	net.Listener
	server *Server
	closed atomic.Bool
	once   sync.Once
	err    error
}

// Accept gives the next session that is admitted.
func (l *listener) Accept() (net.Conn, error) {
	for {
		raw, err := l.Listener.Accept()
		if err != nil {
			return nil, err
		}
		if c := l.server.admit(raw); c != nil {
			return c, nil
		}
	}
}

// Close stops accepting; again it does nothing.
func (l *listener) Close() error {
	l.once.Do(func() {
		l.closed.Store(true)
		l.err = l.Listener.Close()
	})
	return l.err
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

func addressOf(raw net.Conn) netip.Addr {
	if tcp, ok := raw.RemoteAddr().(*net.TCPAddr); ok {
		return tcp.AddrPort().Addr().Unmap()
	}
	return netip.Addr{}
}

// admit makes a session of a connection, or refuses and closes it.
func (s *Server) admit(raw net.Conn) *conn {
	rules := s.o.Rules()
	if rules == nil {
		s.refuse(raw, replyNotReady)
		return nil
	}
	c := newConn(s, raw, rules)
	v := rules.Settings()
	switch s.sessions.add(c, c.key, v.MaxSessions, v.MaxSessionsPerAddress) {
	case refusedDraining:
		s.refuse(raw, replyDraining)
	case refusedFull:
		s.refuse(raw, replyTooManySessions)
	case refusedClient:
		s.refuse(raw, replyTooManyFromClient)
	default:
		s.count.sessions.Add(1)
		s.log.Info().Str("session", c.id).Stringer("client", c.client).Msg("session.open")
		return c
	}
	return nil
}

// refuse answers and closes. The socket is fresh, so the write has room and does not wait.
func (s *Server) refuse(raw net.Conn, reply *mail.Reply) {
	s.count.refused.Add(1)
	s.log.Debug().Stringer("client", addressOf(raw)).Int("code", reply.Code).Str("reason", reply.Text).Msg("session.refused")
	_ = raw.SetWriteDeadline(time.Now().Add(time.Second))
	_, _ = raw.Write(appendReply(nil, reply))
	_ = raw.Close()
}
