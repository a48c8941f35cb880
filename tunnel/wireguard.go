package tunnel

import (
	"context"
	"crypto/ed25519"
	"encoding/hex"
	"errors"
	"fmt"
	"maps"
	"net"
	"net/netip"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"golang.zx2c4.com/wireguard/device"

	"mailproxy/config"
)

const (
	// wgMTU keeps the outer packet within 1280 bytes, which every path for IPv6 carries (RFC 8200 §5): 40 of IPv6, 8 of UDP and 32
	// of WireGuard go around.
	wgMTU = 1280 - 40 - 8 - 32
	// wgPort is where SSH listens inside.
	wgPort = 7025
)

// wireguard is the carrier inside of WireGuard: a device in user space, with a network stack of its own that the host does not see.
// In there each member has the address 10.0.0.0 + CID and lets SSH in, nothing else. A packet counts only from the address that
// belongs to the key that it came under, so that the address of a stream names its member.
//
// The device is made when this node is in a cluster, and anew when it is another node; its peers are the members.
type wireguard struct {
	log func(format string, args ...any)

	mu      sync.Mutex
	sockets *udpSockets
	// err is why there are no sockets or no device.
	err    error
	cid    config.CID
	key    string // of the node, private
	device *device.Device
	net    *inside
	door   *wgListener
	peers  map[config.CID]wgKey
	// live counts the streams with each member.
	live map[config.CID]int
}

var errNotUp = errors.New("WireGuard is not up")

// wgAddress is a member's address inside.
func wgAddress(cid config.CID) (netip.Addr, error) {
	if cid < 1 || cid >= 1<<24 {
		return netip.Addr{}, fmt.Errorf("node %d: no address for WireGuard", cid)
	}
	return netip.AddrFrom4([4]byte{10, byte(cid >> 16), byte(cid >> 8), byte(cid)}), nil
}

// wgMember is the member with an address inside; 0 for none.
func wgMember(at net.Addr) config.CID {
	tcp, ok := at.(*net.TCPAddr)
	if !ok {
		return 0
	}
	a := tcp.AddrPort().Addr().Unmap()
	if !a.Is4() || a.As4()[0] != 10 {
		return 0
	}
	b := a.As4()
	return config.CID(b[1])<<16 | config.CID(b[2])<<8 | config.CID(b[3])
}

// open opens the sockets. Without them the rest of the tunnel works all the same, and dial says why this does not.
func (w *wireguard) open(beside []net.Listener) error {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.sockets, w.err = openUDP(beside); w.err != nil {
		w.err = fmt.Errorf("open UDP port: %w", w.err)
	}
	return w.err
}

// take makes the device fit the trust: this node's identity, and the members as its peers. Who is no member any more is out when it
// returns. It gives the door that streams of members come in by, nil where there is none.
func (w *wireguard) take(t *trust) (net.Listener, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.sockets == nil {
		return nil, nil // open has said why
	}
	if w.device != nil && (w.cid != t.id.CID || w.key != string(t.key.private)) {
		w.endLocked()
	}
	if !t.member() {
		return nil, nil
	}
	if w.device == nil {
		if w.err = w.beginLocked(t.id.CID, t.key.private); w.err != nil {
			w.endLocked()
			return nil, w.err
		}
	}
	return w.door, w.takePeersLocked(t)
}

func (w *wireguard) beginLocked(cid config.CID, key ed25519.PrivateKey) error {
	own, err := wgAddress(cid)
	if err != nil {
		return err
	}
	stack, err := newInside(own, wgMTU)
	if err != nil {
		return fmt.Errorf("make network stack: %w", err)
	}
	w.cid, w.key, w.net = cid, string(key), stack
	w.peers, w.live = map[config.CID]wgKey{}, map[config.CID]int{}
	w.device = device.NewDevice(stack, w.sockets, &device.Logger{Verbosef: device.DiscardLogf, Errorf: w.log})
	private := wgPrivate(key)
	if err := w.device.IpcSet("private_key=" + hex.EncodeToString(private[:]) + "\n"); err != nil {
		return fmt.Errorf("set WireGuard key: %w", err)
	}
	if err := w.device.Up(); err != nil {
		return fmt.Errorf("begin WireGuard: %w", err)
	}
	l, err := stack.listen(netip.AddrPortFrom(own, wgPort))
	if err != nil {
		return fmt.Errorf("listen inside of WireGuard: %w", err)
	}
	w.door = &wgListener{Listener: l, w: w}
	return nil
}

func (w *wireguard) takePeersLocked(t *trust) error {
	var errs []error
	want := map[config.CID]wgKey{}
	for cid, n := range t.nodes {
		if t.admits(cid, t.keys[cid]) != nil {
			continue
		}
		key, err := parsePublic(n.PublicKey)
		if err != nil {
			continue // believe has said so
		}
		public, err := wgPublic(key)
		if err != nil {
			errs = append(errs, fmt.Errorf("node %d: %w", cid, err))
			continue
		}
		want[cid] = public
	}
	for cid, key := range maps.Clone(w.peers) {
		if want[cid] == key {
			continue
		}
		if err := w.device.IpcSet(key.line() + "remove=true\n"); err != nil {
			errs = append(errs, fmt.Errorf("node %d: take out of WireGuard: %w", cid, err))
			continue
		}
		delete(w.peers, cid)
	}
	for cid, key := range want {
		if w.peers[cid] == key {
			continue
		}
		if err := w.addLocked(cid, key, ""); err != nil {
			errs = append(errs, err)
			continue
		}
		w.peers[cid] = key
	}
	return errors.Join(errs...)
}

