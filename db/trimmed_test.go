package db_test

import (
	"strings"
	"testing"

	"mailproxy/config"
	"mailproxy/db"
	"mailproxy/internal/pgtest"
)

// manyDomains makes as many commits as psql would, one after the other; psql's are commits as ours are.
func (n *node) manyDomains(t *testing.T, name string, count int) {
	t.Helper()
	n.sql(t, `DO $$ BEGIN FOR i IN 1..`+itoa(int64(count))+` LOOP
		INSERT INTO config.domain (name, hosts) VALUES ('`+name+`' || i || '.test', '{10.0.0.1:25}'); COMMIT; END LOOP; END $$`)
}

func (n *node) trimmed(t *testing.T) int64 {
	t.Helper()
	return one[int64](t, n.dsn, "SELECT count(*) FROM node.trimmed")
}

// More commits than the history keeps, made by a master that is cut off: the first of them are set aside too, with what they changed.
func TestCommitsThatWereTrimmedGoToTheJournal(t *testing.T) {
	c := cluster(t, 2)
	put(t, c[0].DB, "shared.test")
	push(t, c[0], c[1])
	base := c[0].state(t).Position.Serial
	c[0].manyDomains(t, "j", 1100)
	promote(t, c[1], config.Epoch{N: 2, Owner: 2})
	if s := push(t, c[1], c[0]); s.Journalled != 1100 {
		t.Errorf("%d commits were set aside", s.Journalled)
	}
	same(t, c[1], c[0])
	j, err := c[0].Journal(t.Context())
	if err != nil || len(j) != 1100 {
		t.Fatalf("journal of %d, %v", len(j), err)
	}
	for i, e := range j {
		want := "j" + itoa(int64(i+1)) + ".test"
		if e.Serial != base+int64(i)+1 || len(e.Changes) != 1 || !strings.Contains(string(e.Changes[0].New), `"`+want+`"`) {
			t.Fatalf("entry %d is not %s: %+v", i, want, e)
		}
	}
	// What is on the new master's line stays until the other members hold it, and is no part of the journal.
	if n, m := c[0].trimmed(t), one[int64](t, c[0].dsn, "SELECT count(*) FROM node.trimmed WHERE serial > "+itoa(base)); n == 0 || m != 0 {
		t.Errorf("%d trimmed commits, %d of them in the journal", n, m)
	}
}

func TestTrimmedCommitsAreForgottenUpToWhatAllHold(t *testing.T) {
	c := cluster(t, 2)
	base := c[0].state(t).Position
	c[0].manyDomains(t, "t", 1000)
	push(t, c[0], c[1])
	c[0].manyDomains(t, "u", 50)
	push(t, c[0], c[1])
	same(t, c[0], c[1])
	all := c[0].trimmed(t)
	if all < 50 || c[1].trimmed(t) != 0 {
		t.Fatalf("%d kept on the master, %d on a slave, which is not the one who trims", all, c[1].trimmed(t))
	}
	for _, s := range []struct {
		name string
		held config.Position
		left int64
	}{
		{"another epoch", config.Position{Epoch: config.Epoch{N: 2, Owner: 2}, Serial: base.Serial + 2000}, all},
		{"nothing more", config.Position{Epoch: base.Epoch}, all},
		{"a part", config.Position{Epoch: base.Epoch, Serial: base.Serial + 30}, 20},
		{"all", config.Position{Epoch: base.Epoch, Serial: base.Serial + 1050}, 0},
	} {
		if err := c[0].ForgetTrimmed(t.Context(), s.held); err != nil {
			t.Fatal(err)
		}
		if n := c[0].trimmed(t); n != s.left {
			t.Errorf("%s: %d are left, want %d", s.name, n, s.left)
		}
	}
	if n := one[int64](t, c[0].dsn, "SELECT count(*) FROM node.trimmed_change"); n != 0 {
		t.Errorf("changes of %d are left", n)
	}
	// A node that leaves, or is in no cluster, has nobody to keep them for.
	c[0].manyDomains(t, "v", 5)
	if n := c[0].trimmed(t); n != 5 {
		t.Errorf("%d of five are kept", n)
	}
	single := &node{dsn: c[0].dsn}
	single.sql(t, "UPDATE node.position SET cid = 0, cluster_id = '', epoch_n = 0, epoch_owner = 0, promised_n = 0, promised_owner = 0")
	single.manyDomains(t, "s", 5)
	if n := single.trimmed(t); n != 0 {
		t.Errorf("a single node keeps %d", n)
	}
}

// A backup has them, and with its identity a node can still set them aside; a single node has nobody to keep them for.
func TestTrimmedCommitsComeBackWithTheIdentity(t *testing.T) {
	c := cluster(t, 2)
	put(t, c[0].DB, "shared.test")
	push(t, c[0], c[1])
	c[0].manyDomains(t, "j", 1100)
	kept := c[0].trimmed(t)
	x := dump(t, c[0].DB, db.WithoutLogs)
	dsn := pgtest.New(t)
	single := &node{DB: openDSN(t, dsn), dsn: dsn}
	if _, err := single.RestoreSingle(t.Context(), x.params(), x.feed); err != nil {
		t.Fatal(err)
	}
	if n := single.trimmed(t); n != 0 {
		t.Errorf("a single node keeps %d", n)
	}
	back := restored(t, x)
	if n := back.trimmed(t); n != kept || n < 100 {
		t.Errorf("%d came back, %d were there", n, kept)
	}
	promote(t, c[1], config.Epoch{N: 2, Owner: 2})
	if s := push(t, c[1], back); s.Journalled != 1100 {
		t.Errorf("%d commits were set aside", s.Journalled)
	}
	if n := one[int64](t, back.dsn, "SELECT count(*) FROM node.journal_change WHERE tab = 'domain'"); n != 1100 {
		t.Errorf("with %d changes", n)
	}
	if err := back.Leave(t.Context(), db.LeaveParams{ClusterID: clusterID, NextKey: publicOf(nodeKey(9)), Author: author}); err != nil {
		t.Fatal(err)
	}
	if n := back.trimmed(t); n != 0 {
		t.Errorf("%d are left after a leave", n)
	}
}
