//go:build lab

package e2e

import (
	"fmt"
	"os"
	"regexp"
	"strconv"
	"testing"

	"mailproxy/test/lab"
)

// sql gives what the node's own PostgreSQL says to a statement.
func (n *node) sql(statement string) string {
	n.t.Helper()
	out, err := n.SQL(statement)
	if err != nil {
		n.t.Fatalf("%s: %v\n%s", statement, err, out)
	}
	return out
}

// resumed is in the log of a push that has gone on where others broke.
var resumed = regexp.MustCompile(`"resumed":([0-9]+),[^\n]*"message":"push.done"`)

// A node joins over a thin line, which breaks twice, and once its PostgreSQL is killed. Nothing of it shows before all is there.
func TestScenarioAJoinOverALineThatBreaksGoesOn(t *testing.T) {
	const rows = 60_000
	master, slave := newHost(t, lab.HostOptions{Name: "n1.test"}), newHost(t, lab.HostOptions{Name: "n2.test"})
	master.startHealthy()
	master.must("pmgcm", "create")
	master.sql(fmt.Sprintf(`INSERT INTO config.domain (name, hosts, comment) SELECT 'd' || i || '.thin.test', '{192.0.2.1:25}', md5(i::text) || sha256(i::text::bytea)
		FROM generate_series(1, %d) i`, rows))
	slave.startHealthy()
	slave.done(slave.Thin("2mbit"))
	join := slave.command("pmgcm", master.joinArgs()...)
	slave.done(join.Start())
	had := 0
	for i := range 3 {
		slave.eventually(func() error {
			n, _ := strconv.Atoi(slave.sql("SELECT coalesce(sum(upto), 0) FROM node.kept")) // a number
			if n <= had && slave.sql("SELECT count(*) FROM config.domain") == "0" {         // on a fast machine it may be through before
				return fmt.Errorf("%d rows are kept, and %d were before", n, had)
			}
			had = max(had, n)
			return nil
		})
		if i == 1 {
			slave.killPostgres()
			slave.eventually(slave.healthy)
		} else {
			slave.cutOff()
			slave.eventually(func() error {
				if n := slave.sql("SELECT count(*) FROM pg_stat_activity WHERE usename ~ '^push_'"); n != "0" {
					return fmt.Errorf("%s sessions of the master are open still", n)
				}
				return nil
			})
			slave.heal()
		}
		if n := slave.sql("SELECT count(*) FROM config.domain"); n != "0" && n != strconv.Itoa(rows) { // it goes on meanwhile
			t.Errorf("%s domains show", n)
		}
	}
	_ = join.Wait() // it may have given up
	slave.eventually(slave.inSync)
	if n := slave.sql("SELECT count(*) FROM config.domain"); n != strconv.Itoa(rows) {
		t.Errorf("%s domains", n)
	}
	log, err := os.ReadFile(master.LogFile())
	master.done(err)
	m := resumed.FindSubmatch(log)
	if m == nil {
		t.Fatal("no push went on where another broke")
	}
	if n, _ := strconv.Atoi(string(m[1])); n < had/2 { // digits
		t.Errorf("%d rows were there still, of %d", n, had)
	}
}
