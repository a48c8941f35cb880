package tunnel

import (
	"errors"
	"net"
	"net/netip"
	"sync"
	"syscall"
	"testing"
)

// A udpRelay stands between two nodes as a NAT does: it passes datagrams on from a port of its own for each client. It can drop all,
// and give clients new ports.
type udpRelay struct {
	c       *net.UDPConn
	to      netip.AddrPort
	mu      sync.Mutex
	blocked bool
	clients map[netip.AddrPort]*net.UDPConn
	ports   int // that were given in all
	own     owned
}

// newRelays gives relays for TCP and UDP at one address: a port that is free for the one may not be for the other.
func newRelays(t *testing.T, to string) (*relay, *udpRelay) {
	t.Helper()
	for {
		r := newRelay(t, to)
		c, err := net.ListenUDP("udp", net.UDPAddrFromAddrPort(netip.MustParseAddrPort(r.l.Addr().String())))
		if errors.Is(err, syscall.EADDRINUSE) {
			continue
		}
		if err != nil {
			t.Fatal(err)
		}
		return r, newUDPRelay(t, c, to)
	}
}

func newUDPRelay(t *testing.T, c *net.UDPConn, to string) *udpRelay {
	t.Helper()
	r := &udpRelay{c: c, to: netip.MustParseAddrPort(to), clients: map[netip.AddrPort]*net.UDPConn{}}
	r.own.spawn(r.serve)
	t.Cleanup(func() {
		c.Close()
		r.rebind()
		r.own.wait()
	})
	return r
}

func (r *udpRelay) serve() {
	buf := make([]byte, 64<<10)
	for {
		n, from, err := r.c.ReadFromUDPAddrPort(buf)
		if err != nil {
			return
		}
		r.mu.Lock()
		if !r.blocked {
			if up := r.clientLocked(from); up != nil {
				up.WriteToUDPAddrPort(buf[:n], r.to)
			}
		}
		r.mu.Unlock()
	}
}

func (r *udpRelay) clientLocked(from netip.AddrPort) *net.UDPConn {
	if up := r.clients[from]; up != nil {
		return up
	}
	up, err := net.ListenUDP("udp", &net.UDPAddr{IP: net.IPv4(127, 0, 0, 1)})
	if err != nil {
		return nil
	}
	r.clients[from] = up
	r.ports++
	r.own.spawn(func() {
		buf := make([]byte, 64<<10)
		for {
			n, _, err := up.ReadFromUDPAddrPort(buf)
			if err != nil {
				return
			}
			r.mu.Lock()
			if !r.blocked {
				r.c.WriteToUDPAddrPort(buf[:n], from)
			}
			r.mu.Unlock()
		}
	})
	return up
}

func (r *udpRelay) block(on bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.blocked = on
}

// rebind forgets all clients: their next datagrams come from other ports.
func (r *udpRelay) rebind() {
	r.mu.Lock()
	defer r.mu.Unlock()
	for from, up := range r.clients {
		up.Close()
		delete(r.clients, from)
	}
}

func (r *udpRelay) given() int {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.ports
}
