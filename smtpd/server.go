package smtpd

import (
	"cmp"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"sync"
	"sync/atomic"
	"time"

	"github.com/emersion/go-smtp"
	"github.com/rs/zerolog"

	"mailproxy/config"
	"mailproxy/filter"
	"mailproxy/queue"
	"mailproxy/relay"
)

// Options are what a Server is made from.
type Options struct {
	// Hostname is how we name ourselves in the greeting, EHLO and Received.
	Hostname string
	// Rules gives the Ruleset in force; nil answers 421 to new sessions: the configuration is not there yet.
	Rules func() *filter.Ruleset
	// Resolver asks the DNS for clients' names; nil is Go's own with the host's resolv.conf.
	Resolver *net.Resolver
	// Relay asks next hops and delivers to them.
	Relay *relay.Client
	// Queue takes what cannot be delivered at once.
	Queue *queue.Queue
	// TLS has the certificate for STARTTLS; nil: STARTTLS is not offered. TLS 1.2 and session tickets off are set here.
	TLS *tls.Config
	// TempDir is where bodies past 256 KiB lie, in files without a name; "" is the system's.
	TempDir string
	// MinFree is how many octets bodies leave free on TempDir's file system: 452 where there would be less. Without it one that
	// never ends could take the room of what else lies there.
	MinFree int64
	Log     zerolog.Logger
}

// A Server serves SMTP on any number of listeners. Its methods may be called by many at once.
type Server struct {
	o     Options
	log   zerolog.Logger
	smtp  *smtp.Server
	tls   *tls.Config
	count counters

	names    names
	limits   [limitCount]limitLog
	headless limitLog // balancers' connections without a PROXY header
	balancer atomic.Pointer[headless]
	rates    [sides]rates

	killed context.Context // ended by Close: transactions before their dot are dropped
	kill   context.CancelFunc

	sessions registry
	handoff  *handoff
	engine   sync.WaitGroup // go-smtp's loop, from the first Serve to Close
	start    sync.Once
}

// New makes a Server. It starts nothing.
func New(o Options) *Server {
	s := &Server{o: o, log: o.Log, handoff: newHandoff()}
	if s.o.Hostname == "" {
		s.o.Hostname = "localhost"
	}
	s.killed, s.kill = context.WithCancel(context.Background())
	s.names.resolver, s.names.ended = cmp.Or(o.Resolver, &net.Resolver{PreferGo: true}), s.killed
	if o.TLS != nil {
		s.tls = o.TLS.Clone()
		s.tls.MinVersion = max(s.tls.MinVersion, tls.VersionTLS12)
		s.tls.SessionTicketsDisabled = true // mail from Microsoft is lost otherwise (golang/go#70232)
	}
	s.smtp = smtp.NewServer(smtp.BackendFunc(newSession))
	s.smtp.Domain = "localhost" // never on the wire
	s.smtp.MaxLineLength = 0    // conn bounds lines; go-smtp drops a whole read where one is too long
	s.smtp.EnableSMTPUTF8 = true
	s.smtp.ErrorLog = errorLog{s.log}
	return s
}

// Serve accepts sessions of a kind on l until ctx ends or the server is drained or closed, and closes l. Sessions go on after it has
// returned: Drain or Close end them. The error is the listener's.
func (s *Server) Serve(ctx context.Context, l net.Listener, kind Kind) error {
	wrapped := &listener{Listener: l, kind: kind, closed: make(chan struct{})}
	if !s.sessions.addListener(wrapped, s.startEngine) {
		return l.Close()
	}
	defer s.sessions.removeListener(wrapped)
	stop := context.AfterFunc(ctx, func() { _ = wrapped.Close() })
	defer stop()
	err := s.accept(wrapped)
	_ = wrapped.Close()
	return err
}

// startEngine lets go-smtp take sessions from the handoff.
func (s *Server) startEngine() {
	s.start.Do(func() { s.engine.Go(func() { _ = s.smtp.Serve(s.handoff) }) })
}

// Drain stops accepting, says 421 4.3.2 to sessions that wait for a command, lets transactions that are past DATA finish, and
// returns when all sessions have ended. When ctx ends first, it closes what is left and gives ctx's error.
func (s *Server) Drain(ctx context.Context) error {
	s.sessions.drain()
	select {
	case <-s.sessions.empty():
		s.Close()
		return nil
	case <-ctx.Done():
		s.Close()
		return ctx.Err()
	}
}

// closeWait bounds how long Close waits for goroutines whose connections it has closed; one that waits for the answer to a final
// dot is left behind.
const closeWait = 2 * time.Second

