package db_test

import (
	"context"
	"errors"
	"slices"
	"strings"
	"sync"
	"testing"

	"mailproxy/config"
	"mailproxy/db"
	"mailproxy/internal/pgtest"
)

func TestCreateKeepsAllDataAndBeginsEpoch1(t *testing.T) {
	dsn := pgtest.New(t)
	n := &node{DB: openDSN(t, dsn), dsn: dsn, cid: 1}
	put(t, n.DB, "a.test")
	p := db.CreateParams{ClusterID: clusterID, Node: member(1), CA: config.CA{Fingerprint: "f", CID: 1}}
	if err := n.CreateCluster(t.Context(), p); err != nil {
		t.Fatal(err)
	}
	s := n.state(t)
	if s.Position.Epoch != (config.Epoch{N: 1, Owner: 1}) || s.Position.Serial != 2 || !s.IsMaster() || s.CID != 1 || s.ClusterID != clusterID {
		t.Errorf("state %+v", s)
	}
	snap, err := n.Load(t.Context())
	if err != nil || len(snap.Nodes) != 1 || len(snap.CAs) != 1 || snap.Domains.Len() != 1 || snap.ClusterID != clusterID {
		t.Errorf("snapshot %+v, %v", snap, err)
	}
	if err := n.CreateCluster(t.Context(), p); !errors.Is(err, db.ErrExists) {
		t.Errorf("again: %v", err)
	}
	if got := n.state(t); got != s {
		t.Errorf("the second create changed %+v to %+v", s, got)
	}
}

func TestEnterEmptiesTheNodeOnce(t *testing.T) {
	c := cluster(t, 2)
	dsn := pgtest.New(t)
	n := &node{DB: openDSN(t, dsn), dsn: dsn, cid: 2}
	put(t, n.DB, "mine.test")
	names(t, n.DB)
	n.enter(t, config.Epoch{N: 1, Owner: 1})
	s := n.state(t)
	if s.IsMaster() || s.CID != 2 || s.Promised != (config.Epoch{N: 1, Owner: 1}) || s.Position.Serial != 0 || s.JournalLen != 0 {
		t.Errorf("entered: %+v", s)
	}
	if got := names(t, n.DB); len(got) != 0 {
		t.Errorf("kept %v", got)
	}
	put(t, c[0].DB, "a.test")
	push(t, c[0], n)
	if j := n.state(t).JournalLen; j != 0 {
		t.Errorf("%d commits in the journal", j)
	}
	before := n.state(t)
	n.enter(t, config.Epoch{N: 1, Owner: 1})
	if after := n.state(t); after != before {
		t.Errorf("entering again changed %+v to %+v", before, after)
	}
	err := n.Enter(t.Context(), db.EnterParams{CID: 3, ClusterID: clusterID, Epoch: config.Epoch{N: 1, Owner: 1}})
	if !errors.Is(err, db.ErrExists) {
		t.Errorf("by another CID: %v", err)
	}
	if err := c[0].Enter(t.Context(), db.EnterParams{CID: 1, ClusterID: "other"}); !errors.Is(err, db.ErrExists) {
		t.Errorf("another cluster: %v", err)
	}
}

func TestPromisesOnlyRise(t *testing.T) {
	c := cluster(t, 2)
	push(t, c[0], c[1])
	n := c[1]
	for _, step := range []struct {
		e  config.Epoch
		ok bool
	}{{config.Epoch{N: 2, Owner: 2}, true}, {config.Epoch{N: 2, Owner: 2}, true}, {config.Epoch{N: 2, Owner: 1}, false},
		{config.Epoch{N: 1, Owner: 9}, false}, {config.Epoch{N: 2, Owner: 3}, true}, {config.Epoch{N: 3, Owner: 1}, true}} {
		_, err := n.Promise(t.Context(), step.e)
		if step.ok != (err == nil) || !step.ok && !errors.Is(err, db.ErrStale) {
			t.Errorf("promise %v: %v", step.e, err)
		}
	}
	// many at once, from both sides: what was answered with yes was never followed by a lower yes
	p1, p2 := peer(t, n, 1), peer(t, n, 2)
	var wg sync.WaitGroup
	for _, p := range []*db.Peer{p1, p2} {
		wg.Go(func() {
			var last config.Epoch
			for i := int64(4); i < 40; i++ {
				s, err := p.Promise(context.Background(), i)
				if err != nil && !errors.Is(err, db.ErrStale) {
					t.Error(err)
				}
				if err == nil && s.Promised.Compare(last) < 0 {
					t.Errorf("promised %v, then %v", last, s.Promised)
				}
				last = s.Promised
			}
		})
	}
	wg.Wait()
	if e := n.state(t).Promised; e != (config.Epoch{N: 39, Owner: 2}) {
		t.Errorf("promised %v at the end", e)
	}
}

