package cluster

import (
	"context"
	"errors"
	"net"
	"net/http"
	"os"
	"strings"
	"sync"
	"testing"
	"time"

	"mailproxy/config"
	"mailproxy/db"
)

func TestCommitReachesEverySlave(t *testing.T) {
	nodes := newCluster(t, 3)
	want := nodes[0].mustPutDomain("example.test")
	inSync(t, nodes...)
	for _, n := range nodes {
		if st := n.state(); st.Position != want || !n.hasDomain("example.test") {
			t.Errorf("%s is at %v, want %v", n.local.Name, st.Position, want)
		}
	}
	if _, err := nodes[1].putDomain("slave.test"); !errors.Is(err, db.ErrNotMaster) {
		t.Errorf("commit on a slave: %v, want ErrNotMaster", err)
	}
	if !nodes[0].log.has("push.done") || !nodes[0].log.has("node.joined") || !nodes[1].log.has("role.changed") {
		t.Error("push.done, node.joined or role.changed is missing in the log")
	}
}

func TestSlaveThatWasAwayIsPushedTo(t *testing.T) {
	nodes := newCluster(t, 3)
	nodes[2].stopDaemon()
	nodes[0].mustPutDomain("away.test")
	inSync(t, nodes[:2]...)
	if nodes[2].hasDomain("away.test") {
		t.Fatal("a node without its daemon was pushed to")
	}
	nodes[2].start()
	inSync(t, nodes...)
}

func TestStatusShowsAllNodesSideBySide(t *testing.T) {
	nodes := newCluster(t, 3)
	for _, n := range nodes {
		eventually(t, "status in sync from "+n.local.Name, func() bool { return n.status(StatusParams{}).InSync })
	}
	r := nodes[1].status(StatusParams{})
	for i, row := range r.Rows {
		want := Slave
		if i == 0 {
			want = Master
		}
		if row.CID != config.CID(i+1) || row.Role != want || row.State != InSync || row.Error != "" || row.UUID == "" || row.Version != "test" {
			t.Errorf("row %d: %+v", i, row)
		}
	}
}

func TestDeadPeerIsARowAndCostsTwoSeconds(t *testing.T) {
	nodes := newCluster(t, 3)
	nodes[2].stopDaemon()
	start := time.Now()
	r := nodes[0].status(StatusParams{})
	if took := time.Since(start); took > statusTimeout+time.Second {
		t.Errorf("status took %v", took)
	}
	if got := row(t, r, 3); got.Error == "" || got.State != Unreachable || r.InSync {
		t.Errorf("row of the dead node: %+v, in sync %v", got, r.InSync)
	}
	if got := row(t, r, 2); got.State != InSync {
		t.Errorf("row of a live node: %+v", got)
	}
}

func TestStatusWithoutPostgreSQL(t *testing.T) {
	nodes := newCluster(t, 2)
	position := nodes[1].state().Position
	nodes[1].node.o.DB.Close() // as a server that is gone: every method gives an error
	eventually(t, "status names PostgreSQL", func() bool {
		r := nodes[0].status(StatusParams{})
		got := row(t, r, 2)
		return got.Error == "" && !got.Database && got.State == Stale && got.Position == position && !r.InSync &&
			len(got.Problems) > 0 && strings.Contains(got.Problems[0].What, "PostgreSQL") && got.Problems[0].Remedy != ""
	})
}

func TestStatusWithoutTheDaemon(t *testing.T) {
	nodes := newCluster(t, 2)
	nodes[1].stopDaemon()
	r := nodes[1].status(StatusParams{})
	if len(r.Rows) != 2 || r.InSync || !strings.Contains(row(t, r, 2).Error, ErrNoDaemon.Error()) {
		t.Errorf("status without a daemon: %+v", r)
	}
}

