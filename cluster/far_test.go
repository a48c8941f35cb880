package cluster

import (
	"net"
	"testing"
	"time"

	"mailproxy/config"
	"mailproxy/internal/farlink"
)

// farAway puts a relay in front of a node's tunnel that delays each direction by half of a round trip. The node's address is then the
// relay's; it must not have been started.
func farAway(t *testing.T, n *testNode, roundTrip time.Duration) {
	t.Helper()
	real := n.local.Tunnel.Listen[0]
	_, port, err := net.SplitHostPort(real)
	if err != nil {
		t.Fatal(err)
	}
	n.local.Address = "127.0.0.2"
	l, err := net.Listen("tcp", net.JoinHostPort(n.local.Address, port))
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan struct{})
	go func() { farlink.Serve(l, real, roundTrip); close(done) }()
	t.Cleanup(func() { _ = l.Close(); <-done })
}

func TestAskBound(t *testing.T) {
	for name, c := range map[string]struct{ roundTrip, want time.Duration }{
		"a peer that is near, or was never measured":       {0, askTimeout},
		"a far one has its round trips beside":             {500 * time.Millisecond, askTimeout + 4*time.Second},
		"one that was frozen when it was measured is none": {time.Hour, longestAsk},
	} {
		t.Run(name, func(t *testing.T) {
			if got := askBound(c.roundTrip / 2); got != c.want {
				t.Errorf("%v, want %v", got, c.want)
			}
		})
	}
}

// A member that lives counts for the majority however far it is: with the master dead, it and the asking one are two of three.
func TestPromoteHearsAFarMember(t *testing.T) {
	const roundTrip = 500 * time.Millisecond
	first := newTestNode(t, "mx1").start()
	if _, err := first.operator().Create(t.Context(), CreateParams{}); err != nil {
		t.Fatal(err)
	}
	second, far := newTestNode(t, "mx2"), newTestNode(t, "mx3")
	for i, n := range []*testNode{second, far} { // whichever of both dials
		farAway(t, n, roundTrip)
		n.start()
		if cid, err := n.join(first.joinParams()); err != nil || cid != config.CID(2+i) {
			t.Fatalf("join: CID %d, %v", cid, err)
		}
	}
	inSync(t, first, second, far)
	eventually(t, "it is known to be far", func() bool { return second.node.o.Tunnel.Clock(3).Within > roundTrip/4 })
	first.stopDaemon()
	began := time.Now()
	done, err := second.operator().Promote(t.Context(), false)
	if err != nil {
		t.Fatalf("promote after %v: %v", time.Since(began), err)
	}
	if len(done.Missing) != 1 || done.Missing[0].CID != 1 {
		t.Errorf("missing %v, want the dead master alone", done.Missing)
	}
	inSync(t, second, far)
}
