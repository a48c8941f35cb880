package tunnel

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"mailproxy/config"
)

func TestServicesAreReachedBothWaysOverOneConnection(t *testing.T) {
	_, nodes, _ := cluster(t, 2)
	a, b := nodes[0], nodes[1]
	for _, n := range nodes {
		other := 3 - n.cid
		c := n.mustDial(other, "echo")
		ping(t, c, "hello")
		c.Close()
		c = n.mustDial(other, "who")
		got, err := io.ReadAll(c)
		if want := cidPrincipal(n.cid); err != nil || string(got) != want {
			t.Errorf("the handler at %d was told %q, %v; want %q", other, got, err, want)
		}
		if c.RemoteAddr().String() != cidPrincipal(other)+"/who" || c.RemoteAddr().Network() != "tunnel" {
			t.Errorf("remote address is %v", c.RemoteAddr())
		}
		c.Close()
	}
	eventually(t, "one connection is left", 5*time.Second, func() bool {
		return a.sessions(2) == 1 && b.sessions(1) == 1
	})
}

// sessions counts the connections with a peer.
func (n *node) sessions(cid config.CID) int {
	n.mu.Lock()
	defer n.mu.Unlock()
	if p := n.peers[cid]; p != nil {
		return len(p.sessions)
	}
	return 0
}

func TestBulkArrivesWhole(t *testing.T) {
	_, nodes, _ := cluster(t, 2)
	c := nodes[0].mustDial(2, "echo")
	data := make([]byte, 9<<20)
	rand.NewChaCha8([32]byte{7}).Read(data)
	go func() {
		c.Write(data)
		c.(*conn).CloseWrite()
	}()
	h := sha256.New()
	n, err := io.Copy(h, c)
	want := sha256.Sum256(data)
	if err != nil || n != int64(len(data)) || !bytes.Equal(h.Sum(nil), want[:]) {
		t.Fatalf("%d bytes came back, %v; want %d, the same", n, err, len(data))
	}
}

func TestWhoCannotBeDialledIsReachedByItsOwnConnection(t *testing.T) {
	ca := newCA(t)
	master, natted := newNode(t, Options{}), newNode(t, Options{Listen: []string{}})
	master.enter(ca, 1)
	natted.enter(ca, 2)
	natted.addr = "127.0.0.1:1" // nobody listens
	s := snapshot(ca, master, natted)
	for _, n := range []*node{master, natted} {
		n.start()
		n.Reload(s)
	}
	master.waitUp(2)
	ping(t, master.mustDial(2, "echo"), "to behind the NAT")
	if st := master.state(2); st.Dialler != 2 {
		t.Errorf("the connection was made by %d, want 2", st.Dialler)
	}
}

func TestTheLowerCIDsConnectionIsKeptAndStreamsOnTheOtherLiveOn(t *testing.T) {
	ca := newCA(t)
	low, high := newNode(t, Options{}), newNode(t, Options{})
	low.enter(ca, 1)
	high.enter(ca, 2)
	s := snapshot(ca, low, high)
	// At first only the higher can dial.
	blind := *s
	blind.Nodes = append([]config.Node(nil), s.Nodes...)
	blind.Nodes[1].Address = "127.0.0.1:1"
	for n, known := range map[*node]*config.Snapshot{low: &blind, high: s} {
		n.start()
		n.Reload(known)
	}
	low.waitUp(2)
	inFlight := low.mustDial(2, "echo")
	other := high.mustDial(1, "echo")
	ping(t, inFlight, "before")
	// A second connection, dialled by the lower: as both make when they dial at once.
	low.Reload(s)
	low.mu.Lock()
	p := low.peers[2]
	low.mu.Unlock()
	if !low.attempt(context.Background(), p) {
		t.Fatal("the second connection did not come up")
	}
	for _, n := range []*node{low, high} {
		eventually(t, "both know the connection of the lower", 5*time.Second, func() bool {
			return n.state(3-n.cid).Dialler == 1 && n.sessions(3-n.cid) == 2
		})
	}
	ping(t, low.mustDial(2, "echo"), "over the new one")
	for until := time.Now().Add(3 * quick().surplus); time.Now().Before(until); {
		ping(t, inFlight, "still there")
		ping(t, other, "still there, the other way")
	}
	inFlight.Close()
	other.Close()
	for _, n := range []*node{low, high} {
		eventually(t, "the surplus connection ended", 5*time.Second, func() bool { return n.sessions(3-n.cid) == 1 })
		if st := n.state(3 - n.cid); st.Dialler != 1 || !st.Connected {
			t.Errorf("node %d kept %+v", n.cid, st)
		}
	}
}

