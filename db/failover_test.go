package db_test

import (
	"bytes"
	"context"
	"errors"
	"io"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"mailproxy/config"
	"mailproxy/db"
	"mailproxy/internal/pgtest"
)

// A relay is a socket in front of a server's. It stands in the way of the next COMMIT where it is told to.
type relay struct {
	dir      string
	atCommit atomic.Pointer[func(c *heldCommit)]
}

// A heldCommit is a COMMIT that has not gone to the server yet, and whose answer the client will not see.
type heldCommit struct {
	message  []byte
	server   net.Conn
	client   net.Conn
	answered chan struct{}
}

// forward gives the COMMIT to the server.
func (h *heldCommit) forward() { _, _ = h.server.Write(h.message) }

// cut ends the client's connection.
func (h *heldCommit) cut() { _ = h.client.Close() }

func newRelay(t *testing.T, to string) *relay {
	t.Helper()
	dir, err := os.MkdirTemp("", "relay")
	if err != nil {
		t.Fatal(err)
	}
	r := &relay{dir: dir}
	l, err := net.Listen("unix", filepath.Join(dir, ".s.PGSQL.5432"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = l.Close(); _ = os.RemoveAll(dir) })
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			go r.serve(c, filepath.Join(to, ".s.PGSQL.5432"))
		}
	}()
	return r
}

func (r *relay) serve(client net.Conn, to string) {
	defer client.Close()
	server, err := net.Dial("unix", to)
	if err != nil {
		return
	}
	defer server.Close()
	var held atomic.Pointer[heldCommit]
	go func() {
		defer client.Close()
		b := make([]byte, 64<<10)
		for {
			n, err := server.Read(b)
			if err != nil {
				return
			}
			if h := held.Load(); h != nil {
				close(h.answered) // one answer, and then the connection ends
				return
			}
			if _, err := client.Write(b[:n]); err != nil {
				return
			}
		}
	}()
	b := make([]byte, 64<<10)
	for {
		n, err := client.Read(b)
		if err != nil {
			return
		}
		if bytes.HasSuffix(b[:n], []byte("commit\x00")) {
			if f := r.atCommit.Swap(nil); f != nil {
				h := &heldCommit{message: bytes.Clone(b[:n]), server: server, client: client, answered: make(chan struct{})}
				held.Store(h)
				(*f)(h)
				return
			}
		}
		if _, err := server.Write(b[:n]); err != nil {
			return
		}
	}
}

