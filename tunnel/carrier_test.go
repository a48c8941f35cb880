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
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/rs/zerolog"

	"mailproxy/config"
)

// Every carrier must do what these tests want: they are one suite, run over each.

func eachCarrier(t *testing.T, f func(t *testing.T, kind config.TunnelKind)) {
	for _, kind := range []config.TunnelKind{config.TunnelSSH, config.TunnelWireGuard} {
		t.Run(string(kind), func(t *testing.T) { f(t, kind) })
	}
}

// carriedBy is the snapshot with that setting.
func carriedBy(s *config.Snapshot, kind config.TunnelKind) *config.Snapshot {
	after := *s
	after.Settings = []config.Setting{{Name: "tunnel", Value: string(kind)}}
	return &after
}

// carried waits for a connection by that kind.
func (n *node) waitCarried(cid config.CID, kind config.TunnelKind) {
	n.t.Helper()
	eventually(n.t, fmt.Sprintf("connection of %d with %d by %s", n.cid, cid, kind), 20*time.Second, func() bool {
		st := n.state(cid)
		return st.Connected && st.Transport == kind && st.Fallback == ""
	})
}

// pairBy is two members of which only the first dials, through relays; b's own address stays for those who know it.
type carriedPair struct {
	ca   *CA
	a, b *node
	s    *config.Snapshot // as both have it
	tcp  *relay
	udp  *udpRelay
}

func pairBy(t *testing.T, kind config.TunnelKind) *carriedPair {
	t.Helper()
	return pairWith(t, kind, quick())
}

// patient is the timing of tests that carry so much that packets are lost.
func patient() timing {
	c := quick()
	c.dead, c.linger = defaultTiming().dead, defaultTiming().linger
	return c
}

func pairWith(t *testing.T, kind config.TunnelKind, c timing) *carriedPair {
	t.Helper()
	p := &carriedPair{ca: newCA(t), a: newNode(t, Options{}), b: newNode(t, Options{})}
	p.a.enter(p.ca, 1)
	p.b.enter(p.ca, 2)
	p.tcp, p.udp = newRelays(t, p.b.addr)
	p.s = carriedBy(snapshot(p.ca, p.a, p.b), kind)
	p.s.Nodes[0].Address = ""
	p.s.Nodes[1].Address = p.tcp.l.Addr().String()
	for _, n := range []*node{p.a, p.b} {
		n.setTiming(c)
		n.start()
		n.Reload(p.s)
	}
	p.a.waitCarried(2, kind)
	p.b.waitCarried(1, kind)
	return p
}

func (p *carriedPair) stall() { p.udp.block(true); p.tcp.stall() }
func (p *carriedPair) heal()  { p.udp.block(false); p.tcp.cut(); p.tcp.heal() }

func TestCarrierProvesWhoIsThere(t *testing.T) {
	eachCarrier(t, func(t *testing.T, kind config.TunnelKind) {
		p := pairBy(t, kind)
		for _, n := range []*node{p.a, p.b} {
			got, err := io.ReadAll(n.mustDial(3-n.cid, "who"))
			if err != nil || string(got) != cidPrincipal(n.cid) {
				t.Errorf("the handler at %d was told %q, %v", 3-n.cid, got, err)
			}
		}
	})
}

func TestCarrierLetsNoWrongKeyIn(t *testing.T) {
	eachCarrier(t, func(t *testing.T, kind config.TunnelKind) {
		ca := newCA(t)
		a, b := newNode(t, Options{}), newNode(t, Options{})
		a.enter(ca, 1)
		b.enter(ca, 2)
		s := carriedBy(snapshot(ca, a, b), kind)
		other := *s
		other.Nodes = append([]config.Node(nil), s.Nodes...)
		other.Nodes[1].PublicKey = newKey(t).Public() // as a believes
		a.start()
		b.start()
		a.Reload(&other)
		b.Reload(s)
		eventually(t, "both have tried", 20*time.Second, func() bool { return a.state(2).Err != "" && b.state(1).Err != "" })
		if a.state(2).Connected || b.state(1).Connected || a.log.has("tunnel.up", "address", "") {
			t.Errorf("connected: %+v, %+v", a.state(2), b.state(1))
		}
	})
}

