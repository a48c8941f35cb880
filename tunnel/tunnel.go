package tunnel

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"net"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/rs/zerolog"

	"mailproxy/config"
)

// The services that every node offers to its peers.
const (
	ServicePostgres = "postgres"
	ServiceControl  = "control"
)

// Handler serves one stream from a peer and returns. The stream is closed behind it; ctx ends when the connection to the peer does,
// the peer is no longer allowed, or the tunnel stops.
type Handler func(ctx context.Context, from config.CID, conn net.Conn)

// Options are what a Tunnel is made of.
type Options struct {
	// Listen is where peers and joining nodes connect, as host:port; with none, this node only dials.
	Listen []string
	// KeyDir is the key directory, see config.Local.
	KeyDir string
	// PeerDir gives the directory for the sockets of a peer's services; nil: no sockets.
	PeerDir func(config.CID) string
	// Services are what the gate opens to members, by name.
	Services map[string]Handler
	// Join answers a node that wants to join; nil: none may. Its errors should be a *JoinError.
	Join func(context.Context, JoinRequest) (JoinReply, error)
	// CheckJoin answers a dry run of the same, and changes nothing; it is there where Join is.
	CheckJoin func(context.Context, JoinRequest) (JoinCheck, error)
	Log       zerolog.Logger
	// Now is the clock for certificates; nil: time.Now.
	Now func() time.Time
}

// Tunnel holds this node's connections with its peers. All methods may be called at once.
type Tunnel struct {
	o        Options
	timing   timing
	instance string // of this daemon, see ghost.go
	repeats  *repeats
	joins    *buckets // join attempts by address
	joining  *slots   // join exchanges under way
	stranger *slots   // connections before authentication
	dirty    chan struct{}
	owned    owned
	// wireguard is the carrier of that kind; it is up from the first Reload under Run on.
	wireguard *wireguard

	reload sync.Mutex // one Reload at a time

	// mu guards what follows, and the peers' fields.
	mu        sync.Mutex
	ctx       context.Context
	running   bool
	self      *trust // who this node is, as last read
	trust     *trust // and whom it lets in
	peers     map[config.CID]*peer
	left      map[config.CID]<-chan struct{} // done of the last peer of a CID that left
	socketErr map[config.CID]error
	listeners []net.Listener
	noKey     error         // why this node has no key, and no listeners, until it is started again
	unusable  error         // what the last Reload could not use
	inside    net.Listener  // that of WireGuard; nil: none
	changed   chan struct{} // see Changed
}

// New makes a tunnel that believes nobody until Reload.
func New(o Options) *Tunnel {
	if o.Now == nil {
		o.Now = time.Now
	}
	t := &Tunnel{
		o: o, instance: newInstance(), dirty: make(chan struct{}, 1), ctx: context.Background(), peers: map[config.CID]*peer{},
		left: map[config.CID]<-chan struct{}{}, socketErr: map[config.CID]error{}, trust: &trust{now: o.Now}, changed: make(chan struct{}),
		joining:  &slots{all: maxJoins, each: maxJoins},
		stranger: &slots{all: maxStrangers, each: maxStrangersPerHost},
	}
	t.setTiming(defaultTiming())
	t.wireguard = &wireguard{log: t.wireguardFailed}
	return t
}

func (t *Tunnel) setTiming(c timing) {
	t.timing = c
	t.repeats = &repeats{every: c.repeatedEvery}
	t.joins = &buckets{burst: joinBurst, every: c.joinEvery}
}

// Listen opens the listeners and reads or makes the node's key: what may need root. Run calls it where nobody has. Without a key that can
// be read there is no tunnel, which is no error: the node does without, and Trouble says so.
// ErrPathTooLong where the peers' sockets could not be made.
func (t *Tunnel) Listen() error {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.listeners != nil {
		return nil
	}
	if t.o.PeerDir != nil {
		for service := range t.o.Services {
			if _, err := socketPath(t.o.PeerDir(99999), service); err != nil {
				return err
			}
		}
	}
	if t.noKey = t.readSelfLocked(); t.noKey != nil {
		t.complain(t.noKey)
		t.listeners = []net.Listener{}
		return nil
	}
	listeners := []net.Listener{}
	for _, address := range t.o.Listen {
		l, err := net.Listen("tcp", address)
		if err != nil {
			for _, l := range listeners {
				l.Close() // nothing was accepted
			}
			return err
		}
		listeners = append(listeners, l)
	}
	t.listeners = listeners
	if err := t.wireguard.open(listeners); err != nil {
		t.complain(err) // plain connections go all the same
	}
	return nil
}

