package web

import (
	"context"
	"encoding/json"
	"errors"
	"io"
	"log"
	"net"
	"net/http"
	"strconv"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promhttp"
	"github.com/rs/zerolog"
	"golang.org/x/net/netutil"

	"mailproxy/config"
	"mailproxy/queue"
)

// Limits of a server: whoever asks sends a short request and waits for a short answer.
const (
	maxHeaderBytes    = 16 << 10
	maxNodeHeader     = 64 << 10 // of an administrator or a peer, whose query may have queue.MaxIDs IDs
	readHeaderTimeout = 5 * time.Second
	readTimeout       = 10 * time.Second
	writeTimeout      = time.Minute
	idleTimeout       = time.Minute
	maxConns          = 128 // per door
)

// Options is what a Server shows.
type Options struct {
	// Node is this node's name, Version the software's.
	Node, Version string
	// Checks are what /health runs.
	Checks []Check
	// Queue is what /queue shows.
	Queue *queue.Queue
	// Status gives what /status answers, as JSON. It must answer with PostgreSQL down too; verify asks for the rows themselves.
	Status func(ctx context.Context, verify bool) any
	// Command runs a configuration command that an administrator typed here (from 0) or at a member; nil: none is.
	Command func(ctx context.Context, from config.CID, c config.Command) config.CommandReply
	// Hops gives what GET /hops answers, as JSON: the next hops that are out of reach or connected.
	Hops func() any
	// Drain is what /drain turns on and off.
	Drain Drain
	// Weight is how much new mail this node can take of what it could take idle, in percent; it is shown to balancers, from 1 to 100.
	Weight func() int
	// Master is the one peer that this node takes orders from; 0 for none.
	Master func() config.CID
	// Member answers POST /member/… of a peer, who is from.
	Member func(from config.CID, w http.ResponseWriter, r *http.Request)
	// Peer gives the socket that leads to a member; false where there is no such member, or it is this node.
	Peer func(config.CID) (socket string, ok bool)
	// Gatherer is what /metrics shows.
	Gatherer prometheus.Gatherer
	Log      zerolog.Logger
}

// Server is the three doors. Make it with New.
type Server struct {
	opts    Options
	checker *checker
	agent   *checker // the critical checks alone
	control *http.Server
	public  *http.Server
	peer    *http.Server
	conns   *connListener // feeds peer
	// commands has room for the one command that runs: commits come one after the other anyhow, and texts can be large.
	commands chan struct{}
}

// New makes a server; the Serve methods start it.
func New(o Options) *Server {
	s := &Server{opts: o, checker: &checker{checks: o.Checks, now: time.Now}, agent: &checker{checks: critical(o.Checks), now: time.Now}, conns: newConnListener(), commands: make(chan struct{}, 1)}
	public := http.NewServeMux()
	public.HandleFunc("GET /health", s.health)
	public.Handle("GET /metrics", promhttp.HandlerFor(o.Gatherer, promhttp.HandlerOpts{MaxRequestsInFlight: 4, Timeout: 10 * time.Second}))

	peer := http.NewServeMux()
	peer.Handle("GET /health", public)
	peer.Handle("GET /metrics", public)
	peer.HandleFunc("GET /status", s.status)
	peer.HandleFunc("GET /hops", s.hops)
	s.queueRoutes(peer)
	peer.HandleFunc("POST /command", s.command)
	control := http.NewServeMux()
	control.Handle("/", peer)
	control.HandleFunc("POST /drain", s.drain)
	control.HandleFunc("DELETE /drain", s.undrain)
	fromPeer := http.NewServeMux()
	fromPeer.Handle("/", peer)
	fromPeer.HandleFunc("POST /drain", s.masterOnly(s.drain))
	fromPeer.HandleFunc("DELETE /drain", s.masterOnly(s.undrain))
	fromPeer.HandleFunc("POST /member/", s.member)
	fromPeer.HandleFunc("PUT /queue/{id}", s.queueReceive)

	s.public, s.peer, s.control = s.server(public), s.server(fromPeer), s.server(control)
	s.peer.MaxHeaderBytes, s.control.MaxHeaderBytes = maxNodeHeader, maxNodeHeader
	return s
}

