package cluster

import (
	"errors"
	"fmt"
	"maps"
	"strings"
	"testing"
	"time"

	"mailproxy/config"
	"mailproxy/db"
)

func TestPromoteWithTheMasterLost(t *testing.T) {
	nodes := newCluster(t, 3)
	nodes[0].mustPutDomain("before.test")
	inSync(t, nodes...)
	nodes[0].stopDaemon()
	p, err := nodes[1].operator().Promote(t.Context(), false)
	if err != nil {
		t.Fatal(err)
	}
	if p.Epoch != (config.Epoch{N: 2, Owner: 2}) || len(p.Untold) != 1 || p.Untold[0].CID != 1 {
		t.Errorf("promoted: %+v", p)
	}
	nodes[1].mustPutDomain("after.test")
	inSync(t, nodes[1], nodes[2])
	if !nodes[2].hasDomain("before.test") || !nodes[2].hasDomain("after.test") {
		t.Error("the third node does not have both domains")
	}
	nodes[0].start()
	inSync(t, nodes[1], nodes[0], nodes[2])
	if _, err := nodes[0].putDomain("old.test"); !errors.Is(err, db.ErrNotMaster) {
		t.Errorf("commit on the old master: %v, want ErrNotMaster", err)
	}
	if st := nodes[0].state(); st.JournalLen != 0 {
		t.Errorf("journal of %d commits, though nothing was lost", st.JournalLen)
	}
	eventually(t, "all in sync in status", func() bool { return nodes[0].status(StatusParams{}).InSync })
	// The new master takes nodes in by a CA of its own, also while the first master is away.
	nodes[0].stopDaemon()
	fourth := newTestNode(t, "mx4").start()
	if cid, err := fourth.join(nodes[1].joinParams()); err != nil || cid != 4 {
		t.Errorf("join at the new master: CID %d, %v", cid, err)
	}
	inSync(t, nodes[1], nodes[2], fourth)
}

func TestPromoteAdoptsTheNewestPosition(t *testing.T) {
	nodes := newCluster(t, 3)
	nodes[1].stopDaemon()
	nodes[0].mustPutDomain("newest.test") // 3 has it, 2 does not
	inSync(t, nodes[0], nodes[2])
	nodes[0].stopDaemon()
	nodes[1].start()
	promoteWhenReachable(t, nodes[1], nodes[2])
	if !nodes[1].hasDomain("newest.test") {
		t.Error("a commit that a majority had is lost")
	}
	inSync(t, nodes[1], nodes[2])
}

// promoteWhenReachable waits until the promoting node reaches the other, and promotes it.
func promoteWhenReachable(t *testing.T, n, other *testNode) {
	t.Helper()
	cid := other.state().CID
	eventually(t, "the tunnel is up", func() bool {
		_, err := n.operator().peerState(t.Context(), cid)
		return err == nil
	})
	if _, err := n.operator().Promote(t.Context(), false); err != nil {
		t.Fatal(err)
	}
}

func TestOldMasterStepsDownAndItsOwnCommitsAreSetAside(t *testing.T) {
	nodes := newCluster(t, 3)
	nodes[0].stopDaemon()
	nodes[0].mustPutDomain("lost.test") // acknowledged, and pushed to nobody
	promoteWhenReachable(t, nodes[1], nodes[2])
	nodes[1].mustPutDomain("kept.test")
	nodes[0].start()
	inSync(t, nodes[1], nodes[0], nodes[2])
	if nodes[0].hasDomain("lost.test") || !nodes[0].hasDomain("kept.test") {
		t.Error("the old master does not hold the new one's configuration")
	}
	all, err := nodes[0].operator().Journal(t.Context(), false)
	if err != nil || len(all) != 1 || all[0].Command != "domain add lost.test" || len(all[0].Changes) == 0 ||
		!strings.Contains(string(all[0].Changes[len(all[0].Changes)-1].New), "lost.test") {
		t.Fatalf("journal: %+v, %v", all, err)
	}
	if _, err := nodes[0].operator().JournalEntry(t.Context(), all[0].ID); err != nil {
		t.Errorf("journal show: %v", err)
	}
	if _, err := nodes[0].operator().JournalEntry(t.Context(), all[0].ID+1); !errors.Is(err, ErrNoSuchEntry) {
		t.Errorf("journal show of no entry: %v", err)
	}
	got := row(t, nodes[1].status(StatusParams{}), 1)
	if got.Journal != 1 || len(got.Problems) == 0 || !strings.Contains(got.Problems[0].Remedy, "pmgcm journal") {
		t.Errorf("status does not name the journal: %+v", got)
	}
}