// readSelfLocked reads or makes this node's key, unless Reload has.
func (t *Tunnel) readSelfLocked() error {
	if t.self != nil {
		return nil
	}
	self, err := loadSelf(t.o.KeyDir, t.o.Now)
	if err != nil {
		// The key is needed for joining nodes; a broken identity is Reload's to report.
		key, kerr := LoadOrMakeKey(t.o.KeyDir)
		if kerr != nil {
			return kerr
		}
		self = &trust{key: key, now: t.o.Now}
	}
	t.self, t.trust = self, &trust{key: self.key, now: t.o.Now}
	return nil
}

// Clock is how a peer's clock was last measured, and with it the round trip; zero for never.
func (t *Tunnel) Clock(cid config.CID) Clock {
	t.mu.Lock()
	defer t.mu.Unlock()
	if p := t.peers[cid]; p != nil {
		return p.clock
	}
	return Clock{}
}

// Changed gives a channel that is closed when a connection next comes or goes. Who waits asks for it before looking at Peers.
func (t *Tunnel) Changed() <-chan struct{} {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.changed
}

// changedLocked tells who waits for p or for any change.
func (t *Tunnel) changedLocked(p *peer) {
	p.changedLocked()
	close(t.changed)
	t.changed = make(chan struct{})
}

// Addrs gives where the tunnel listens.
func (t *Tunnel) Addrs() []net.Addr {
	t.mu.Lock()
	defer t.mu.Unlock()
	all := make([]net.Addr, 0, len(t.listeners))
	for _, l := range t.listeners {
		all = append(all, l.Addr())
	}
	return all
}

// Run serves until ctx ends, and returns nil when all that it started has ended; an error only where Listen gives one. It runs once.
//
// The stop order: listeners and diallers first, so that nothing new comes; then the sockets; then the connections, which end the
// handlers.
func (t *Tunnel) Run(ctx context.Context) error {
	if err := t.Listen(); err != nil {
		return err
	}
	inner, cancel := context.WithCancel(context.WithoutCancel(ctx))
	defer cancel()
	t.mu.Lock()
	t.ctx, t.running = inner, true
	listeners := t.listeners
	t.mu.Unlock()
	t.reload.Lock()
	t.carry()
	t.reload.Unlock()
	var outer owned // listeners, diallers, sockets
	for _, l := range listeners {
		t.o.Log.Info().Str("address", l.Addr().String()).Msg("tunnel.listen")
		outer.spawn(func() { t.listen(ctx, l, config.TunnelSSH) })
	}
	var door net.Listener
	t.clearSockets()
	t.wake()
	for ctx.Err() == nil {
		select {
		case <-t.dirty:
			t.reconcile(ctx, &outer)
			door = t.letIn(ctx, &outer, door)
		case <-ctx.Done():
		}
	}
	t.mu.Lock()
	t.running = false
	for _, p := range t.peers {
		if p.stop != nil {
			p.stop()
		}
	}
	t.mu.Unlock()
	for _, l := range listeners {
		l.Close() // closed already
	}
	outer.wait()
	cancel()
	t.owned.wait()
	t.reload.Lock() // none is on its way to make a device
	t.wireguard.close()
	t.reload.Unlock()
	return nil
}

// carry makes WireGuard fit the trust, while the tunnel runs. The caller holds reload.
func (t *Tunnel) carry() {
	t.mu.Lock()
	running, tr := t.running, t.trust
	t.mu.Unlock()
	if !running {
		return
	}
	inside, err := t.wireguard.take(tr)
	if err != nil {
		t.complain(err)
	}
	t.mu.Lock()
	t.inside = inside
	t.mu.Unlock()
	t.wake()
}

// letIn accepts at the door inside of WireGuard where that is another than the last one, and gives it.
func (t *Tunnel) letIn(ctx context.Context, outer *owned, last net.Listener) net.Listener {
	t.mu.Lock()
	door := t.inside
	t.mu.Unlock()
	if door != nil && door != last {
		t.o.Log.Info().Str("address", door.Addr().String()).Str("transport", string(config.TunnelWireGuard)).Msg("tunnel.listen")
		outer.spawn(func() { t.listen(ctx, door, config.TunnelWireGuard) })
	}
	return door
}

// wireguardFailed logs what WireGuard's device has to say; it names peers by a part of their public keys.
func (t *Tunnel) wireguardFailed(format string, args ...any) {
	text := fmt.Sprintf(format, args...)
	t.repeats.log(t.o.Log.Warn(), "tunnel.wireguard", text, func(e *zerolog.Event) { e.Str("err", text) })
}

func (t *Tunnel) wake() {
	select {
	case t.dirty <- struct{}{}:
	default:
	}
}

