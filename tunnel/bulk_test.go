package tunnel

import (
	"context"
	"errors"
	"io"
	"net"
	"testing"
	"time"

	"mailproxy/config"
)

// uses counts the connections with a peer by what they are for.
func (n *node) uses(cid config.CID) map[use]int {
	n.mu.Lock()
	defer n.mu.Unlock()
	count := map[use]int{}
	if p := n.peers[cid]; p != nil {
		for _, s := range p.sessions {
			count[s.use]++
		}
	}
	return count
}

func (n *node) mustDialBulk(cid config.CID) net.Conn {
	n.t.Helper()
	c, err := n.DialBulk(n.t.Context(), cid, "echo")
	if err != nil {
		n.t.Fatal(err)
	}
	n.t.Cleanup(func() { c.Close() })
	return c
}

func TestBulkHasAConnectionOfItsOwn(t *testing.T) {
	eachCarrier(t, func(t *testing.T, kind config.TunnelKind) {
		p := pairBy(t, kind)
		since := p.a.state(2).Since
		first, second := p.a.mustDialBulk(2), p.a.mustDialBulk(2)
		ping(t, first, "much")
		ping(t, second, "more")
		small := p.a.mustDial(2, "echo")
		ping(t, small, "small")
		for _, n := range []*node{p.a, p.b} {
			if got := n.uses(3 - n.cid); got[useBulk] != 1 || got[useAll] != 1 {
				t.Errorf("node %d has connections %v, want one of each kind", n.cid, got)
			}
		}
		// What breaks under bulk breaks nothing else, and the other way round a new stream takes a new one.
		p.a.mu.Lock()
		p.a.peers[2].bulkLocked(kind).wire.Conn.Close()
		p.a.mu.Unlock()
		first.SetReadDeadline(time.Now().Add(20 * time.Second))
		if _, err := io.ReadAll(first); !errors.Is(err, ErrLost) {
			t.Errorf("the cut stream read %v", err)
		}
		ping(t, small, "still there")
		if st := p.a.state(2); !st.Connected || st.Since != since || st.Err != "" {
			t.Errorf("%+v", st)
		}
		ping(t, p.a.mustDialBulk(2), "again")
	})
}

// Over a slow link it takes long to learn that it is one; neither side takes the connection for one that nobody wants meanwhile.
func TestAConnectionForBulkIsKeptWhileItIsWeighed(t *testing.T) {
	p := pairBy(t, config.TunnelSSH)
	p.tcp.slow(30 * time.Millisecond)
	c := p.a.mustDialBulk(2)
	ping(t, c, "over a slow link")
	if got := p.a.uses(2); got[useBulk] != 1 || !c.(*conn).packed {
		t.Errorf("connections %v, packed %v", got, c.(*conn).packed)
	}
	p.tcp.slow(0)
	p.a.mu.Lock()
	bulk := p.a.peers[2].bulkLocked(config.TunnelSSH)
	p.a.mu.Unlock()
	if bulk == nil || bulk.channels() != 1 {
		t.Error("the stream is not on the connection for bulk")
	}
}

// Over a line where a block takes longer than anybody waits for a stream, the connection is weighed by it all the same, and is there for
// the next try.
func TestAThinLineIsWeighedByOneBlock(t *testing.T) {
	timing := quick()
	timing.surplus = time.Second // less than three blocks take, and long enough to look at what was weighed
	p := pairWith(t, config.TunnelSSH, timing)
	beside, err := p.a.session(t.Context(), 2)
	if err != nil {
		t.Fatal(err)
	}
	s := p.a.bulk(t.Context(), beside)
	if s == nil {
		t.Fatal("no connection for bulk")
	}
	p.tcp.slow(300 * time.Millisecond)
	ctx, cancel := context.WithTimeout(t.Context(), 200*time.Millisecond)
	defer cancel()
	if c, err := p.a.DialBulk(ctx, 2, "echo"); err == nil {
		c.Close()
		t.Fatal("the line is not slow")
	}
	s.release()
	<-s.weighed
	if err := s.reason(); err != nil {
		t.Fatalf("the connection has ended before it was weighed: %v", err)
	}
	p.tcp.slow(0)
	if c := p.a.mustDialBulk(2).(*conn); !c.packed {
		t.Error("the stream is not packed")
	}
}

func TestAConnectionForBulkEndsWithItsLastStream(t *testing.T) {
	p := pairBy(t, config.TunnelSSH)
	c := p.a.mustDialBulk(2)
	for until := time.Now().Add(3 * quick().surplus); time.Now().Before(until); {
		ping(t, c, "in use")
	}
	c.Close()
	eventually(t, "it is gone on both sides", 5*time.Second, func() bool {
		return p.a.uses(2)[useBulk]+p.b.uses(1)[useBulk] == 0 && p.a.sessions(2) == 1
	})
}

func TestAConnectionForBulkEndsWithTheOther(t *testing.T) {
	timing := quick()
	timing.idle = time.Minute
	p := pairWith(t, config.TunnelSSH, timing)
	c := p.a.mustDialBulk(2)
	ping(t, c, "before")
	p.stall()
	began := time.Now()
	if _, err := c.Read(make([]byte, 1)); !errors.Is(err, ErrLost) {
		t.Errorf("the stream read %v, want %v", err, ErrLost)
	}
	if took := time.Since(began); took > 3*quick().dead {
		t.Errorf("noticed after %v, want about %v", took, quick().dead)
	}
}

func TestBulkToANodeThatCannotBeDialledGoesBesideTheRest(t *testing.T) {
	p := pairBy(t, config.TunnelSSH)
	// Only a dials; b has no address for it.
	c := p.b.mustDialBulk(1)
	ping(t, c, "all the same")
	if got := p.b.uses(1); got[useBulk] != 0 {
		t.Errorf("connections %v", got)
	}
}