func TestPromoteWithoutMajority(t *testing.T) {
	nodes := newCluster(t, 2)
	nodes[0].stopDaemon()
	before := nodes[1].state()
	_, err := nodes[1].operator().Promote(t.Context(), false)
	var nm *NoMajorityError
	if !errors.Is(err, ErrNoMajority) || !errors.As(err, &nm) || nm.Votes != 1 || nm.Wanted != 2 || len(nm.AtRisk) == 0 {
		t.Fatalf("promote without majority: %v", err)
	}
	if after := nodes[1].state(); after.Promised != before.Promised || after.Position != before.Position {
		t.Errorf("a refused promote changed %+v to %+v", before, after)
	}
	if _, err := nodes[1].operator().Promote(t.Context(), true); err != nil {
		t.Fatalf("forced: %v", err)
	}
	nodes[1].mustPutDomain("forced.test")
	nodes[0].start()
	inSync(t, nodes[1], nodes[0])
}

func TestHandOverLosesNothing(t *testing.T) {
	nodes := newCluster(t, 3)
	var acknowledged []string
	stop, done := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(done)
		for i := 0; ; i++ {
			select {
			case <-stop:
				return
			default:
			}
			name := fmt.Sprintf("d%d.test", i)
			if _, err := nodes[0].putDomain(name); err != nil {
				return // the promise has taken the configuration away
			}
			acknowledged = append(acknowledged, name)
		}
	}()
	if _, err := nodes[1].operator().Promote(t.Context(), false); err != nil {
		t.Fatal(err)
	}
	close(stop)
	<-done
	inSync(t, nodes[1], nodes[0], nodes[2])
	for _, name := range acknowledged {
		if !nodes[1].hasDomain(name) {
			t.Errorf("%s was acknowledged and is lost", name)
		}
	}
	if st := nodes[0].state(); st.JournalLen != 0 || roleOf(st) != Slave {
		t.Errorf("old master: %+v", st)
	}
	if _, err := nodes[1].operator().Promote(t.Context(), false); !errors.Is(err, ErrAlreadyMaster) {
		t.Errorf("promote on the master: %v", err)
	}
	if _, err := nodes[0].operator().Promote(t.Context(), false); err != nil {
		t.Errorf("and back: %v", err)
	}
	inSync(t, nodes...)
}

func TestPromoteThatDiedWedgesNobody(t *testing.T) {
	for _, c := range []struct {
		name string
		asks []config.CID // whose promise the dying promote of node 2 got, beside its own
	}{
		{"with the master's promise", []config.CID{1, 3}},
		{"with a slave's only", []config.CID{3}},
		{"with its own only", nil},
	} {
		t.Run(c.name, func(t *testing.T) {
			timing := quick()
			timing.Grace = time.Second
			nodes := newClusterWith(t, 3, timing)
			e := config.Epoch{N: 2, Owner: 2}
			if _, err := nodes[1].db.Promise(t.Context(), e); err != nil {
				t.Fatal(err)
			}
			for _, cid := range c.asks {
				p, err := nodes[1].operator().openPeer(t.Context(), cid)
				if err != nil {
					t.Fatal(err)
				}
				_, err = p.Promise(t.Context(), e.N)
				p.Close()
				if err != nil {
					t.Fatal(err)
				}
			}
			eventually(t, "the master takes configuration again", func() bool {
				st := nodes[0].state()
				if st.Position.Epoch.N < 3 {
					return false
				}
				_, err := nodes[0].putDomain("again.test")
				return err == nil
			})
			inSync(t, nodes...)
			if !nodes[0].log.has("promote.recovered") {
				t.Error("promote.recovered is not logged")
			}
		})
	}
}

// The configuration that is adopted has a member of which the promoting node did not know, and whose promise it did not ask for.
func TestPromoteThatLearnsOfAMemberAsksAgain(t *testing.T) {
	nodes := newCluster(t, 3)
	nodes[1].stopDaemon()
	fourth := newTestNode(t, "mx4").start()
	if _, err := fourth.join(nodes[0].joinParams()); err != nil {
		t.Fatal(err)
	}
	inSync(t, nodes[0], nodes[2], fourth)
	nodes[0].stopDaemon()
	nodes[1].start()
	var p Promoted
	eventually(t, "a majority of four promises", func() bool {
		var err error
		p, err = nodes[1].operator().Promote(t.Context(), false)
		return err == nil
	})
	if len(p.Members) != 4 || fourth.state().Promised != p.Epoch {
		t.Errorf("promoted among %s, while the fourth has promised %v", labels(p.Members), fourth.state().Promised)
	}
	inSync(t, nodes[1], nodes[2], fourth)
}

