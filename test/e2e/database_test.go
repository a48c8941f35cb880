package e2e

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"mailproxy/test/lab"
)

func TestMailFlowsWhilePostgreSQLIsKilledAgainAndAgain(t *testing.T) {
	t.Parallel()
	n := newNode(t, "n1.test")
	n.startHealthy()
	sink := newSink()
	sink.listen(t)
	n.must("mailproxy", "domain", "add", "example.test", "--to", sink.Address)
	n.takes("to@example.test")
	for i := range 3 {
		pid := n.postmaster()
		n.killPostgres()
		message := fmt.Sprint("killed ", i)
		n.mustSend("to@example.test", message)
		if sink.Count(message) != 1 {
			t.Errorf("%s did not arrive", message)
		}
		if out := n.must("mailproxy", "queue", "list"); out != "queue is empty\n" {
			t.Errorf("queue list: %s", out)
		}
		n.eventually(func() error {
			if now := n.postmaster(); now == 0 || now == pid {
				return errors.New("PostgreSQL was not started again")
			}
			if out, err := n.psql("SELECT 1"); err != nil {
				return errors.New(out)
			}
			return n.healthy()
		})
		n.must("mailproxy", "domain", "add", fmt.Sprintf("after-%d.test", i), "--to", sink.Address)
		n.takes(fmt.Sprintf("to@after-%d.test", i))
	}
}

// mount makes a small file system for the node's user; it goes with the test.
func (n *node) mount(dir, size string) {
	n.t.Helper()
	options := fmt.Sprintf("size=%s,mode=700,uid=65534", size) // nobody's
	if err := syscall.Mount("e2e", dir, "tmpfs", syscall.MS_NOSUID|syscall.MS_NODEV, options); err != nil {
		n.t.Fatal(err)
	}
	n.t.Cleanup(func() {
		n.crash()
		if err := syscall.Unmount(dir, syscall.MNT_DETACH); err != nil {
			n.t.Error(err)
		}
	})
}

// fill leaves room for so many octets on the file system of a directory, and gives how to make room again.
func (n *node) fill(dir string, leave int64) (free func()) {
	n.t.Helper()
	file := filepath.Join(dir, "filler")
	n.done(lab.Fill(file, leave))
	return func() {
		n.t.Helper()
		if err := os.Remove(file); err != nil {
			n.t.Fatal(err)
		}
	}
}

func TestMailFlowsWhilePostgreSQLsDiskIsFullAlsoAfterARestart(t *testing.T) {
	t.Parallel()
	n := newNode(t, "n1.test")
	data := n.local.PostgresDataDir()
	n.sh(fmt.Sprintf("mv %[1]s %[1]s.on-disk && mkdir %[1]s", data))
	n.mount(data, "256m")
	n.sh(fmt.Sprintf("cp -a %[1]s.on-disk/. %[1]s && rm -r %[1]s.on-disk", data))
	n.startHealthy()
	sink := newSink()
	sink.listen(t)
	n.must("pmgcm", "create")
	n.must("mailproxy", "domain", "add", "example.test", "--to", sink.Address)
	n.takes("to@example.test")

	free := n.fill(data, 0)
	many := filepath.Join(n.dir, "many.toml")
	var text strings.Builder
	fmt.Fprintf(&text, "[[domain]]\nname = \"example.test\"\nhosts = [%q]\n", sink.Address)
	for i := range 5000 {
		fmt.Fprintf(&text, "[[domain]]\nname = \"d%d.test\"\nhosts = [\"192.0.2.1\"]\n", i)
	}
	if err := os.WriteFile(many, []byte(text.String()), 0o644); err != nil {
		t.Fatal(err)
	}
	out, errs, code := n.run("mailproxy", "config", "apply", "--yes", many)
	if code != 1 || !strings.HasPrefix(errs, "mailproxy: ") || !strings.Contains(errs, "\nhint: ") {
		t.Errorf("config apply on a full disk: exit code %d\n%s%s", code, out, errs)
	}
	answers := func(when string) {
		t.Helper()
		message := "full, " + when
		n.mustSend("to@example.test", message)
		if sink.Count(message) != 1 {
			t.Errorf("%s: it did not arrive", message)
		}
		if out := n.must("mailproxy", "queue", "list"); out != "queue is empty\n" {
			t.Errorf("%s: queue list: %s", when, out)
		}
		if out, errs, _ := n.run("pmgcm", "status"); !strings.Contains(out, "n1.test(1)") {
			t.Errorf("%s: pmgcm status: %s%s", when, out, errs)
		}
	}
	answers("as it ran")
	named := func() error { // whether the server runs, runs and cannot be connected to, or cannot start
		if out, _, _ := n.run("pmgcm", "status"); !strings.Contains(out, "disk of "+data+" is full") {
			return fmt.Errorf("pmgcm status:\n%s", out)
		}
		return nil
	}
	if err := named(); err != nil {
		t.Error(err)
	}
	n.stop()
	n.start()
	n.eventually(named)
	answers("after a restart")

	free()
	n.eventually(n.healthy) // by itself
	n.must("mailproxy", "config", "apply", "--yes", many)
	n.takes("to@example.test")
	n.eventually(n.inSync)
}

func TestWithoutPostgreSQLsProgramsANodeSaysWhichPackageIsMissing(t *testing.T) {
	t.Parallel()
	n := newNode(t, "n1.test")
	n.startHealthy()
	n.must("pmgcm", "create")
	sink := newSink()
	sink.listen(t)
	n.must("mailproxy", "domain", "add", "example.test", "--to", sink.Address)
	n.takes("to@example.test")
	n.stop()
	b, err := os.ReadFile(n.file)
	if err != nil {
		t.Fatal(err)
	}
	const missing = "bin = \"/nonexistent\""
	text := strings.Replace(string(b), "#bin = \"/usr/lib/postgresql/15/bin\"", missing, 1)
	if !strings.Contains(text, missing) {
		t.Fatalf("no place for bin in\n%s", b)
	}
	if err := os.WriteFile(n.file, []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
	n.start()
	n.mustSend("to@example.test", "without programs")
	n.eventually(func() error {
		out, _, code := n.run("pmgcm", "status")
		if code != 3 || !strings.Contains(out, "postgresql-15") || !strings.Contains(out, "  remedy: ") {
			return fmt.Errorf("pmgcm status: exit code %d\n%s", code, out)
		}
		return nil
	})
	if out := n.must("mailproxy", "queue", "list"); out != "queue is empty\n" {
		t.Errorf("queue list: %s", out)
	}
}
