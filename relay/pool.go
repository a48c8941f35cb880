package relay

import (
	"net"
	"sync"
	"syscall"
	"time"
)

// Bounds on kept connections.
const (
	poolIdle      = 30 * time.Second // the longest that one is kept unused
	poolPerHop    = 64
	poolPerClient = 4 // of those that were opened in a client's name
	poolTotal     = 256
	poolMessages  = 100 // on one connection
)

// A pool keeps connections between transactions, the last used on top. The zero pool is ready.
type pool struct {
	mu     sync.Mutex
	idle   map[hop][]*conn
	n      int
	closed bool
}

// get gives a kept connection that is alive, or nil. Those that are not are closed.
func (p *pool) get(h hop, now time.Time) *conn {
	for {
		p.mu.Lock()
		list := p.idle[h]
		if len(list) == 0 {
			p.mu.Unlock()
			return nil
		}
		cn := list[len(list)-1]
		list[len(list)-1] = nil
		p.setLocked(h, list[:len(list)-1])
		p.n--
		p.mu.Unlock()
		if now.Sub(cn.idleSince) < poolIdle && cn.alive() {
			cn.kept = true
			return cn
		}
		cn.quit()
	}
}

func (p *pool) setLocked(h hop, list []*conn) {
	if len(list) == 0 {
		delete(p.idle, h)
		return
	}
	p.idle[h] = list
}

// put takes a connection back, or closes it where it is broken, used up or one too many.
func (p *pool) put(cn *conn) {
	if cn.broken {
		cn.raw.Close()
		return
	}
	cn.idleSince = time.Now()
	p.mu.Lock()
	keep := !p.closed && !cn.usedUp() && p.n < poolTotal && len(p.idle[cn.hop]) < poolPerHop
	if cn.hop.client.IsValid() { // few will ask for that client's: they must not keep out all others
		keep = keep && p.n < poolTotal/2 && len(p.idle[cn.hop]) < poolPerClient
	}
	if keep {
		if p.idle == nil {
			p.idle = make(map[hop][]*conn)
		}
		p.idle[cn.hop] = append(p.idle[cn.hop], cn)
		p.n++
	}
	p.mu.Unlock()
	if !keep {
		cn.quit()
	}
}

// sweep closes the connections that have been idle for too long by now. They lie at the bottom.
func (p *pool) sweep(now time.Time) {
	var old []*conn
	p.mu.Lock()
	for h, list := range p.idle {
		n := 0
		for n < len(list) && now.Sub(list[n].idleSince) >= poolIdle {
			n++
		}
		old = append(old, list[:n]...)
		p.setLocked(h, append([]*conn(nil), list[n:]...))
		p.n -= n
	}
	p.mu.Unlock()
	var wg sync.WaitGroup
	defer wg.Wait()
	for _, cn := range old {
		wg.Go(cn.quit)
	}
}

// kept counts the connections that are kept to each hop.
func (p *pool) kept() map[hop]int {
	p.mu.Lock()
	defer p.mu.Unlock()
	counts := make(map[hop]int, len(p.idle))
	for h, list := range p.idle {
		counts[h] = len(list)
	}
	return counts
}

// drop closes the connections kept to a hop, without a goodbye.
func (p *pool) drop(h hop) {
	p.mu.Lock()
	list := p.idle[h]
	delete(p.idle, h)
	p.n -= len(list)
	p.mu.Unlock()
	for _, cn := range list {
		cn.abort()
	}
}

func (p *pool) closeIdle() { p.sweep(time.Now().Add(2 * poolIdle)) }

func (p *pool) close() {
	p.mu.Lock()
	p.closed = true
	p.mu.Unlock()
	p.closeIdle()
}

// usedUp says that no further transaction is to be begun: by our own bound, or by the hop's (RFC 9422 §4.1).
func (c *conn) usedUp() bool {
	return c.messages >= poolMessages || c.caps.mailMax > 0 && c.mails >= c.caps.mailMax
}

// alive says whether an idle connection is still good: nothing may have come on it, neither its end nor a 421.
func (c *conn) alive() bool { return c.r.Buffered() == 0 && nothingCame(c.raw) }

// quiet says that the hop has nothing to say yet. Inside TLS only what was read already counts: what is on the wire may be TLS's
// own.
func (c *conn) quiet() bool { return c.r.Buffered() == 0 && (c.nc != c.raw || nothingCame(c.raw)) }

// nothingCame looks without waiting: neither octets nor the end are there to be read.
func nothingCame(raw net.Conn) bool {
	sc, ok := raw.(syscall.Conn)
	if !ok {
		return false
	}
	rc, err := sc.SyscallConn()
	if err != nil {
		return false
	}
	quiet := false
	err = rc.Control(func(fd uintptr) {
		var b [1]byte
		_, _, e := syscall.Recvfrom(int(fd), b[:], syscall.MSG_PEEK|syscall.MSG_DONTWAIT)
		quiet = e == syscall.EAGAIN
	})
	return err == nil && quiet
}

// quitTime bounds the goodbye. Nothing depends on it, but a hop whose answer finds nobody logs an error.
const quitTime = 500 * time.Millisecond

// quit closes the connection politely (RFC 5321 §4.1.1.10).
func (c *conn) quit() {
	if !c.broken && c.nc.SetDeadline(time.Now().Add(quitTime)) == nil {
		if _, err := c.nc.Write([]byte("QUIT\r\n")); err == nil {
			_, _ = readReply(c.r)
		}
	}
	c.raw.Close()
}

// downTime is how long an address that let us wait is left alone, so that it does not cost every message the same wait.
const (
	downTime    = 10 * time.Second
	downCost    = 500 * time.Millisecond // a failure that took less is not worth remembering
	downMaximum = 1000                   // addresses remembered
)

// A downList remembers addresses that were out of reach at some cost. The zero downList is ready.
type downList struct {
	mu    sync.Mutex
	until map[string]time.Time
}

func (d *downList) has(addr string, now time.Time) bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	until, ok := d.until[addr]
	if ok && !now.Before(until) {
		delete(d.until, addr)
		ok = false
	}
	return ok
}

func (d *downList) forget() {
	d.mu.Lock()
	defer d.mu.Unlock()
	clear(d.until)
}

// failed notes that an attempt begun at start has ended at now without reaching addr; false where it cost too little for that.
func (d *downList) failed(addr string, start, now time.Time) bool {
	if now.Sub(start) < downCost {
		return false
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	if len(d.until) >= downMaximum {
		clear(d.until)
	}
	if d.until == nil {
		d.until = make(map[string]time.Time)
	}
	d.until[addr] = now.Add(downTime)
	return true
}

// repeats lets one event in 30 s into the log and counts the others. The zero repeats is ready.
type repeats struct {
	mu    sync.Mutex
	next  time.Time
	count int
}

// allow says whether this one goes into the log, and how many there were with it since the last that did.
func (r *repeats) allow(now time.Time) (count int, ok bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.count++
	if now.Before(r.next) {
		return 0, false
	}
	count, r.count, r.next = r.count, 0, now.Add(30*time.Second)
	return count, true
}
