package e2e

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"mailproxy/internal/testbin"
)

// futureSQL is what the next version of these programs brings: a column and a table that today's do not know.
const futureSQL = `-- +goose Up
ALTER TABLE config.domain ADD COLUMN future text;
CREATE TABLE config.future (name text PRIMARY KEY, value text NOT NULL);
`

// futureVersion is what they call themselves.
const futureVersion = "99.0"

// futurePrograms builds them from today's source, with one migration more.
func futurePrograms(t *testing.T) string {
	t.Helper()
	dir, err := shortDir()
	if err != nil {
		t.Fatal(err)
	}
	migrations, err := filepath.Abs(filepath.Join("..", "..", "db", "migrations"))
	if err != nil {
		t.Fatal(err)
	}
	file, overlay := filepath.Join(dir, "future.sql"), filepath.Join(dir, "overlay.json")
	text, err := json.Marshal(map[string]any{"Replace": map[string]string{filepath.Join(migrations, "09999_future.sql"): file}})
	if err == nil {
		err = os.WriteFile(file, []byte(futureSQL), 0o644)
	}
	if err == nil {
		err = os.WriteFile(overlay, text, 0o644)
	}
	if err != nil {
		t.Fatal(err)
	}
	bin, err := testbin.BuildWith([]string{"-overlay", overlay, "-ldflags", "-X mailproxy/internal/version.Version=" + futureVersion}, "mailproxy", "pmgcm")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(bin) })
	return bin
}

// upgrade installs other programs on the node, and restarts its daemon, as an administrator does.
func (n *node) upgrade(bin string) {
	n.t.Helper()
	n.stop()
	n.done(n.Install(bin))
	n.startHealthy()
	if out := n.must("mailproxy", "--version"); !strings.Contains(out, futureVersion) {
		n.t.Fatalf("%s is upgraded, and has %s", n.name, out)
	}
}

// finds gives nil where a query on the node's own PostgreSQL gives that.
func (n *node) finds(sql, want string) error {
	if got, err := n.psql(sql); err != nil || got != want {
		return fmt.Errorf("%s: %s: %q, %v, want %q", n.name, sql, got, err, want)
	}
	return nil
}

// A cluster is upgraded one node at a time, in the order that is right and in the one that is wrong: nothing is lost, and mail goes on.
func TestAClusterOfTwoVersions(t *testing.T) {
	t.Parallel()
	c := newCluster(t, 3)
	master, early, late := c[0], c[1], c[2]
	sink := newSink()
	sink.listen(t)
	bin := futurePrograms(t)
	addDomain := func(name string) {
		t.Helper()
		master.must("mailproxy", "domain", "add", name, "--to", sink.Address)
	}
	domains := func(names ...string) (sql, want string) {
		return "SELECT string_agg(name, ' ' ORDER BY name) FROM config.domain", strings.Join(names, " ")
	}

	// A slave that is newer than the master is pushed to, changes and whole tables.
	early.upgrade(bin)
	addDomain("a.test")
	master.must("pmgcm", "status", "--wait", "--timeout", "60s")
	master.must("pmgcm", "sync", "--push", "2", "--full", "--yes")
	if err := early.finds(domains("a.test")); err != nil {
		t.Error(err)
	}
	early.eventually(early.inSync)
	if out, _, code := master.run("pmgcm", "status", "--long"); code != 0 || !strings.Contains(out, futureVersion) || strings.Contains(out, "upgrade mailproxy") {
		t.Errorf("with a slave that is newer: exit code %d\n%s", code, out)
	}
	late.takes("to@a.test")

	// The master is newer than a slave: that one is not pushed to, and whoever asks is told.
	before := late.report()
	master.upgrade(bin)
	addDomain("b.test")
	master.eventually(func() error {
		_, err := master.psql("UPDATE config.domain SET future = 'x' WHERE name = 'b.test'; INSERT INTO config.future VALUES ('a', 'b')")
		return err // until it holds its lease again
	})
	early.eventually(func() error {
		return early.finds("SELECT domain.future || value FROM config.domain, config.future WHERE domain.future = 'x'", "xb")
	})
	for _, n := range c {
		n.eventually(func() error {
			out, _, code := n.run("pmgcm", "status", "--long")
			if code != 3 || !strings.Contains(out, "upgrade mailproxy on node 3;") || strings.Contains(out, "upgrade mailproxy on node 2") {
				return fmt.Errorf("status on %s: exit code %d\n%s", n.name, code, out)
			}
			return nil
		})
	}
	if _, errs, code := master.run("pmgcm", "sync", "--push", "3", "--full", "--yes"); code != 1 || !strings.Contains(errs, "older") {
		t.Errorf("a push to a slave that is older, by hand: exit code %d, %s", code, errs)
	}

	// It keeps what it had, and its mail.
	if err := late.finds(domains("a.test")); err != nil {
		t.Error(err)
	}
	if after := late.report(); after.Nodes[2].Position != before.Nodes[2].Position {
		t.Errorf("it was at %v, and is at %v", before.Nodes[2].Position, after.Nodes[2].Position)
	}
	late.mustSend("to@a.test", "to one that waits for its upgrade")
	late.stop()
	late.start()
	late.mustSend("to@a.test", "the same after a restart")
	if sink.Count("to one that waits for its upgrade") != 1 || sink.Count("the same after a restart") != 1 {
		t.Error("mail has not arrived")
	}

	// Upgraded, it is brought up by the master without a command.
	late.upgrade(bin)
	late.eventually(late.inSync)
	if err := late.finds(domains("a.test", "b.test")); err != nil {
		t.Error(err)
	}
	if err := late.finds("SELECT domain.future || value FROM config.domain, config.future WHERE domain.future = 'x'", "xb"); err != nil {
		t.Error(err)
	}
	late.takes("to@b.test")
}