func TestDialsAtOnceDoNotFlap(t *testing.T) {
	_, nodes, _ := cluster(t, 3)
	var streams []net.Conn
	for _, n := range nodes {
		for cid := config.CID(1); cid <= 3; cid++ {
			if cid != n.cid {
				c := n.mustDial(cid, "echo")
				ping(t, c, "hello")
				streams = append(streams, c)
			}
		}
	}
	for _, n := range nodes {
		for _, p := range n.Peers() {
			since := p.Since
			eventually(t, "one connection", 5*time.Second, func() bool { return n.sessions(p.CID) <= 2 })
			if got := n.state(p.CID); !got.Connected || got.Since != since {
				t.Errorf("node %d lost node %d in between: %+v", n.cid, p.CID, got)
			}
		}
	}
	for _, c := range streams {
		ping(t, c, "hello again")
	}
}

func TestDialSaysWhy(t *testing.T) {
	_, nodes, s := cluster(t, 3)
	a := nodes[0]
	nodes[2].stop()
	eventually(t, "a dial that failed", 5*time.Second, func() bool { return strings.Contains(a.state(3).Err, "refused") })
	for _, c := range []struct {
		what    string
		cid     config.CID
		service string
		want    error
		text    string
	}{
		{"a CID that is no member", 9, "echo", ErrUnknownPeer, "node 9"},
		{"this node itself", 1, "echo", ErrUnknownPeer, ""},
		{"a service that is not offered", 2, "spool", ErrRefused, "unknown service"},
		{"a node that is down", 3, "echo", ErrUnreachable, "connection refused"},
	} {
		t.Run(c.what, func(t *testing.T) {
			_, err := a.dial(c.cid, c.service)
			if !errors.Is(err, c.want) || !strings.Contains(fmt.Sprint(err), c.text) {
				t.Errorf("got %v, want %v with %q", err, c.want, c.text)
			}
		})
	}
	idle := newNode(t, Options{})
	idle.start()
	idle.Reload(s)
	if _, err := idle.dial(1, "echo"); !errors.Is(err, ErrUnknownPeer) {
		t.Errorf("a node that is in no cluster dialled: %v", err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	if _, err := a.Dial(ctx, 3, "echo"); !errors.Is(err, ErrUnreachable) {
		t.Errorf("with an ended context: %v", err)
	}
}

func TestChannelsOfAPeerAreBounded(t *testing.T) {
	_, nodes, _ := cluster(t, 2)
	a, b := nodes[0], nodes[1]
	var open []net.Conn
	for range maxChannels {
		open = append(open, a.mustDial(2, "echo"))
	}
	if _, err := a.dial(2, "echo"); !errors.Is(err, ErrRefused) {
		t.Fatalf("channel %d: %v, want %v", maxChannels+1, err, ErrRefused)
	}
	// The peer does not rely on our count.
	a.mu.Lock()
	a.peers[2].out.all, a.peers[2].out.each = 1000, 1000
	a.mu.Unlock()
	if _, err := a.dial(2, "echo"); !errors.Is(err, ErrRefused) || !strings.Contains(err.Error(), "too many channels") {
		t.Fatalf("the peer took one more: %v", err)
	}
	ping(t, b.mustDial(1, "echo"), "the other direction has its own")
	for _, c := range open {
		c.Close()
	}
	eventually(t, "closed channels are free again", 5*time.Second, func() bool {
		c, err := a.dial(2, "echo")
		if err == nil {
			c.Close()
		}
		return err == nil
	})
}

func TestReconnectAfterTheConnectionBreaks(t *testing.T) {
	_, nodes, _ := cluster(t, 2)
	a := nodes[0]
	c := a.mustDial(2, "echo")
	ping(t, c, "hello")
	a.mu.Lock()
	for _, s := range a.peers[2].sessions {
		s.wire.Conn.Close()
	}
	a.mu.Unlock()
	if _, err := io.ReadAll(c); !errors.Is(err, ErrLost) {
		t.Errorf("the broken stream read %v, want %v and never an end of file", err, ErrLost)
	}
	eventually(t, "a stream over a new connection", 5*time.Second, func() bool {
		again, err := a.dial(2, "echo") // the connection that broke may be found dead only by this
		if err == nil {
			t.Cleanup(func() { again.Close() })
			c = again
		}
		return err == nil
	})
	ping(t, c, "again")
	eventually(t, "tunnel.down in the log", 5*time.Second, func() bool { return a.log.has("tunnel.down", "err", ErrLost.Error()) })
}

func TestSocketsOfPeers(t *testing.T) {
	_, nodes, s := cluster(t, 3)
	a := nodes[0]
	path := filepath.Join(a.run, "peer", "2", "echo.sock")
	eventually(t, "socket", 5*time.Second, func() bool { _, err := os.Stat(path); return err == nil })
	for p, want := range map[string]os.FileMode{path: 0o600, filepath.Dir(path): 0o700} {
		if info, err := os.Stat(p); err != nil || info.Mode().Perm() != want {
			t.Errorf("%s has mode %v, %v; want %v", p, info.Mode(), err, want)
		}
	}
	a.waitUp(2)
	local, err := net.Dial("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	defer local.Close()
	ping(t, local, "through the socket")
	local.(*net.UnixConn).CloseWrite()
	if rest, err := io.ReadAll(local); err != nil || len(rest) > 0 {
		t.Errorf("after half a close: %q, %v", rest, err)
	}
	t.Run("a peer that is away is explained in the service's protocol", func(t *testing.T) {
		nodes[2].stop()
		c, err := net.Dial("unix", filepath.Join(a.run, "peer", "3", "control.sock"))
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		io.WriteString(c, "GET /status HTTP/1.1\r\n")
		buf := make([]byte, 1000)
		c.SetDeadline(time.Now().Add(100 * time.Millisecond))
		if n, err := c.Read(buf); !errors.Is(err, os.ErrDeadlineExceeded) {
			t.Errorf("before the request was made: %q, %v", buf[:n], err)
		}
		c.SetDeadline(time.Now().Add(5 * time.Second))
		io.WriteString(c, "Host: x\r\n\r\n")
		n, _ := io.ReadFull(c, buf)
		if !strings.HasPrefix(string(buf[:n]), "HTTP/1.1 502 ") || !strings.Contains(string(buf[:n]), "unreachable") {
			t.Errorf("got %q", buf[:n])
		}
	})
	t.Run("a peer that leaves takes its sockets with it", func(t *testing.T) {
		a.Reload(without(s, 2))
		eventually(t, "directory is gone", 5*time.Second, func() bool {
			_, err := os.Stat(filepath.Dir(path))
			return os.IsNotExist(err)
		})
		a.Reload(s) // as after a configuration that was away for a moment
		eventually(t, "socket is back", 5*time.Second, func() bool { _, err := os.Stat(path); return err == nil })
	})
	a.stop()
	if left, _ := filepath.Glob(filepath.Join(a.run, "peer", "*")); len(left) > 0 {
		t.Errorf("the stopped tunnel left %v", left)
	}
}

func TestStaleSocketsAreReplaced(t *testing.T) {
	ca := newCA(t)
	a, b := newNode(t, Options{}), newNode(t, Options{})
	a.enter(ca, 1)
	b.enter(ca, 2)
	for _, cid := range []string{"2", "7"} {
		dir := filepath.Join(a.run, "peer", cid)
		if err := os.MkdirAll(dir, 0o700); err != nil {
			t.Fatal(err)
		}
		l, err := net.Listen("unix", filepath.Join(dir, "echo.sock"))
		if err != nil {
			t.Fatal(err)
		}
		l.(*net.UnixListener).SetUnlinkOnClose(false)
		l.Close()
	}
	s := snapshot(ca, a, b)
	for _, n := range []*node{a, b} {
		n.start()
		n.Reload(s)
	}
	eventually(t, "the stale socket answers again", 5*time.Second, func() bool {
		c, err := net.Dial("unix", filepath.Join(a.run, "peer", "2", "echo.sock"))
		if err == nil {
			c.Close()
		}
		return err == nil
	})
	if _, err := os.Stat(filepath.Join(a.run, "peer", "7")); !os.IsNotExist(err) {
		t.Errorf("the directory of a node that is no member is still there: %v", err)
	}
}

func TestSocketPathsAreChecked(t *testing.T) {
	long := "/" + strings.Repeat("r", maxSocketPath-len("//99999/.s.PGSQL.5432"))
	dir := func(cid config.CID) string { return filepath.Join(long, fmt.Sprint(int(cid))) }
	o := Options{KeyDir: t.TempDir(), PeerDir: dir, Services: map[string]Handler{ServicePostgres: echo}}
	if err := New(o).Listen(); err != nil {
		t.Errorf("a path of %d bytes: %v", maxSocketPath, err)
	}
	long += "r"
	if err := New(o).Listen(); !errors.Is(err, ErrPathTooLong) {
		t.Errorf("a path of %d bytes: %v, want %v", maxSocketPath+1, err, ErrPathTooLong)
	}
}

func TestListenSaysWhatIsInTheWay(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	err = New(Options{KeyDir: t.TempDir(), Listen: []string{l.Addr().String()}}).Listen()
	if err == nil || !strings.Contains(err.Error(), l.Addr().String()) {
		t.Errorf("got %v, want an error that names the address", err)
	}
}

func TestHandlersEndWhenTheTunnelStops(t *testing.T) {
	ca := newCA(t)
	began := make(chan struct{}, 2)
	byContext := func(ctx context.Context, _ config.CID, _ net.Conn) { began <- struct{}{}; <-ctx.Done() }
	byConn := func(_ context.Context, _ config.CID, c net.Conn) { began <- struct{}{}; c.Read(make([]byte, 1)) }
	services := map[string]Handler{"context": byContext, "conn": byConn}
	a, b := newNode(t, Options{}), newNode(t, Options{Services: services})
	a.enter(ca, 1)
	b.enter(ca, 2)
	s := snapshot(ca, a, b)
	for _, n := range []*node{a, b} {
		n.start()
		n.Reload(s)
	}
	a.mustDial(2, "context")
	a.mustDial(2, "conn")
	<-began
	<-began
	b.stop() // fails the test when it does not return
}

func TestManyStreamsAtOnce(t *testing.T) {
	_, nodes, _ := cluster(t, 2)
	var all sync.WaitGroup
	for _, n := range nodes {
		for i := range 8 {
			all.Go(func() {
				n.waitUp(3 - n.cid)
				for j := range 20 {
					c, err := n.dial(3-n.cid, "echo")
					if err != nil {
						t.Errorf("stream %d.%d: %v", i, j, err)
						return
					}
					text := strings.Repeat(fmt.Sprint(n.cid, i, j), 500*j)
					go func() { io.WriteString(c, text); c.(*conn).CloseWrite() }()
					got, err := io.ReadAll(c)
					if err != nil || string(got) != text {
						t.Errorf("stream %d.%d: %d bytes, %v; want %d", i, j, len(got), err, len(text))
					}
					c.Close()
				}
			})
		}
	}
	all.Wait()
}

// What SSH opens while the connection ends must not wait for ever.
func TestDialsWhileConnectionsEnd(t *testing.T) {
	_, nodes, _ := cluster(t, 2)
	a, b := nodes[0], nodes[1]
	for range 60 {
		a.waitUp(2)
		var all sync.WaitGroup
		for range 4 {
			all.Go(func() {
				if c, err := a.dial(2, "echo"); err == nil {
					c.Close()
				} else if errors.Is(err, context.DeadlineExceeded) {
					t.Errorf("a dial hung: %v", err)
				}
			})
		}
		b.mu.Lock()
		for _, s := range b.peers[1].sessions {
			s.wire.Conn.Close()
		}
		b.mu.Unlock()
		all.Wait()
	}
}