func (s *Server) server(h http.Handler) *http.Server {
	return &http.Server{
		Handler:           bounded(h),
		MaxHeaderBytes:    maxHeaderBytes,
		ReadHeaderTimeout: readHeaderTimeout,
		ReadTimeout:       readTimeout,
		WriteTimeout:      writeTimeout,
		IdleTimeout:       idleTimeout,
		ErrorLog:          log.New(io.Discard, "", 0), // a client that breaks off is no event
		ConnContext: func(ctx context.Context, c net.Conn) context.Context {
			from, _ := c.RemoteAddr().(peerAddr) // 0: not over the tunnel
			return context.WithValue(ctx, fromKey{}, config.CID(from))
		},
	}
}

// fromKey is the key of the member that asks, in a request's context.
type fromKey struct{}

// bounded bounds what a request may bring: little, but for a command with its text and an item.
func bounded(h http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		limit := int64(64 << 10)
		switch {
		case r.URL.Path == "/command":
			limit = config.MaxCommandBytes
		case r.Method == http.MethodPut: // an item
			limit = maxItemBytes
		}
		r.Body = http.MaxBytesReader(w, r.Body, limit)
		h.ServeHTTP(w, r)
	})
}

// ServeControl answers at the control socket until ctx ends; it closes l.
func (s *Server) ServeControl(ctx context.Context, l net.Listener) error {
	return serve(ctx, s.control, l)
}

// ServePublic answers at the web listener until ctx ends; it closes l. It may be called for several listeners.
func (s *Server) ServePublic(ctx context.Context, l net.Listener) error {
	return serve(ctx, s.public, l)
}

// Run serves the peers that ServePeer brings, until ctx ends.
func (s *Server) Run(ctx context.Context) error { return serve(ctx, s.peer, s.conns) }

// ServePeer answers a peer on one channel of the tunnel and returns when that is closed. Run must be running.
func (s *Server) ServePeer(ctx context.Context, from config.CID, conn net.Conn) {
	c := &trackedConn{Conn: conn, from: peerAddr(from), closed: make(chan struct{})}
	if !s.conns.put(ctx, c) {
		_ = conn.Close()
		return
	}
	select {
	case <-c.closed:
	case <-ctx.Done():
		_ = c.Close()
	case <-s.conns.done:
		_ = c.Close()
	}
}

// serve ends requests that run when ctx ends within a second, then cuts them.
func serve(ctx context.Context, server *http.Server, l net.Listener) error {
	ended := make(chan struct{})
	defer func() { <-ended }()
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	go func() {
		defer close(ended)
		<-ctx.Done()
		grace, cancel := context.WithTimeout(context.WithoutCancel(ctx), time.Second)
		defer cancel()
		if server.Shutdown(grace) != nil {
			_ = server.Close()
		}
	}()
	err := server.Serve(netutil.LimitListener(l, maxConns))
	if errors.Is(err, http.ErrServerClosed) {
		return nil
	}
	return err
}

func (s *Server) health(w http.ResponseWriter, _ *http.Request) {
	h := Health{Node: s.opts.Node, Version: s.opts.Version, Checks: s.checker.run()}
	h.Status = status(h.Checks)
	if s.opts.Drain.On() && h.Status != "failed" {
		h.Status = "draining" // of this moment: a balancer shall not send a second's mail more
	}
	code := http.StatusOK
	if h.Status == "failed" || h.Status == "draining" {
		code = http.StatusServiceUnavailable
	}
	s.answer(w, code, h)
}

func (s *Server) hops(w http.ResponseWriter, _ *http.Request) {
	s.answer(w, http.StatusOK, s.opts.Hops())
}

func (s *Server) status(w http.ResponseWriter, r *http.Request) {
	verify, _ := strconv.ParseBool(r.URL.Query().Get("verify"))
	s.answer(w, http.StatusOK, s.opts.Status(r.Context(), verify))
}

// Bounds of the reading of a command, while which others wait, and of its running: a text of any size is one commit.
const (
	commandReadTimeout = 2 * time.Minute
	commandTimeout     = 30 * time.Minute
)

