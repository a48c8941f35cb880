package tunnel

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"slices"
	"sync"
	"time"

	"github.com/rs/zerolog"
	"golang.org/x/crypto/ssh"

	"mailproxy/config"
)

// A peer is another member. Its fields but cid, in, out and kick are guarded by Tunnel.mu.
//
//	           dial, or the peer dials             last session ends
//	waiting ──────────────────────────> connected ──────────────────> waiting (back-off)
//	   └─ dial fails: back-off doubled, up to its maximum, with jitter
type peer struct {
	cid  config.CID
	node config.Node
	// in and out count channels that the peer opened and that we did.
	in, out *slots
	// packed counts those of in that are packed.
	packed *slots
	// want is the kind of carrier that connections shall have.
	want config.TunnelKind
	// unlike is why there is none of that kind, from the last attempt.
	unlike error
	// bulking is held by who makes a connection for bulk; bulkFailed is when that last failed.
	bulking    chan struct{}
	bulkFailed time.Time
	// kick asks for an attempt now.
	kick chan struct{}
	// stop ends the goroutines of this peer, which close done; nil while they do not run.
	stop context.CancelFunc
	done chan struct{}
	// after is the done of a peer of the same CID that left a moment ago; nil for none.
	after <-chan struct{}
	// sessions in the order in which they came up.
	sessions []*session
	// changed is closed and replaced when sessions or attempts change.
	changed  chan struct{}
	dialling bool
	attempts int // finished ones
	tried    time.Time
	since    time.Time // when connected became what it is
	heard    time.Time // of sessions that ended
	lasted   time.Duration
	clock    Clock
	sighted  sighting // of another daemon of this peer's identity
	twinAt   string   // where the peer refused another daemon of ours, as it last said
	err      error    // of the last attempt or session
}

// PeerState says how it stands with one peer.
type PeerState struct {
	CID       config.CID `json:"cid"`
	Connected bool       `json:"connected"`
	// Since is when Connected became what it is; zero before the first connection.
	Since time.Time `json:"since,omitzero"`
	// LastSeen is when the last bytes came from the peer; zero for never since this start.
	LastSeen time.Time `json:"last_seen,omitzero"`
	// Dialler is the side that made the connection.
	Dialler config.CID `json:"dialler,omitempty"`
	// Err is why there is no connection, or what is wrong with the peer's sockets; empty for nothing.
	Err string `json:"err,omitempty"`
	// Transport is what carries the connection: ssh is plain TCP.
	Transport config.TunnelKind `json:"transport,omitempty"`
	// Fallback is why that is another one than the configuration wants; empty: it is as it shall be.
	Fallback string `json:"fallback,omitempty"`
	// NotLetIn says that the peer, which has proven its key, does not take this node for a member.
	NotLetIn bool `json:"not_let_in,omitempty"`
	// NotTrusted says that something at the peer's address answers which this node does not take for the peer.
	NotTrusted bool `json:"not_trusted,omitempty"`
	// Ghost is where another live daemon of that peer's identity was refused a moment ago; empty for none.
	Ghost string `json:"ghost,omitempty"`
	// TwinRefused says that the peer refuses this daemon, since another one of this node's identity is connected there; TwinAt is where
	// another one is, which the peer refused for this one's sake.
	TwinRefused bool   `json:"twin_refused,omitempty"`
	TwinAt      string `json:"twin_at,omitempty"`
	// Clock is the peer's beside ours.
	Clock Clock `json:"-"`
}

func newPeer(n config.Node) *peer {
	return &peer{
		cid: n.CID, node: n, kick: make(chan struct{}, 1), bulking: make(chan struct{}, 1), changed: make(chan struct{}), done: make(chan struct{}),
		in: &slots{all: maxChannels, each: maxChannels}, out: &slots{all: maxChannels, each: maxChannels},
		packed: &slots{all: maxPacked, each: maxPacked},
	}
}

