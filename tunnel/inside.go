package tunnel

import (
	"context"
	"fmt"
	"net"
	"net/netip"
	"os"
	"sync"

	"golang.zx2c4.com/wireguard/tun"
	"gvisor.dev/gvisor/pkg/buffer"
	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/adapters/gonet"
	"gvisor.dev/gvisor/pkg/tcpip/header"
	"gvisor.dev/gvisor/pkg/tcpip/link/channel"
	"gvisor.dev/gvisor/pkg/tcpip/network/ipv4"
	"gvisor.dev/gvisor/pkg/tcpip/stack"
	transport "gvisor.dev/gvisor/pkg/tcpip/transport/tcp"
)

// An inside is the network that a WireGuard device leads to, in this process alone: one IPv4 address, and TCP. To the device it is the
// tun.Device. The one that comes with WireGuard closes a channel that its stack may still send on, which ends the process.
type inside struct {
	stack *stack.Stack
	// link is where the stack's packets lie until the device takes them.
	link   *channel.Endpoint
	mtu    int
	events chan tun.Event
	ctx    context.Context // of Read
	end    context.CancelFunc
	once   sync.Once
}

// insideNIC numbers the one interface; insideQueue is how many packets may lie in front of it.
const (
	insideNIC   = 1
	insideQueue = 1024
)

func newInside(own netip.Addr, mtu int) (*inside, error) {
	i := &inside{
		stack: stack.New(stack.Options{
			NetworkProtocols:   []stack.NetworkProtocolFactory{ipv4.NewProtocol},
			TransportProtocols: []stack.TransportProtocolFactory{transport.NewProtocol},
			HandleLocal:        true,
		}),
		link: channel.New(insideQueue, uint32(mtu), ""), mtu: mtu, events: make(chan tun.Event, 1),
	}
	i.ctx, i.end = context.WithCancel(context.Background()) // ends with Close
	sack := tcpip.TCPSACKEnabled(true)
	if err := i.stack.SetTransportProtocolOption(transport.ProtocolNumber, &sack); err != nil {
		return nil, fmt.Errorf("allow selective acknowledgements: %v", err)
	}
	if err := i.stack.CreateNIC(insideNIC, i.link); err != nil {
		return nil, fmt.Errorf("make interface: %v", err)
	}
	address := tcpip.ProtocolAddress{Protocol: ipv4.ProtocolNumber, AddressWithPrefix: tcpip.AddrFrom4(own.As4()).WithPrefix()}
	if err := i.stack.AddProtocolAddress(insideNIC, address, stack.AddressProperties{}); err != nil {
		return nil, fmt.Errorf("give it the address %v: %v", own, err)
	}
	i.stack.AddRoute(tcpip.Route{Destination: header.IPv4EmptySubnet, NIC: insideNIC})
	i.events <- tun.EventUp
	return i, nil
}

func insideAddress(at netip.AddrPort) tcpip.FullAddress {
	return tcpip.FullAddress{NIC: insideNIC, Addr: tcpip.AddrFrom4(at.Addr().As4()), Port: at.Port()}
}

func (i *inside) dial(ctx context.Context, at netip.AddrPort) (net.Conn, error) {
	c, err := gonet.DialContextTCP(ctx, i.stack, insideAddress(at), ipv4.ProtocolNumber)
	if err != nil {
		return nil, err // not c: a nil *TCPConn is no nil Conn
	}
	return c, nil
}

func (i *inside) listen(at netip.AddrPort) (net.Listener, error) {
	l, err := gonet.ListenTCP(i.stack, insideAddress(at), ipv4.ProtocolNumber)
	if err != nil {
		return nil, err
	}
	return l, nil
}

// Read waits for a packet of the stack; os.ErrClosed after Close. Like all that follows it is part of tun.Device.
func (i *inside) Read(bufs [][]byte, sizes []int, offset int) (int, error) {
	p := i.link.ReadContext(i.ctx)
	if p == nil {
		return 0, os.ErrClosed
	}
	defer p.DecRef()
	v := p.ToView()
	defer v.Release()
	sizes[0] = copy(bufs[0][offset:], v.AsSlice())
	return 1, nil
}

// Write gives packets to the stack. Others than IPv4 have no address in here, and are dropped.
func (i *inside) Write(bufs [][]byte, offset int) (int, error) {
	for _, b := range bufs {
		if packet := b[offset:]; len(packet) > 0 && packet[0]>>4 == header.IPv4Version {
			p := stack.NewPacketBuffer(stack.PacketBufferOptions{Payload: buffer.MakeWithData(packet)})
			i.link.InjectInbound(ipv4.ProtocolNumber, p)
			p.DecRef()
		}
	}
	return len(bufs), nil
}

// Close ends the stack with all its connections. What that still sends is refused by the link.
func (i *inside) Close() error {
	i.once.Do(func() {
		i.end()
		i.stack.RemoveNIC(insideNIC)
		i.stack.Close()
		i.link.Close()
		close(i.events)
	})
	return nil
}

// Name is for the device's log.
func (i *inside) Name() (string, error) { return "inside", nil }

// File is nil: there is no file.
func (i *inside) File() *os.File { return nil }

// MTU is what a packet may have at most.
func (i *inside) MTU() (int, error) { return i.mtu, nil }

// Events says that the interface is up, and ends with Close.
func (i *inside) Events() <-chan tun.Event { return i.events }

// BatchSize is how many packets Read gives at once.
func (i *inside) BatchSize() int { return 1 }