// command runs a configuration command, for this node's administrator or a member's: whoever is root on a member may change what all
// members have in common.
func (s *Server) command(w http.ResponseWriter, r *http.Request) {
	if s.opts.Command == nil {
		http.NotFound(w, r)
		return
	}
	select { // before anything of the text is read
	case s.commands <- struct{}{}:
	case <-r.Context().Done():
		return
	}
	defer func() { <-s.commands }()
	now, rc := time.Now(), http.NewResponseController(w)
	if err := errors.Join(rc.SetReadDeadline(now.Add(commandReadTimeout)), rc.SetWriteDeadline(now.Add(commandTimeout))); err != nil {
		s.fail(w, err)
		return
	}
	var c config.Command
	if err := json.NewDecoder(r.Body).Decode(&c); err != nil {
		s.answer(w, http.StatusBadRequest, problem{"unreadable command"})
		return
	}
	if err := rc.SetReadDeadline(now.Add(commandTimeout)); err != nil { // one that passes meanwhile would end the request
		s.fail(w, err)
		return
	}
	s.answer(w, http.StatusOK, s.opts.Command(r.Context(), peerOf(r), c))
}

// problem is the body of an answer that is none.
type problem struct {
	Error string `json:"error"`
}

func (s *Server) fail(w http.ResponseWriter, err error) {
	code := http.StatusInternalServerError
	switch {
	case errors.Is(err, queue.ErrNoSuch):
		code = http.StatusNotFound
	case errors.Is(err, queue.ErrSelection), errors.Is(err, queue.ErrNoTransport), errors.Is(err, queue.ErrDeed):
		code = http.StatusBadRequest
	}
	s.answer(w, code, problem{err.Error()})
}

func (s *Server) answer(w http.ResponseWriter, code int, v any) {
	body, err := json.Marshal(v)
	if err != nil {
		s.opts.Log.Error().Err(err).Msg("web.failed")
		http.Error(w, `{"error":"no answer can be made"}`, http.StatusInternalServerError)
		return
	}
	h := w.Header()
	h.Set("Content-Type", "application/json")
	h.Set("Cache-Control", "no-store")
	h.Set("X-Content-Type-Options", "nosniff")
	w.WriteHeader(code)
	_, _ = w.Write(append(body, '\n')) // whoever asked may be gone
}

// connListener makes a listener of connections that come one by one.
type connListener struct {
	ch   chan net.Conn
	done chan struct{}
	once sync.Once
}

func newConnListener() *connListener {
	return &connListener{ch: make(chan net.Conn), done: make(chan struct{})}
}

func (l *connListener) put(ctx context.Context, c net.Conn) bool {
	select {
	case l.ch <- c:
		return true
	case <-ctx.Done():
	case <-l.done:
	}
	return false
}

// Accept is part of net.Listener.
func (l *connListener) Accept() (net.Conn, error) {
	select {
	case c := <-l.ch:
		return c, nil
	case <-l.done:
		return nil, net.ErrClosed
	}
}

// Close is part of net.Listener.
func (l *connListener) Close() error {
	l.once.Do(func() { close(l.done) })
	return nil
}

// Addr is part of net.Listener.
func (l *connListener) Addr() net.Addr { return &net.UnixAddr{Name: "tunnel", Net: "unix"} }

// trackedConn says when it was closed.
type trackedConn struct {
	net.Conn
	from   peerAddr
	closed chan struct{}
	once   sync.Once
}

// peerAddr is the member at the other end of a connection.
type peerAddr config.CID

// Network is part of net.Addr.
func (a peerAddr) Network() string { return "tunnel" }

// String is part of net.Addr.
func (a peerAddr) String() string { return "node " + strconv.Itoa(int(a)) }

// RemoteAddr is part of net.Conn.
func (c *trackedConn) RemoteAddr() net.Addr { return c.from }

// Close is part of net.Conn.
func (c *trackedConn) Close() error {
	c.once.Do(func() { close(c.closed) })
	return c.Conn.Close()
}
