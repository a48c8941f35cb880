package tunnel

import (
	"context"
	"errors"
	"io"
	"net"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"mailproxy/config"
)

// A relay stands between two nodes: it can stall (nothing more gets through, and the connections stay as they are, as behind a packet
// filter that drops), be slow, and cut.
type relay struct {
	l       net.Listener
	to      string
	each    time.Duration // how long it keeps what it has read
	mu      sync.Mutex
	stalled chan struct{} // closed to go on
	conns   []net.Conn
	own     owned
}

func newRelay(t *testing.T, to string) *relay {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	r := &relay{l: l, to: to}
	r.own.spawn(func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			r.own.spawn(func() { r.serve(c) })
		}
	})
	t.Cleanup(func() {
		l.Close()
		r.heal()
		r.cut()
		r.own.wait()
	})
	return r
}

func (r *relay) serve(a net.Conn) {
	b, err := net.Dial("tcp", r.to)
	if err != nil {
		a.Close()
		return
	}
	r.mu.Lock()
	r.conns = append(r.conns, a, b)
	r.mu.Unlock()
	var ways sync.WaitGroup
	ways.Go(func() { r.copy(a, b) })
	r.copy(b, a)
	ways.Wait()
}

func (r *relay) copy(to, from net.Conn) {
	defer to.Close()
	defer from.Close()
	buf := make([]byte, 32<<10)
	for {
		n, err := from.Read(buf)
		r.mu.Lock()
		stalled, each := r.stalled, r.each
		r.mu.Unlock()
		<-time.After(each)
		if stalled != nil {
			<-stalled // an end is not passed on either
		}
		if _, werr := to.Write(buf[:n]); err != nil || werr != nil {
			return
		}
	}
}

func (r *relay) stall() {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.stalled == nil {
		r.stalled = make(chan struct{})
	}
}

func (r *relay) slow(each time.Duration) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.each = each
}

func (r *relay) heal() {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.stalled != nil {
		close(r.stalled)
		r.stalled = nil
	}
}

func (r *relay) cut() {
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, c := range r.conns {
		c.Close()
	}
	r.conns = nil
}

// partition is two nodes whose only way to each other is a relay.
func partition(t *testing.T, c timing) (a, b *node, r *relay) {
	t.Helper()
	return partitionOf(t, newCA(t), c)
}

func partitionOf(t *testing.T, ca *CA, c timing) (a, b *node, r *relay) {
	t.Helper()
	a, b = newNode(t, Options{}), newNode(t, Options{Listen: []string{"127.0.0.1:0"}})
	a.enter(ca, 1)
	b.enter(ca, 2)
	r = newRelay(t, b.addr)
	s := snapshot(ca, a, b)
	s.Nodes[0].Address = "" // only the first dials
	s.Nodes[1].Address = r.l.Addr().String()
	for _, n := range []*node{a, b} {
		n.setTiming(c)
		n.start()
		n.Reload(s)
	}
	a.waitUp(2)
	b.waitUp(1)
	return a, b, r
}

func TestASilentPartitionIsNoticedByBothSides(t *testing.T) {
	a, b, r := partition(t, quick())
	stream := a.mustDial(2, "echo")
	ping(t, stream, "before")
	began := time.Now()
	r.stall()
	if _, err := stream.Read(make([]byte, 1)); !errors.Is(err, ErrLost) {
		t.Errorf("the stream read %v, want %v", err, ErrLost)
	}
	for _, n := range []*node{a, b} {
		eventually(t, "both sides notice", 5*time.Second, func() bool { return !n.state(3 - n.cid).Connected })
	}
	if took, least := time.Since(began), quick().dead-quick().keepAlive; took < least/2 || took > 2*quick().dead {
		t.Errorf("noticed after %v, want about %v", took, quick().dead)
	}
	if got := b.state(1).Err; !strings.Contains(got, errSilent.Error()) {
		t.Errorf("the reason is %q", got)
	}
	_, err := a.dial(2, "echo")
	if !errors.Is(err, ErrUnreachable) {
		t.Errorf("dial meanwhile: %v, want %v", err, ErrUnreachable)
	}
	r.cut()
	r.heal()
	a.waitUp(2)
	ping(t, a.mustDial(2, "echo"), "after")
}

// The constants that are in force keep what is promised: a dead peer is noticed within ten seconds.
func TestTheConstantsKeepThePromise(t *testing.T) {
	c := defaultTiming()
	if c.dead > 10*time.Second || c.dead < 2*c.keepAlive {
		t.Errorf("dead after %v with a keep-alive every %v", c.dead, c.keepAlive)
	}
	if window := 3 * c.backoffMax; c.idle >= window || c.measure > c.idle {
		t.Errorf("a peer is asked every %v, %v while idle; of its twin it is told for %v", c.measure, c.idle, window)
	}
}

// Where nobody waits there are next to no keep-alives: the nodes of a large cluster are many pairs.
func TestAConnectionWithoutStreamsIsLeftAlone(t *testing.T) {
	c := quick()
	c.idle = time.Minute
	a, _, _ := partition(t, c)
	eventually(t, "the first keep-alives are answered", 5*time.Second, func() bool { return time.Since(a.state(2).LastSeen) > c.keepAlive })
	seen := a.state(2).LastSeen
	for until := time.Now().Add(10 * c.keepAlive); time.Now().Before(until); <-time.After(c.keepAlive) {
		if now := a.state(2).LastSeen; now != seen {
			t.Fatalf("the peer was heard %v after the last time", now.Sub(seen))
		}
	}
}