// bestLocked is the session that takes new channels: of those by the wanted carrier, or where there are none of all, the newest that
// the lower CID dialled, else the newest. Both sides come to the same answer by themselves.
func (p *peer) bestLocked() *session {
	var best *session
	for _, s := range p.sessions {
		if s.use != useAll || s.reason() != nil {
			continue // for something else; or closed, and on its way out
		}
		if best == nil || p.prefersLocked(s, best) {
			best = s
		}
	}
	return best
}

// prefersLocked says whether the newer session a goes before b.
func (p *peer) prefersLocked(a, b *session) bool {
	if (a.carried == p.want) != (b.carried == p.want) {
		return a.carried == p.want
	}
	lower := min(a.self, a.cid)
	return a.dialler == lower || b.dialler != lower
}

// mainLocked counts the sessions that are for all streams.
func (p *peer) mainLocked() int {
	n := 0
	for _, s := range p.sessions {
		if s.use == useAll {
			n++
		}
	}
	return n
}

// bulkLocked is a session for bulk by that kind of carrier.
func (p *peer) bulkLocked(by config.TunnelKind) *session {
	for _, s := range p.sessions {
		if s.use == useBulk && s.carried == by && s.reason() == nil {
			return s
		}
	}
	return nil
}

// rightLocked says whether there is a session as the configuration wants it.
func (p *peer) rightLocked() bool {
	s := p.bestLocked()
	return s != nil && s.carried == p.want
}

func (p *peer) changedLocked() {
	close(p.changed)
	p.changed = make(chan struct{})
}

// Peers gives the state of each peer, by CID.
func (t *Tunnel) Peers() []PeerState {
	t.mu.Lock()
	defer t.mu.Unlock()
	all := make([]PeerState, 0, len(t.peers))
	for _, p := range t.peers {
		st := PeerState{CID: p.cid, Since: p.since, LastSeen: p.heard, Clock: p.clock}
		if s := p.bestLocked(); s != nil {
			st.Connected, st.Dialler, st.Transport = true, s.dialler, s.carried
			st.Ghost, st.TwinAt = t.ghostLocked(p), p.twinAt
			if s.carried != p.want {
				st.Fallback = fmt.Sprintf("not %s yet", p.want)
				if p.unlike != nil {
					st.Fallback = p.unlike.Error()
				}
			}
		} else if p.err != nil {
			st.Err, st.NotLetIn = p.err.Error(), errors.Is(p.err, errNotLetIn)
			st.NotTrusted, st.TwinRefused = errors.Is(p.err, errPeerNotTrusted), errors.Is(p.err, errTwin)
		}
		for _, s := range p.sessions {
			if why := s.reason(); why != nil && !st.Connected && s.use == useAll {
				st.Err = why.Error() // on its way out
			}
			if at := s.wire.lastHeard(); at.After(st.LastSeen) {
				st.LastSeen = at
			}
		}
		if t.socketErr[p.cid] != nil && st.Err == "" {
			st.Err = t.socketErr[p.cid].Error()
		}
		all = append(all, st)
	}
	slices.SortFunc(all, func(a, b PeerState) int { return int(a.CID) - int(b.CID) })
	return all
}

// add registers an authenticated connection, if the peer is still allowed.
func (t *Tunnel) add(s *session) error {
	t.mu.Lock()
	defer t.mu.Unlock()
	if !t.running {
		return errStopped
	}
	// What allowed the connection may have changed during the handshake.
	if err := t.allowsLocked(s); err != nil {
		return err
	}
	p := t.peers[s.cid]
	if t.otherLocked(p, s.instance) {
		p.sighted = sighting{addressOf(s.wire.RemoteAddr()), time.Now()}
		return errGhost
	}
	s.peer = p
	if s.use == useAll {
		if p.mainLocked() == 0 {
			p.since = s.since
		}
		p.err = nil
	}
	p.sessions = append(p.sessions, s)
	if len(p.sessions) > maxConnections {
		for _, old := range p.sessions {
			if old != p.bestLocked() {
				old.close(errTooMany)
				break
			}
		}
	}
	t.changedLocked(p)
	for _, other := range p.sessions {
		t.retireLocked(p, other)
	}
	t.o.Log.Info().Int("node", int(s.cid)).Str("address", s.wire.RemoteAddr().String()).Int("dialler", int(s.dialler)).
		Str("transport", string(s.carried)).Msg("tunnel.up")
	return nil
}