// reconcile starts what serves new peers and stops what served those that left.
func (t *Tunnel) reconcile(ctx context.Context, outer *owned) {
	t.mu.Lock()
	defer t.mu.Unlock()
	for _, p := range t.peers {
		if p.stop != nil {
			continue
		}
		peerCtx, stop := context.WithCancel(ctx)
		p.stop = stop
		outer.spawn(func() { t.runPeer(peerCtx, p) })
	}
}

// Reload takes this node's identity from the key directory and members, CAs and deleted nodes from the snapshot, or, while that is
// not of this node's cluster (just joined, database lost), those that were last known. Connections that are no longer allowed are cut
// before it returns. nil is a snapshot of no cluster. What is wrong with identity or snapshot is logged; what is right is in force.
func (t *Tunnel) Reload(s *config.Snapshot) {
	t.reload.Lock()
	defer t.reload.Unlock()
	t.mu.Lock()
	self := t.self
	t.mu.Unlock()
	var problems []error
	fresh, err := loadSelf(t.o.KeyDir, t.o.Now)
	switch {
	case err == nil:
		self = fresh
	case self == nil:
		t.refuse(err)
		return
	default:
		problems = append(problems, err) // who this node was a moment ago it still is; a deleted peer must be cut all the same
	}
	tr, err := self.with(s)
	if err != nil {
		problems = append(problems, err)
	}
	if tr.member() {
		if err := keepTrusted(t.o.KeyDir, tr); err != nil {
			problems = append(problems, fmt.Errorf("keep the list of members: %w", err))
		}
	}
	t.refuse(problems...)
	t.mu.Lock()
	t.self, t.trust = self, tr
	t.takePeersLocked()
	t.wake()
	t.mu.Unlock()
	t.carry()
}

// refuse keeps and logs what Reload could not use; none: all of it is in force.
func (t *Tunnel) refuse(problems ...error) {
	for _, err := range problems {
		t.complain(err)
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	t.unusable = errors.Join(problems...)
}

// Trouble says what of this node's key, identity and list of members cannot be used, by the names of the files in the key directory; nil:
// nothing.
func (t *Tunnel) Trouble() error {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.noKey != nil {
		return t.noKey
	}
	return t.unusable
}

// Off says that Trouble leaves this node without a tunnel: it reaches nobody, and nobody it.
func (t *Tunnel) Off() bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	return !t.trust.member() && (t.noKey != nil || t.unusable != nil)
}

func (t *Tunnel) complain(err error) {
	t.repeats.log(t.o.Log.Error(), "tunnel.config_refused", err.Error(), func(e *zerolog.Event) { e.Str("err", err.Error()) })
}

// takePeersLocked makes the peers those of the trust, and cuts sessions that it no longer allows.
func (t *Tunnel) takePeersLocked() {
	for cid, n := range t.trust.nodes {
		if t.trust.admits(cid, t.trust.keys[cid]) != nil {
			continue
		}
		p := t.peers[cid]
		if p == nil {
			p = newPeer(n)
			p.after, p.want = t.left[cid], t.trust.tunnel
			t.peers[cid] = p
			continue
		}
		if p.node.Address != n.Address {
			p.kickNow()
		}
		if p.want != t.trust.tunnel {
			p.want, p.unlike = t.trust.tunnel, nil
			p.kickNow()
			p.changedLocked()
			for _, s := range p.sessions {
				t.retireLocked(p, s)
			}
		}
		p.node = n
	}
	for cid, p := range t.peers {
		if t.trust.admits(cid, t.trust.keys[cid]) != nil {
			if p.stop != nil {
				p.stop()
				t.left[cid] = p.done
			}
			delete(t.peers, cid)
			delete(t.socketErr, cid)
			p.changedLocked() // who waits for a connection learns that there is none to come
		}
		for _, s := range slices.Clone(p.sessions) {
			if err := t.allowsLocked(s); err != nil {
				s.close(err)
			}
		}
	}
}

func (p *peer) kickNow() {
	select {
	case p.kick <- struct{}{}:
	default:
	}
}

// Dial opens a stream to a service of the peer. Where there is no connection it asks for an attempt at once and waits for its outcome
// (or, within a second of the last one, gives that), at most until ctx ends. ErrUnknownPeer, ErrUnreachable, ErrRefused. The caller
// closes the stream.
func (t *Tunnel) Dial(ctx context.Context, cid config.CID, service string) (net.Conn, error) {
	return t.dial(ctx, cid, func(s *session) (*conn, error) { return s.dial(ctx, stream{service: service}) })
}

