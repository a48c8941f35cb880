package db_test

import (
	"context"
	"errors"
	"slices"
	"testing"
	"time"

	"mailproxy/config"
	"mailproxy/db"
	"mailproxy/internal/pgtest"
)

func (n *node) hasLease(t *testing.T) bool {
	t.Helper()
	has, err := n.HasLease(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	return has
}

// tryPut commits a domain, and says how that went.
func (n *node) tryPut(t *testing.T, name string) error {
	t.Helper()
	_, err := n.Commit(t.Context(), author, func(ctx context.Context, tx *db.Tx) error {
		return tx.PutDomain(ctx, config.Domain{Name: name, Hosts: []string{"127.0.0.1:25"}})
	}, nil)
	return err
}

func TestAMasterWithOtherMembersWritesOnlyUnderALease(t *testing.T) {
	c := cluster(t, 3)
	c[0].sql(t, "UPDATE node.position SET lease_waived = false")
	if err := c[0].tryPut(t, "none.test"); !errors.Is(err, db.ErrNoLease) || c[0].hasLease(t) {
		t.Errorf("without a lease: %v", err)
	}
	if err := c[0].trySQL("INSERT INTO config.setting VALUES ('a', 'b')"); code(err) != "MP011" {
		t.Errorf("psql without a lease: %v", err)
	}
	for _, x := range []struct {
		name  string
		age   time.Duration
		holds bool
	}{
		{"a majority heard just now", 0, true},
		{"a majority heard a while ago", db.LeaseTerm - 5*time.Second, true},
		{"a majority heard too long ago", db.LeaseTerm + time.Second, false},
		{"a clock that was set back since", -time.Hour, false},
	} {
		t.Run(x.name, func(t *testing.T) {
			if err := c[0].RenewLease(t.Context(), c[0].state(t).Position.Epoch, x.age, true); err != nil {
				t.Fatal(err)
			}
			if err := c[0].tryPut(t, "some.test"); (err == nil) != x.holds || c[0].hasLease(t) != x.holds {
				t.Errorf("commit: %v", err)
			}
		})
	}
}

func TestASingleMemberNeedsNoLease(t *testing.T) {
	c := cluster(t, 1)
	c[0].sql(t, "UPDATE node.position SET lease_waived = false")
	if err := c[0].tryPut(t, "alone.test"); err != nil {
		t.Error(err)
	}
	single := &node{DB: open(t)}
	if err := single.tryPut(t, "single.test"); err != nil {
		t.Error(err)
	}
}

func TestAForcedEpochGoesWithoutLeaseUntilAMajorityIsHeard(t *testing.T) {
	for _, mandate := range []db.Mandate{db.ByMajority, db.ByForce} {
		t.Run(string(mandate), func(t *testing.T) {
			c := cluster(t, 3)
			push(t, c[0], c[1])
			e := config.Epoch{N: 2, Owner: 2}
			if _, err := c[1].Promise(t.Context(), e); err != nil {
				t.Fatal(err)
			}
			if _, err := c[1].BeginEpoch(t.Context(), e, mandate, author); err != nil {
				t.Fatal(err)
			}
			if !c[1].hasLease(t) {
				t.Error("an epoch that has just begun has no lease")
			}
			past := func(heardIn config.Epoch, majority bool) {
				t.Helper()
				if err := c[1].RenewLease(t.Context(), heardIn, time.Hour, majority); err != nil {
					t.Fatal(err)
				}
			}
			past(e, false)
			past(config.Epoch{N: 1, Owner: 2}, true) // it did not know of this epoch
			if c[1].hasLease(t) != (mandate == db.ByForce) {
				t.Errorf("after its term: %v", c[1].hasLease(t))
			}
			past(e, true)
			if c[1].hasLease(t) {
				t.Error("a majority was heard, and that was long ago")
			}
		})
	}
}

func TestALeaseDoesNotOutliveACrashOfTheServer(t *testing.T) {
	dsn := pgtest.New(t)
	openDSN(t, dsn)
	if got := one[string](t, dsn, "SELECT relpersistence::text FROM pg_class WHERE oid = 'node.lease'::regclass"); got != "u" {
		t.Errorf("persistence %q, want unlogged", got)
	}
}

// What an adoption costs follows the commits that are missing; where they do not lead there, the whole is taken.
func TestAdoptSendsOnlyWhatIsMissing(t *testing.T) {
	c := cluster(t, 3)
	put(t, c[0].DB, "a.test")
	push(t, c[0], c[1])
	push(t, c[0], c[2])
	put(t, c[0].DB, "b.test")
	adopt := func() db.PushStats {
		t.Helper()
		stats, err := c[1].Adopt(t.Context(), peer(t, c[0], 2), c[1].state(t).Position, c[0].state(t).Position)
		if err != nil {
			t.Fatal(err)
		}
		same(t, c[0], c[1])
		return stats
	}
	if s := adopt(); s.Full || s.Rows != 3 { // the domain, its change, its commit
		t.Errorf("one commit behind: %+v", s)
	}
	put(t, c[0].DB, "c.test")
	c[1].sql(t, "SET session_replication_role = replica", "DELETE FROM config.domain WHERE name = 'a.test'")
	if _, _, err := c[1].Verify(t.Context()); err != nil {
		t.Fatal(err)
	}
	if s := adopt(); !s.Full {
		t.Errorf("drifted: %+v", s)
	}
	if _, err := c[2].Adopt(t.Context(), peer(t, c[0], 3), c[2].state(t).Position, c[0].state(t).Position); err != nil {
		t.Fatal(err)
	}
}

func TestPromisesAndCommitsAreSyncedWhateverTheServersDefault(t *testing.T) {
	dsn := pgtest.New(t)
	openDSN(t, dsn)
	(&node{dsn: dsn}).sql(t, "SELECT node.harden_database()")
	if got := one[[]string](t, dsn, `SELECT coalesce(array_agg(c), '{}') FROM pg_db_role_setting s JOIN pg_database b ON b.oid = s.setdatabase,
		unnest(s.setconfig) c WHERE b.datname = current_database() AND s.setrole = 0`); !slices.Contains(got, "synchronous_commit=on") {
		t.Errorf("settings of the database: %v", got)
	}
}
