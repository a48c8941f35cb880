package tunnel

import (
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"sync"
	"syscall"
	"time"

	"golang.org/x/crypto/ssh"

	"mailproxy/config"
)

// Addr is an end of a stream through the tunnel.
type Addr struct {
	CID     config.CID
	Service string
}

// Network gives "tunnel".
func (Addr) Network() string { return "tunnel" }

// String gives "cid-3/postgres".
func (a Addr) String() string { return cidPrincipal(a.CID) + "/" + a.Service }

const (
	// chunkBytes is what a conn holds in each direction beside SSH's own window; also the longest SSH packet's payload.
	chunkBytes = 32 << 10
	// finRequest is sent in front of SSH's EOF. A channel whose connection broke reads as EOF too; without a fin it is ErrLost.
	finRequest = "fin@mailproxy"
)

// A conn is a net.Conn over an SSH channel, which itself knows no deadlines and whose reads and writes end only with the other
// side's help. Three goroutines do those: the filler reads, the flusher writes, the drainer takes channel requests. A deadline that
// has passed stops reads or writes until it is moved, as with TCP; nothing that was read or counted as written is lost by it.
type conn struct {
	ch            ssh.Channel
	local, remote Addr
	linger        time.Duration // how long Close lets the flusher try
	plain         bool          // the other end sends no fin: its EOF is the end, unless the connection is seen to break
	packed        bool          // see pack.go
	lingering     *time.Timer   // guarded by out.mu
	in            inbound
	out           outbound
}

// newConn takes over ch. spawn starts a goroutine that its owner waits for, and says no when the owner ends; ended is called when the
// conn's goroutines have ended and the channel is free for another.
func newConn(ch ssh.Channel, requests <-chan *ssh.Request, local, remote Addr, linger time.Duration,
	spawn func(func()) bool, ended func(*conn),
) (*conn, error) {
	return startConn(ch, requests, &conn{local: local, remote: remote, linger: linger}, spawn, ended)
}

// startConn is newConn with what is fixed of c set.
func startConn(ch ssh.Channel, requests <-chan *ssh.Request, c *conn, spawn func(func()) bool, ended func(*conn)) (*conn, error) {
	c.ch = ch
	c.in.cond, c.out.cond = sync.NewCond(&c.in.mu), sync.NewCond(&c.out.mu)
	fin, drained := make(chan struct{}), make(chan struct{})
	from, to := c.packing(ch)
	ok := spawn(func() {
		var both sync.WaitGroup
		both.Go(func() {
			drain(requests, fin, drained, c.plain)
			c.out.fail(syscall.EPIPE) // the channel is closed, so the flusher ends too
		})
		if c.plain {
			close(fin)
		}
		both.Go(func() { c.in.fill(from, fin, drained) })
		c.out.flush(ch, to, !c.plain)
		both.Wait()
		c.out.mu.Lock()
		if c.lingering != nil {
			c.lingering.Stop()
		}
		c.out.mu.Unlock()
		ended(c)
	})
	if !ok {
		ch.Close() // its connection is gone
		return nil, ErrLost
	}
	return c, nil
}

// drain takes channel requests: none is granted, a fin is noted where there has been none.
func drain(requests <-chan *ssh.Request, fin, drained chan<- struct{}, seen bool) {
	defer close(drained)
	for r := range requests {
		if r.Type == finRequest && !seen {
			seen = true
			close(fin)
		}
		if r.WantReply {
			r.Reply(false, nil) //nolint:errcheck // the channel is gone, the loop ends
		}
	}
}

// inbound is the direction from the peer.
type inbound struct {
	mu   sync.Mutex
	cond *sync.Cond
	// data is what was received and not yet read; the filler waits until it is empty.
	data []byte
	// err ends the stream behind data.
	err    error
	closed bool
	by     deadline
}

func (in *inbound) fill(from io.Reader, fin, drained <-chan struct{}) {
	buf := make([]byte, chunkBytes)
	for {
		n, err := from.Read(buf)
		if errors.Is(err, io.EOF) {
			err = howEnded(fin, drained)
		}
		in.mu.Lock()
		in.data = buf[:n]
		if in.err == nil {
			in.err = err
		}
		in.cond.Broadcast()
		for len(in.data) > 0 && !in.closed {
			in.cond.Wait()
		}
		in.mu.Unlock()
		if err != nil {
			return
		}
	}
}

// howEnded tells an end that the peer announced from a broken connection.
func howEnded(fin, drained <-chan struct{}) error {
	select {
	case <-fin:
		return io.EOF
	case <-drained:
	}
	select {
	case <-fin:
		return io.EOF
	default:
		return ErrLost
	}
}

func (in *inbound) read(p []byte) (int, error) {
	in.mu.Lock()
	defer in.mu.Unlock()
	for {
		switch {
		case in.closed:
			return 0, net.ErrClosed
		case in.by.passed:
			return 0, os.ErrDeadlineExceeded
		case len(p) == 0:
			return 0, nil
		case len(in.data) > 0:
			n := copy(p, in.data)
			if in.data = in.data[n:]; len(in.data) == 0 {
				in.cond.Broadcast()
			}
			return n, nil
		case in.err != nil:
			return 0, in.err
		}
		in.cond.Wait()
	}
}

