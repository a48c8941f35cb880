package tunnel

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"
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

	leaving bool // it is closed soon, whatever is open; guarded by Tunnel.mu

	mu     sync.Mutex
	conns  map[*conn]struct{}
	opened int // outgoing channels that are being opened
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

// watch asks the peer for a sign of life and cuts the connection when nothing at all came in for too long: a peer that is stopped or
// behind a packet filter leaves the TCP connection as it is.
func (s *session) watch() {
	asked := make(chan struct{}, 1)
	s.owned.spawn(func() {
		for range asked {
			if err := s.askAlive(); err != nil {
				s.close(fmt.Errorf("%w: %w", ErrLost, err))
			}
		}
	})
	defer close(asked)
	every, dead := s.t.timing.keepAlive, s.t.timing.dead
	if s.use == useBulk {
		every, dead = bulkPatience*every, bulkPatience*dead
	}
	next := time.NewTimer(0)
	defer next.Stop()
	for asks := (time.Time{}); ; {
		select {
		case <-s.ctx.Done():
			return
		case <-next.C:
		}
		silence := s.wire.silence()
		if silence >= dead {
			s.close(fmt.Errorf("%w for %s", errSilent, silence.Round(time.Second/10)))
			return
		}
		if now := time.Now(); now.Sub(asks) >= every {
			asks = now
			select {
			case asked <- struct{}{}:
			default: // the last one is still under way
			}
		}
		next.Reset(min(every-time.Since(asks), dead-silence))
	}
}

// accept hands the channels that the peer opens to the gate.
func (s *session) accept(channels <-chan ssh.NewChannel) {
	for n := range channels {
		service, handler, reason, text := s.gate(n)
		if handler == nil {
			n.Reject(reason, text) //nolint:errcheck // the connection is gone, the loop ends
			s.t.refused(s.wire.RemoteAddr(), s.cid, "channel: "+text)
			continue
		}
		s.serve(n, service, handler)
	}
}

// gate finds the handler for a channel, or why there is none. With a handler, one of the peer's channels is taken.
func (s *session) gate(n ssh.NewChannel) (service string, h Handler, reason ssh.RejectionReason, text string) {
	service, known := serviceOf(n)
	if !known {
		return "", nil, ssh.UnknownChannelType, "unknown channel type"
	}
	if service == "" {
		return "", nil, ssh.Prohibited, "malformed request"
	}
	h = s.t.o.Services[service]
	if h == nil {
		return "", nil, ssh.Prohibited, "unknown service"
	}
	if !s.peer.in.take("") {
		return "", nil, ssh.ResourceShortage, "too many channels"
	}
	return service, h, 0, ""
}

// serviceOf reads which service a channel is for; empty where the request is malformed, and not known where it is no channel of ours.
func serviceOf(n ssh.NewChannel) (service string, known bool) {
	if len(n.ExtraData()) > 64 {
		return "", n.ChannelType() == gateChannel || n.ChannelType() == streamLocalChannel
	}
	switch n.ChannelType() {
	case gateChannel:
		var r gateRequest
		if ssh.Unmarshal(n.ExtraData(), &r) != nil {
			return "", true
		}
		return r.Service, true
	case streamLocalChannel:
		var r streamLocalRequest
		if ssh.Unmarshal(n.ExtraData(), &r) != nil || !strings.HasPrefix(r.Path, "/") {
			return "", true
		}
		return r.Path[1:], true
	}
	return "", false
}

func (s *session) serve(n ssh.NewChannel, service string, handler Handler) {
	ch, requests, err := n.Accept()
	if err != nil {
		s.peer.in.give("")
		return
	}
	var handled sync.WaitGroup
	handled.Add(1)
	c, err := s.newConn(ch, requests, service, n.ChannelType() == streamLocalChannel, func() { handled.Wait(); s.peer.in.give("") })
	if err != nil {
		s.peer.in.give("")
		return
	}
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

// newConn makes the channel a conn of this session; plain is one whose other end knows no fin.
func (s *session) newConn(ch ssh.Channel, requests <-chan *ssh.Request, service string, plain bool, done func()) (*conn, error) {
	ended := func(c *conn) {
		s.mu.Lock()
		delete(s.conns, c)
		s.mu.Unlock()
		done()
		s.t.idle(s)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	local, remote := Addr{s.self, service}, Addr{s.cid, service}
	c, err := startConn(ch, requests, &conn{local: local, remote: remote, linger: s.t.timing.linger, plain: plain}, s.owned.spawn, ended)
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

// dial opens a channel to a service of the peer. ErrLost when the connection ended before the peer took the channel, so that another
// connection may be tried.
func (s *session) dial(ctx context.Context, service string) (*conn, error) {
	if !s.peer.out.take("") {
		return nil, fmt.Errorf("%w: %d channels are open", ErrRefused, maxChannels)
	}
	type opened struct {
		c   *conn
		err error
	}
	result := make(chan opened)
	s.mu.Lock()
	s.opened++
	s.mu.Unlock()
	started := s.owned.spawn(func() {
		c, err := s.openChannel(service)
		s.mu.Lock()
		s.opened--
		s.mu.Unlock()
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
		s.mu.Lock()
		s.opened--
		s.mu.Unlock()
		return nil, ErrLost
	}
	select {
	case r := <-result:
		return r.c, r.err
	case <-ctx.Done():
		return nil, fmt.Errorf("%w: no answer to the opening of a channel: %w", ErrUnreachable, ctx.Err())
	}
}

func (s *session) openChannel(service string) (*conn, error) {
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
	c, err := s.newConn(ch, requests, service, false, func() { s.peer.out.give("") })
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
