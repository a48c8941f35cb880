package tunnel

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/crypto/ssh"

	"mailproxy/config"
)

const (
	// gateChannel is the channel type between members; its extra data is a gateRequest.
	gateChannel = "gate@mailproxy"
	// streamLocalChannel is what OpenSSH's ssh -L opens for the path of a socket (its PROTOCOL, 2.4); "/control" is the service.
	streamLocalChannel = "direct-streamlocal@openssh.com"
	// keepAlive is the one global request that is answered with yes.
	keepAlive = "keepalive@mailproxy"
)

// gateRequest names the service that a channel is for.
type gateRequest struct{ Service string }

// streamLocalRequest is the same in OpenSSH's words.
type streamLocalRequest struct {
	Path      string
	Reserved0 string
	Reserved1 uint32
}

// Why a session ended; the text is the err of the log and of PeerState.
var (
	errSilent    = errors.New("no answer")
	errCut       = errors.New("no longer allowed by the configuration")
	errSurplus   = errors.New("another connection to the same node is used")
	errStopped   = errors.New("tunnel is stopping")
	errTooMany   = errors.New("too many connections of the same node")
	errSelfMoved = errors.New("this node's own identity changed")
)

// A session is one authenticated SSH connection with a peer; both sides open channels on it.
type session struct {
	t       *Tunnel
	peer    *peer
	cid     config.CID // of the peer
	self    config.CID // of this node
	cluster string
	key     string // the peer's key, marshalled
	dialler config.CID
	carried config.TunnelKind
	use     use
	// instance tells the peer's daemon from another one of the same identity; empty: it does not say.
	instance string
	ssh      ssh.Conn
	wire     *wire
	since    time.Time
	ctx      context.Context
	cancel   context.CancelFunc
	owned    owned

	look    chan struct{} // capacity 1, see lookNow
	doubted atomic.Bool   // see doubt
	waiting atomic.Int64  // when the peer was asked for a sign of life that has not come, after since; 0: it has

	weigh   sync.Once // see isSlow, as are the next two
	weighed chan struct{}
	slow    atomic.Bool

	leaving bool // it is closed soon, whatever is open; guarded by Tunnel.mu

	mu     sync.Mutex
	conns  map[*conn]struct{}
	opened int // outgoing channels that are being opened, and who is about to
	why    error
}

// run serves the session until its connection ends, and returns when all that it started has ended.
func (s *session) run(channels <-chan ssh.NewChannel, requests <-chan *ssh.Request) {
	s.owned.spawn(func() { s.accept(channels) })
	s.owned.spawn(func() { answer(requests, s.t.o.Now, s.ghost) })
	s.owned.spawn(s.watch)
	stop := context.AfterFunc(s.ctx, func() { s.close(errStopped) })
	err := s.ssh.Wait()
	s.close(fmt.Errorf("%w: %w", ErrLost, err))
	stop()
	s.cancel()
	s.t.remove(s)
	for _, c := range s.open() {
		c.reset(ErrLost)
	}
	s.owned.wait()
}

// close ends the connection at once; the first reason counts.
func (s *session) close(why error) {
	s.mu.Lock()
	if s.why == nil {
		s.why = why
	}
	s.mu.Unlock()
	s.ssh.Close() // it is closed then
}

// reason is why it ended.
func (s *session) reason() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.why
}

func (s *session) open() []*conn {
	s.mu.Lock()
	defer s.mu.Unlock()
	all := make([]*conn, 0, len(s.conns))
	for c := range s.conns {
		all = append(all, c)
	}
	return all
}

// watch asks the peer for a sign of life and cuts the connection when it is asked and nothing at all comes in for too long: a peer that is
// stopped or behind a packet filter leaves the TCP connection as it is.
func (s *session) watch() {
	asks := make(chan struct{}, 1)
	s.owned.spawn(func() {
		for range asks {
			if err := s.askAlive(); err != nil {
				s.close(fmt.Errorf("%w: %w", ErrLost, err))
			}
		}
	})
	defer close(asks)
	next := time.NewTimer(0)
	defer next.Stop()
	for last := (time.Time{}); ; {
		select {
		case <-s.ctx.Done():
			return
		case <-next.C:
		case <-s.look:
		}
		p, now := s.pace(), time.Now()
		if s.unanswered(now) >= p.patience {
			s.close(fmt.Errorf("%w for %s", errSilent, s.wire.silence().Round(time.Second/10)))
			return
		}
		// By silence not more often than that lasts: an answer may be on its way.
		due := func() time.Duration {
			return min(max(p.silence-s.wire.silence(), p.silence-now.Sub(last)), p.every-now.Sub(last))
		}
		if s.doubted.Swap(false) || due() <= 0 {
			last = now
			s.waiting.CompareAndSwap(0, int64(now.Sub(s.since)))
			select {
			case asks <- struct{}{}:
			default: // the last one is still under way
			}
		}
		wait := due()
		if s.waiting.Load() != 0 {
			wait = min(wait, p.patience-s.unanswered(now))
		}
		next.Reset(wait)
	}
}