// outbound is the direction to the peer.
type outbound struct {
	writer sync.Mutex // held for a whole Write, so that two do not mix
	mu     sync.Mutex
	cond   *sync.Cond
	// buf is what was written and not yet sent, chunkBytes at most.
	buf    []byte
	err    error
	fin    bool // no more will be written
	closed bool
	by     deadline
}

func (o *outbound) write(p []byte) (n int, err error) {
	o.writer.Lock()
	defer o.writer.Unlock()
	o.mu.Lock()
	defer o.mu.Unlock()
	for {
		switch {
		case o.closed:
			return n, net.ErrClosed
		case o.by.passed:
			return n, os.ErrDeadlineExceeded
		case o.fin:
			return n, syscall.EPIPE
		case o.err != nil:
			return n, o.err
		case len(p) == 0:
			return n, nil
		case len(o.buf) < chunkBytes:
			took := min(chunkBytes-len(o.buf), len(p))
			o.buf = append(o.buf, p[:took]...)
			n, p = n+took, p[took:]
			o.cond.Broadcast()
			continue
		}
		o.cond.Wait()
	}
}

// flush sends what is written, then the fin where one is wanted, then closes the channel.
func (o *outbound) flush(ch ssh.Channel, to io.Writer, withFin bool) {
	own := make([]byte, 0, chunkBytes)
	for {
		o.mu.Lock()
		for len(o.buf) == 0 && !o.fin && !o.closed && o.err == nil {
			o.cond.Wait()
		}
		if o.err != nil {
			o.mu.Unlock()
			return
		}
		own, o.buf = o.buf, own[:0]
		o.cond.Broadcast()
		o.mu.Unlock()
		if len(own) == 0 {
			break
		}
		if _, err := to.Write(own); err != nil {
			o.fail(fmt.Errorf("%w: %w", syscall.EPIPE, err))
			return
		}
	}
	if withFin {
		ch.SendRequest(finRequest, false, nil) //nolint:errcheck // a peer that hears no fin sees the stream as lost
	}
	ch.CloseWrite() //nolint:errcheck // as above
	o.mu.Lock()
	for !o.closed && o.err == nil {
		o.cond.Wait()
	}
	o.mu.Unlock()
	ch.Close() // closed by the peer already
}

func (o *outbound) fail(err error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.err == nil {
		o.err = err
	}
	o.cond.Broadcast()
}

// Read implements net.Conn. io.EOF only where the peer closed its side; ErrLost where the connection broke.
func (c *conn) Read(p []byte) (int, error) { return c.in.read(p) }

// Write implements net.Conn. It returns when the last of p is on its way, at most 32 KiB of it not yet sent.
func (c *conn) Write(p []byte) (int, error) { return c.out.write(p) }

// Close ends both directions. What was written is still sent, for a bounded time, in the background.
func (c *conn) Close() error {
	c.in.mu.Lock()
	was := c.in.closed
	c.in.closed = true
	c.in.by.setLocked(c.in.cond, time.Time{})
	c.in.mu.Unlock()
	if was {
		return net.ErrClosed
	}
	c.out.mu.Lock()
	c.out.closed = true
	c.out.by.setLocked(c.out.cond, time.Time{})
	// Without a fin when it comes to this: the peer shall see that there was more.
	c.lingering = time.AfterFunc(c.linger, func() { c.reset(ErrLost) })
	c.out.mu.Unlock()
	return nil
}

// CloseWrite ends the stream to the peer, which reads io.EOF; reading goes on.
func (c *conn) CloseWrite() error {
	c.out.mu.Lock()
	defer c.out.mu.Unlock()
	if c.out.closed {
		return net.ErrClosed
	}
	c.out.fin = true
	c.out.cond.Broadcast()
	return nil
}

// reset ends both directions at once, without a fin: the peer reads an error. What was received and not read is dropped.
func (c *conn) reset(err error) {
	c.in.mu.Lock()
	if !errors.Is(c.in.err, io.EOF) || len(c.in.data) > 0 {
		c.in.err = err
	}
	c.in.data = nil
	c.in.cond.Broadcast()
	c.in.mu.Unlock()
	c.out.fail(err)
	c.ch.Close() // closed by the peer already
}

// LocalAddr gives this node's end.
func (c *conn) LocalAddr() net.Addr { return c.local }

// RemoteAddr gives the peer's end.
func (c *conn) RemoteAddr() net.Addr { return c.remote }

// SetDeadline implements net.Conn.
func (c *conn) SetDeadline(t time.Time) error {
	if err := c.SetReadDeadline(t); err != nil {
		return err
	}
	return c.SetWriteDeadline(t)
}

// SetReadDeadline implements net.Conn.
func (c *conn) SetReadDeadline(t time.Time) error {
	c.in.mu.Lock()
	defer c.in.mu.Unlock()
	if c.in.closed {
		return net.ErrClosed
	}
	c.in.by.setLocked(c.in.cond, t)
	return nil
}

// SetWriteDeadline implements net.Conn.
func (c *conn) SetWriteDeadline(t time.Time) error {
	c.out.mu.Lock()
	defer c.out.mu.Unlock()
	if c.out.closed {
		return net.ErrClosed
	}
	c.out.by.setLocked(c.out.cond, t)
	return nil
}
