package smtpd

import (
	"bytes"
	"errors"
	"net"
	"os"
	"sync"
	"syscall"
	"time"

	"mailproxy/mail"
)

const (
	leastInput = 512      // octets, to begin with
	smallInput = 4 << 10  // octets, while commands are read
	bigInput   = 64 << 10 // octets, while a message is read

	lineTime = time.Minute // for a command to come to its end, once it has begun
)

var (
	longAgo   = time.Unix(1, 0)
	wireDot   = []byte(".\r\n")
	bigInputs = sync.Pool{New: func() any { b := make([]byte, bigInput); return &b }}
)

// An input is what the client sent and nobody has taken yet. The zero input is empty.
type input struct {
	buf  []byte
	r, w int
	big  *[]byte // buf's owner, while it is a big one
}

func (in *input) bytes() []byte { return in.buf[in.r:in.w] }
func (in *input) len() int      { return in.w - in.r }

// take drops the first n octets.
func (in *input) take(n int) {
	if in.r += n; in.r == in.w {
		in.r, in.w = 0, 0
	}
}

// free gives where to read to; empty when the buffer is full.
func (in *input) free() []byte {
	if in.buf == nil {
		in.buf = make([]byte, leastInput)
	}
	if in.r == 0 && in.w == len(in.buf) && in.w < smallInput {
		in.buf = append(make([]byte, 0, smallInput), in.buf...)[:smallInput]
	}
	if in.r > 0 && in.w == len(in.buf) {
		in.w = copy(in.buf, in.buf[in.r:in.w])
		in.r = 0
	}
	return in.buf[in.w:]
}

// grow goes over to a big buffer.
func (in *input) grow() {
	if in.big != nil {
		return
	}
	in.big = bigInputs.Get().(*[]byte)
	in.w = copy(*in.big, in.bytes())
	in.r, in.buf = 0, *in.big
}

// shrink goes back to a small one where nothing would be lost.
func (in *input) shrink() {
	if in.big != nil && in.len() == 0 {
		in.release()
	}
}

func (in *input) release() {
	if in.big != nil {
		bigInputs.Put(in.big)
	}
	*in = input{}
}

// fill reads from the wire once, having written the replies that are held. At the deadline it says late. Where it gives false
// the session has ended.
func (c *conn) fill(deadline time.Time, late *mail.Reply) bool {
	c.flush()
	for c.phase != phaseEnded {
		if c.base.SetReadDeadline(deadline) != nil {
			break
		}
		// In this order: who drains sets its mark first and the deadline second.
		if c.phase == phaseCommand && c.server.sessions.isDraining() {
			c.end(replyDraining)
			return false
		}
		n, err := c.stream.Read(c.in.free())
		c.in.w += n
		if n > 0 {
			return true
		}
		timeout := errors.Is(err, os.ErrDeadlineExceeded)
		if err == nil || timeout && time.Now().Before(deadline) {
			continue // woken for something else
		}
		if timeout {
			c.abort(late)
		}
		break
	}
	c.phase = phaseEnded
	return false
}

// readLine gives the next line with its CRLF, or nil where the session has ended. The line is valid until the next read.
func (c *conn) readLine() []byte {
	c.in.shrink()
	deadline, late := time.Now().Add(c.idle), replyIdle
	if c.expiry.Before(deadline) {
		deadline, late = c.expiry, replyTooOld
	}
	for seen, begun := 0, false; ; {
		b := c.in.bytes()
		if noise(b[seen:]) {
			c.hangUp()
			return nil
		}
		end := bytes.IndexByte(b[seen:], '\n')
		switch {
		case end >= 0 && seen+end < maxCommand:
			line := b[:seen+end+1]
			if len(line) < 2 || bytes.IndexByte(line, '\r') != len(line)-2 {
				c.abort(replyBareLine)
				return nil
			}
			c.in.take(len(line))
			return line
		case end >= 0 || len(b) >= maxCommand:
			c.abort(replyLineTooLong)
			return nil
		}
		if seen = len(b); seen > 0 && !begun {
			begun = true
			if t := time.Now().Add(lineTime); t.Before(deadline) {
				deadline, late = t, replyTooSlow
			}
		}
		if !c.fill(deadline, late) {
			return nil
		}
	}
}

// noise finds what no command has in it: control characters other than TAB and line ends. A TLS hello begins with one.
func noise(b []byte) bool {
	for _, x := range b {
		if x == '\n' {
			return false // the next line has its turn
		}
		if x < ' ' && x != '\t' && x != '\r' || x == 0x7f {
			return true
		}
	}
	return false
}

// hasSent says, without waiting, whether the client has sent anything that nobody has taken yet: inside TLS also what was read off the
// wire with the record before. A record that is not all there is seen on the wire.
func (c *conn) hasSent() bool {
	if pending, _ := c.unread.peek(); pending || c.in.len() > 0 {
		return true
	}
	if c.tls == nil || c.base.SetReadDeadline(longAgo) != nil {
		return false
	}
	n, _ := c.stream.Read(c.in.free())
	c.in.w += n
	return n > 0
}

// A peeker looks at what has come on a connection and was not read. It is made once, so that a look takes no memory. The nil peeker sees
// nothing.
type peeker struct {
	raw  syscall.RawConn
	look func(fd uintptr) // peeks into b
	b    [1]byte
	n    int
	err  error
}

func newPeeker(conn net.Conn) *peeker {
	has, ok := conn.(syscall.Conn)
	if !ok {
		return nil
	}
	p := &peeker{}
	p.raw, p.err = has.SyscallConn()
	p.look = func(fd uintptr) {
		p.n, _, p.err = syscall.Recvfrom(int(fd), p.b[:], syscall.MSG_PEEK|syscall.MSG_DONTWAIT)
	}
	return p
}

// peek does not wait.
func (p *peeker) peek() (pending, closed bool) {
	if p == nil {
		return false, false
	}
	if p.raw == nil || p.raw.Control(p.look) != nil {
		return false, true
	}
	if p.err != nil {
		return false, !errors.Is(p.err, syscall.EAGAIN) && !errors.Is(p.err, syscall.EINTR)
	}
	return p.n > 0, p.n == 0
}