func TestCarrierDeletesANodeAtOnce(t *testing.T) {
	eachCarrier(t, func(t *testing.T, kind config.TunnelKind) {
		p := pairBy(t, kind)
		c := p.a.mustDial(2, "echo")
		ping(t, c, "before")
		p.b.Reload(without(p.s, 1))
		p.b.wireguard.mu.Lock()
		peers, at := len(p.b.wireguard.peers), p.b.wireguard.device
		p.b.wireguard.mu.Unlock()
		if text, err := at.IpcGet(); peers != 0 || err != nil || strings.Contains(text, "public_key") {
			t.Errorf("the device still has %d peers: %v", peers, err)
		}
		if p.b.sessions(1) != 0 {
			t.Error("the connection is still there when Reload has returned")
		}
		c.SetDeadline(time.Now().Add(10 * time.Second))
		if _, err := io.ReadAll(c); !errors.Is(err, ErrLost) {
			t.Errorf("the stream ended with %v, want %v", err, ErrLost)
		}
	})
}

func TestCarrierObeysDeadlinesOfAStalledPeer(t *testing.T) {
	eachCarrier(t, func(t *testing.T, kind config.TunnelKind) {
		p := pairBy(t, kind)
		c := p.a.mustDial(2, "echo")
		ping(t, c, "before")
		p.stall()
		began := time.Now()
		c.SetReadDeadline(began.Add(100 * time.Millisecond))
		if _, err := c.Read(make([]byte, 1)); !errors.Is(err, os.ErrDeadlineExceeded) || time.Since(began) > time.Second {
			t.Errorf("read: %v after %v", err, time.Since(began))
		}
		c.SetWriteDeadline(time.Now().Add(100 * time.Millisecond))
		began = time.Now()
		if _, err := c.Write(make([]byte, 16<<20)); !errors.Is(err, os.ErrDeadlineExceeded) || time.Since(began) > time.Second {
			t.Errorf("write: %v after %v", err, time.Since(began))
		}
	})
}

func TestCarrierReturnsAfterACut(t *testing.T) {
	eachCarrier(t, func(t *testing.T, kind config.TunnelKind) {
		p := pairBy(t, kind)
		c := p.a.mustDial(2, "echo")
		ping(t, c, "before")
		p.stall()
		if _, err := c.Read(make([]byte, 1)); !errors.Is(err, ErrLost) {
			t.Errorf("the stream read %v, want %v", err, ErrLost)
		}
		for _, n := range []*node{p.a, p.b} {
			eventually(t, "both notice", 10*time.Second, func() bool { return !n.state(3 - n.cid).Connected })
		}
		p.heal()
		p.a.waitCarried(2, kind)
		ping(t, p.a.mustDial(2, "echo"), "after")
	})
}

// restart is a new daemon of the same node at the same address.
func (n *node) restart() *node {
	n.t.Helper()
	n.stop()
	again := &node{t: n.t, cid: n.cid, dir: n.dir, run: n.run, key: n.key, addr: n.addr, log: &logged{}}
	o := n.o
	o.Listen, o.Log = []string{n.addr}, zerolog.New(again.log)
	again.Tunnel = New(o)
	again.setTiming(quick())
	eventually(n.t, "the port is free again", 5*time.Second, func() bool { return again.Listen() == nil })
	again.start()
	return again
}

func TestCarrierReturnsAfterARestart(t *testing.T) {
	eachCarrier(t, func(t *testing.T, kind config.TunnelKind) {
		p := pairBy(t, kind)
		ping(t, p.a.mustDial(2, "echo"), "before")
		p.b.stop()
		eventually(t, "it is noticed", 10*time.Second, func() bool { return !p.a.state(2).Connected })
		b := p.b.restart()
		began := time.Now()
		b.Reload(p.s)
		p.a.waitCarried(2, kind)
		// WireGuard by itself gives up old keys after 15 s.
		if took := time.Since(began); took > 12*time.Second {
			t.Errorf("back after %v", took)
		}
		ping(t, p.a.mustDial(2, "echo"), "after")
	})
}

