package cluster

import (
	"errors"
	"testing"

	"mailproxy/config"
	"mailproxy/db"
)

func at(n int64, owner config.CID, serial int64, digest byte) config.Position {
	return config.Position{Epoch: config.Epoch{N: n, Owner: owner}, Serial: serial, Digest: config.Digest{digest}}
}

func TestRelate(t *testing.T) {
	master := at(2, 1, 10, 7)
	for _, c := range []struct {
		name   string
		theirs config.Position
		want   Relation
	}{
		{"the same position and digest is in sync", at(2, 1, 10, 7), InSync},
		{"the same position with another digest is drifted", at(2, 1, 10, 8), Drifted},
		{"a lower serial is behind", at(2, 1, 9, 7), Behind},
		{"a lower epoch is behind, also with a higher serial", at(1, 3, 99, 7), Behind},
		{"a higher serial of the same epoch is ahead", at(2, 1, 11, 7), Ahead},
		{"a higher epoch is ahead", at(3, 2, 1, 7), Ahead},
		{"of two epochs with one number the higher owner is ahead", at(2, 2, 1, 7), Ahead},
		{"no epoch yet is joining", at(0, 0, 0, 0), Joining},
	} {
		t.Run(c.name, func(t *testing.T) {
			if got := relate(master, c.theirs); got != c.want {
				t.Errorf("relate(%v, %v) = %q, want %q", master, c.theirs, got, c.want)
			}
		})
	}
}

func TestRoleOf(t *testing.T) {
	e := func(n int64, o config.CID) config.Epoch { return config.Epoch{N: n, Owner: o} }
	for _, c := range []struct {
		name    string
		state   db.State
		want    Role
		deposed bool
	}{
		{"a node in no cluster is single", db.State{}, Single, false},
		{"the owner of the epoch in force is master", db.State{CID: 1, Position: at(1, 1, 5, 0), Promised: e(1, 1)}, Master, false},
		{"a promise to another ends that", db.State{CID: 1, Position: at(1, 1, 5, 0), Promised: e(2, 2)}, Slave, true},
		{"a promise to itself ends that too", db.State{CID: 1, Position: at(1, 1, 5, 0), Promised: e(2, 1)}, Slave, true},
		{"who owns no epoch is slave", db.State{CID: 2, Position: at(1, 1, 5, 0), Promised: e(1, 1)}, Slave, false},
		{"a slave that gave a promise is not deposed", db.State{CID: 2, Position: at(1, 1, 5, 0), Promised: e(2, 3)}, Slave, false},
	} {
		t.Run(c.name, func(t *testing.T) {
			if got := roleOf(c.state); got != c.want {
				t.Errorf("roleOf = %q, want %q", got, c.want)
			}
			if got := deposed(c.state); got != c.deposed {
				t.Errorf("deposed = %v, want %v", got, c.deposed)
			}
		})
	}
}

func TestMajority(t *testing.T) {
	for members, want := range map[int]int{1: 1, 2: 2, 3: 2, 4: 3, 5: 3} {
		if got := majority(members); got != want {
			t.Errorf("majority(%d) = %d, want %d", members, got, want)
		}
	}
}

var errDown = errors.New("down")

// said makes an answer; a zero position is a node that is still joining.
func said(cid config.CID, p config.Position, promised bool) answer {
	return answer{node: config.Node{CID: cid}, state: db.State{CID: cid, Position: p}, promised: promised}
}

func down(cid config.CID) answer { return answer{node: config.Node{CID: cid}, err: errDown} }

func TestVotes(t *testing.T) {
	p := at(1, 1, 5, 0)
	for _, c := range []struct {
		name                   string
		answers                []answer
		voters, heard, promise int
	}{
		{"all promise", []answer{said(1, p, true), said(2, p, true), said(3, p, true)}, 3, 3, 3},
		{"a member that is down has a vote and does not give it", []answer{down(1), said(2, p, true), said(3, p, true)}, 3, 2, 2},
		{"a member that answers and refuses", []answer{said(1, p, false), said(2, p, true)}, 2, 2, 1},
		{"a joining node has no vote", []answer{said(1, p, true), said(2, p, true), said(3, config.Position{}, true)}, 2, 2, 2},
	} {
		t.Run(c.name, func(t *testing.T) {
			if v, h, p := voters(c.answers), votes(c.answers, false), votes(c.answers, true); v != c.voters || h != c.heard || p != c.promise {
				t.Errorf("voters %d, heard %d, promised %d; want %d, %d, %d", v, h, p, c.voters, c.heard, c.promise)
			}
		})
	}
}

func TestNextEpochIsAboveAllKnown(t *testing.T) {
	a := said(1, at(4, 1, 9, 0), false)
	b := said(2, at(3, 2, 9, 0), false)
	b.state.Promised = config.Epoch{N: 7, Owner: 3}
	gone := down(3)
	gone.state.Promised = config.Epoch{N: 99}
	if got, want := nextEpoch(2, []answer{a, b, gone}), (config.Epoch{N: 8, Owner: 2}); got != want {
		t.Errorf("nextEpoch = %v, want %v", got, want)
	}
}

