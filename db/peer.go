package db

import (
	"context"
	"errors"
	"fmt"
	"net"
	"sync"
	"sync/atomic"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"

	"mailproxy/config"
)

// A Peer is another node's PostgreSQL, reached through the tunnel; it logs us in by who we are. Its methods are for one caller at a
// time. A Peer whose connection broke gives errors; open another.
type Peer struct {
	dial func(ctx context.Context) (net.Conn, error)
	conn *pgx.Conn
	sent *countingConn
	// asked is what StateForPush has read, for the push behind it; nil: nothing.
	asked *peerState
}

// OpenPeer connects to a peer by dial. The context ends only the opening.
func OpenPeer(ctx context.Context, dial func(ctx context.Context) (net.Conn, error)) (*Peer, error) {
	p := &Peer{dial: dial}
	if err := p.connect(ctx); err != nil {
		return nil, err
	}
	return p, nil
}

func (p *Peer) connect(ctx context.Context) error {
	// The gate sets the user and database itself; nothing here comes from the environment.
	c, err := pgx.ParseConfig("host=peer port=5432 user=peer dbname=mailproxy sslmode=disable password=none")
	if err != nil {
		return fmt.Errorf("open peer: %w", err)
	}
	c.LookupFunc = func(_ context.Context, host string) ([]string, error) { return []string{host}, nil }
	var sent atomic.Pointer[countingConn]
	c.DialFunc = func(ctx context.Context, _, _ string) (net.Conn, error) {
		if sent.Load() != nil {
			return nil, errNoCancel // pgx dials again to cancel, from a goroutine of its own
		}
		conn, err := p.dial(ctx)
		if err != nil {
			return nil, err
		}
		sent.Store(&countingConn{Conn: conn})
		return sent.Load(), nil
	}
	conn, err := pgx.ConnectConfig(ctx, c)
	if err != nil {
		return fmt.Errorf("open peer: %w", said(err))
	}
	if p.sent != nil {
		sent.Load().written.Add(p.sent.written.Load()) // it counts on where this is not the first connection
	}
	p.conn, p.sent = conn, sent.Load()
	return nil
}

// A saidError is a connection's error in the words of who gave it; that the user is called peer and so on tells nobody anything.
type saidError struct {
	text string
	err  error
}

func (e *saidError) Error() string { return e.text }
func (e *saidError) Unwrap() error { return e.err }

func said(err error) error {
	if server, ok := errors.AsType[*pgconn.PgError](err); ok {
		return &saidError{server.Message, err}
	}
	if failed, ok := errors.AsType[*pgconn.ConnectError](err); ok {
		return &saidError{failed.Unwrap().Error(), err}
	}
	return err
}

// errNoCancel: the gate lets nobody cancel a session's statement from outside.
var errNoCancel = errors.New("a peer's statements cannot be cancelled")

// Close ends the connection.
func (p *Peer) Close() { closeConn(p.conn.PgConn()) }

// peerState is a peer's state and what a push wants to know beside it.
type peerState struct {
	State
	kind   string            // as what we are logged in: peer, push
	schema int64             // its newest migration
	sums   map[string]string // its tables' kept sums
}

func (p *Peer) state(ctx context.Context) (peerState, error) {
	var s peerState
	var err error
	s.State, err = scanState(p.conn.QueryRow(ctx, "SELECT "+stateColumns+", role_kind, schema_version, sums FROM node.position()"),
		&s.kind, &s.schema, &s.sums)
	return s, err
}

// StateForPush is State with what a push wants to know beside it: one that follows asks no more.
func (p *Peer) StateForPush(ctx context.Context) (State, error) {
	s, err := p.state(ctx)
	if err != nil {
		return State{}, fmt.Errorf("read the peer's state: %w", err)
	}
	p.asked = &s
	return s.State, nil
}

// lastState gives what StateForPush has read a moment ago, once; else it asks.
func (p *Peer) lastState(ctx context.Context) (peerState, error) {
	if s := p.asked; s != nil {
		p.asked = nil
		return *s, nil
	}
	return p.state(ctx)
}

// State reads the peer's state: what is asked of every peer again and again, so no more than that.
func (p *Peer) State(ctx context.Context) (State, error) {
	p.asked = nil
	s, err := scanState(p.conn.QueryRow(ctx, "SELECT "+stateColumns+" FROM node.position()"))
	if err != nil {
		return State{}, fmt.Errorf("read the peer's state: %w", err)
	}
	return s, nil
}

// Promise asks the peer to promise us the n-th epoch, and gives its state under that promise. The same again is no error. ErrStale
// where it has promised a higher one, ErrNotMember where it does not know us as promotable, ErrFarEpoch.
func (p *Peer) Promise(ctx context.Context, n int64) (State, error) {
	if _, err := p.conn.Exec(ctx, "SELECT node.promise($1)", n); err != nil {
		return State{}, fmt.Errorf("ask for a promise of epoch %d: %w", n, mapError(err))
	}
	return p.State(ctx)
}

// Heartbeat tells the peer that we are there, at this position. Where we are its master and it is there too, it notes itself in sync.
func (p *Peer) Heartbeat(ctx context.Context, at config.Position) error {
	_, err := p.conn.Exec(ctx, "SELECT node.heartbeat($1, $2, $3, $4)", at.Epoch.N, at.Epoch.Owner, at.Serial, at.Digest[:])
	if err != nil {
		return fmt.Errorf("heartbeat: %w", mapError(err))
	}
	return nil
}

// countingConn counts what is written, and ends with its deadline also where what it wraps knows none: pgx bounds reads and writes by
// deadlines alone.
type countingConn struct {
	net.Conn
	written atomic.Int64

	mu    sync.Mutex
	timer *time.Timer // closes the conn; nil: no deadline
}

func (c *countingConn) Write(b []byte) (int, error) {
	n, err := c.Conn.Write(b)
	c.written.Add(int64(n))
	return n, err
}

// SetDeadline asks the conn below, and where that cannot, closes it in time.
func (c *countingConn) SetDeadline(t time.Time) error {
	if c.Conn.SetDeadline(t) == nil {
		return nil
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.timer != nil {
		c.timer.Stop()
		c.timer = nil
	}
	if !t.IsZero() {
		c.timer = time.AfterFunc(time.Until(t), func() { _ = c.Conn.Close() })
	}
	return nil
}

// Close closes the conn below and stops its timer.
func (c *countingConn) Close() error {
	c.mu.Lock()
	if c.timer != nil {
		c.timer.Stop()
	}
	c.mu.Unlock()
	return c.Conn.Close()
}
