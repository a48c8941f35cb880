package tunnel

import (
	"context"
	"crypto/ecdh"
	"errors"
	"fmt"
	"io"
	"net"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/crypto/ssh"

	"mailproxy/config"
)

func TestTheWireGuardKeyIsTheNodesKey(t *testing.T) {
	for range 50 {
		key := newKey(t)
		private := wgPrivate(key.private)
		x, err := ecdh.X25519().NewPrivateKey(private[:])
		if err != nil {
			t.Fatal(err)
		}
		parsed, err := parsePublic(key.Public())
		if err != nil {
			t.Fatal(err)
		}
		public, err := wgPublic(parsed)
		if err != nil || !slices.Equal(public[:], x.PublicKey().Bytes()) {
			t.Fatalf("the row gives %x, %v; the private key %x", public, err, x.PublicKey().Bytes())
		}
	}
}

func TestAKeyWithoutAFormForWireGuardIsRefused(t *testing.T) {
	blob := ssh.Marshal(struct {
		Kind  string
		Point []byte
	}{ssh.KeyAlgoED25519, append([]byte{1}, make([]byte, 31)...)}) // y = 1
	key, err := ssh.ParsePublicKey(blob)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := wgPublic(key); !errors.Is(err, errNoPoint) {
		t.Errorf("got %v, want %v", err, errNoPoint)
	}
}

func TestAddressesInside(t *testing.T) {
	for cid, want := range map[config.CID]string{1: "10.0.0.1", 258: "10.0.1.2", 1<<24 - 1: "10.255.255.255"} {
		got, err := wgAddress(cid)
		if err != nil || got.String() != want || wgMember(&net.TCPAddr{IP: got.AsSlice()}) != cid {
			t.Errorf("node %d has %v, %v; want %s", cid, got, err, want)
		}
	}
	for _, cid := range []config.CID{0, -1, 1 << 24} {
		if _, err := wgAddress(cid); err == nil {
			t.Errorf("node %d has an address", cid)
		}
	}
}

// The setting changes under way: no moment without a connection, and what is open goes on.
func TestTheKindIsSwitchedWithoutLosingAnybody(t *testing.T) {
	c := quick()
	c.unlike = time.Minute
	p := pairWith(t, config.TunnelSSH, c)
	open := p.a.mustDial(2, "echo")
	for _, kind := range []config.TunnelKind{config.TunnelWireGuard, config.TunnelSSH} {
		since := p.a.state(2).Since
		for _, n := range []*node{p.a, p.b} {
			n.Reload(carriedBy(p.s, kind))
			if !n.state(3 - n.cid).Connected {
				t.Fatalf("%s: node %d lost its peer", kind, n.cid)
			}
		}
		p.a.waitCarried(2, kind)
		p.b.waitCarried(1, kind)
		ping(t, open, "still there")
		again := p.a.mustDial(2, "echo")
		open.Close()
		open = again
		eventually(t, "the other kind ends with its last stream", 10*time.Second, func() bool {
			return p.a.sessions(2) == 1 && p.b.sessions(1) == 1
		})
		ping(t, open, "over the new one")
		if st := p.a.state(2); st.Since != since || st.Transport != kind {
			t.Errorf("%s: %+v, connected since %v", kind, st, since)
		}
	}
}

func TestWhichConnectionTakesNewStreams(t *testing.T) {
	plain := func(dialler config.CID) *session {
		return &session{self: 1, cid: 2, dialler: dialler, carried: config.TunnelSSH}
	}
	inside := func(dialler config.CID) *session {
		return &session{self: 1, cid: 2, dialler: dialler, carried: config.TunnelWireGuard}
	}
	bulk := plain(1)
	bulk.use = useBulk
	for _, c := range []struct {
		what string
		want config.TunnelKind
		all  []*session // in the order in which they came up
		best int
	}{
		{"the lower CID's", config.TunnelSSH, []*session{plain(1), plain(2)}, 0},
		{"the newer of one dialler's", config.TunnelSSH, []*session{plain(1), plain(1)}, 1},
		{"the wanted kind, by the higher CID and older", config.TunnelWireGuard, []*session{inside(2), plain(1)}, 0},
		{"the wanted kind, by the higher CID and newer", config.TunnelSSH, []*session{inside(1), plain(2)}, 1},
		{"the other kind where there is none of the wanted", config.TunnelWireGuard, []*session{plain(2), plain(1)}, 1},
		{"never one for bulk", config.TunnelSSH, []*session{inside(2), bulk}, 0},
	} {
		t.Run(c.what, func(t *testing.T) {
			p := newPeer(config.Node{CID: 2})
			p.want, p.sessions = c.want, c.all
			if p.bestLocked() != c.all[c.best] {
				t.Errorf("it is not number %d of %d", c.best+1, len(c.all))
			}
		})
	}
}

