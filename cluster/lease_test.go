package cluster

import (
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	"mailproxy/config"
	"mailproxy/db"
)

func TestLeaseFrom(t *testing.T) {
	now := time.Unix(1e9, 0)
	own := config.Epoch{N: 2, Owner: 1}
	heard := func(age time.Duration) standing {
		return standing{asked: true, answered: now.Add(-age), state: db.State{CID: 9, Promised: own, Position: config.Position{Epoch: own}}}
	}
	other := heard(0)
	other.state.Promised = config.Epoch{N: 3, Owner: 2}
	joins := heard(0)
	joins.state.Position.Epoch = config.Epoch{}
	older := heard(0)
	older.state.Promised = config.Epoch{N: 1, Owner: 1}
	promises := heard(0)
	promises.state.Position.Epoch = config.Epoch{N: 1, Owner: 1}
	silent, unasked := standing{asked: true}, standing{}
	for _, c := range []struct {
		name       string
		others     []standing
		age        time.Duration
		byMajority bool
		ok         bool
	}{
		{"alone", nil, 0, true, true},
		{"two, the other heard", []standing{heard(3 * time.Second)}, 3 * time.Second, true, true},
		{"two, the other not asked yet", []standing{unasked}, 0, false, false},
		{"two, the other silent", []standing{silent}, 0, false, true},
		{"two, the other silent for a while", []standing{heard(6 * time.Second)}, 0, false, true},
		{"two, the other silent for long", []standing{heard(time.Hour)}, 0, false, true},
		{"two, the other has promised a higher epoch", []standing{other}, 0, false, false},
		{"two and one that joins", []standing{heard(time.Second), joins}, time.Second, true, true},
		{"three, one heard", []standing{silent, heard(9 * time.Second)}, 9 * time.Second, true, true},
		{"three, one heard too long ago", []standing{silent, heard(10 * time.Second)}, 0, false, false},
		{"three, both silent", []standing{silent, silent}, 0, false, false},
		{"three, one has promised a higher epoch, one heard", []standing{other, heard(time.Second)}, time.Second, true, true},
		{"three, one has promised a higher epoch, one silent", []standing{other, silent}, 0, false, false},
		{"two, the other knows an older epoch", []standing{older}, 0, false, true},
		{"three, one knows an older epoch", []standing{silent, older}, 0, false, false},
		{"three, one has promised the epoch and does not hold it yet", []standing{silent, promises}, 0, false, false},
		{"three, the newer of two counts", []standing{heard(8 * time.Second), heard(time.Second)}, time.Second, true, true},
		{"four, the second newest of three counts", []standing{heard(8 * time.Second), heard(time.Second), heard(2 * time.Second)},
			2 * time.Second, true, true},
		{"four, one heard", []standing{heard(0), silent, silent}, 0, false, false},
	} {
		t.Run(c.name, func(t *testing.T) {
			at, byMajority, ok := leaseFrom(own, now, c.others)
			if ok != c.ok || ok && (byMajority != c.byMajority || now.Sub(at) != c.age) {
				t.Errorf("got %v ago, majority %v, %v", now.Sub(at), byMajority, ok)
			}
		})
	}
}

// pastLease takes the lease away, as if its term were over.
func (n *testNode) pastLease() {
	n.psql("UPDATE node.lease SET heard_at = heard_at - interval '1 h', until = until - interval '1 h'")
}