func (t *Tunnel) dial(ctx context.Context, cid config.CID, open func(*session) (*conn, error)) (net.Conn, error) {
	for tries := 1; ; tries++ {
		s, err := t.session(ctx, cid)
		if err != nil {
			return nil, fmt.Errorf("dial node %d: %w", cid, err)
		}
		c, err := open(s)
		switch {
		case err == nil:
			return c, nil
		case errors.Is(err, ErrLost) && tries < 3:
			// The peer never took the channel: it may have just ended a surplus connection.
		case errors.Is(err, ErrLost):
			return nil, fmt.Errorf("dial node %d: %w: %w", cid, ErrUnreachable, err)
		default:
			return nil, fmt.Errorf("dial node %d: %w", cid, err)
		}
	}
}

// DialBulk is Dial for a stream that carries much: over a connection of its own, so that no other stream waits behind it. Where that
// cannot be made, most likely since only the peer can connect to this node, it is a stream beside the others. Over a slow link it is packed.
func (t *Tunnel) DialBulk(ctx context.Context, cid config.CID, service string) (net.Conn, error) {
	beside, err := t.session(ctx, cid)
	if err != nil {
		return nil, fmt.Errorf("dial node %d: %w", cid, err)
	}
	open := func(s *session) (*conn, error) {
		if s.isSlow(ctx) {
			c, err := s.dial(ctx, stream{service: service, packed: true})
			if !errors.Is(err, ErrRefused) {
				return c, err
			}
		}
		return s.dial(ctx, stream{service: service})
	}
	for range 2 { // the peer may have just ended the one there was
		s := t.bulk(ctx, beside)
		if s == nil {
			break
		}
		c, err := open(s)
		s.release()
		switch {
		case err == nil:
			return c, nil
		case !errors.Is(err, ErrLost):
			return nil, fmt.Errorf("dial node %d: %w", cid, err)
		}
	}
	return t.dial(ctx, cid, open)
}

// bulk gives the connection for bulk beside another one of the peer, and makes it where there is none; nil where it cannot. It does not
// end for want of channels until it is released: how fast the link is may have to be learned before there is one.
func (t *Tunnel) bulk(ctx context.Context, beside *session) *session {
	p := beside.peer
	select {
	case p.bulking <- struct{}{}:
		defer func() { <-p.bulking }()
	case <-ctx.Done():
		return nil
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	s := p.bulkLocked(beside.carried)
	if s == nil && t.peers[p.cid] == p && time.Since(p.bulkFailed) >= t.timing.bulkAgain {
		address, tr := p.node.Address, t.trust
		t.mu.Unlock()
		err := t.connect(ctx, p.cid, address, tr, beside.carried, useBulk)
		t.mu.Lock()
		if err != nil {
			p.bulkFailed = time.Now()
			return nil
		}
		s = p.bulkLocked(beside.carried)
	}
	if s != nil {
		s.hold()
	}
	return s
}

// session gives the connection for new channels to a peer, or waits for one.
func (t *Tunnel) session(ctx context.Context, cid config.CID) (*session, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	p := t.peers[cid]
	if p == nil {
		return nil, ErrUnknownPeer
	}
	if s := p.bestLocked(); s != nil {
		return s, nil
	}
	if !t.running {
		return nil, fmt.Errorf("%w: the tunnel is not running", ErrUnreachable)
	}
	seen := p.attempts
	if !p.dialling {
		if p.err != nil && time.Since(p.tried) < t.timing.kick {
			return nil, fmt.Errorf("%w: %w", ErrUnreachable, p.err)
		}
		p.kickNow()
	}
	for {
		changed := p.changed
		t.mu.Unlock()
		var err error
		select {
		case <-changed:
		case <-ctx.Done():
			err = ctx.Err()
		}
		t.mu.Lock()
		if t.peers[cid] != p {
			return nil, ErrUnknownPeer
		}
		if s := p.bestLocked(); s != nil {
			return s, nil
		}
		switch {
		case err != nil && p.err != nil:
			return nil, fmt.Errorf("%w: %w: %w", ErrUnreachable, p.err, err)
		case err != nil:
			return nil, fmt.Errorf("%w: %w", ErrUnreachable, err)
		case p.attempts > seen && p.err != nil:
			return nil, fmt.Errorf("%w: %w", ErrUnreachable, p.err)
		case !t.running:
			return nil, fmt.Errorf("%w: %w", ErrUnreachable, errStopped)
		}
	}
}

// refused logs that something from the network was turned away; cid is 0 where it is not known who it was.
func (t *Tunnel) refused(client net.Addr, cid config.CID, reason string) {
	key := hostOf(client) + " " + reason
	t.repeats.log(t.o.Log.Warn(), "tunnel.refused", key, func(e *zerolog.Event) {
		if cid > 0 {
			e.Int("node", int(cid))
		}
		e.Str("client", client.String()).Str("reason", reason)
	})
}

// serviceNames gives the gate's services in a fixed order.
func (t *Tunnel) serviceNames() []string {
	return slices.SortedFunc(maps.Keys(t.o.Services), strings.Compare)
}