// allowsLocked says whether a session is one that the present trust would let in.
func (t *Tunnel) allowsLocked(s *session) error {
	if s.self != t.trust.id.CID || s.cluster != t.trust.id.ClusterID {
		return errSelfMoved
	}
	if err := t.trust.admits(s.cid, s.key); err != nil {
		return fmt.Errorf("%w: %w", errCut, err)
	}
	if t.peers[s.cid] == nil {
		return errNotMember
	}
	return nil
}

// remove takes an ended session out.
func (t *Tunnel) remove(s *session) {
	t.mu.Lock()
	defer t.mu.Unlock()
	p := s.peer
	p.sessions = slices.DeleteFunc(p.sessions, func(o *session) bool { return o == s })
	if at := s.wire.lastHeard(); at.After(p.heard) {
		p.heard = at
	}
	why := s.reason()
	if s.use == useAll {
		p.lasted = time.Since(s.since)
		if p.mainLocked() == 0 {
			p.since, p.err = time.Now(), why
			for _, other := range p.sessions {
				if other.use == useBulk {
					other.close(why) // it knows less well whether the peer lives
				}
			}
		}
	}
	t.changedLocked(p)
	level := zerolog.WarnLevel
	if errors.Is(why, errSurplus) || errors.Is(why, errStopped) || s.use != useAll {
		level = zerolog.InfoLevel
	}
	t.repeats.log(t.o.Log.WithLevel(level), "tunnel.down", fmt.Sprint(s.cid, errors.Is(why, errSurplus)), func(e *zerolog.Event) {
		e.Int("node", int(s.cid)).Str("err", why.Error()).Int64("took_ms", time.Since(s.since).Milliseconds())
	})
}

// idle is called when a channel of s has ended.
func (t *Tunnel) idle(s *session) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.retireLocked(s.peer, s)
}

// retireLocked lets a surplus session go once it has had no channel for a while. Each side does that by its own count; a channel that
// the other side opens at that moment was not yet taken, and its Dial goes to the other connection. One for bulk is ended by who made
// it: only that side knows of a channel that is about to be opened. Another program's connection is its own affair. A session by another
// carrier than the wanted one goes after a while with what is open on it, since streams between daemons may last for ever.
func (t *Tunnel) retireLocked(p *peer, s *session) {
	if s.use != useTheir && s.carried != p.want && p.rightLocked() && !s.leaving {
		s.leaving = true
		t.laterLocked(s, t.timing.unlike, func() bool {
			s.leaving = s.carried != p.want && p.rightLocked()
			return s.leaving
		})
	}
	if s.use == useTheir || s.use == useBulk && s.dialler != s.self || p.bestLocked() == s || s.channels() > 0 {
		return
	}
	t.laterLocked(s, t.timing.surplus, func() bool { return p.bestLocked() != s && s.channels() == 0 })
}

// laterLocked closes a surplus session after a while if it still is one then, which is asked under mu.
func (t *Tunnel) laterLocked(s *session, after time.Duration, surplus func() bool) {
	s.owned.spawn(func() {
		timer := time.NewTimer(after)
		defer timer.Stop()
		select {
		case <-timer.C:
		case <-s.ctx.Done():
			return
		}
		t.mu.Lock()
		gone := surplus()
		t.mu.Unlock()
		if gone {
			s.close(errSurplus)
		}
	})
}

// runPeer serves what belongs to one peer until ctx ends.
func (t *Tunnel) runPeer(ctx context.Context, p *peer) {
	defer close(p.done)
	if p.after != nil {
		<-p.after // it removes its sockets, which have the names of ours
	}
	var parts sync.WaitGroup
	if t.o.PeerDir != nil {
		parts.Go(func() { t.serveSockets(ctx, p) })
	}
	t.keep(ctx, p)
	parts.Wait()
}