func TestADaemonThatHangsIsToldFromOneThatIsDown(t *testing.T) {
	nodes := newCluster(t, 2)
	nodes[1].stopDaemon()
	_ = os.Remove(nodes[1].local.ControlSocket())
	l, err := net.Listen("unix", nodes[1].local.ControlSocket()) // takes the question, and that is all
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	r := nodes[1].status(StatusParams{})
	own, master := row(t, r, 2), row(t, r, 1)
	if !strings.Contains(own.Error, ErrDaemonSilent.Error()) || len(own.Problems) != 1 || own.Problems[0].Remedy != "systemctl restart mailproxy" {
		t.Errorf("its own row: %q, %+v", own.Error, own.Problems)
	}
	if master.Error != notAsked || len(master.Problems) > 0 { // nobody knows how the master is
		t.Errorf("the master's row: %q, %+v", master.Error, master.Problems)
	}
	if err := nodes[1].operator().needDaemon(t.Context()); !errors.Is(err, ErrDaemonSilent) || errors.Is(err, ErrNoDaemon) {
		t.Errorf("what needs it: %v", err)
	}
}

func TestStatusOfASingleNode(t *testing.T) {
	n := newTestNode(t, "mx1").start()
	if _, err := n.operator().Status(t.Context(), StatusParams{}); !errors.Is(err, ErrNoCluster) {
		t.Errorf("status: %v, want ErrNoCluster", err)
	}
}

func TestRowsChangedByHandShowAsDriftAndSyncPutsThemRight(t *testing.T) {
	nodes := newCluster(t, 2)
	nodes[0].mustPutDomain("a.test")
	inSync(t, nodes...)
	drift := func() {
		t.Helper()
		nodes[1].psql("UPDATE config.domain SET comment = 'by hand'")
		eventually(t, "drift is shown", func() bool {
			got := row(t, nodes[0].status(StatusParams{}), 2)
			return got.State == Drifted && len(got.Problems) > 0 && strings.Contains(got.Problems[0].Remedy, "pmgcm sync")
		})
	}
	repaired := func() {
		t.Helper()
		eventually(t, "in sync again", func() bool { return nodes[0].status(StatusParams{}).InSync })
		if s, err := nodes[1].db.Load(t.Context()); err != nil || s.Domains.Get("a.test").Comment != "" {
			t.Errorf("after the repair: %+v, %v", s, err)
		}
	}
	drift()
	if !nodes[1].log.has("drift.found") {
		t.Error("drift.found is not logged")
	}
	no := Confirm(func(string) bool { return false })
	if _, err := nodes[1].operator().Sync(t.Context(), nil); !errors.Is(err, ErrWouldOverwrite) {
		t.Errorf("sync on the slave: %v, want ErrWouldOverwrite", err)
	}
	if _, err := nodes[1].operator().Pull(t.Context(), 0, no); !errors.Is(err, ErrNotConfirmed) {
		t.Errorf("pull that is not confirmed: %v", err)
	}
	if s, err := nodes[1].operator().Pull(t.Context(), 0, nil); err != nil || s.Stats.Journalled != 1 {
		t.Fatalf("pull on the slave: %+v, %v", s, err)
	}
	repaired()
	drift()
	if _, err := nodes[0].operator().Sync(t.Context(), no); !errors.Is(err, ErrNotConfirmed) {
		t.Errorf("sync that is not confirmed: %v", err)
	}
	if s, err := nodes[0].operator().Sync(t.Context(), nil); err != nil || s[0].Stats.Journalled != 1 {
		t.Fatalf("sync on the master: %+v, %v", s, err)
	}
	repaired()
	drift()
	if s, err := nodes[0].operator().PushTo(t.Context(), 2, true, nil); err != nil || !s.Stats.Full || s.Stats.Journalled != 1 {
		t.Fatalf("push --full: %+v, %v", s, err)
	}
	repaired()
}

