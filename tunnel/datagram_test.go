package tunnel

import (
	"net"
	"net/netip"
	"sync"
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

// newUDPRelay listens at an address, which a relay for TCP may have too.
func newUDPRelay(t *testing.T, at, to string) *udpRelay {
	t.Helper()
	c, err := net.ListenUDP("udp", net.UDPAddrFromAddrPort(netip.MustParseAddrPort(at)))
	if err != nil {
		t.Fatal(err)
	}
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