// domains are the names that the database has.
func domains(t *testing.T, d *db.DB) string {
	t.Helper()
	s, err := d.Load(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	var names []string
	for v := range s.Domains.All() {
		names = append(names, v.Name)
	}
	return strings.Join(names, " ")
}

func tryPut(ctx context.Context, d *db.DB, name string) (config.Position, error) {
	return d.Commit(ctx, author, func(ctx context.Context, tx *db.Tx) error {
		return tx.PutDomain(ctx, config.Domain{Name: name, Hosts: []string{"10.0.0.1:25"}})
	}, nil)
}

// Each case loses the server at another instant of a commit: the commit is made or it is not, and Commit says which.
func TestACommitInAFailoverIsMadeOrClearlyNot(t *testing.T) {
	for _, c := range []struct {
		name  string
		prep  func(p *pgtest.Pair)
		fault func(t *testing.T, p *pgtest.Pair, h *heldCommit)
		made  bool
	}{
		{"the COMMIT never reaches the server", nil, func(_ *testing.T, p *pgtest.Pair, _ *heldCommit) { p.Failover() }, false},
		{"the answer is lost, the standby has it", (*pgtest.Pair).Sync, func(_ *testing.T, p *pgtest.Pair, h *heldCommit) {
			h.forward()
			<-h.answered
			p.Failover()
		}, true},
		{"the answer is lost, the standby lacks it, and its serial is another's by now", (*pgtest.Pair).Cut, func(t *testing.T, p *pgtest.Pair, h *heldCommit) {
			h.forward()
			<-h.answered
			p.Failover()
			put(t, openDSN(t, p.DSN(p.Standby.SocketDir)), "other.test")
		}, false},
		{"the answer is lost, and no server fails", nil, func(_ *testing.T, _ *pgtest.Pair, h *heldCommit) {
			h.forward()
			<-h.answered
		}, true},
		{"the connection is lost while the server waits for its standby", func(p *pgtest.Pair) { p.Sync(); p.Cut() }, func(_ *testing.T, p *pgtest.Pair, h *heldCommit) {
			h.forward()
			p.Primary.Await("the commit to wait", "SELECT count(*) > 0 FROM pg_stat_activity WHERE wait_event = 'SyncRep'")
			h.cut()
			p.Primary.Await("somebody to wait for that", "SELECT count(*) > 0 FROM pg_stat_activity WHERE wait_event_type = 'Lock'")
			p.Follow()
		}, true},
	} {
		t.Run(c.name, func(t *testing.T) {
			p := pgtest.NewPair(t)
			r := newRelay(t, p.Primary.SocketDir)
			d := openDSN(t, p.DSN(p.Standby.SocketDir, r.dir))
			before := put(t, d, "before.test")
			p.Primary.Await("the standby to have it", "SELECT pg_current_wal_lsn() = replay_lsn FROM pg_stat_replication")
			if c.prep != nil {
				c.prep(p)
			}
			done := make(chan struct{})
			fault := func(h *heldCommit) { defer close(done); c.fault(t, p, h); h.cut() }
			r.atCommit.Store(&fault)
			at, err := tryPut(t.Context(), d, "new.test")
			<-done
			has := strings.Contains(domains(t, d), "new.test")
			switch {
			case has != c.made:
				t.Errorf("the database has %q", domains(t, d))
			case c.made && (err != nil || at.Serial != before.Serial+1):
				t.Errorf("it was made, and Commit gives %v, %v", at, err)
			case !c.made && (!errors.Is(err, db.ErrDisconnected) || errors.Is(err, db.ErrInDoubt)):
				t.Errorf("it was not made, and Commit gives %v, %v", at, err)
			}
			if _, err := tryPut(t.Context(), d, "next.test"); err != nil {
				t.Errorf("the next one: %v", err)
			}
		})
	}
}

func TestANodeGoesOnAtThePromotedStandby(t *testing.T) {
	p := pgtest.NewPair(t)
	d := openDSN(t, strings.Replace(p.DSN(), "target_session_attrs=read-write", "", 1)) // the one that can be written is taken all the same
	woken := make(chan struct{}, 100)
	ctx, cancel := context.WithCancel(t.Context())
	listening := make(chan error, 1)
	go func() { listening <- d.Listen(ctx, func() { woken <- struct{}{} }) }()
	defer func() { cancel(); <-listening }()
	<-woken
	p.Sync()
	put(t, d, "a.test")
	<-woken
	// The server is lost within the transaction.
	_, err := d.Commit(t.Context(), author, func(ctx context.Context, tx *db.Tx) error {
		p.Failover()
		return tx.PutDomain(ctx, config.Domain{Name: "lost.test"})
	}, nil)
	if !errors.Is(err, db.ErrDisconnected) {
		t.Errorf("a server lost within the transaction: %v", err)
	}
	select {
	case <-woken: // it listens at the other server
	case <-time.After(time.Minute):
		t.Fatal("Listen does not find the other server")
	}
	put(t, d, "b.test")
	if got := domains(t, d); got != "a.test b.test" {
		t.Errorf("domains %q", got)
	}
	if kept, rows, err := d.Verify(t.Context()); err != nil || kept != rows {
		t.Errorf("digests at the other server: %v %v %v", kept, rows, err)
	}
	select {
	case <-woken:
	case <-time.After(time.Minute):
		t.Fatal("a commit at the other server wakes nobody")
	}
}

func TestACommitOfWhichNoServerSaysAnythingIsInDoubt(t *testing.T) {
	p := pgtest.NewPair(t)
	r := newRelay(t, p.Primary.SocketDir)
	d := openDSN(t, p.DSN(r.dir))
	d.SetDoubt(300 * time.Millisecond)
	put(t, d, "before.test")
	fault := func(h *heldCommit) { h.forward(); <-h.answered; p.Primary.Kill() }
	r.atCommit.Store(&fault)
	_, err := tryPut(t.Context(), d, "new.test")
	if !errors.Is(err, db.ErrInDoubt) || !strings.Contains(err.Error(), "/2") {
		t.Errorf("%v; want the serial in it", err)
	}
}

func TestACommandThatIsInterruptedAtCommitSaysWhatBecameOfIt(t *testing.T) {
	p := pgtest.NewPair(t)
	r := newRelay(t, p.Primary.SocketDir)
	d := openDSN(t, p.DSN(r.dir))
	before := put(t, d, "before.test")
	ctx, cancel := context.WithCancel(t.Context())
	fault := func(h *heldCommit) { h.forward(); <-h.answered; cancel(); _, _ = io.Copy(io.Discard, h.client) }
	r.atCommit.Store(&fault)
	if at, err := tryPut(ctx, d, "new.test"); err != nil || at.Serial != before.Serial+1 {
		t.Errorf("%v, %v", at, err)
	}
}

func TestPoolSettingsOfTheDSN(t *testing.T) {
	for _, c := range []struct {
		dsn  string
		max  int32
		fail string
	}{
		{"host=/x", 24, ""},
		{"host=/x pool_max_conns=20 pool_max_conn_lifetime=5m", 20, ""},
		{"postgres:///d?host=/x,/y&target_session_attrs=read-write&pool_max_conns=3", 3, ""},
		{"host=/x pool_max_conns=2", 0, "pool_max_conns is 2, and a node needs at least 3"},
		{"host=/x pool_max_conns=many", 0, "pool_max_conns"},
		{"host=/x password=hush target_session_attrs=sometimes", 0, "target_session_attrs"},
	} {
		d, err := db.Open(db.Options{DSN: c.dsn})
		switch {
		case c.fail != "":
			if err == nil || !strings.Contains(err.Error(), c.fail) || strings.Contains(err.Error(), "hush") {
				t.Errorf("%s: %v; want %q", c.dsn, err, c.fail)
			}
		case err != nil:
			t.Errorf("%s: %v", c.dsn, err)
		default:
			if got := d.MaxConns(); got != c.max {
				t.Errorf("%s: %d connections", c.dsn, got)
			}
			d.Close()
		}
	}
}

func TestAServerThatIsSilentIsGivenUp(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	c, err := db.Dialer().DialContext(t.Context(), "tcp", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if got := tcpOption(t, c, 0x12); got != 15_000 { // TCP_USER_TIMEOUT
		t.Errorf("TCP_USER_TIMEOUT is %d ms", got)
	}
	if got := tcpOption(t, c, 4); got != 5 { // TCP_KEEPIDLE
		t.Errorf("TCP_KEEPIDLE is %d s", got)
	}
}

func tcpOption(t *testing.T, c net.Conn, option int) int {
	t.Helper()
	raw, err := c.(*net.TCPConn).SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	var value int
	if cerr := raw.Control(func(fd uintptr) { value, err = syscall.GetsockoptInt(int(fd), syscall.IPPROTO_TCP, option) }); cerr != nil || err != nil {
		t.Fatal(cerr, err)
	}
	return value
}

// The steps of a node's life are in a failover what a configuration commit is: made, or clearly not, and then they can be taken again.
func TestAStepInAFailoverIsMadeOrClearlyNot(t *testing.T) {
	epoch := config.Epoch{N: 2, Owner: 1}
	for _, c := range []struct {
		name string
		// before is what comes before the step.
		before func(ctx context.Context, d *db.DB) error
		step   func(ctx context.Context, d *db.DB) error
		// made says whether it was.
		made func(s db.State) bool
	}{
		{"create", nil, createOne, func(s db.State) bool { return s.CID == 1 }},
		{
			"begin an epoch",
			func(ctx context.Context, d *db.DB) error {
				err := createOne(ctx, d)
				if err == nil {
					_, err = d.Promise(ctx, epoch)
				}
				return err
			},
			func(ctx context.Context, d *db.DB) error {
				at, err := d.BeginEpoch(ctx, epoch, db.ByForce, author)
				if err == nil && (at.Epoch != epoch || at.Serial == 0) {
					return errors.New("it gives another position")
				}
				return err
			},
			func(s db.State) bool { return s.Position.Epoch == epoch },
		},
		{
			"enter", nil,
			func(ctx context.Context, d *db.DB) error {
				return d.Enter(ctx, db.EnterParams{CID: 2, ClusterID: clusterID, Epoch: config.Epoch{N: 1, Owner: 1}})
			},
			func(s db.State) bool { return s.CID == 2 },
		},
		{
			"promise", createOne,
			func(ctx context.Context, d *db.DB) error {
				_, err := d.Promise(ctx, epoch)
				return err
			},
			func(s db.State) bool { return s.Promised == epoch },
		},
		{
			"leave", createOne,
			func(ctx context.Context, d *db.DB) error {
				return d.Leave(ctx, db.LeaveParams{ClusterID: clusterID, NextKey: publicOf(nodeKey(5)), Author: author})
			},
			func(s db.State) bool { return s.CID == 0 },
		},
	} {
		for _, reaches := range []bool{true, false} {
			name := c.name + ", the answer is lost"
			if !reaches {
				name = c.name + ", the COMMIT never reaches the server"
			}
			t.Run(name, func(t *testing.T) {
				p := pgtest.NewPair(t)
				p.Sync()
				r := newRelay(t, p.Primary.SocketDir)
				d := openAs(t, p.DSN(p.Standby.SocketDir, r.dir), nodeKey(1))
				put(t, d, "before.test")
				if c.before != nil {
					if err := c.before(t.Context(), d); err != nil {
						t.Fatal(err)
					}
				}
				done := make(chan struct{})
				fault := func(h *heldCommit) {
					defer close(done)
					if reaches {
						h.forward()
						<-h.answered
					}
					p.Failover()
					h.cut()
				}
				r.atCommit.Store(&fault)
				err := c.step(t.Context(), d)
				<-done
				s, stateErr := d.State(t.Context())
				if stateErr != nil {
					t.Fatal(stateErr)
				}
				switch made := c.made(s); {
				case err == nil && !made, err != nil && made:
					t.Errorf("made: %v, and it gives %v", made, err)
				case reaches && err != nil:
					t.Errorf("the server had it: %v", err)
				case err != nil && (!errors.Is(err, db.ErrDisconnected) || errors.Is(err, db.ErrInDoubt)):
					t.Errorf("%v, want ErrDisconnected", err)
				}
				if err != nil {
					if err := c.step(t.Context(), d); err != nil {
						t.Errorf("again: %v", err)
					}
				}
			})
		}
	}
}

// createOne makes a node the first of a cluster.
func createOne(ctx context.Context, d *db.DB) error {
	return d.CreateCluster(ctx, db.CreateParams{ClusterID: clusterID, Node: member(1), CA: config.CA{Fingerprint: "SHA256:a", PublicKey: "x", CID: 1}})
}
