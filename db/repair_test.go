package db_test

import (
	"context"
	"slices"
	"strings"
	"testing"

	"mailproxy/config"
	"mailproxy/db"
)

// byHand runs statements with all triggers off, and lets the node see what they did.
func (n *node) byHand(t *testing.T, statements ...string) {
	t.Helper()
	n.sql(t, append([]string{"SET session_replication_role = replica"}, statements...)...)
	if _, _, err := n.Verify(t.Context()); err != nil {
		t.Fatal(err)
	}
}

func TestRowsChangedByHandGoToTheJournalBeforeTheyAreOverwritten(t *testing.T) {
	c := cluster(t, 2)
	put(t, c[0].DB, "kept.test", "changed.test", "gone.test", "newer.test")
	push(t, c[0], c[1])
	c[1].byHand(t, "UPDATE config.domain SET comment = 'by hand' WHERE name IN ('changed.test', 'newer.test')",
		"DELETE FROM config.domain WHERE name = 'gone.test'", "INSERT INTO config.domain (name) VALUES ('mine.test')")
	commit(t, c[0].DB, func(ctx context.Context, tx *db.Tx) error {
		return tx.PutDomain(ctx, config.Domain{Name: "newer.test", Comment: "by the master"})
	})
	if s := push(t, c[0], c[1]); !s.Full || s.Journalled != 1 {
		t.Errorf("push: %+v", s)
	}
	same(t, c[0], c[1])
	j, err := c[1].Journal(t.Context())
	if err != nil || len(j) != 1 {
		t.Fatalf("journal: %+v, %v", j, err)
	}
	got := map[string]db.Change{}
	for _, ch := range j[0].Changes {
		got[ch.Op+" "+string(ch.Key)] = ch
	}
	// newer.test is not among them: the master's commit is why that row is another now.
	if len(got) != 3 || !strings.Contains(string(got[`update {"name": "changed.test"}`].New), "by hand") ||
		got[`insert {"name": "mine.test"}`].New == nil || got[`delete {"name": "gone.test"}`].Old == nil {
		t.Errorf("changes: %+v", j[0].Changes)
	}
	if s := push(t, c[0], c[1]); s.Journalled != 0 {
		t.Errorf("pushed again: %+v", s)
	}
}

func TestRowsChangedByHandOnAMasterAreKnownUntilItCommits(t *testing.T) {
	c := cluster(t, 2)
	put(t, c[0].DB, "a.test", "b.test")
	push(t, c[0], c[1])
	drifted := func(want bool) {
		t.Helper()
		if got, err := c[0].Drifted(t.Context()); err != nil || got != want {
			t.Errorf("drifted: %v, %v", got, err)
		}
	}
	drifted(false)
	c[0].byHand(t, "UPDATE config.domain SET comment = 'by hand' WHERE name = 'a.test'")
	drifted(true)
	before := c[0].state(t).Position
	after := commit(t, c[0].DB, func(ctx context.Context, tx *db.Tx) error { return tx.Renew(ctx) })
	if after.Serial != before.Serial+1 {
		t.Errorf("from %v to %v", before, after)
	}
	drifted(false)
	if s := push(t, c[0], c[1]); s.Journalled != 0 {
		t.Errorf("push: %+v", s)
	}
	same(t, c[0], c[1])
	// Where another master overwrites them they go to the journal, as a slave's do.
	c[0].byHand(t, "DELETE FROM config.domain WHERE name = 'b.test'")
	promote(t, c[1], config.Epoch{N: 2, Owner: 2})
	if s := push(t, c[1], c[0]); s.Journalled != 1 {
		t.Errorf("push to the old master: %+v", s)
	}
	same(t, c[1], c[0])
	drifted(false)
}

func TestAPushThatOverwritesNothingLeavesTheJournalEmpty(t *testing.T) {
	c := cluster(t, 3)
	put(t, c[0].DB, "a.test")
	push(t, c[0], c[1])
	put(t, c[0].DB, "b.test")
	push(t, c[0], c[2])
	if s, err := c[0].PushFull(t.Context(), peer(t, c[1], 1), nil); err != nil || !s.Full || s.Journalled != 0 {
		t.Errorf("whole push to a slave that is behind: %+v, %v", s, err)
	}
	same(t, c[0], c[1])
	if s, err := c[0].PushFull(t.Context(), peer(t, c[1], 1), nil); err != nil || s.Rows == 0 || s.Journalled != 0 {
		t.Errorf("whole push to a slave in sync: %+v, %v", s, err)
	}
	// A former slave that commits has rows of its own right.
	promote(t, c[1], config.Epoch{N: 2, Owner: 2})
	put(t, c[1].DB, "c.test")
	promote(t, c[2], config.Epoch{N: 3, Owner: 3})
	if s := push(t, c[2], c[1]); s.Journalled != 2 { // its epoch's first commit, and the domain
		t.Errorf("push to the loser: %+v", s)
	}
}

// Of 100,000 domains and their history a pull takes what differs.
func TestAnAdoptionAfterDriftTakesTheTablesThatDiffer(t *testing.T) {
	c := cluster(t, 2)
	put(t, c[0].DB, "a.test", "b.test")
	commit(t, c[0].DB, func(ctx context.Context, tx *db.Tx) error {
		return tx.PutSetting(ctx, config.Setting{Name: "queue_life", Value: "2d"})
	})
	push(t, c[0], c[1])
	c[1].byHand(t, "DELETE FROM config.domain WHERE name = 'a.test'", "INSERT INTO config.network (prefix) VALUES ('10.0.0.0/8')")
	s, err := c[1].Adopt(t.Context(), peer(t, c[0], 2), c[1].state(t).Position, c[0].state(t).Position)
	if err != nil || !slices.Equal(s.Tables, []string{"domain", "network"}) || s.Rows != 2 || s.Journalled != 1 {
		t.Errorf("%+v, %v", s, err)
	}
	same(t, c[0], c[1])
}

func TestAClosedEntryStaysAndCountsNoMore(t *testing.T) {
	c := cluster(t, 2)
	put(t, c[0].DB, "a.test")
	push(t, c[0], c[1])
	c[1].byHand(t, "DELETE FROM config.domain")
	push(t, c[0], c[1])
	j, err := c[1].Journal(t.Context())
	if err != nil || len(j) != 1 || c[1].state(t).JournalLen != 1 {
		t.Fatalf("journal: %+v, %v", j, err)
	}
	if err := c[1].CloseJournal(t.Context(), j[0].ID, db.Dropped, "anna", "an accident"); err != nil {
		t.Fatal(err)
	}
	e, err := c[1].JournalEntry(t.Context(), j[0].ID)
	if err != nil || e.Outcome != db.Dropped || e.ClosedBy != "anna" || e.Reason != "an accident" || e.ClosedAt.IsZero() {
		t.Errorf("entry: %+v, %v", e, err)
	}
	if n := c[1].state(t).JournalLen; n != 0 {
		t.Errorf("%d open", n)
	}
}
