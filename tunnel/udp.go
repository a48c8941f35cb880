package tunnel

import (
	"errors"
	"net"
	"net/netip"
	"os"
	"sync/atomic"
	"time"

	wgconn "golang.zx2c4.com/wireguard/conn"
)

// udpBufferBytes is asked of the kernel for each socket; it gives less where its own bound is lower.
const udpBufferBytes = 4 << 20

// udpSockets are what WireGuard sends and receives by: a socket beside each TCP listener of the tunnel, of the same address and port,
// and one of any port where none of these can reach everywhere. They are opened once, while the node may still be root, and outlive
// the devices that use them one after the other (conn.Bind).
type udpSockets struct {
	all    []*net.UDPConn
	closed atomic.Bool // for the device; the sockets stay open
}

// openUDP opens a socket beside each listener.
func openUDP(beside []net.Listener) (*udpSockets, error) {
	s := &udpSockets{}
	everywhere := false
	for _, l := range beside {
		at := l.Addr().(*net.TCPAddr)
		everywhere = everywhere || at.IP.IsUnspecified()
		if err := s.open(&net.UDPAddr{IP: at.IP, Port: at.Port, Zone: at.Zone}); err != nil {
			s.end()
			return nil, err
		}
	}
	if everywhere {
		return s, nil
	}
	if err := s.open(&net.UDPAddr{}); err != nil {
		s.end()
		return nil, err
	}
	return s, nil
}

func (s *udpSockets) open(at *net.UDPAddr) error {
	c, err := net.ListenUDP("udp", at)
	if err != nil {
		return err
	}
	c.SetReadBuffer(udpBufferBytes)  //nolint:errcheck // slower without
	c.SetWriteBuffer(udpBufferBytes) //nolint:errcheck // as above
	s.all = append(s.all, c)
	return nil
}

// end closes the sockets for good.
func (s *udpSockets) end() {
	for _, c := range s.all {
		c.Close() // nothing is lost that UDP would not lose
	}
}

// Open implements conn.Bind: one receiver for each socket. The port is that of the sockets.
func (s *udpSockets) Open(uint16) ([]wgconn.ReceiveFunc, uint16, error) {
	s.closed.Store(false)
	var receivers []wgconn.ReceiveFunc
	for _, c := range s.all {
		if err := c.SetReadDeadline(time.Time{}); err != nil {
			return nil, 0, err
		}
		receivers = append(receivers, func(packets [][]byte, sizes []int, from []wgconn.Endpoint) (int, error) {
			return s.receive(c, packets[0], sizes, from)
		})
	}
	return receivers, uint16(s.all[0].LocalAddr().(*net.UDPAddr).Port), nil
}

// receive reads one packet. A device gives up a receiver after a few errors, so what passes is waited for here.
func (s *udpSockets) receive(c *net.UDPConn, packet []byte, sizes []int, from []wgconn.Endpoint) (int, error) {
	for {
		n, at, err := c.ReadFromUDPAddrPort(packet)
		switch {
		case s.closed.Load() || errors.Is(err, net.ErrClosed):
			return 0, net.ErrClosed
		case errors.Is(err, os.ErrDeadlineExceeded):
			continue // of a device before this one
		case err != nil:
			<-time.After(100 * time.Millisecond)
			continue
		}
		sizes[0], from[0] = n, &udpEndpoint{at: netip.AddrPortFrom(at.Addr().Unmap(), at.Port()), by: c}
		return 1, nil
	}
}

// Close implements conn.Bind: receivers end, the sockets stay.
func (s *udpSockets) Close() error {
	s.closed.Store(true)
	for _, c := range s.all {
		c.SetReadDeadline(time.Unix(1, 0)) //nolint:errcheck // a closed socket ends its receiver too
	}
	return nil
}

// SetMark implements conn.Bind; marks are for routers.
func (s *udpSockets) SetMark(uint32) error { return nil }

// BatchSize implements conn.Bind.
func (s *udpSockets) BatchSize() int { return 1 }

// Send implements conn.Bind. It answers by the socket that the peer was heard on; else by the first that can reach it.
func (s *udpSockets) Send(packets [][]byte, to wgconn.Endpoint) error {
	e, ok := to.(*udpEndpoint)
	if !ok {
		return wgconn.ErrWrongEndpointType
	}
	for _, p := range packets {
		if e.by != nil {
			if _, err := e.by.WriteToUDPAddrPort(p, e.at); err == nil {
				continue
			}
		}
		if err := s.sendByAny(p, e.at); err != nil {
			return err
		}
	}
	return nil
}

func (s *udpSockets) sendByAny(packet []byte, to netip.AddrPort) (err error) {
	for _, c := range s.all {
		if _, err = c.WriteToUDPAddrPort(packet, to); err == nil {
			return nil
		}
	}
	return err
}

// ParseEndpoint implements conn.Bind: "192.0.2.1:7025", "[2001:db8::1]:7025".
func (s *udpSockets) ParseEndpoint(text string) (wgconn.Endpoint, error) {
	at, err := netip.ParseAddrPort(text)
	if err != nil {
		return nil, err
	}
	return &udpEndpoint{at: at}, nil
}

// A udpEndpoint is where a peer was heard from last, and on which socket.
type udpEndpoint struct {
	at netip.AddrPort
	by *net.UDPConn // nil: not heard yet
}

// ClearSrc implements conn.Endpoint.
func (e *udpEndpoint) ClearSrc() {}

// SrcToString implements conn.Endpoint.
func (e *udpEndpoint) SrcToString() string { return "" }

// SrcIP implements conn.Endpoint.
func (e *udpEndpoint) SrcIP() netip.Addr { return netip.Addr{} }

// DstToString implements conn.Endpoint.
func (e *udpEndpoint) DstToString() string { return e.at.String() }

// DstIP implements conn.Endpoint.
func (e *udpEndpoint) DstIP() netip.Addr { return e.at.Addr() }

// DstToBytes implements conn.Endpoint; who floods is told apart by it.
func (e *udpEndpoint) DstToBytes() []byte {
	b, _ := e.at.MarshalBinary() // never fails
	return b
}
