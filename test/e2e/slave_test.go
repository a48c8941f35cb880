package e2e

import (
	"fmt"
	"strings"
	"testing"
	"time"
)

func TestWhatASlaveMayNotDoInTheMastersDatabase(t *testing.T) {
	t.Parallel()
	c := newCluster(t, 2)
	master, slave := c[0], c[1]
	master.must("mailproxy", "domain", "add", "example.test", "--to", "127.0.0.1")
	before := master.must("mailproxy", "config", "show")
	for _, login := range [][]string{
		{"-U", "postgres", "-d", "mailproxy"}, {"-U", "mailproxy", "-d", "mailproxy"}, {"-U", "push_1", "-d", "postgres"},
		{"-d", "user=root dbname=template1 options='-c session_replication_role=replica -c role=mailproxy'"},
	} {
		// Whoever it says that it is, it is the peer; and whatever database it asks for, it is the node's.
		who, err := slave.peerSQL(1, login, "SELECT session_user, current_user, current_database(), current_setting('session_replication_role')")
		if err != nil || who != "peer_2|peer_2|mailproxy|origin" {
			t.Errorf("psql %s is %s, %v", strings.Join(login, " "), who, err)
		}
		for _, sql := range []string{
			"UPDATE config.domain SET comment = 'x'", "INSERT INTO config.setting VALUES ('max_errors', '1')", "DELETE FROM config.node",
			"TRUNCATE config.domain", "SELECT * FROM config.secret", "SELECT * FROM config.secret_key", "SELECT * FROM config.domain", "SELECT * FROM config.token",
			"SET ROLE mailproxy", "SET ROLE push_2", "SET SESSION AUTHORIZATION mailproxy", "SET session_replication_role = replica",
			"COPY (SELECT 1) TO PROGRAM 'id'", "CREATE TEMP TABLE x (a int)", "CREATE TABLE public.x (a int)",
			"SELECT pg_read_file('/etc/passwd')", "UPDATE node.position SET promised_n = 9",
		} {
			if out, err := slave.peerSQL(1, login, sql); err == nil || !strings.Contains(out, "ERROR:  42501: ") {
				t.Errorf("psql %s: %s: %s, %v", strings.Join(login, " "), sql, out, err)
			}
		}
	}
	if out, err := slave.peerSQL(1, []string{"-d", "user=postgres replication=database"}, "IDENTIFY_SYSTEM"); err == nil ||
		!strings.Contains(out, "replication is not open to peers") {
		t.Errorf("replication: %s, %v", out, err)
	}
	if out, err := slave.peerSQL(1, []string{"-U", "any"}, "SELECT count(*) FROM node.position()"); err != nil || out != "1" {
		t.Errorf("what it may: %s, %v", out, err)
	}
	if after := master.must("mailproxy", "config", "show"); after != before {
		t.Errorf("the master had\n%sand has\n%s", before, after)
	}
	if err := master.inSync(); err != nil {
		t.Error(err)
	}
}

// driftPatience is how soon a changed row must show without being asked for.
const driftPatience = 60 * time.Second

func TestARowChangedByHandOnASlaveIsRefusedOrSeen(t *testing.T) {
	t.Parallel()
	c := newCluster(t, 2)
	master, slave := c[0], c[1]
	sink := newSink()
	sink.listen(t)
	master.must("mailproxy", "domain", "add", "example.test", "--to", sink.Address)
	slave.takes("to@example.test")

	for _, sql := range []string{"UPDATE config.domain SET comment = 'by hand'", "DELETE FROM config.domain", "TRUNCATE config.domain",
		"INSERT INTO config.setting VALUES ('max_errors', '1')"} {
		if out, err := slave.psql(sql); err == nil || !strings.Contains(out, "MP001") {
			t.Errorf("%s: %s, %v", sql, out, err)
		}
	}
	if err := master.inSync(); err != nil {
		t.Error(err)
	}
	if out, _, code := master.run("pmgcm", "status", "--verify"); code != 0 {
		t.Errorf("after what was refused: exit code %d\n%s", code, out)
	}

	const untriggered = "SET session_replication_role = replica; UPDATE config.domain SET comment = comment || 'by hand'"
	drifted := func(flags ...string) error {
		out, _, code := master.run("pmgcm", append([]string{"status"}, flags...)...)
		if code != 3 || !strings.Contains(out, "n2.test(2): rows were changed behind the cluster's back") || !strings.Contains(out, "remedy: `pmgcm sync --pull`") {
			return fmt.Errorf("status %v: exit code %d\n%s", flags, code, out)
		}
		return nil
	}
	if out, err := slave.psql(untriggered); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	changed := time.Now()
	master.eventually(func() error { return drifted() })
	if took := time.Since(changed); took > driftPatience+5*time.Second {
		t.Errorf("it shows after %v", took)
	}
	slave.must("pmgcm", "sync", "--pull", "--yes")
	master.eventually(master.inSync)

	if out, err := slave.psql(untriggered); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	if err := drifted("--verify"); err != nil {
		t.Error(err)
	}
	slave.must("pmgcm", "sync", "--pull", "--yes")
	if out, _, code := master.run("pmgcm", "status", "--verify"); code != 0 {
		t.Errorf("after sync: exit code %d\n%s", code, out)
	}
	if out, err := slave.psql("SELECT comment FROM config.domain"); err != nil || strings.Contains(out, "by hand") {
		t.Errorf("after sync: comment %q, %v", out, err)
	}
}