// A pace is how a session is kept alive.
type pace struct {
	silence  time.Duration // after which the peer is asked
	every    time.Duration // it is asked, also where it is heard: for its clock
	patience time.Duration // with a peer that was asked and is silent
}

// pace asks often where a stream is open: somebody waits. A connection without any costs next to nothing: nodes that do
// not work together, the slaves of a large cluster, are many pairs. One for bulk may have its answers queued behind what it carries, and
// the one beside it tells whether the peer lives.
func (s *session) pace() pace {
	c := s.t.timing
	patience := c.dead - c.keepAlive
	switch {
	case s.use == useBulk:
		return pace{c.idle, c.idle, bulkPatience * patience}
	case !s.isAwaited():
		return pace{c.idle, 2 * c.idle, patience} // of both sides one asks
	}
	return pace{c.keepAlive, c.measure, patience}
}

// unanswered is how long the peer has been silent since it was asked for a sign of life; 0: it was heard since, or not asked.
func (s *session) unanswered(now time.Time) time.Duration {
	asked := s.waiting.Load()
	if asked == 0 {
		return 0
	}
	if s.wire.lastHeard().Sub(s.since) > time.Duration(asked) {
		s.waiting.CompareAndSwap(asked, 0)
		return 0
	}
	return now.Sub(s.since) - time.Duration(asked)
}

// doubt has the peer asked for a sign of life now.
func (s *session) doubt() {
	s.doubted.Store(true)
	s.lookNow()
}

// awaited has the peer's sessions looked at, since a stream is being opened on one of them.
func (s *session) awaited() {
	s.t.mu.Lock()
	defer s.t.mu.Unlock()
	for _, other := range s.peer.sessions {
		other.lookNow()
	}
}

// isAwaited says whether a stream with the peer is open, or being opened, on this or another connection.
func (s *session) isAwaited() bool {
	s.t.mu.Lock()
	defer s.t.mu.Unlock()
	return slices.ContainsFunc(s.peer.sessions, func(other *session) bool { return other.channels() > 0 })
}

// lookNow has watch look at once.
func (s *session) lookNow() {
	select {
	case s.look <- struct{}{}:
	default:
	}
}

// accept hands the channels that the peer opens to the gate.
func (s *session) accept(channels <-chan ssh.NewChannel) {
	for n := range channels {
		stream, handler, reason, text := s.gate(n)
		if handler == nil {
			n.Reject(reason, text) //nolint:errcheck // the connection is gone, the loop ends
			s.t.refused(s.wire.RemoteAddr(), s.cid, "channel: "+text)
			continue
		}
		s.serve(n, stream, handler)
	}
}

// A stream is what a channel is asked to be.
type stream struct {
	service string
	plain   bool // OpenSSH's: its other end knows no fin
	packed  bool // see pack.go
}

// gate finds the handler for a channel, or why there is none. With a handler, one of the peer's channels is taken.
func (s *session) gate(n ssh.NewChannel) (st stream, h Handler, reason ssh.RejectionReason, text string) {
	st, known := streamOf(n)
	if !known {
		return st, nil, ssh.UnknownChannelType, "unknown channel type"
	}
	if st.service == "" {
		return st, nil, ssh.Prohibited, "malformed request"
	}
	h = s.t.o.Services[st.service]
	if h == nil {
		return st, nil, ssh.Prohibited, "unknown service"
	}
	if !s.take(st) {
		return st, nil, ssh.ResourceShortage, "too many channels"
	}
	return st, h, 0, ""
}

// take takes one of the channels that the peer may open, give gives it back.
func (s *session) take(st stream) bool {
	if !s.peer.in.take("") {
		return false
	}
	if st.packed && !s.peer.packed.take("") {
		s.peer.in.give("")
		return false
	}
	return true
}

func (s *session) give(st stream) {
	s.peer.in.give("")
	if st.packed {
		s.peer.packed.give("")
	}
}

// streamOf reads what a channel is for; without a service where the request is malformed, and not known where it is no channel of ours.
func streamOf(n ssh.NewChannel) (st stream, known bool) {
	if len(n.ExtraData()) > 64 {
		return st, n.ChannelType() == gateChannel || n.ChannelType() == streamLocalChannel
	}
	switch n.ChannelType() {
	case gateChannel:
		var r gateRequest
		if ssh.Unmarshal(n.ExtraData(), &r) != nil {
			return st, true
		}
		st.service, st.packed = strings.CutSuffix(r.Service, packedSuffix)
		return st, true
	case streamLocalChannel:
		var r streamLocalRequest
		if ssh.Unmarshal(n.ExtraData(), &r) != nil || !strings.HasPrefix(r.Path, "/") {
			return st, true
		}
		return stream{service: r.Path[1:], plain: true}, true
	}
	return st, false
}