func (k wgKey) line() string { return "public_key=" + hex.EncodeToString(k[:]) + "\n" }

// addLocked makes a member a peer, as one of which nothing is remembered. An endpoint that is not given is learned from what it sends.
func (w *wireguard) addLocked(cid config.CID, key wgKey, endpoint string) error {
	at, err := wgAddress(cid)
	if err != nil {
		return err
	}
	var b strings.Builder
	b.WriteString(key.line() + "remove=true\n" + key.line())
	if endpoint != "" {
		fmt.Fprintf(&b, "endpoint=%s\n", endpoint)
	}
	fmt.Fprintf(&b, "allowed_ip=%s/32\n", at)
	if err := w.device.IpcSet(b.String()); err != nil {
		return fmt.Errorf("node %d: make it a peer of WireGuard: %w", cid, err)
	}
	return nil
}

// wgFirstTry is how long dial waits before it begins anew: a first packet that is lost would be sent again after 5 s only.
const wgFirstTry = 1500 * time.Millisecond

// dial implements carrier.
func (w *wireguard) dial(ctx context.Context, cid config.CID, address string) (net.Conn, error) {
	at, err := resolve(ctx, address)
	if err != nil {
		return nil, err
	}
	first, cancel := context.WithTimeout(ctx, wgFirstTry)
	defer cancel()
	c, err := w.dialOnce(first, cid, at)
	if err != nil && first.Err() != nil && ctx.Err() == nil {
		c, err = w.dialOnce(ctx, cid, at)
	}
	return c, err
}

// dialOnce makes a stream to the member, whose UDP port that is.
//
// Where there is no stream with it, what the device remembers of it is forgotten first: keys of a daemon that has ended, with which
// it would try for 15 seconds; a time stamp from before a clock went back, which would shut the member out until it is reached again;
// an address that is no longer right.
func (w *wireguard) dialOnce(ctx context.Context, cid config.CID, at netip.AddrPort) (net.Conn, error) {
	inside, err := wgAddress(cid)
	if err != nil {
		return nil, err
	}
	w.mu.Lock()
	stack, err := w.net, w.err
	key, known := w.peers[cid]
	switch {
	case known && w.live[cid] == 0:
		err = w.addLocked(cid, key, at.String())
	case !known && err == nil:
		err = errNotUp
	}
	w.mu.Unlock()
	if err != nil {
		return nil, err
	}
	c, err := stack.dial(ctx, netip.AddrPortFrom(inside, wgPort))
	if err != nil && ctx.Err() != nil {
		return nil, fmt.Errorf("WireGuard: no answer from UDP port %s: %w", at, ctx.Err())
	}
	if err != nil {
		return nil, fmt.Errorf("WireGuard: by UDP port %s: %w", at, err)
	}
	return w.keep(c, net.TCPAddrFromAddrPort(netip.AddrPortFrom(inside, wgPort)), cid), nil
}

// resolve gives the first address of host:port.
func resolve(ctx context.Context, address string) (netip.AddrPort, error) {
	host, service, err := net.SplitHostPort(address)
	if err != nil {
		return netip.AddrPort{}, err
	}
	port, err := net.DefaultResolver.LookupPort(ctx, "udp", service)
	if err != nil {
		return netip.AddrPort{}, err
	}
	ips, err := net.DefaultResolver.LookupNetIP(ctx, "ip", host)
	if err != nil {
		return netip.AddrPort{}, err
	}
	return netip.AddrPortFrom(ips[0].Unmap(), uint16(port)), nil
}

// A wgStream is a TCP connection inside; it is counted until it is closed.
type wgStream struct {
	net.Conn
	remote net.Addr
	once   sync.Once
	gone   func()
}

// RemoteAddr is the other end's; that of what it wraps is nil once the connection has ended.
func (s *wgStream) RemoteAddr() net.Addr { return s.remote }

func (w *wireguard) keep(c net.Conn, remote net.Addr, cid config.CID) net.Conn {
	w.mu.Lock()
	live := w.live
	live[cid]++
	w.mu.Unlock()
	return &wgStream{Conn: c, remote: remote, gone: func() {
		w.mu.Lock()
		live[cid]--
		w.mu.Unlock()
	}}
}

// Close closes the stream and counts it out.
func (s *wgStream) Close() error {
	s.once.Do(s.gone)
	return s.Conn.Close()
}

// A wgListener is the door inside.
type wgListener struct {
	net.Listener
	w      *wireguard
	closed atomic.Bool
}

// Accept gives the next stream; net.ErrClosed after Close.
func (l *wgListener) Accept() (net.Conn, error) {
	for {
		c, err := l.Listener.Accept()
		if err != nil {
			if l.closed.Load() {
				return nil, net.ErrClosed
			}
			return nil, err
		}
		if from := c.RemoteAddr(); from != nil {
			return l.w.keep(c, from, wgMember(from)), nil
		}
		c.Close() // it has ended already
	}
}

// Close lets nobody in any more.
func (l *wgListener) Close() error {
	if l.closed.Swap(true) {
		return net.ErrClosed
	}
	return l.Listener.Close()
}

// endLocked ends the device; the sockets stay for the next.
func (w *wireguard) endLocked() {
	if w.door != nil {
		w.door.Close() // it may be closed
	}
	if w.device != nil {
		w.device.Close()
	}
	w.device, w.net, w.door, w.peers = nil, nil, nil, nil
}

// close ends the device and the sockets.
func (w *wireguard) close() {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.endLocked()
	if w.sockets != nil {
		w.sockets.end()
		w.sockets, w.err = nil, errStopped
	}
}
