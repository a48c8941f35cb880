package db_test

import (
	"context"
	"crypto/ed25519"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"strconv"
	"sync"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"github.com/rs/zerolog"

	"mailproxy/config"
	"mailproxy/db"
	"mailproxy/internal/pgtest"
	"mailproxy/secret"
)

func TestMain(m *testing.M) {
	if dir := os.Getenv(supervisorEnv); dir != "" {
		os.Exit(supervise(dir))
	}
	if os.Getenv(idleEnv) != "" {
		_, _ = io.Copy(io.Discard, os.Stdin)
		os.Exit(0)
	}
	os.Exit(pgtest.Main(m))
}

// open gives a DB on a fresh clone.
func open(t testing.TB) *db.DB { return openDSN(t, pgtest.New(t)) }

func openDSN(t testing.TB, dsn string) *db.DB { return openAs(t, dsn, nodeKey(0)) }

// openAs opens a database as the node that has a key.
func openAs(t testing.TB, dsn string, key ed25519.PrivateKey) *db.DB {
	t.Helper()
	d, err := db.Open(db.Options{DSN: dsn, NodeKey: func() (ed25519.PrivateKey, error) { return key, nil }, Log: zerolog.Nop()})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(d.Close)
	return d
}

var author = db.Author{Who: "root", Command: "test"}

// openWithout opens a database whose node has lost its key.
func openWithout(t testing.TB, dsn string) *db.DB {
	t.Helper()
	d, err := db.Open(db.Options{DSN: dsn, NodeKey: func() (ed25519.PrivateKey, error) { return nil, os.ErrNotExist }, Log: zerolog.Nop()})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(d.Close)
	return d
}

// commit runs one edit.
func commit(t testing.TB, d *db.DB, edit func(ctx context.Context, tx *db.Tx) error) config.Position {
	t.Helper()
	p, err := d.Commit(context.Background(), author, edit, nil)
	if err != nil {
		t.Fatal(err)
	}
	return p
}

// put commits domains.
func put(t testing.TB, d *db.DB, names ...string) config.Position {
	t.Helper()
	return commit(t, d, func(ctx context.Context, tx *db.Tx) error {
		for _, n := range names {
			if err := tx.PutDomain(ctx, config.Domain{Name: n, Hosts: []string{"10.0.0.1:25"}}); err != nil {
				return err
			}
		}
		return nil
	})
}

// A node is a DB with its DSN for what only SQL can do.
type node struct {
	*db.DB
	dsn string
	cid config.CID
}

const clusterID = "6f1c0f6e-8f57-4c0c-9a35-2f9ae6c5a001"

// nodeKey is the key of a node, the same each time.
func nodeKey(cid config.CID) ed25519.PrivateKey {
	seed := sha256.Sum256([]byte(strconv.Itoa(int(cid))))
	return ed25519.NewKeyFromSeed(seed[:])
}

func publicOf(key ed25519.PrivateKey) ed25519.PublicKey { return key.Public().(ed25519.PublicKey) }

func publicText(key ed25519.PrivateKey) string { return secret.PublicText(publicOf(key)) }

func member(cid config.CID) config.Node {
	return config.Node{CID: cid, UUID: "u" + strconv.Itoa(int(cid)), Name: "n" + strconv.Itoa(int(cid)), Address: "127.0.0.1:7025",
		PublicKey: publicText(nodeKey(cid)), Services: []string{"smtp"}, Promotable: true, JoinedAt: time.Unix(1e9, 0).UTC()}
}

// cluster makes CID 1 the master of n nodes; the others have entered, and hold nothing yet.
func cluster(t testing.TB, n int) []*node {
	t.Helper()
	var nodes []*node
	for i := range n {
		dsn := pgtest.New(t)
		cid := config.CID(i + 1)
		nodes = append(nodes, &node{DB: openAs(t, dsn, nodeKey(cid)), dsn: dsn, cid: cid})
	}
	ctx := context.Background()
	err := nodes[0].CreateCluster(ctx, db.CreateParams{ClusterID: clusterID, Node: member(1),
		CA: config.CA{Fingerprint: "SHA256:a", PublicKey: "ssh-ed25519 ca", CID: 1, CreatedAt: time.Unix(1e9, 0)}})
	if err != nil {
		t.Fatal(err)
	}
	nodes[0].sql(t, "UPDATE node.position SET lease_waived = true") // no daemon hears the others
	for _, s := range nodes[1:] {
		commit(t, nodes[0].DB, func(ctx context.Context, tx *db.Tx) error { return tx.PutNode(ctx, member(s.cid)) })
		s.enter(t, config.Epoch{N: 1, Owner: 1})
	}
	return nodes
}

