package tunnel

import (
	"os"
	"path/filepath"
	"testing"
	"time"

	"mailproxy/config"
)

// cloneOf is another daemon with the key and the certificates of n.
func cloneOf(t *testing.T, n *node) *node {
	t.Helper()
	c := newNode(t, Options{})
	files, err := os.ReadDir(n.dir)
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range files {
		text, err := os.ReadFile(filepath.Join(n.dir, f.Name()))
		if err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(c.dir, f.Name()), text, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	c.cid = n.cid
	return c
}

func (n *node) peerState(cid config.CID) PeerState {
	for _, p := range n.Peers() {
		if p.CID == cid {
			return p
		}
	}
	return PeerState{}
}

func TestOfTwoDaemonsOfOneIdentityTheFirstStays(t *testing.T) {
	for name, cid := range map[string]config.CID{"whom the other dials": 2, "who dials": 1} {
		t.Run(name, func(t *testing.T) {
			_, nodes, s := cluster(t, 2)
			twice, other := nodes[cid-1], nodes[2-cid]
			since := other.peerState(cid).Since
			clone := cloneOf(t, twice)
			clone.start()
			clone.Reload(s)
			eventually(t, "all three know it", 10*time.Second, func() bool {
				return other.peerState(cid).Ghost != "" && twice.peerState(other.cid).TwinAt != "" && clone.peerState(other.cid).TwinRefused
			})
			if p := other.peerState(cid); !p.Connected || p.Since != since {
				t.Errorf("the older connection: %+v, want it untouched since %v", p, since)
			}
			if clone.peerState(other.cid).Connected || !other.log.has("tunnel.refused", "reason", errGhost.Error()) {
				t.Error("the clone was let in, or nothing is in the log")
			}
			// The first is stopped: the other one is the node, and nobody is warned any more.
			twice.stop()
			eventually(t, "the clone is let in", 10*time.Second, func() bool {
				p, q := clone.peerState(other.cid), other.peerState(cid)
				return p.Connected && !p.TwinRefused && q.Connected && q.Ghost == "" && p.TwinAt == ""
			})
		})
	}
}

// The same node that comes back at once is no second one, although its old connection may not be known to be dead.
func TestARestartIsNoGhost(t *testing.T) {
	_, nodes, s := cluster(t, 2)
	for range 3 {
		nodes[1].stop()
		again := cloneOf(t, nodes[1])
		again.start()
		again.Reload(s)
		again.waitUp(1)
		if p := nodes[0].peerState(2); p.Ghost != "" {
			t.Errorf("a restart shows as a ghost at %s", p.Ghost)
		}
		nodes[1] = again
	}
}

// A refusal is a ghost only once the connection that stayed was heard after it.
func TestAGhostIsSeenOnlyBesideALivePeer(t *testing.T) {
	_, nodes, _ := cluster(t, 2)
	n := nodes[0]
	n.mu.Lock()
	n.peers[2].sighted = sighting{"192.0.2.1", time.Now().Add(100 * time.Millisecond)}
	at := n.ghostLocked(n.peers[2])
	n.mu.Unlock()
	if at != "" {
		t.Errorf("at once: %q", at)
	}
	eventually(t, "the peer was heard since", 10*time.Second, func() bool {
		n.mu.Lock()
		n.peers[2].sessions[0].doubt() // as whoever refuses does
		n.mu.Unlock()
		return n.peerState(2).Ghost == "192.0.2.1"
	})
}

// A node whose host went away without a word comes back: the old connection, on which nobody waits, is doubted and found silent.
func TestANodeThatComesBackIsNotHeldUpByAnIdleConnection(t *testing.T) {
	c := quick()
	c.idle, c.dead = time.Minute, time.Minute
	ca := newCA(t)
	a, b, r := partitionOf(t, ca, c)
	r.stall()
	again := cloneOf(t, a)
	again.start()
	again.Reload(snapshot(ca, a, b))
	again.waitUp(2)
}

func TestInstance(t *testing.T) {
	if a, b := newInstance(), newInstance(); a == b || instanceOf([]byte(version+" "+a)) != a {
		t.Errorf("instances %q and %q", a, b)
	}
	for _, u := range []use{useAll, useBulk} {
		said := []byte(newNode(t, Options{}).announced(u))
		if useOf(said) != u || instanceOf(said) == "" {
			t.Errorf("%q is read as use %v", said, useOf(said))
		}
	}
	if useOf([]byte("SSH-2.0-OpenSSH_9.2p1 Debian-2+deb12u3")) != useTheir {
		t.Error("OpenSSH is taken for one of us")
	}
	for _, v := range []string{version, version + " ", version + " x", version + " 00112233445566", version + " 00112233445566zz"} {
		if got := instanceOf([]byte(v)); got != "" {
			t.Errorf("instance of %q is %q", v, got)
		}
	}
}