func TestAdoptFrom(t *testing.T) {
	for _, c := range []struct {
		name    string
		answers []answer
		want    config.CID // asked by node 2; 0: none
	}{
		{"the newest serial", []answer{said(1, at(1, 1, 9, 0), true), said(2, at(1, 1, 5, 0), true)}, 1},
		{"the newest epoch, not the highest serial", []answer{said(1, at(1, 1, 90, 0), true), said(3, at(2, 3, 5, 0), true)}, 3},
		{"itself where nobody is further", []answer{said(1, at(1, 1, 5, 1), true), said(2, at(1, 1, 5, 1), true)}, 2},
		{"not from who gave no promise: it may go on", []answer{said(1, at(1, 1, 9, 0), false), said(2, at(1, 1, 5, 0), true)}, 2},
		{"not from who is down", []answer{down(1), said(2, at(1, 1, 5, 0), true)}, 2},
		{"not from who is joining", []answer{said(3, config.Position{}, true), said(2, at(1, 1, 5, 0), true)}, 2},
		{"the master's word against a drifted self", []answer{said(1, at(1, 1, 5, 1), true), said(2, at(1, 1, 5, 2), true), said(3, at(1, 1, 5, 2), true)}, 1},
		{"the digest that most hold, without the master", []answer{said(2, at(1, 1, 5, 2), true), said(3, at(1, 1, 5, 1), true), said(4, at(1, 1, 5, 1), true)}, 3},
		{"nobody", []answer{down(1)}, 0},
	} {
		t.Run(c.name, func(t *testing.T) {
			got, ok := adoptFrom(2, c.answers)
			if ok != (c.want != 0) || got.node.CID != c.want {
				t.Errorf("adoptFrom = node %d, %v; want node %d", got.node.CID, ok, c.want)
			}
		})
	}
}

func TestHolds(t *testing.T) {
	pos := at(2, 1, 7, 0)
	for _, c := range []struct {
		name     string
		at       config.Position
		promised config.Epoch
		want     bool
	}{
		{"there", pos, pos.Epoch, true},
		{"further", at(2, 1, 9, 0), pos.Epoch, true},
		{"not yet", at(2, 1, 6, 0), pos.Epoch, false},
		{"in an epoch before", at(1, 1, 7, 0), pos.Epoch, false},
		{"in a higher epoch, which may have begun without it", at(3, 2, 9, 0), config.Epoch{N: 3, Owner: 2}, false},
		{"there, and with more promised: perhaps it took it over for a round of its own", pos, config.Epoch{N: 3, Owner: 2}, false},
	} {
		t.Run(c.name, func(t *testing.T) {
			if got := holds(db.State{Position: c.at, Promised: c.promised}, pos); got != c.want {
				t.Errorf("holds = %v, want %v", got, c.want)
			}
		})
	}
}

func TestDrifted(t *testing.T) {
	state := func(p config.Position) db.State { return db.State{CID: 2, ClusterID: "c", Position: p} }
	for _, c := range []struct {
		name        string
		before, now db.State
		want        bool
	}{
		{"another digest at the same position", state(at(1, 1, 5, 1)), state(at(1, 1, 5, 2)), true},
		{"a commit between", state(at(1, 1, 5, 1)), state(at(1, 1, 6, 2)), false},
		{"nothing happened", state(at(1, 1, 5, 1)), state(at(1, 1, 5, 1)), false},
		{"the node entered a cluster", db.State{}, state(at(0, 0, 0, 2)), false},
	} {
		t.Run(c.name, func(t *testing.T) {
			if got := drifted(c.before, c.now); got != c.want {
				t.Errorf("drifted = %v, want %v", got, c.want)
			}
		})
	}
}

func TestPlace(t *testing.T) {
	s := &config.Snapshot{
		Nodes: []config.Node{
			{CID: 1, Name: "mx1", Address: "192.0.2.1:7025", PublicKey: "k1", MachineID: "m1"},
			{CID: 2, Name: "mx2", Address: "192.0.2.2:7025", PublicKey: "k2", MachineID: "m2"},
		},
		Revoked: []config.Revoked{{CID: 3, Name: "mx3", PublicKey: "k3"}},
	}
	for _, c := range []struct {
		name string
		node config.Node
		cid  config.CID
		err  error
	}{
		{"a new node", config.Node{Name: "mx4", Address: "192.0.2.4:7025", PublicKey: "k4", MachineID: "m4"}, 0, nil},
		{"the same key is the same node, with a new name", config.Node{Name: "mx9", Address: "192.0.2.9:7025", PublicKey: "k2", MachineID: "m2"}, 2, nil},
		{"the same key with another's name", config.Node{Name: "mx1", Address: "192.0.2.2:7025", PublicKey: "k2", MachineID: "m2"}, 0, ErrNameTaken},
		{"a deleted node's key", config.Node{Name: "mx4", PublicKey: "k3"}, 0, ErrKeyRevoked},
		{"a name in use, in other letters", config.Node{Name: "MX1", Address: "192.0.2.4:7025", PublicKey: "k4"}, 0, ErrNameTaken},
		{"an address in use", config.Node{Name: "mx4", Address: "192.0.2.1:7025", PublicKey: "k4"}, 0, ErrAddressTaken},
		{"a machine that was installed again", config.Node{Name: "mx1", Address: "192.0.2.1:7025", PublicKey: "k4", MachineID: "m1"}, 0, ErrGhost},
	} {
		t.Run(c.name, func(t *testing.T) {
			cid, again, err := place(s, c.node)
			if !errors.Is(err, c.err) || cid != c.cid && err == nil || again != (c.cid != 0) && err == nil {
				t.Errorf("place = %d, %v, %v; want %d, %v", cid, again, err, c.cid, c.err)
			}
		})
	}
}