// keep dials the peer whenever there is no connection, or none by the wanted carrier, until ctx ends.
func (t *Tunnel) keep(ctx context.Context, p *peer) {
	backoff := t.timing.backoffMin
	t.mu.Lock()
	next := time.Now()
	if t.trust.id.CID > p.cid {
		next = next.Add(jitter(t.timing.second))
	}
	t.mu.Unlock()
	for up := false; ctx.Err() == nil; {
		t.mu.Lock()
		was := up
		up = p.rightLocked()
		lasted, changed := p.lasted, p.changed
		t.mu.Unlock()
		if up {
			select {
			case <-changed:
			case <-ctx.Done():
			}
			continue
		}
		if was {
			// A connection that does not last is no success.
			if lasted >= t.timing.steady {
				backoff = t.timing.backoffMin
			} else {
				backoff = min(2*backoff, t.timing.backoffMax)
			}
			next = time.Now().Add(jitter(backoff))
		}
		timer := time.NewTimer(time.Until(next))
		select {
		case <-ctx.Done():
		case <-changed:
		case <-p.kick:
			next = time.Now()
		case <-timer.C:
			// Set here, since a connection may come and go before the next look.
			if up = t.attempt(ctx, p); !up {
				backoff = min(2*backoff, t.timing.backoffMax)
				next = time.Now().Add(jitter(backoff))
			}
		}
		timer.Stop()
	}
}

// jitter gives a time between a half of d and d, so that nodes that lost each other at once do not dial at once.
func jitter(d time.Duration) time.Duration { return d/2 + rand.N(d/2+1) }

// attempt dials once and says whether a connection by the wanted carrier came of it. Where WireGuard does not come through, most
// likely since a packet filter drops UDP, and there is no connection at all, it dials without: a node shall not be lost by that. The
// state of the peer says so, and the next attempt is by WireGuard again.
func (t *Tunnel) attempt(ctx context.Context, p *peer) bool {
	t.mu.Lock()
	p.dialling = true
	address, tr, want := p.node.Address, t.trust, p.want
	t.mu.Unlock()
	err := t.connect(ctx, p.cid, address, tr, want, useAll)
	t.mu.Lock()
	defer t.mu.Unlock()
	if p.want == want {
		p.unlike = err
	}
	if err != nil && want == config.TunnelWireGuard && p.mainLocked() == 0 {
		t.mu.Unlock()
		plain := t.connect(ctx, p.cid, address, tr, config.TunnelSSH, useAll)
		t.mu.Lock()
		if plain != nil && !errors.Is(err, errNoAddress) {
			err = fmt.Errorf("%w; without it: %w", err, plain)
		}
	}
	p.dialling = false
	p.attempts++
	p.tried = time.Now()
	up := p.mainLocked() > 0
	// How the last connection ended says more than that there is nowhere to dial.
	if err != nil && !up && (p.err == nil || !errors.Is(err, errNoAddress)) {
		p.err = err
	}
	p.changedLocked()
	if err != nil && ctx.Err() == nil && !p.rightLocked() {
		t.repeats.log(t.o.Log.Warn(), "tunnel.unreachable", fmt.Sprint(p.cid, err), func(e *zerolog.Event) {
			e.Int("node", int(p.cid)).Str("address", address).Str("err", err.Error())
		})
	}
	return err == nil || p.rightLocked()
}