func TestAPeerPromisesForItselfAlone(t *testing.T) {
	c := cluster(t, 3)
	commit(t, c[0].DB, func(ctx context.Context, tx *db.Tx) error {
		no := member(3)
		no.Promotable = false
		return tx.PutNode(ctx, no)
	})
	push(t, c[0], c[1])
	p := peer(t, c[1], 2)
	if s, err := p.Promise(t.Context(), 2); err != nil || s.Promised != (config.Epoch{N: 2, Owner: 2}) {
		t.Errorf("promise: %+v, %v", s, err)
	}
	if _, err := p.Promise(t.Context(), 1003); !errors.Is(err, db.ErrFarEpoch) {
		t.Errorf("far epoch: %v", err)
	}
	if _, err := peer(t, c[1], 3).Promise(t.Context(), 3); !errors.Is(err, db.ErrNotMember) {
		t.Errorf("not promotable: %v", err)
	}
	if _, err := peer(t, c[1], 1).Promise(t.Context(), 2); !errors.Is(err, db.ErrStale) {
		t.Errorf("lower owner: %v", err)
	}
}

// promote makes a node the master by the steps of a promote, without asking anyone.
func promote(t testing.TB, n *node, e config.Epoch) {
	t.Helper()
	if _, err := n.Promise(context.Background(), e); err != nil {
		t.Fatal(err)
	}
	if _, err := n.BeginEpoch(context.Background(), e, db.ByForce, db.Author{Who: "root", Command: "pmgcm promote"}); err != nil {
		t.Fatal(err)
	}
}

func TestTheOldMastersCommitsGoToItsJournal(t *testing.T) {
	c := cluster(t, 3)
	put(t, c[0].DB, "a.test")
	push(t, c[0], c[1])
	push(t, c[0], c[2])
	put(t, c[0].DB, "orphan.test") // cut off: nobody else learns of it
	put(t, c[0].DB, "orphan2.test")
	promote(t, c[1], config.Epoch{N: 2, Owner: 2})
	put(t, c[1].DB, "new.test")
	if s := push(t, c[1], c[2]); s.Full || s.Journalled != 0 {
		t.Errorf("a slave on the line: %+v", s)
	}
	if s := push(t, c[1], c[0]); s.Journalled != 2 {
		t.Errorf("the old master: %+v", s)
	}
	same(t, c[1], c[0])
	same(t, c[1], c[2])
	j, err := c[0].Journal(t.Context())
	if err != nil || len(j) != 2 {
		t.Fatalf("journal %+v, %v", j, err)
	}
	if j[0].Epoch != (config.Epoch{N: 1, Owner: 1}) || j[0].By != (config.Epoch{N: 2, Owner: 2}) || j[0].Who != "root" ||
		len(j[0].Changes) != 1 || !strings.Contains(string(j[0].Changes[0].New), "orphan.test") {
		t.Errorf("entry %+v", j[0])
	}
	if s := c[0].state(t); s.IsMaster() || s.JournalLen != 2 {
		t.Errorf("the old master is %+v", s)
	}
	if got := names(t, c[0].DB); !slices.Equal(got, []string{"a.test", "new.test"}) {
		t.Errorf("domains %v", got)
	}
	if err := c[0].CloseJournal(t.Context(), j[0].ID, db.Dropped, "tester", "not wanted"); err != nil {
		t.Fatal(err)
	}
	if err := c[0].CloseJournal(t.Context(), j[0].ID, db.Dropped, "tester", "not wanted"); !errors.Is(err, db.ErrNoSuch) {
		t.Errorf("dropped twice: %v", err)
	}
	if n := c[0].state(t).JournalLen; n != 1 {
		t.Errorf("%d left", n)
	}
}

// Two promote at once by force: the higher owner wins, and the other's commits are set aside.
func TestTwoForcedPromotesHaveOneWinner(t *testing.T) {
	c := cluster(t, 3)
	push(t, c[0], c[1])
	push(t, c[0], c[2])
	promote(t, c[1], config.Epoch{N: 2, Owner: 2})
	promote(t, c[2], config.Epoch{N: 2, Owner: 3})
	put(t, c[1].DB, "two.test")
	put(t, c[2].DB, "three.test")
	if s := push(t, c[2], c[1]); s.Journalled != 2 { // the epoch's own commit, and the domain
		t.Errorf("push %+v", s)
	}
	same(t, c[2], c[1])
	p := peer(t, c[2], 2)
	if _, err := c[1].Push(t.Context(), p, nil); !errors.Is(err, db.ErrNotMaster) {
		t.Errorf("the loser pushes: %v", err)
	}
	if s := push(t, c[2], c[0]); s.Full || s.Journalled != 0 {
		t.Errorf("push to one that knew neither: %+v", s)
	}
	same(t, c[2], c[0])
}