// Whoever opens a stream on a connection that was left alone is not kept waiting by a peer that is gone.
func TestAConnectionWithoutStreamsIsLookedAtOnceSomebodyWaits(t *testing.T) {
	c := quick()
	c.idle = time.Minute
	a, _, r := partition(t, c)
	eventually(t, "all is quiet", 5*time.Second, func() bool { return time.Since(a.state(2).LastSeen) > c.dead })
	r.stall()
	var waits sync.WaitGroup
	defer waits.Wait()
	waits.Go(func() { _, _ = a.dial(2, "echo") }) // it goes on to try another connection
	eventually(t, "the peer is seen to be gone", 3*c.dead, func() bool { return !a.state(2).Connected })
}

func TestIdleConnectionsAreKept(t *testing.T) {
	a, b, _ := partition(t, quick())
	before := b.state(1).Since
	for until := time.Now().Add(3 * quick().dead); time.Now().Before(until); <-time.After(quick().keepAlive) {
		if !a.state(2).Connected || b.state(1).Since != before {
			t.Fatal("an idle connection was taken for a dead one")
		}
	}
	if seen := time.Since(a.state(2).LastSeen); seen > quick().dead {
		t.Errorf("the peer was last seen %v ago", seen)
	}
}

func TestTheKernelKnowsTheBoundToo(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	c, err := net.Dial("tcp", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	newWire(c, 7*time.Second)
	raw, err := c.(*net.TCPConn).SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	raw.Control(func(fd uintptr) {
		if got, err := syscall.GetsockoptInt(int(fd), syscall.IPPROTO_TCP, tcpUserTimeout); err != nil || got != 7000 {
			t.Errorf("TCP_USER_TIMEOUT is %d, %v; want 7000", got, err)
		}
	})
}

func TestBusyConnectionsAreNotTakenForDead(t *testing.T) {
	a, _, _ := partition(t, quick())
	stream := a.mustDial(2, "echo")
	before := a.state(2).Since
	for until := time.Now().Add(3 * quick().dead); time.Now().Before(until); {
		if _, err := stream.Write(make([]byte, 64<<10)); err != nil {
			t.Fatal(err)
		}
		if _, err := io.ReadFull(stream, make([]byte, 64<<10)); err != nil {
			t.Fatal(err)
		}
	}
	if st := a.state(2); !st.Connected || st.Since != before {
		t.Errorf("it was lost in between: %+v", st)
	}
}

// A stream that its reader leaves lying holds up itself alone.
func TestAStalledStreamDelaysNoOther(t *testing.T) {
	ca := newCA(t)
	stuck := make(chan struct{})
	goOn := sync.OnceFunc(func() { close(stuck) })
	services := map[string]Handler{"echo": echo, "stuck": func(ctx context.Context, _ config.CID, _ net.Conn) { <-stuck }}
	a, b := newNode(t, Options{}), newNode(t, Options{Services: services})
	a.enter(ca, 1)
	b.enter(ca, 2)
	s := snapshot(ca, a, b)
	for _, n := range []*node{a, b} {
		n.start()
		n.Reload(s)
	}
	t.Cleanup(goOn)
	full := a.mustDial(2, "stuck")
	full.SetWriteDeadline(time.Now().Add(100 * time.Millisecond))
	if _, err := full.Write(make([]byte, 16<<20)); err == nil {
		t.Fatal("16 MiB fitted into a stream that nobody reads")
	}
	before := a.state(2).Since
	for until := time.Now().Add(2 * quick().dead); time.Now().Before(until); {
		c := a.mustDial(2, "echo")
		ping(t, c, "still answered")
		c.Close()
	}
	if a.state(2).Since != before {
		t.Error("the connection was lost")
	}
}

func TestDialToAStalledPeerEndsWithItsContext(t *testing.T) {
	c := quick()
	c.dead = time.Minute
	a, _, r := partition(t, c)
	r.stall()
	ctx, cancel := context.WithTimeout(context.Background(), 100*time.Millisecond)
	defer cancel()
	began := time.Now()
	_, err := a.Dial(ctx, 2, "echo")
	if !errors.Is(err, ErrUnreachable) || !errors.Is(err, context.DeadlineExceeded) || time.Since(began) > 2*time.Second {
		t.Errorf("got %v after %v", err, time.Since(began))
	}
}

func TestAttemptsBackOff(t *testing.T) {
	ca := newCA(t)
	n := newNode(t, Options{})
	n.enter(ca, 1)
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	c := quick()
	c.backoffMax = 640 * time.Millisecond
	n.setTiming(c)
	n.start()
	s := snapshot(ca, n)
	s.Nodes = append(s.Nodes, config.Node{CID: 2, PublicKey: newKey(t).Public(), Address: l.Addr().String()})
	n.Reload(s)
	var at []time.Time
	for range 10 {
		conn, err := l.Accept()
		if err != nil {
			t.Fatal(err)
		}
		at = append(at, time.Now())
		conn.Close()
	}
	if first := at[1].Sub(at[0]); first > c.backoffMax {
		t.Errorf("the second attempt came after %v", first)
	}
	if last := at[9].Sub(at[8]); last < c.backoffMax/2-5*time.Millisecond {
		t.Errorf("the tenth attempt came %v after the ninth, want at least half of %v", last, c.backoffMax)
	}
}