func TestAMasterThatHearsNoMajorityTakesNoConfiguration(t *testing.T) {
	nodes := newCluster(t, 3)
	nodes[1].stopDaemon()
	nodes[0].pastLease()
	eventually(t, "one other is a majority", func() bool { _, err := nodes[0].putDomain("two.test"); return err == nil })
	nodes[2].stopDaemon()
	eventually(t, "the master knows that it is alone", func() bool {
		nodes[0].pastLease() // what was heard in the last seconds would count on
		_, err := nodes[0].putDomain("alone.test")
		return errors.Is(err, db.ErrNoLease)
	})
	eventually(t, "status says so", func() bool {
		nodes[0].pastLease()
		for _, p := range row(t, nodes[0].status(StatusParams{}), 1).Problems {
			if strings.Contains(p.What, "no majority") && strings.Contains(p.Remedy, "promote --force") {
				return true
			}
		}
		return false
	})
	// The way out where the others are lost for good.
	if _, err := nodes[0].operator().Promote(t.Context(), false); !errors.Is(err, ErrNoMajority) {
		t.Errorf("promote: %v, want ErrNoMajority", err)
	}
	if p, err := nodes[0].operator().Promote(t.Context(), true); err != nil || p.Epoch != (config.Epoch{N: 2, Owner: 1}) {
		t.Fatalf("forced: %+v, %v", p, err)
	}
	nodes[0].pastLease()
	nodes[0].mustPutDomain("forced.test")
	nodes[1].start()
	inSync(t, nodes[0], nodes[1])
	eventually(t, "the waiver ends with a majority", func() bool {
		nodes[0].pastLease()
		has, err := nodes[0].db.HasLease(t.Context())
		return err == nil && !has
	})
	eventually(t, "and the lease is kept again", func() bool { _, err := nodes[0].putDomain("again.test"); return err == nil })
}

// What the others have answered is as old as it is, whatever the clock says by now.
func TestALeaseIsRenewedThoughTheClockJumps(t *testing.T) {
	master := newCluster(t, 3)[0]
	for _, days := range []int{30, -30} {
		master.skew.Store(int64(days) * int64(24*time.Hour))
		master.pastLease()
		master.node.renewLease(t.Context())
		master.mustPutDomain(fmt.Sprintf("jump%d.test", days+30))
	}
}

func TestOfTwoNodesTheMasterGoesOnAlone(t *testing.T) {
	nodes := newCluster(t, 2)
	nodes[1].stopDaemon()
	nodes[0].pastLease()
	eventually(t, "configuration is taken", func() bool { _, err := nodes[0].putDomain("alone.test"); return err == nil })
	// One that was away asks first.
	nodes[0].stopDaemon()
	nodes[0].pastLease()
	if _, err := nodes[0].putDomain("early.test"); !errors.Is(err, db.ErrNoLease) {
		t.Errorf("before the daemon has asked: %v", err)
	}
	nodes[0].start()
	eventually(t, "configuration is taken again", func() bool { _, err := nodes[0].putDomain("later.test"); return err == nil })
}

// rollBack takes a node's last commit out of its database, as if it were yesterday's.
func (n *testNode) rollBack() {
	n.t.Helper()
	n.psql(`DELETE FROM config.domain; DELETE FROM config.change WHERE serial = (SELECT serial FROM node.position);
		DELETE FROM config.history WHERE serial = (SELECT serial FROM node.position); UPDATE node.position SET serial = serial - 1;
		SELECT node.recount(); UPDATE node.lease SET until = now() + interval '1 day'`) // so that it is taken away, not just not renewed
}

func TestARolledBackMasterTakesNoConfiguration(t *testing.T) {
	nodes := newCluster(t, 3)
	nodes[0].mustPutDomain("kept.test")
	inSync(t, nodes...)
	for _, n := range nodes {
		n.stopDaemon()
	}
	nodes[0].rollBack()
	for _, n := range nodes {
		n.start()
	}
	eventually(t, "status says so, with the remedy", func() bool {
		for _, p := range row(t, nodes[0].status(StatusParams{}), 1).Problems {
			if strings.HasPrefix(p.What, "rolled back: ") && strings.HasPrefix(p.Remedy, "`pmgcm promote` on node ") {
				return true
			}
		}
		return false
	})
	if _, err := nodes[0].putDomain("other.test"); !errors.Is(err, db.ErrNoLease) {
		t.Errorf("commit on the rolled-back master: %v, want ErrNoLease", err)
	}
	if _, err := nodes[1].operator().Promote(t.Context(), false); err != nil {
		t.Fatal(err)
	}
	inSync(t, nodes[1], nodes[0], nodes[2])
	if !nodes[0].hasDomain("kept.test") {
		t.Error("what only the slaves had is lost")
	}
}

