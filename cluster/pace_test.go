package cluster

import (
	"testing"
	"time"

	"github.com/rs/zerolog"

	"mailproxy/config"
	"mailproxy/db"
)

// paced is node 2 of four, in a state.
func paced(st db.State) *Node {
	s := &config.Snapshot{Nodes: []config.Node{{CID: 1}, {CID: 2}, {CID: 3}, {CID: 4}}}
	n := New(Options{Local: &config.Local{}, Snapshot: func() *config.Snapshot { return s }, Log: zerolog.Nop()})
	n.state, n.stateAt = st, time.Now()
	return n
}

// state2 is that of node 2 in an epoch, with a promise.
func state2(epoch, promised config.Epoch) db.State {
	return db.State{CID: 2, Position: config.Position{Epoch: epoch, Serial: 9}, Promised: promised}
}

func TestWhoAsksWhomHowOften(t *testing.T) {
	first, own, third := config.Epoch{N: 1, Owner: 1}, config.Epoch{N: 2, Owner: 2}, config.Epoch{N: 3, Owner: 3}
	timing := Timing{}.withDefaults()
	for name, c := range map[string]struct {
		st    db.State
		cid   config.CID
		every time.Duration
		soon  bool
	}{
		"the master its slaves, its lease hangs on that":  {state2(own, own), 3, timing.Probe, true},
		"a master that was deposed, it may have to begin": {state2(own, third), 4, timing.Probe, true},
		"a slave its master":                              {state2(first, first), 1, timing.Confirm, true},
		"a slave the master that it has promised":         {state2(first, third), 3, timing.Confirm, true},
		"a slave the other slaves, each in its turn":      {state2(first, first), 3, slavesProbe * 3 * timing.Probe, false},
	} {
		t.Run(name, func(t *testing.T) {
			if every, soon := paced(c.st).probePace(c.cid); every != c.every || soon != c.soon {
				t.Errorf("every %v, soon %v; want %v, %v", every, soon, c.every, c.soon)
			}
		})
	}
}

// A slave that becomes master does not sleep over its lease, nor one with a new master over that.
func TestAnotherMasterIsAskedAtOnce(t *testing.T) {
	first, own := config.Epoch{N: 1, Owner: 1}, config.Epoch{N: 2, Owner: 2}
	for name, next := range map[string]db.State{
		"another promise": state2(first, own), "another epoch": state2(own, own),
	} {
		t.Run(name, func(t *testing.T) {
			n := paced(state2(first, first))
			k := n.kicksOf(3)
			n.keepLocked(state2(first, first))
			if len(k.probe) != 0 {
				t.Fatal("woken for nothing")
			}
			n.keepLocked(next)
			if len(k.probe) != 1 {
				t.Error("not woken")
			}
		})
	}
}