// Neither node has noticed yet when the operator orders the repair.
func TestARepairSeesRowsThatWereChangedByHandJustNow(t *testing.T) {
	nodes := newCluster(t, 2)
	for name, repair := range map[string]func(o *Operator) error{
		"sync":        func(o *Operator) error { _, err := o.Sync(t.Context(), nil); return err },
		"sync --push": func(o *Operator) error { _, err := o.PushTo(t.Context(), 2, false, nil); return err },
	} {
		t.Run(name, func(t *testing.T) {
			nodes[0].mustPutDomain("a.test")
			inSync(t, nodes...)
			nodes[1].psql("UPDATE config.domain SET comment = 'by hand'")
			if err := repair(nodes[0].operator()); err != nil {
				t.Fatal(err)
			}
			if s, err := nodes[1].db.Load(t.Context()); err != nil || s.Domains.Get("a.test").Comment != "" {
				t.Errorf("after the repair: %+v, %v", s.Domains, err)
			}
			nodes[0].mustPutDomain("b.test") // what else is pushed then
			nodes[1].psql("UPDATE config.domain SET comment = 'by hand'")
			nodes[0].psql("UPDATE config.domain SET comment = 'too'")
			if err := repair(nodes[0].operator()); err != nil {
				t.Fatalf("on both: %v", err)
			}
			if s, err := nodes[1].db.Load(t.Context()); err != nil || s.Domains.Get("a.test").Comment != "too" {
				t.Errorf("after the repair of both: %+v, %v", s.Domains, err)
			}
			nodes[0].mustPutDomain("a.test")
		})
	}
}

func TestRowsChangedByHandOnTheMasterBecomeACommitOfSync(t *testing.T) {
	for name, sync := range map[string]func(o *Operator, confirm Confirm) error{
		"sync": func(o *Operator, confirm Confirm) error { _, err := o.Sync(t.Context(), confirm); return err },
		"sync --push": func(o *Operator, confirm Confirm) error {
			_, err := o.PushTo(t.Context(), 2, false, confirm)
			return err
		},
	} {
		t.Run(name, func(t *testing.T) {
			nodes := newCluster(t, 3)
			before := nodes[0].mustPutDomain("a.test")
			inSync(t, nodes...)
			nodes[0].psql("UPDATE config.domain SET comment = 'by hand'")
			// The daemon has seen it, and set the digest right, before the operator looks.
			eventually(t, "drift is shown", func() bool { return row(t, nodes[0].status(StatusParams{}), 1).State == Drifted })
			if err := sync(nodes[0].operator(), func(string) bool { return false }); !errors.Is(err, ErrNotConfirmed) || nodes[0].state().Position.Serial != before.Serial {
				t.Errorf("sync that is not confirmed: %v, at %v", err, nodes[0].state().Position)
			}
			if err := sync(nodes[0].operator(), nil); err != nil {
				t.Fatal(err)
			}
			eventually(t, "all in sync", func() bool { return nodes[0].status(StatusParams{Verify: true}).InSync })
			for _, n := range nodes {
				s, err := n.db.Load(t.Context())
				if err != nil || s.Position.Serial != before.Serial+1 || s.Domains.Get("a.test").Comment != "by hand" {
					t.Errorf("%s: %+v, %v", n.local.Name, s, err)
				}
				if st := n.state(); st.JournalLen != 0 {
					t.Errorf("%s: a journal of %d", n.local.Name, st.JournalLen)
				}
				for _, r := range n.status(StatusParams{}).Rows {
					if len(r.Problems) > 0 {
						t.Errorf("%s says of node %d: %+v", n.local.Name, r.CID, r.Problems)
					}
				}
			}
			h, err := nodes[1].db.History(t.Context(), 1)
			if err != nil || h[0].Who != "tester" || h[0].Command != "pmgcm" {
				t.Errorf("history: %+v, %v", h, err)
			}
			if err := sync(nodes[0].operator(), nil); err != nil || nodes[0].state().Position.Serial != before.Serial+1 {
				t.Errorf("sync again: %v, at %v", err, nodes[0].state().Position)
			}
		})
	}
}