// Streams between daemons last for ever; the switch must not wait for their end.
func TestAfterASwitchTheOtherKindGoesWithWhatIsOpen(t *testing.T) {
	p := pairBy(t, config.TunnelSSH)
	open := p.a.mustDial(2, "echo")
	ping(t, open, "before")
	for _, n := range []*node{p.a, p.b} {
		n.Reload(carriedBy(p.s, config.TunnelWireGuard))
	}
	if _, err := open.Read(make([]byte, 1)); !errors.Is(err, ErrLost) {
		t.Errorf("the stream over plain SSH read %v, want %v", err, ErrLost)
	}
	eventually(t, "only the new kind is left", 10*time.Second, func() bool {
		return p.a.state(2).Transport == config.TunnelWireGuard && p.a.sessions(2) == 1
	})
}

func TestWithUDPBlockedANodeIsReachedWithoutWireGuardAndThatIsSaid(t *testing.T) {
	p := pairBy(t, config.TunnelWireGuard)
	p.udp.block(true)
	eventually(t, "it is connected without", 30*time.Second, func() bool {
		st := p.a.state(2)
		return st.Connected && st.Transport == config.TunnelSSH && strings.Contains(st.Fallback, "no answer from UDP port")
	})
	c := p.a.mustDial(2, "echo")
	ping(t, c, "all the same")
	c.Close()
	if st := p.b.state(1); st.Fallback == "" {
		t.Errorf("the other side says nothing: %+v", st)
	}
	p.udp.block(false)
	p.a.waitCarried(2, config.TunnelWireGuard)
	eventually(t, "the other ends", 10*time.Second, func() bool { return p.a.sessions(2) == 1 })
}

func TestANATThatGivesAnotherPortIsNotNoticed(t *testing.T) {
	p := pairBy(t, config.TunnelWireGuard)
	c := p.a.mustDial(2, "echo")
	since := p.a.state(2).Since
	for i := range 5 {
		p.udp.rebind()
		ping(t, c, fmt.Sprint("over port ", i))
		eventually(t, "a new port", 5*time.Second, func() bool { return p.udp.given() >= i+2 })
	}
	if p.a.state(2).Since != since {
		t.Error("it connected again")
	}
}

// clientInside speaks SSH through a node's WireGuard to node 2.
func clientInside(t *testing.T, through *node, address, user string, signer ssh.Signer) error {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
	defer cancel()
	raw, err := through.wireguard.dial(ctx, 2, address)
	if err != nil {
		t.Fatal(err)
	}
	defer raw.Close()
	c, channels, requests, err := ssh.NewClientConn(raw, "inside", &ssh.ClientConfig{
		Config: algorithms(), User: user, Auth: []ssh.AuthMethod{ssh.PublicKeys(signer)}, HostKeyCallback: ssh.InsecureIgnoreHostKey(),
	})
	if err != nil {
		return err
	}
	go ssh.DiscardRequests(requests)
	go refuseChannels(channels)
	return c.Close()
}

func TestInsideOfWireGuardOnlyTheMemberOfTheAddressIsLetIn(t *testing.T) {
	ca := newCA(t)
	var nodes []*node
	for cid := config.CID(1); cid <= 3; cid++ {
		n := newNode(t, Options{Join: func(context.Context, JoinRequest) (JoinReply, error) { return JoinReply{}, errors.New("none") }})
		n.enter(ca, cid)
		nodes = append(nodes, n)
	}
	s := carriedBy(snapshot(ca, nodes...), config.TunnelWireGuard)
	for _, n := range nodes {
		n.start()
		n.Reload(s)
	}
	nodes[0].waitCarried(2, config.TunnelWireGuard)
	signer := func(n *node) ssh.Signer {
		n.mu.Lock()
		defer n.mu.Unlock()
		return n.trust.user
	}
	for _, c := range []struct {
		what, user string
		signer     ssh.Signer
		ok         bool
	}{
		{"the member itself", "cid-1", signer(nodes[0]), true},
		{"another member's certificate", "cid-3", signer(nodes[2]), false},
		{"a node that wants to join", joinUser, nodes[0].key.signer, false},
	} {
		t.Run(c.what, func(t *testing.T) {
			if err := clientInside(t, nodes[0], nodes[1].addr, c.user, c.signer); (err == nil) != c.ok {
				t.Errorf("let in: %v, want %v", err, c.ok)
			}
		})
	}
}

