package db_test

import (
	"context"
	"errors"
	"testing"
	"testing/fstest"

	"mailproxy/config"
	"mailproxy/db"
)

// Two may push at once: the daemon, and `pmgcm sync` beside it. The slower one holds an older snapshot by then.
func TestAPushThatWasOvertakenTakesNothingBack(t *testing.T) {
	c := cluster(t, 2)
	put(t, c[0].DB, "a.test")
	push(t, c[0], c[1])
	put(t, c[0].DB, "b.test")
	overtaken := false
	_, err := c[0].Push(t.Context(), peer(t, c[1], 1), func(int64, int64) {
		if !overtaken {
			overtaken = true
			put(t, c[0].DB, "c.test")
			push(t, c[0], c[1])
		}
	})
	if !overtaken || err != nil {
		t.Errorf("overtaken %v: %v", overtaken, err)
	}
	if s := c[1].state(t); s.JournalLen != 0 {
		t.Errorf("%d commits of the master were set aside", s.JournalLen)
	}
	same(t, c[0], c[1])
}

// Two rounds may run at once on one node, each with the same promise; the one that comes second must not undo the reign of the first.
func TestAdoptIsRefusedOnceTheOwnEpochHasBegun(t *testing.T) {
	c := cluster(t, 3)
	put(t, c[0].DB, "a.test")
	push(t, c[0], c[1])
	at := c[0].state(t).Position
	e := config.Epoch{N: 2, Owner: 2}
	if _, err := c[1].Promise(t.Context(), e); err != nil {
		t.Fatal(err)
	}
	if _, err := c[1].BeginEpoch(t.Context(), e, db.ByForce, author); err != nil {
		t.Fatal(err)
	}
	put(t, c[1].DB, "b.test")
	before := c[1].state(t)
	if _, err := c[1].Adopt(t.Context(), peer(t, c[0], 2), before.Position, at); !errors.Is(err, db.ErrStale) {
		t.Errorf("adopt: %v", err)
	}
	if after := c[1].state(t); after != before {
		t.Errorf("from %+v to %+v", before, after)
	}
}

// While the rows of an older position are on their way to a node, a push may bring it further.
func TestAdoptTakesNothingBackThatCameMeanwhile(t *testing.T) {
	c := cluster(t, 3)
	compared := c[1].state(t).Position
	put(t, c[0].DB, "a.test")
	push(t, c[0], c[2])
	put(t, c[0].DB, "b.test")
	push(t, c[0], c[1])
	before := c[1].state(t)
	if _, err := c[1].Adopt(t.Context(), peer(t, c[2], 2), compared, c[2].state(t).Position); !errors.Is(err, db.ErrMoved) {
		t.Errorf("adopt: %v", err)
	}
	if after := c[1].state(t); after != before {
		t.Errorf("from %+v to %+v", before, after)
	}
}

// Values may be equal and yet not the same: the digest is over their text.
func TestAChangeToAnEqualValueIsACommitToo(t *testing.T) {
	c := cluster(t, 2)
	file := fstest.MapFS{"00900_extra.sql": {Data: []byte("-- +goose Up\nCREATE TABLE config.extra (a int PRIMARY KEY, d numeric, e jsonb);")}}
	for _, n := range c {
		if err := n.Migrate(context.Background(), file); err != nil {
			t.Fatal(err)
		}
	}
	c[0].sql(t, `INSERT INTO config.extra VALUES (1, 1.0, '[1.0]'), (2, NULL, NULL)`)
	push(t, c[0], c[1])
	for _, sql := range []string{"UPDATE config.extra SET d = 1.00 WHERE a = 1", "UPDATE config.extra SET e = '[1.00]' WHERE a = 1"} {
		before := c[0].state(t).Position
		c[0].sql(t, sql)
		if after := c[0].state(t).Position; after.Serial != before.Serial+1 || after.Digest == before.Digest {
			t.Errorf("%s: from %v %v to %v %v", sql, before, before.Digest, after, after.Digest)
		}
		if s := push(t, c[0], c[1]); s.Full {
			t.Errorf("%s: %+v", sql, s)
		}
		same(t, c[0], c[1])
	}
	before := c[0].state(t).Position
	c[0].sql(t, "UPDATE config.extra SET d = d, e = e")
	if after := c[0].state(t).Position; after != before {
		t.Errorf("an update that changed nothing: from %v to %v", before, after)
	}
}

// What a session says about the text of values must not make two keys of one.
func TestSettingsOfASessionDoNotChangeWhatIsRecorded(t *testing.T) {
	c := cluster(t, 2)
	push(t, c[0], c[1])
	c[0].sql(t, `INSERT INTO config.token (hash, created_at, expires_at) VALUES ('\x00ff', now(), now())`,
		`SET bytea_output = 'escape'`, `SET intervalstyle = 'iso_8601'`, `SET extra_float_digits = -3`,
		`UPDATE config.token SET used_by = 'x'`)
	if s := push(t, c[0], c[1]); s.Full {
		t.Errorf("%+v", s)
	}
	same(t, c[0], c[1])
}

// History goes on naming a table that a later version has dropped.
func TestADeltaPassesOverTablesThatAreGone(t *testing.T) {
	c := cluster(t, 2)
	steps := fstest.MapFS{"00900_extra.sql": {Data: []byte("-- +goose Up\nCREATE TABLE config.extra (a int PRIMARY KEY);")}}
	for _, n := range c {
		if err := n.Migrate(t.Context(), steps); err != nil {
			t.Fatal(err)
		}
	}
	push(t, c[0], c[1])
	c[0].sql(t, "INSERT INTO config.extra VALUES (1)", "DELETE FROM config.extra")
	put(t, c[0].DB, "a.test")
	steps["00901_gone.sql"] = &fstest.MapFile{Data: []byte("-- +goose Up\nDROP TABLE config.extra;")}
	for _, n := range c {
		if err := n.Migrate(t.Context(), steps); err != nil {
			t.Fatal(err)
		}
	}
	if s := push(t, c[0], c[1]); s.Full {
		t.Errorf("%+v", s)
	}
	same(t, c[0], c[1])
}