func TestPullTakesAnotherSlavesConfigurationOnlyWithoutAMaster(t *testing.T) {
	nodes := newCluster(t, 3)
	nodes[1].stopDaemon()
	nodes[0].mustPutDomain("a.test")
	inSync(t, nodes[0], nodes[2])
	if _, err := nodes[0].operator().Pull(t.Context(), 0, nil); !errors.Is(err, ErrLocalMaster) {
		t.Errorf("pull on the master: %v", err)
	}
	nodes[1].start()
	inSync(t, nodes[0], nodes[1])
	if _, err := nodes[1].operator().Pull(t.Context(), 3, nil); !errors.Is(err, ErrMasterAnswers) {
		t.Errorf("pull from a slave while the master answers: %v", err)
	}
	if _, err := nodes[1].operator().Pull(t.Context(), 9, nil); !errors.Is(err, ErrNoSuchNode) {
		t.Errorf("pull from nobody: %v", err)
	}
	if _, err := nodes[1].operator().PushTo(t.Context(), 3, false, nil); !errors.Is(err, ErrNotMaster) {
		t.Errorf("push on a slave: %v", err)
	}
	nodes[1].stopDaemon()
	nodes[0].mustPutDomain("b.test")
	inSync(t, nodes[0], nodes[2])
	nodes[0].stopDaemon()
	nodes[1].start()
	var s Synced
	eventually(t, "the other slave is pulled from", func() bool {
		var err error
		s, err = nodes[1].operator().Pull(t.Context(), 3, nil)
		return err == nil
	})
	if !nodes[1].hasDomain("b.test") || s.Stats.Full {
		t.Errorf("pulled: %+v", s)
	}
}

func TestVerifyShowsDriftAtOnce(t *testing.T) {
	slow := quick()
	slow.Drift = time.Hour
	nodes := newClusterWith(t, 2, slow)
	nodes[0].mustPutDomain("a.test")
	inSync(t, nodes...)
	nodes[1].psql("DELETE FROM config.domain")
	if got := row(t, nodes[0].status(StatusParams{Verify: true}), 2); got.State != Drifted {
		t.Errorf("state %q after --verify, want drifted", got.State)
	}
}

func TestSyncBringsAllUpToDate(t *testing.T) {
	nodes := newCluster(t, 2)
	nodes[0].mustPutDomain("a.test")
	done, err := nodes[0].operator().Sync(t.Context(), nil)
	if err != nil || len(done) != 1 || done[0].Node.CID != 2 {
		t.Fatalf("sync on the master: %+v, %v", done, err)
	}
	if !nodes[1].hasDomain("a.test") {
		t.Error("sync returned before the slave had it")
	}
	nodes[1].stopDaemon()
	if _, err := nodes[0].operator().Sync(t.Context(), nil); !errors.Is(err, ErrNotInSync) {
		t.Errorf("sync with a slave away: %v, want ErrNotInSync", err)
	}
	if _, err := nodes[0].operator().SyncWith(t.Context(), "127.0.0.1"); !errors.Is(err, ErrLocalMaster) {
		t.Errorf("sync --master_ip on the master: %v, want ErrLocalMaster", err)
	}
}

// A node that is slow to look at its rows, or does not answer, holds up no other's look.
func TestNodesLookAtTheirRowsSideBySide(t *testing.T) {
	n := newTestNode(t, "mx1")
	var asked sync.WaitGroup
	asked.Add(2)
	var nodes []Synced
	for cid := config.CID(2); cid < 4; cid++ {
		if err := os.MkdirAll(n.local.PeerDir(cid), 0o700); err != nil {
			t.Fatal(err)
		}
		l, err := net.Listen("unix", n.local.PeerDir(cid)+"/control.sock")
		if err != nil {
			t.Fatal(err)
		}
		s := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
			asked.Done()
			asked.Wait()
			w.WriteHeader(http.StatusInternalServerError)
		})}
		go func() { _ = s.Serve(l) }()
		t.Cleanup(func() { _ = s.Close() })
		nodes = append(nodes, Synced{Node: config.Node{CID: cid}})
	}
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	n.operator().verifiedStates(ctx, nodes)
	if err := ctx.Err(); err != nil {
		t.Errorf("they were asked one after the other: %v", err)
	}
}

