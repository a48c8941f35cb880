package smtpd

import (
	"bytes"
	"net"
	"runtime/debug"
	"sync"
)

// A handoff is the listener that go-smtp serves: it gives the sessions that have come to their first MAIL. go-smtp has two buffers for
// each, which cost more than all else that an idle session takes; most that are idle have not sent anything.
type handoff struct {
	conns chan net.Conn
	done  chan struct{}
	once  sync.Once
}

func newHandoff() *handoff { return &handoff{conns: make(chan net.Conn), done: make(chan struct{})} }

// Accept gives the next session; net.ErrClosed at the end.
func (h *handoff) Accept() (net.Conn, error) {
	select {
	case c := <-h.conns:
		return c, nil
	case <-h.done:
		return nil, net.ErrClosed
	}
}

// Close ends the handing over; again it does nothing.
func (h *handoff) Close() error {
	h.once.Do(func() { close(h.done) })
	return nil
}

// Addr is none.
func (h *handoff) Addr() net.Addr { return &net.TCPAddr{} }

// give hands a session over, or ends it.
func (h *handoff) give(c *conn) {
	select {
	case h.conns <- c:
	case <-h.done:
		_ = c.Close()
	}
}

// begin is a session up to its first MAIL.
func (s *Server) begin(c *conn) {
	defer func() {
		if p := recover(); p != nil {
			c.log.Error().Interface("err", p).Bytes("stack", debug.Stack()).Msg("session.error")
			c.end(replyPanic)
			_ = c.Close()
		}
	}()
	if !c.early() {
		_ = c.Close()
		return
	}
	s.handoff.give(c)
}

// early answers what go-smtp need not see, and gives true where there is a MAIL for it; false where the session has ended.
func (c *conn) early() bool {
	c.mustWait()
	c.put(c.greeting())
	for {
		hand := c.nextCommand()
		if hand == nil {
			return false
		}
		if bytes.Equal(hand, handMail) {
			// go-smtp wants to greet, and to be greeted, first.
			c.unsaid = 2
			c.handed, c.behind = handHelo, hand
			if c.esmtp {
				c.handed = handEhlo
			}
			return true
		}
		reply := c.answer
		c.answer = nil
		c.put(reply)
		if bytes.Equal(hand, handQuit) {
			c.flush()
			return false
		}
	}
}