// bulkBytes is what one stream carries: BULK_BYTES, or what the race detector has time for. BenchmarkCarrierGiB carries 1 GiB.
func bulkBytes(t *testing.T) int64 {
	text := os.Getenv("BULK_BYTES")
	if text == "" {
		return 24 << 20
	}
	n, err := strconv.ParseInt(text, 10, 64)
	if err != nil {
		t.Fatal(err)
	}
	return n
}

// bulk sends n bytes to the peer's echo and wants the same back.
func bulk(t testing.TB, c net.Conn, n int64) {
	t.Helper()
	var sent [32]byte
	go func() {
		h := sha256.New()
		if _, err := io.CopyN(io.MultiWriter(c, h), rand.NewChaCha8([32]byte{7}), n); err != nil {
			t.Errorf("send: %v", err)
		}
		sent = [32]byte(h.Sum(nil))
		c.(*conn).CloseWrite()
	}()
	h := sha256.New()
	got, err := io.Copy(h, c)
	if err != nil || got != n || !bytes.Equal(h.Sum(nil), sent[:]) {
		t.Fatalf("%d bytes came back, %v; want %d, the same", got, err, n)
	}
}

func TestCarrierCarriesBulk(t *testing.T) {
	eachCarrier(t, func(t *testing.T, kind config.TunnelKind) {
		bulk(t, pairWith(t, kind, patient()).a.mustDial(2, "echo"), bulkBytes(t))
	})
}

func TestCarrierClosesHalf(t *testing.T) {
	eachCarrier(t, func(t *testing.T, kind config.TunnelKind) {
		p := pairBy(t, kind)
		for range 50 {
			c := p.a.mustDial(2, "echo")
			io.WriteString(c, "all I have to say")
			c.(*conn).CloseWrite()
			if got, err := io.ReadAll(c); err != nil || string(got) != "all I have to say" {
				t.Fatalf("%q, %v", got, err)
			}
			c.Close()
		}
	})
}

func TestCarrierTakesThousandsOfShortDials(t *testing.T) {
	eachCarrier(t, func(t *testing.T, kind config.TunnelKind) {
		p := pairBy(t, kind)
		since := p.a.state(2).Since
		work := make(chan struct{})
		var all owned
		for range 8 {
			all.spawn(func() {
				for range work {
					c, err := p.a.dial(2, "who")
					if err != nil {
						t.Error(err)
						continue
					}
					if got, err := io.ReadAll(c); err != nil || string(got) != "cid-1" {
						t.Errorf("%q, %v", got, err)
					}
					c.Close()
				}
			})
		}
		for range 3000 {
			work <- struct{}{}
		}
		close(work)
		all.wait()
		if p.a.state(2).Since != since || p.a.sessions(2) != 1 {
			t.Error("it took more than one connection")
		}
	})
}

// inNamespace runs the named test of this binary in a network namespace whose loopback has that MTU, as root of a user namespace.
func inNamespace(t *testing.T, name string, mtu int) {
	t.Helper()
	cmd := exec.Command("unshare", "-n", "sh", "-c", `ip link set lo mtu "$2" up && exec "$0" -test.run "$1" -test.v`,
		os.Args[0], "^"+name+"$", strconv.Itoa(mtu))
	cmd.Env = append(os.Environ(), "TUNNEL_TEST_INSIDE=1")
	out, err := cmd.CombinedOutput()
	if err != nil || !bytes.Contains(out, []byte("--- PASS: "+name)) {
		t.Fatalf("%v\n%s", err, out)
	}
}