func TestAMemberCannotSendFromAnothersAddress(t *testing.T) {
	p := pairBy(t, config.TunnelWireGuard)
	third := newNode(t, Options{})
	third.enter(p.ca, 3)
	s := *p.s
	s.Nodes = append(slices.Clone(p.s.Nodes), third.row())
	p.b.Reload(&s)
	p.a.mu.Lock()
	tr := *p.a.trust
	p.a.mu.Unlock()
	p.a.stop()
	for own, reached := range map[config.CID]bool{1: true, 3: false} {
		forger := &wireguard{log: t.Logf}
		if err := forger.open(nil); err != nil {
			t.Fatal(err)
		}
		tr.id.CID = own
		if _, err := forger.take(&tr); err != nil {
			t.Fatal(err)
		}
		ctx, cancel := context.WithTimeout(context.Background(), 3*time.Second)
		c, err := forger.dial(ctx, 2, p.b.addr)
		cancel()
		if err == nil {
			c.Close()
		}
		if (err == nil) != reached {
			t.Errorf("member 1 from the address of member %d: %v", own, err)
		}
		forger.close()
	}
}

func TestWhoHasNoMembersKeyHearsNothing(t *testing.T) {
	p := pairBy(t, config.TunnelWireGuard)
	stranger := newNode(t, Options{})
	stranger.enter(newCA(t), 7)
	s := carriedBy(snapshot(p.ca, stranger), config.TunnelWireGuard)
	s.Nodes = append(s.Nodes, p.b.row())
	stranger.start()
	stranger.Reload(s)
	ctx, cancel := context.WithTimeout(context.Background(), time.Second)
	defer cancel()
	if c, err := stranger.wireguard.dial(ctx, 2, p.b.addr); err == nil {
		c.Close()
		t.Error("a stranger has a stream")
	}
	text, err := stranger.wireguard.device.IpcGet()
	if err != nil || !strings.Contains(text, "\nrx_bytes=0\n") {
		t.Errorf("it was answered: %v", err)
	}
}

func TestANodeThatLeavesAndEntersElsewhereHasANewDevice(t *testing.T) {
	p := pairBy(t, config.TunnelWireGuard)
	ca := newCA(t)
	third := newNode(t, Options{})
	third.enter(ca, 1)
	p.a.enter(ca, 2) // it was 1
	s := carriedBy(snapshot(ca, third, p.a), config.TunnelWireGuard)
	third.start()
	third.Reload(s)
	p.a.Reload(s)
	third.waitCarried(2, config.TunnelWireGuard)
	got, err := io.ReadAll(third.mustDial(2, "who"))
	if err != nil || string(got) != "cid-1" {
		t.Errorf("%q, %v", got, err)
	}
	if err := RemoveIdentity(p.a.dir); err != nil {
		t.Fatal(err)
	}
	p.a.Reload(nil)
	if p.a.wireguard.device != nil {
		t.Error("a node in no cluster has a device")
	}
}

func TestAUDPPortThatIsTakenKeepsNobodyFromSSH(t *testing.T) {
	taken, err := net.ListenUDP("udp", &net.UDPAddr{IP: net.IPv4(127, 0, 0, 1)})
	if err != nil {
		t.Fatal(err)
	}
	defer taken.Close()
	ca := newCA(t)
	a, b := newNode(t, Options{Listen: []string{taken.LocalAddr().String()}}), newNode(t, Options{})
	a.enter(ca, 1)
	b.enter(ca, 2)
	s := carriedBy(snapshot(ca, a, b), config.TunnelWireGuard)
	for _, n := range []*node{a, b} {
		n.start()
		n.Reload(s)
	}
	a.waitUp(2)
	eventually(t, "why it is not WireGuard", 10*time.Second, func() bool { return strings.Contains(a.state(2).Fallback, "address already in use") })
	if st := a.state(2); st.Transport != config.TunnelSSH {
		t.Errorf("%+v", st)
	}
}

// A connection inside that has ended knows no addresses any more, and a peer can end one at any moment.
func TestAConnectionInsideThatEndsAtOnceHarmsNobody(t *testing.T) {
	p := pairBy(t, config.TunnelWireGuard)
	for range 200 {
		c, err := p.a.wireguard.dial(t.Context(), 2, p.b.Addrs()[0].String())
		if err != nil {
			t.Fatal(err)
		}
		before := c.RemoteAddr().String()
		c.Close()
		if after := c.RemoteAddr(); after == nil || after.String() != before {
			t.Fatalf("the address was %s, and is %v", before, after)
		}
	}
	c := p.a.mustDial(2, "echo")
	ping(t, c, "all the same")
	c.Close()
}