func (n *node) enter(t testing.TB, e config.Epoch) {
	t.Helper()
	if err := n.Enter(context.Background(), db.EnterParams{CID: n.cid, ClusterID: clusterID, Epoch: e}); err != nil {
		t.Fatal(err)
	}
}

func (n *node) state(t testing.TB) db.State {
	t.Helper()
	s, err := n.State(context.Background())
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// sql runs statements on the node's server as its superuser.
func (n *node) sql(t testing.TB, statements ...string) {
	t.Helper()
	if err := n.trySQL(statements...); err != nil {
		t.Fatal(err)
	}
}

func (n *node) trySQL(statements ...string) error {
	ctx := context.Background()
	c, err := pgx.Connect(ctx, n.dsn)
	if err != nil {
		return err
	}
	defer c.Close(ctx)
	for _, s := range statements {
		if _, err := c.Exec(ctx, s); err != nil {
			return fmt.Errorf("%s: %w", s, err)
		}
	}
	return nil
}

// one reads a single value.
func one[T any](t testing.TB, dsn, sql string, args ...any) T {
	t.Helper()
	ctx := context.Background()
	c, err := pgx.Connect(ctx, dsn)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close(ctx)
	var v T
	if err := c.QueryRow(ctx, sql, args...).Scan(&v); err != nil {
		t.Fatalf("%s: %v", sql, err)
	}
	return v
}

// code gives the SQLSTATE of an error.
func code(err error) string {
	if pg, ok := errors.AsType[*pgconn.PgError](err); ok {
		return pg.Code
	}
	return fmt.Sprint(err)
}

// dialer reaches a node's server as another node does: through Backend, with a gate that reads the startup message away.
func dialer(t testing.TB, to *db.DB, from config.CID) func(context.Context) (net.Conn, error) {
	t.Helper()
	dir := t.TempDir()
	l, err := net.Listen("unix", dir+"/gate")
	if err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	t.Cleanup(func() {
		l.Close()
		wg.Wait()
	})
	wg.Go(func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			wg.Go(func() { gate(c, to, from) })
		}
	})
	return func(ctx context.Context) (net.Conn, error) {
		var d net.Dialer
		return d.DialContext(ctx, "unix", dir+"/gate")
	}
}

func gate(c net.Conn, to *db.DB, from config.CID) {
	defer c.Close()
	head := make([]byte, 4)
	if _, err := io.ReadFull(c, head); err != nil {
		return
	}
	if _, err := io.CopyN(io.Discard, c, int64(binary.BigEndian.Uint32(head))-4); err != nil {
		return
	}
	back, startup, err := to.Backend(context.Background(), from)
	if err != nil {
		return
	}
	defer back.Close()
	if _, err := c.Write(startup); err != nil {
		return
	}
	done := make(chan struct{}, 2)
	go func() { _, _ = io.Copy(back, c); done <- struct{}{} }()
	go func() { _, _ = io.Copy(c, back); done <- struct{}{} }()
	<-done
	c.Close()
	back.Close()
	<-done
}

// peer opens a node as another node sees it.
func peer(t testing.TB, to *node, from config.CID) *db.Peer {
	t.Helper()
	p, err := db.OpenPeer(context.Background(), dialer(t, to.DB, from))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(p.Close)
	return p
}

// push pushes once and wants it to work.
func push(t testing.TB, from, to *node) db.PushStats {
	t.Helper()
	p, err := db.OpenPeer(context.Background(), dialer(t, to.DB, from.cid))
	if err != nil {
		t.Fatal(err)
	}
	defer p.Close()
	s, err := from.Push(context.Background(), p, nil)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// same wants two nodes at one position, with the rows to go with it.
func same(t testing.TB, a, b *node) {
	t.Helper()
	if x, y := a.state(t).Position, b.state(t).Position; x != y {
		t.Fatalf("positions differ: %v %v, %v %v", x, x.Digest, y, y.Digest)
	}
	for _, n := range []*node{a, b} {
		kept, rows, err := n.Verify(context.Background())
		if err != nil || kept != rows {
			t.Fatalf("node %d: kept %v, rows %v, %v", n.cid, kept, rows, err)
		}
	}
}

// names lists the domains that a node loads.
func names(t testing.TB, d *db.DB) []string {
	t.Helper()
	s, err := d.Load(context.Background())
	if err != nil {
		t.Fatal(err)
	}
	var l []string
	for x := range s.Domains.All() {
		l = append(l, x.Name)
	}
	return l
}