func TestDeleteRevokes(t *testing.T) {
	nodes := newCluster(t, 3)
	nodes[0].putSecret("dkim-key", "x")
	inSync(t, nodes...)
	op := nodes[0].operator()
	if _, err := op.Delete(t.Context(), 9, nil); !errors.Is(err, ErrNoSuchNode) {
		t.Errorf("delete of an unknown CID: %v", err)
	}
	if _, err := op.Delete(t.Context(), 1, nil); !errors.Is(err, ErrDeleteSelf) {
		t.Errorf("delete of itself: %v", err)
	}
	if _, err := nodes[1].operator().Delete(t.Context(), 3, nil); !errors.Is(err, ErrNotMaster) || !strings.Contains(err.Error(), "mx1(1)") {
		t.Errorf("delete on a slave: %v, want ErrNotMaster with the master's name", err)
	}
	before := nodes[0].state().Position
	if _, err := op.Delete(t.Context(), 3, func(config.Node) bool { return false }); !errors.Is(err, ErrNotConfirmed) || nodes[0].state().Position != before {
		t.Errorf("delete that was not confirmed: %v", err)
	}
	d, err := op.Delete(t.Context(), 3, func(n config.Node) bool { return n.Name == "mx3" })
	if err != nil || !d.Majority || len(d.Missing) != 0 || len(d.Secrets) != 1 || d.Secrets[0] != "dkim-key" {
		t.Fatalf("delete: %+v, %v", d, err)
	}
	for _, cid := range []config.CID{1, 2} {
		eventually(t, "the deleted node reaches nobody", func() bool {
			_, err := nodes[2].operator().peerState(t.Context(), cid)
			return err != nil
		})
	}
	nodes[0].mustPutDomain("after.test")
	nodes[0].putSecret("dkim-key", "y")
	inSync(t, nodes[:2]...)
	nodes[1].wantSecret("dkim-key", "y")
	nodes[2].wantSecret("dkim-key", "x")
	if rows, err := openKeyOf(t, nodes[1], nodes[2]).Secrets(t.Context()); err != nil || len(rows) != 1 || !errors.Is(rows[0].Err, db.ErrNoDataKey) {
		t.Errorf("the deleted node's key on another's rows: %+v, %v, want ErrNoDataKey", rows, err)
	}
	if nodes[2].hasDomain("after.test") {
		t.Error("the deleted node was pushed to")
	}
	if r := nodes[0].status(StatusParams{}); len(r.Rows) != 2 {
		t.Errorf("status has %d rows after the delete", len(r.Rows))
	}
}

func TestDeleteSaysWhereLessThanAMajorityKnows(t *testing.T) {
	nodes := newCluster(t, 3)
	nodes[1].stopDaemon()
	o := nodes[0].operator()
	o.Patience = 3 * pollEvery
	if d, err := o.Delete(t.Context(), 3, nil); err != nil || d.Majority || len(d.Missing) != 1 || d.Missing[0].CID != 2 {
		t.Errorf("one of three knows: %+v, %v", d, err)
	}
	// The same commit, once the other has it.
	nodes[1].start()
	inSync(t, nodes[:2]...)
	s, err := nodes[0].db.Load(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	members := append(s.Nodes, config.Node{CID: 3})
	if missing, majority := o.waitHeld(t.Context(), members, nodes[0].state().Position, 3); !majority || len(missing) != 0 {
		t.Errorf("two of three know: %v, missing %v", majority, missing)
	}
}

func TestSelfAnswersBeforeAnythingIsKnown(t *testing.T) {
	n := newTestNode(t, "mx1").start()
	n.node.o.DB.Close()
	start := time.Now()
	s := n.node.Self(t.Context(), false)
	if took := time.Since(start); took > time.Second {
		t.Errorf("Self took %v", took)
	}
	if s.Database || s.Name != "mx1" || len(s.Problems) == 0 {
		t.Errorf("Self: %+v", s)
	}
}