// On a path of 1280 bytes no packet is cut in pieces, which many paths drop.
func TestCarrierFitsAnMTUOf1280(t *testing.T) {
	if os.Getenv("TUNNEL_TEST_INSIDE") == "" {
		inNamespace(t, t.Name(), 1280)
		return
	}
	eachCarrier(t, func(t *testing.T, kind config.TunnelKind) {
		bulk(t, pairWith(t, kind, patient()).a.mustDial(2, "echo"), 4<<20)
	})
	for _, file := range []string{"/proc/net/snmp", "/proc/net/snmp6"} {
		text, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		if n := counter(string(text), "FragCreates"); n != "0" {
			t.Errorf("%s: %s fragments were made", file, n)
		}
	}
}

// counter finds a counter in the two forms of /proc/net.
func counter(text, name string) string {
	if m := regexp.MustCompile(`Ip6` + name + `\s+(\d+)`).FindStringSubmatch(text); m != nil {
		return m[1]
	}
	lines := strings.Split(text, "\n")
	for i, line := range lines[:len(lines)-1] {
		for j, word := range strings.Fields(line) {
			if values := strings.Fields(lines[i+1]); word == name && j < len(values) {
				return values[j]
			}
		}
	}
	return "no counter"
}

// BenchmarkCarrierGiB is 1 GiB to a peer that throws it away.
func BenchmarkCarrierGiB(b *testing.B) {
	for _, kind := range []config.TunnelKind{config.TunnelSSH, config.TunnelWireGuard} {
		b.Run(string(kind), func(b *testing.B) {
			x, y := benchPair(b, kind)
			b.SetBytes(1 << 30)
			for b.Loop() {
				c, err := x.Dial(context.Background(), 2, "discard")
				if err != nil {
					b.Fatal(err)
				}
				io.CopyN(c, zeros{}, 1<<30)
				c.(*conn).CloseWrite()
				if got, err := io.ReadAll(c); err != nil || string(got) != strconv.Itoa(1<<30) {
					b.Fatalf("%q, %v", got, err)
				}
				c.Close()
			}
			_ = y
		})
	}
}

type zeros struct{}

func (zeros) Read(p []byte) (int, error) { clear(p); return len(p), nil }

// benchPair is two members that are connected.
func benchPair(b *testing.B, kind config.TunnelKind) (x, y *Tunnel) {
	b.Helper()
	ca, err := LoadOrMakeCA(filepath.Join(b.TempDir(), "ca"))
	if err != nil {
		b.Fatal(err)
	}
	s := carriedBy(&config.Snapshot{ClusterID: testCluster, CAs: []config.CA{ca.Config(1)}}, kind)
	var all []*Tunnel
	for cid := config.CID(1); cid <= 2; cid++ {
		dir := filepath.Join(b.TempDir(), "keys")
		key, err := LoadOrMakeKey(dir)
		if err != nil {
			b.Fatal(err)
		}
		certs, err := ca.Sign(key.Public(), cid, testCluster, time.Hour)
		if err != nil {
			b.Fatal(err)
		}
		if err := SaveIdentity(dir, Identity{ClusterID: testCluster, CID: cid, Certs: certs}); err != nil {
			b.Fatal(err)
		}
		t := New(Options{KeyDir: dir, Listen: []string{"127.0.0.1:0"}, Log: zerolog.Nop(), Services: map[string]Handler{
			"discard": func(_ context.Context, _ config.CID, c net.Conn) {
				n, _ := io.Copy(io.Discard, c)
				fmt.Fprint(c, n)
			},
		}})
		if err := t.Listen(); err != nil {
			b.Fatal(err)
		}
		s.Nodes = append(s.Nodes, config.Node{CID: cid, PublicKey: key.Public(), Address: t.Addrs()[0].String()})
		all = append(all, t)
	}
	ctx, cancel := context.WithCancel(context.Background())
	var ran owned
	for _, t := range all {
		ran.spawn(func() { t.Run(ctx) })
		t.Reload(s)
	}
	b.Cleanup(func() { cancel(); ran.wait() })
	for up := false; !up; <-time.After(time.Millisecond) {
		up = all[0].Peers()[0].Transport == kind
	}
	return all[0], all[1]
}