// connect makes an authenticated connection to the peer's tunnel, by that kind of carrier and for that use.
func (t *Tunnel) connect(ctx context.Context, cid config.CID, address string, tr *trust, by config.TunnelKind, use use) error {
	if address == "" {
		return errNoAddress
	}
	dialCtx, cancel := context.WithTimeout(ctx, t.timing.dial)
	defer cancel()
	raw, err := t.carrier(by).dial(dialCtx, cid, address)
	if err != nil {
		return err
	}
	w := newWire(raw, t.timing.dead)
	stop := context.AfterFunc(ctx, func() { raw.Close() }) // closed twice at worst
	defer stop()
	raw.SetDeadline(time.Now().Add(t.timing.handshake)) //nolint:errcheck // a closed conn fails in the handshake
	var key string
	var onlyAsk error // why it is asked whether it lets us in, and no more
	twin := false
	client := &ssh.ClientConfig{
		Config: algorithms(), User: cidPrincipal(tr.id.CID), ClientVersion: t.announced(use),
		Auth: []ssh.AuthMethod{ssh.PublicKeysCallback(func() ([]ssh.Signer, error) {
			if onlyAsk != nil {
				return []ssh.Signer{unsigned{tr.user, onlyAsk}}, nil
			}
			return []ssh.Signer{tr.user}, nil
		})},
		HostKeyAlgorithms: []string{ssh.CertAlgoED25519v01},
		BannerCallback:    func(text string) error { twin = text == ghostNotice; return nil },
		HostKeyCallback: func(_ string, _ net.Addr, presented ssh.PublicKey) error {
			err := tr.check(presented, ssh.HostCert, cid)
			if err != nil {
				err = fmt.Errorf("%w: %w", errPeerNotTrusted, err)
			}
			if err != nil && !tr.knowsKey(err, presented, cid) {
				return err
			}
			onlyAsk, key = err, string(presented.(*ssh.Certificate).Key.Marshal())
			return nil
		},
	}
	c, channels, requests, err := ssh.NewClientConn(w, address, client)
	if err != nil && twin && key != "" {
		return errTwin
	}
	if err != nil {
		return handshakeError(err, key != "")
	}
	if onlyAsk != nil { // it let us in without a proof
		t.discard(c, channels, requests)
		return onlyAsk
	}
	raw.SetDeadline(time.Time{}) //nolint:errcheck // a closed conn ends the session
	return t.start(&session{
		cid: cid, self: tr.id.CID, cluster: tr.id.ClusterID, key: key, dialler: tr.id.CID, carried: by, use: use, ssh: c, wire: w,
		instance: instanceOf(c.ServerVersion()),
	}, channels, requests)
}

var (
	errNoAddress      = errors.New("its address is not known, and it has not connected")
	errPeerNotTrusted = errors.New("node at that address is not trusted")
	errTwin           = errors.New("another live daemon has this node's identity and is connected there")
	errNotLetIn       = errors.New("node does not let this one in")
)

// unsigned is a certificate that the other side may look at, and of which it gets no proof: the first question of the public key
// method is whether the key would do (RFC 4252 §7).
type unsigned struct {
	ssh.Signer
	why error
}

// Sign is asked of who would be let in.
func (u unsigned) Sign(io.Reader, []byte) (*ssh.Signature, error) { return nil, u.why }

// handshakeError says which side did not trust the other, as far as that can be known. Only the peer's own no is one: a connection that
// ends in the middle says nothing.
func handshakeError(err error, hostProven bool) error {
	var network net.Error
	if errors.Is(err, errPeerNotTrusted) || errors.As(err, &network) || errors.Is(err, io.EOF) || !hostProven {
		return err
	}
	return fmt.Errorf("%w: %w", errNotLetIn, err)
}

// start adds a session and runs it in a goroutine of the tunnel.
func (t *Tunnel) start(s *session, channels <-chan ssh.NewChannel, requests <-chan *ssh.Request) error {
	s.t, s.since, s.conns, s.look, s.weighed = t, time.Now(), map[*conn]struct{}{}, make(chan struct{}, 1), make(chan struct{})
	t.mu.Lock()
	ctx := t.ctx
	t.mu.Unlock()
	s.ctx, s.cancel = context.WithCancel(ctx)
	s.wire.guard(s.ssh)
	err := t.add(s)
	if err == nil && t.owned.spawn(func() { s.run(channels, requests) }) {
		return nil
	}
	if err == nil {
		t.remove(s)
		err = errStopped
	}
	s.cancel()
	t.discard(s.ssh, channels, requests)
	return err
}

// discard closes a connection that is of no use. Its own goroutines end once what comes is drained.
func (t *Tunnel) discard(c ssh.Conn, channels <-chan ssh.NewChannel, requests <-chan *ssh.Request) {
	c.Close() // it is closed then
	t.owned.spawn(func() { ssh.DiscardRequests(requests) })
	t.owned.spawn(func() {
		for n := range channels {
			n.Reject(ssh.Prohibited, "not allowed") //nolint:errcheck // the connection is closed
		}
	})
}