// A master whose store was rolled back, and which then made other commits under the same serials: what a slave had of the first ones
// is set aside.
func TestCommitsOfARolledBackMasterGoToTheJournal(t *testing.T) {
	c := cluster(t, 2)
	put(t, c[0].DB, "a.test")
	push(t, c[0], c[1])
	base := c[0].state(t).Position.Serial
	put(t, c[0].DB, "lost.test")
	push(t, c[0], c[1])
	rewind := []string{"BEGIN", "UPDATE node.position SET apply_xid = pg_current_xact_id(), apply_at = transaction_timestamp()",
		"DELETE FROM config.domain WHERE name = 'lost.test'", "DELETE FROM config.history WHERE serial > " + itoa(base),
		"DELETE FROM config.change WHERE serial > " + itoa(base),
		"UPDATE node.position SET apply_xid = NULL, serial = " + itoa(base) + ", rewrites = rewrites + 1", "COMMIT"}
	c[0].sql(t, strings.Join(rewind, ";"))
	put(t, c[0].DB, "other.test")
	put(t, c[0].DB, "more.test")
	if s := push(t, c[0], c[1]); s.Journalled != 1 {
		t.Errorf("push %+v", s)
	}
	same(t, c[0], c[1])
	j, err := c[1].Journal(t.Context())
	if err != nil || len(j) != 1 || !strings.Contains(string(j[0].Changes[0].New), "lost.test") {
		t.Errorf("journal %+v, %v", j, err)
	}
}

func TestAdoptTakesTheNewestPosition(t *testing.T) {
	c := cluster(t, 3)
	put(t, c[0].DB, "a.test")
	push(t, c[0], c[1])
	put(t, c[0].DB, "b.test")
	push(t, c[0], c[2])
	e := config.Epoch{N: 2, Owner: 2}
	if _, err := c[1].Promise(t.Context(), e); err != nil {
		t.Fatal(err)
	}
	p := peer(t, c[2], 2)
	s, err := p.Promise(t.Context(), e.N)
	if err != nil || s.Position != c[0].state(t).Position {
		t.Fatalf("promise %+v, %v", s, err)
	}
	moved := s.Position
	moved.Serial--
	if _, err := c[1].Adopt(t.Context(), p, c[1].state(t).Position, moved); !errors.Is(err, db.ErrMoved) {
		t.Errorf("at another position: %v", err)
	}
	if stats, err := c[1].Adopt(t.Context(), p, c[1].state(t).Position, s.Position); err != nil || stats.Rows == 0 || stats.Bytes == 0 || stats.Journalled != 0 {
		t.Fatalf("adopt %+v, %v", stats, err)
	}
	same(t, c[1], c[2])
	if st := c[1].state(t); st.IsMaster() || st.Promised != e {
		t.Errorf("adopted: %+v", st)
	}
	if _, err := c[1].BeginEpoch(t.Context(), config.Epoch{N: 3, Owner: 2}, db.ByForce, author); !errors.Is(err, db.ErrStale) {
		t.Errorf("an epoch that was not promised began: %v", err)
	}
	at, err := c[1].BeginEpoch(t.Context(), e, db.ByForce, author)
	if err != nil || at.Epoch != e || at.Serial != s.Position.Serial+1 || !c[1].state(t).IsMaster() {
		t.Errorf("begin: %v, %v", at, err)
	}
	if _, err := c[1].BeginEpoch(t.Context(), e, db.ByForce, author); !errors.Is(err, db.ErrStale) {
		t.Errorf("began twice: %v", err)
	}
	if st := push(t, c[1], c[2]); st.Full {
		t.Errorf("push %+v", st)
	}
	same(t, c[1], c[2])
}

// Adopting is also how a slave asks for its master's rows; and nobody adopts under another's promise.
func TestAdoptOnASlaveAndWithoutARight(t *testing.T) {
	c := cluster(t, 3)
	put(t, c[0].DB, "a.test")
	p := peer(t, c[0], 2)
	at := c[0].state(t).Position
	if _, err := c[1].Adopt(t.Context(), p, c[1].state(t).Position, at); err != nil {
		t.Fatal(err)
	}
	same(t, c[0], c[1])
	if _, err := c[1].Promise(t.Context(), config.Epoch{N: 2, Owner: 3}); err != nil {
		t.Fatal(err)
	}
	if _, err := c[1].Adopt(t.Context(), p, c[1].state(t).Position, at); !errors.Is(err, db.ErrStale) {
		t.Errorf("adopt after a promise to another: %v", err)
	}
}

func TestHeartbeatSaysInSync(t *testing.T) {
	c := cluster(t, 2)
	put(t, c[0].DB, "a.test")
	push(t, c[0], c[1])
	before := c[1].state(t).PushedAt
	wrong := c[0].state(t).Position
	wrong.Digest[0]++
	p := peer(t, c[1], 1)
	if err := p.Heartbeat(t.Context(), wrong); err != nil {
		t.Fatal(err)
	}
	if got := c[1].state(t).PushedAt; got != before {
		t.Errorf("in sync by another digest: %v, then %v", before, got)
	}
	if err := p.Heartbeat(t.Context(), c[0].state(t).Position); err != nil {
		t.Fatal(err)
	}
	if got := c[1].state(t).PushedAt; !got.After(before) {
		t.Errorf("pushed at %v, then %v", before, got)
	}
}

// A master that changed while a node was joining can take that node over, though it knows no members yet.
func TestANewMasterTakesOverAJoiningNode(t *testing.T) {
	c := cluster(t, 3)
	push(t, c[0], c[1])
	promote(t, c[1], config.Epoch{N: 2, Owner: 2})
	if s := push(t, c[1], c[2]); s.From.Serial != 0 {
		t.Errorf("push %+v", s)
	}
	same(t, c[1], c[2])
}