// Close ends all listeners and sessions at once, without a reply. What was answered stays answered.
func (s *Server) Close() {
	s.sessions.drain()
	s.kill()
	s.sessions.closeAll()
	s.names.stop()
	bound, cancel := context.WithTimeout(context.Background(), closeWait)
	defer cancel()
	defer s.engine.Wait() // its listener is closed
	select {
	case <-s.sessions.empty():
	case <-bound.Done():
	}
	_ = s.handoff.Close() // Shutdown does so too, where go-smtp has come to serve it
	if !errors.Is(s.smtp.Shutdown(bound), context.DeadlineExceeded) {
		return
	}
	for _, id := range s.sessions.left() {
		s.count.duplicates.Add(1)
		s.log.Warn().Str("session", id).Str("reason", "stopped while the next hop's answer was waited for").Msg("mail.possible_duplicate")
	}
}

// errorLog takes what go-smtp has to say: panics of ours and errors of Accept.
type errorLog struct{ log zerolog.Logger }

// Printf logs one event.
func (e errorLog) Printf(format string, v ...any) {
	e.log.Error().Str("err", fmt.Sprintf(format, v...)).Msg("session.error")
}

// Println logs one event.
func (e errorLog) Println(v ...any) { e.log.Error().Str("err", fmt.Sprint(v...)).Msg("session.error") }

// A registry knows every listener and session.
type registry struct {
	mu        sync.Mutex
	listeners map[*listener]struct{}
	conns     map[*conn]struct{}
	crowds    [sides]crowd
	draining  atomic.Bool   // set under mu
	paused    atomic.Bool   // set under mu
	drained   chan struct{} // closed when draining and no session is left
	isClosed  bool          // drained is closed
}

// addListener takes a listener in, and runs start, where the server was not drained or closed.
func (r *registry) addListener(l *listener, start func()) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.draining.Load() {
		return false
	}
	start()
	if r.listeners == nil {
		r.listeners = make(map[*listener]struct{})
	}
	r.listeners[l] = struct{}{}
	return true
}

func (r *registry) removeListener(l *listener) {
	r.mu.Lock()
	defer r.mu.Unlock()
	delete(r.listeners, l)
}

// A crowd counts the sessions of one side.
type crowd struct {
	all                   int
	perClient, perNetwork map[netip.Prefix]int
}

// full gives the limit that one more session would be over; limitCount where there is room.
func (w *crowd) full(key clientKey, network netip.Prefix, v *config.Limits) limit {
	switch {
	case w.all >= v.MaxSessions:
		return limitSessions
	case w.perClient[key] >= v.MaxSessionsPerAddress:
		return limitAddress
	case w.perNetwork[network] >= v.MaxSessionsPerNetwork:
		return limitNetwork
	}
	return limitCount
}

func (w *crowd) add(key clientKey, network netip.Prefix) {
	if w.perClient == nil {
		w.perClient, w.perNetwork = make(map[netip.Prefix]int), make(map[netip.Prefix]int)
	}
	w.all++
	w.perClient[key]++
	w.perNetwork[network]++
}

func (w *crowd) remove(key clientKey, network netip.Prefix) {
	w.all--
	if w.perClient[key]--; w.perClient[key] == 0 {
		delete(w.perClient, key)
	}
	if w.perNetwork[network]--; w.perNetwork[network] == 0 {
		delete(w.perNetwork, network)
	}
}

// add takes a session in where there is room for it. Else it gives the limit that it would be over; while no session is taken it
// gives false.
func (r *registry) add(c *conn, v *config.Limits) (over limit, open bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.isDraining() {
		return limitCount, false
	}
	w := &r.crowds[c.side]
	if over := w.full(c.key, networkOf(c.client), v); over < limitCount {
		return over, true
	}
	if r.conns == nil {
		r.conns = make(map[*conn]struct{})
	}
	r.conns[c] = struct{}{}
	w.add(c.key, networkOf(c.client))
	return limitCount, true
}

func (r *registry) remove(c *conn) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if _, ok := r.conns[c]; !ok {
		return
	}
	delete(r.conns, c)
	r.crowds[c.side].remove(c.key, networkOf(c.client))
	r.tellEmptyLocked()
}

func (r *registry) tellEmptyLocked() {
	if r.draining.Load() && len(r.conns) == 0 && !r.isClosed {
		if r.drained == nil {
			r.drained = make(chan struct{})
		}
		close(r.drained)
		r.isClosed = true
	}
}

// drain closes the listeners and wakes every session that waits for a command.
func (r *registry) drain() {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.draining.Store(true)
	for l := range r.listeners {
		_ = l.Close()
	}
	for c := range r.conns {
		c.drain()
	}
	r.tellEmptyLocked()
}

func (r *registry) isDraining() bool { return r.draining.Load() || r.paused.Load() }

// empty gives a channel that is closed when, after drain, no session is left.
func (r *registry) empty() <-chan struct{} {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.drained == nil {
		r.drained = make(chan struct{})
	}
	return r.drained
}

// left gives the IDs of the sessions that have not ended.
func (r *registry) left() (ids []string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for c := range r.conns {
		ids = append(ids, c.id)
	}
	return ids
}

func (r *registry) closeAll() {
	r.mu.Lock()
	defer r.mu.Unlock()
	for c := range r.conns {
		_ = c.base.Close()
	}
}