func TestForcedPromotesHaveOneWinner(t *testing.T) {
	nodes := newCluster(t, 3)
	for _, n := range nodes {
		n.stopDaemon()
	}
	// Two islands of one node each promote themselves to the same epoch number.
	for _, n := range nodes[1:] {
		n.start()
		if _, err := n.operator().Promote(t.Context(), true); err != nil {
			t.Fatal(err)
		}
		n.mustPutDomain(n.local.Name + ".test")
		n.stopDaemon()
	}
	for _, n := range nodes {
		n.start()
	}
	inSync(t, nodes[2], nodes[0], nodes[1])
	if st := nodes[1].state(); st.JournalLen == 0 || roleOf(nodes[2].state()) != Master {
		t.Errorf("the loser's journal holds %d commits; the winner is %s", st.JournalLen, roleOf(nodes[2].state()))
	}
}

func TestSyncWithANewMaster(t *testing.T) {
	nodes := newCluster(t, 3)
	if _, err := nodes[1].operator().SyncWith(t.Context(), "192.0.2.99"); !errors.Is(err, ErrNotMember) {
		t.Errorf("an address of no member: %v", err)
	}
	if _, err := nodes[1].operator().SyncWith(t.Context(), "mx3"); !errors.Is(err, ErrHostNotMaster) {
		t.Errorf("a member that is not master: %v", err)
	}
	if _, err := nodes[1].operator().Promote(t.Context(), false); err != nil {
		t.Fatal(err)
	}
	s, err := nodes[2].operator().SyncWith(t.Context(), "mx2")
	if err != nil || s.Node.CID != 2 {
		t.Errorf("sync --master_ip: %+v, %v", s, err)
	}
	if st := nodes[2].state(); st.Promised != (config.Epoch{N: 2, Owner: 2}) {
		t.Errorf("promised %v", st.Promised)
	}
}

func TestHigherEpochInForceIsPromisedBeforeAnythingElse(t *testing.T) {
	nodes := newCluster(t, 2)
	seen := db.State{CID: 2, Position: config.Position{Epoch: config.Epoch{N: 5, Owner: 2}, Serial: 1}}
	nodes[0].node.learn(t.Context(), seen)
	if st := nodes[0].state(); st.Promised != seen.Position.Epoch {
		t.Fatalf("promised %v, want %v", st.Promised, seen.Position.Epoch)
	}
	if _, err := nodes[0].putDomain("late.test"); !errors.Is(err, db.ErrNotMaster) {
		t.Errorf("commit after it: %v, want ErrNotMaster", err)
	}
	eventually(t, "the node is a slave", func() bool { return nodes[0].node.Self(t.Context(), false).Role == Slave })
	// A promise alone is not in force, and ends nobody's reign.
	nodes = newCluster(t, 2)
	nodes[0].node.learn(t.Context(), db.State{CID: 2, Position: nodes[0].state().Position, Promised: config.Epoch{N: 5, Owner: 2}})
	nodes[0].mustPutDomain("still.test")
}

// A member that has promised more may hold a commit only for a round of its own: it does not count as told.
func TestWhoHasPromisedMoreIsNotCountedAsTold(t *testing.T) {
	nodes := newCluster(t, 2)
	pos := nodes[0].mustPutDomain("told.test")
	inSync(t, nodes...)
	members := map[config.CID]config.Node{2: {CID: 2}}
	left := maps.Clone(members)
	if away := nodes[0].operator().askHeld(t.Context(), left, pos); away != 0 || len(left) != 0 {
		t.Errorf("in sync: %d out of reach, left %v", away, left)
	}
	if _, err := nodes[1].db.Promise(t.Context(), config.Epoch{N: 2, Owner: 2}); err != nil {
		t.Fatal(err)
	}
	left = maps.Clone(members)
	if away := nodes[0].operator().askHeld(t.Context(), left, pos); away != 0 || len(left) != 1 {
		t.Errorf("after a promise: %d out of reach, left %v", away, left)
	}
}
