package main

import (
	"fmt"
	"strings"
	"testing"
)

// join makes slave a member of master's cluster, by the command that join-cmd prints.
func join(t *testing.T, master, slave *testNode) {
	t.Helper()
	out, errs, code := master.run("pmgcm", "join-cmd")
	if code != 0 {
		t.Fatalf("pmgcm join-cmd: %d %s%s", code, out, errs)
	}
	var words []string
	for line := range strings.Lines(out) {
		if rest, ok := strings.CutPrefix(strings.TrimSpace(line), "pmgcm "); ok {
			words = strings.Fields(rest)
		}
	}
	if out, errs, code := slave.run("pmgcm", words...); code != 0 {
		t.Fatalf("pmgcm %s: %d %s%s", strings.Join(words, " "), code, out, errs)
	}
}

func TestOnASlaveTheCommandsSayWhereTheMasterIs(t *testing.T) {
	master, slave := newNode(t), newNode(t, "--name", "n2.test")
	for _, n := range []*testNode{master, slave} {
		n.start()
		n.waitHealthy()
	}
	if out, errs, code := master.run("pmgcm", "create"); code != 0 {
		t.Fatalf("pmgcm create: %d %s%s", code, out, errs)
	}
	master.must("domain", "add", "example.test", "--to", freePort(t))
	join(t, master, slave)
	eventually(t, func() error { return slave.tryMail("to@example.test") })
	if out := slave.must("domain", "list"); !strings.Contains(out, "example.test") {
		t.Errorf("domain list: %s", out)
	}
	before := master.must("config", "show")
	for _, c := range [][]string{
		{"domain", "add", "b.test", "--to", "192.0.2.1", "--comment", "two words"}, {"setting", "set", "max_errors", "3"},
		{"network", "add", "10.0.0.0/8"}, {"transport", "add", "t", "--mx"}, {"domain", "remove", "example.test"},
		{"config", "apply", "--yes", "/dev/null"},
	} {
		_, errs, code := slave.run("mailproxy", append([]string{"--config", slave.file}, c...)...)
		words := strings.ReplaceAll(strings.Join(c, " "), "two words", "'two words'")
		want := fmt.Sprintf("mailproxy: not the master: configuration is changed on the master, n1.test (CID 1, %s)\nhint: run there: mailproxy %s\n",
			master.local.TunnelAddress(), words)
		if code != 1 || errs != want {
			t.Errorf("exit code %d\ngot  %s\nwant %s", code, errs, want)
		}
	}
	if after := master.must("config", "show"); after != before {
		t.Errorf("the master has now\n%s", after)
	}
	master.must("setting", "set", "queue_life", "2d")
	eventually(t, func() error {
		if out := slave.must("setting", "get", "queue_life"); out != "2d\n" {
			return fmt.Errorf("setting get: %s", out)
		}
		return nil
	})
	slave.stop()
	master.stop()
}