func (s *session) serve(n ssh.NewChannel, st stream, handler Handler) {
	ch, requests, err := n.Accept()
	if err != nil {
		s.give(st)
		return
	}
	var handled sync.WaitGroup
	handled.Add(1)
	c, err := s.newConn(ch, requests, st, func() { handled.Wait(); s.give(st) })
	if err != nil {
		s.give(st)
		return
	}
	s.awaited()
	started := s.owned.spawn(func() {
		defer handled.Done()
		// A handler that does not look at its conn ends with the session too.
		ctx, cancel := context.WithCancel(s.ctx)
		defer cancel()
		handler(ctx, s.cid, c)
		c.Close() // closed by the handler already
	})
	if !started {
		handled.Done()
		c.reset(ErrLost)
	}
}

// newConn makes the channel a conn of this session.
func (s *session) newConn(ch ssh.Channel, requests <-chan *ssh.Request, st stream, done func()) (*conn, error) {
	ended := func(c *conn) {
		s.mu.Lock()
		delete(s.conns, c)
		s.mu.Unlock()
		done()
		s.t.idle(s)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	local, remote := Addr{s.self, st.service}, Addr{s.cid, st.service}
	c, err := startConn(ch, requests, &conn{
		local: local, remote: remote, linger: s.t.timing.linger, plain: st.plain, packed: st.packed,
	}, s.owned.spawn, ended)
	if err != nil {
		return nil, err
	}
	s.conns[c] = struct{}{}
	return c, nil
}

// channels is how many are open or being opened.
func (s *session) channels() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return len(s.conns) + s.opened
}

// hold keeps the session as an open channel would, until release.
func (s *session) hold() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.opened++
}

func (s *session) release() {
	s.mu.Lock()
	s.opened--
	s.mu.Unlock()
	s.t.idle(s)
}

// dial opens a channel to a service of the peer. ErrLost when the connection ended before the peer took the channel, so that another
// connection may be tried.
func (s *session) dial(ctx context.Context, st stream) (*conn, error) {
	if !s.peer.out.take("") {
		return nil, fmt.Errorf("%w: %d channels are open", ErrRefused, maxChannels)
	}
	type opened struct {
		c   *conn
		err error
	}
	result := make(chan opened)
	s.hold()
	s.awaited()
	started := s.owned.spawn(func() {
		c, err := s.openChannel(st)
		s.release()
		select {
		case result <- opened{c, err}:
		case <-ctx.Done():
			if c != nil {
				c.Close() // nobody uses it
			}
		}
	})
	if !started {
		s.peer.out.give("")
		s.release()
		return nil, ErrLost
	}
	select {
	case r := <-result:
		return r.c, r.err
	case <-ctx.Done():
		return nil, fmt.Errorf("%w: no answer to the opening of a channel: %w", ErrUnreachable, ctx.Err())
	}
}

func (s *session) openChannel(st stream) (*conn, error) {
	service := st.service
	if st.packed {
		service += packedSuffix
	}
	ch, requests, err := openChannel(s.ctx, s.ssh, gateChannel, ssh.Marshal(gateRequest{service}), s.t.timing.linger)
	if err != nil {
		s.peer.out.give("")
		var refused *ssh.OpenChannelError
		if errors.As(err, &refused) {
			return nil, fmt.Errorf("%w: %s", ErrRefused, cleaned(refused.Message, 200))
		}
		err = fmt.Errorf("%w: %w", ErrLost, err)
		s.close(err) // so that the next try takes another
		return nil, err
	}
	c, err := s.newConn(ch, requests, st, func() { s.peer.out.give("") })
	if err != nil {
		s.peer.out.give("")
	}
	return c, err
}

// openChannel opens a channel on c, whose end ends ended. SSH may never answer where the connection ends at the same moment (see wire);
// then, after a while, nobody waits for it any more.
func openChannel(ended context.Context, c ssh.Conn, kind string, extra []byte, linger time.Duration,
) (ssh.Channel, <-chan *ssh.Request, error) {
	type opened struct {
		ch       ssh.Channel
		requests <-chan *ssh.Request
		err      error
	}
	result := make(chan opened, 1)
	go func() {
		ch, requests, err := c.OpenChannel(kind, extra)
		result <- opened{ch, requests, err}
	}()
	select {
	case r := <-result:
		return r.ch, r.requests, r.err
	case <-ended.Done():
	}
	timer := time.NewTimer(linger)
	defer timer.Stop()
	select {
	case r := <-result:
		return r.ch, r.requests, r.err
	case <-timer.C:
		return nil, nil, ErrLost
	}
}

// cleaned makes another's text fit for a log or a terminal: printable ASCII, n bytes at most.
func cleaned(s string, n int) string {
	out := make([]byte, 0, min(len(s), n))
	for i := 0; i < len(s) && len(out) < n; i++ {
		b := s[i]
		if b < ' ' || b > '~' {
			b = '?'
		}
		out = append(out, b)
	}
	return string(out)
}