// What is committed while a status is made is no sign of a master that was rolled back.
func TestACommitDuringAStatusIsNoRollback(t *testing.T) {
	at := func(serial int64) config.Position {
		return config.Position{Epoch: config.Epoch{N: 1, Owner: 1}, Serial: serial}
	}
	n := New(Options{Snapshot: func() *config.Snapshot { return &config.Snapshot{ClusterID: "c", Position: at(11)} }})
	st := db.State{CID: 1, ClusterID: "c", Position: at(10), Promised: at(10).Epoch}
	if got := n.rolledBack(st); got != nil {
		t.Errorf("loaded what is newer: %v", got)
	}
	n.see(2, time.Now(), db.State{CID: 2, ClusterID: "c", Position: at(11)}, nil)
	if got := n.rolledBack(st); got != nil {
		t.Errorf("pushed what is newer: %v", got)
	}
	n.setLease(false)
	if got := n.rolledBack(st); len(got) != 1 || !strings.Contains(got[0].Remedy, "promote") {
		t.Errorf("without the lease: %v", got)
	}
}

// Nobody in reach holds what the master has lost, since the slave that does is away: its own file tells.
func TestARolledBackMasterKnowsByItsOwnFile(t *testing.T) {
	nodes := newCluster(t, 3)
	inSync(t, nodes...)
	nodes[2].stopDaemon()
	nodes[0].mustPutDomain("lost.test")
	inSync(t, nodes[0], nodes[1])
	held := nodes[0].state().Position
	eventually(t, "the master's file has it", func() bool {
		s, err := config.LoadSnapshot(nodes[0].local.SnapshotFile())
		return err == nil && s.Position == held
	})
	nodes[0].stopDaemon()
	nodes[1].stopDaemon()
	nodes[0].rollBack()
	nodes[2].start()
	nodes[0].start()
	eventually(t, "status says so, with the remedy", func() bool {
		for _, p := range row(t, nodes[0].status(StatusParams{}), 1).Problems {
			if strings.HasPrefix(p.What, "rolled back: this master's database is at 1.1/") && strings.Contains(p.Remedy, "`pmgcm promote --force` here") {
				return true
			}
		}
		return false
	})
	eventually(t, "the lease is taken away", func() bool {
		has, err := nodes[0].db.HasLease(t.Context())
		return err == nil && !has
	})
	if _, err := nodes[0].putDomain("other.test"); !errors.Is(err, db.ErrNoLease) {
		t.Errorf("commit on the rolled-back master: %v, want ErrNoLease", err)
	}
	if s, err := config.LoadSnapshot(nodes[0].local.SnapshotFile()); err != nil || s.Position != held {
		t.Errorf("the file holds %v (%v), want %v", s.Position, err, held)
	}
	if _, err := nodes[0].operator().Promote(t.Context(), true); err != nil {
		t.Fatal(err)
	}
	eventually(t, "in a new epoch configuration is taken", func() bool { _, err := nodes[0].putDomain("new.test"); return err == nil })
	nodes[1].start()
	inSync(t, nodes...)
	if n := nodes[1].state().JournalLen; n != 1 {
		t.Errorf("the lost commit's journal entries on the slave that held it: %d, want 1", n)
	}
}

// A majority of an old member list and one of a new list share nobody for sure; so the list is not changed before a majority of the old
// one holds the epoch.
func TestOfFourNodesAMasterWritesOnceAMajorityHoldsItsEpoch(t *testing.T) {
	nodes := newCluster(t, 4)
	for _, n := range nodes {
		n.stopDaemon()
	}
	e := config.Epoch{N: 2, Owner: 2}
	if _, err := nodes[1].db.Promise(t.Context(), e); err != nil {
		t.Fatal(err)
	}
	if _, err := nodes[1].db.BeginEpoch(t.Context(), e, db.ByMajority, db.Author{Who: "tester"}); err != nil {
		t.Fatal(err)
	}
	if _, err := nodes[1].operator().Delete(t.Context(), 1, nil); !errors.Is(err, db.ErrNoLease) {
		t.Errorf("delete before anybody else holds the epoch: %v", err)
	}
	for _, n := range nodes[1:] {
		n.start()
	}
	eventually(t, "it can be changed", func() bool { _, err := nodes[1].operator().Delete(t.Context(), 1, nil); return err == nil })
	inSync(t, nodes[1:]...)
	if _, err := nodes[2].operator().Promote(t.Context(), false); err != nil {
		t.Errorf("promote: %v", err)
	}
}
