package main

import (
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/rs/zerolog"

	"mailproxy/db"
)

// opened gives a secret as the node's daemon reads it.
func (n *testNode) opened(name string) string {
	n.t.Helper()
	d, err := db.Open(db.Options{DSN: databaseDSN(n.local), NodeKey: nodeKey(n.local), Log: zerolog.Nop()})
	if err != nil {
		n.t.Fatal(err)
	}
	defer d.Close()
	value, err := d.Secret(n.t.Context(), name)
	if err != nil {
		n.t.Errorf("secret %s: %v", name, err)
	}
	return string(value)
}

// holds says which files below the node's directory have a text in them.
func (n *testNode) holds(text string) []string {
	n.t.Helper()
	var in []string
	err := filepath.WalkDir(n.dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil || !d.Type().IsRegular() {
			return nil //nolint:nilerr // a file that is gone by now holds nothing
		}
		if b, err := os.ReadFile(path); err == nil && strings.Contains(string(b), text) {
			in = append(in, path)
		}
		return nil
	})
	if err != nil {
		n.t.Fatal(err)
	}
	return in
}

// A secret that is set on a slave goes to the master and is opened on both, whatever its bytes; on neither it is in a log, a history, a
// file. A node that cannot open it says so in its status.
func TestASecretIsSetOnAnyNode(t *testing.T) {
	t.Parallel()
	master, slave := newNode(t), newNode(t, "--name", "n2.test")
	for _, n := range []*testNode{master, slave} {
		n.start()
		n.waitHealthy()
	}
	if out, errs, code := master.run("pmgcm", "create"); code != 0 {
		t.Fatalf("pmgcm create: %d %s%s", code, out, errs)
	}
	join(t, master, slave)
	value := "carried-hunter\x00\xff\xfe\n"
	file := filepath.Join(t.TempDir(), "value")
	if err := os.WriteFile(file, []byte(value), 0o600); err != nil {
		t.Fatal(err)
	}
	if out := slave.must("secret", "set", "--file", file, "dkim"); !strings.HasPrefix(out, "secret dkim set (configuration 1.1/") {
		t.Errorf("secret set: %s", out)
	}
	for _, n := range []*testNode{master, slave} {
		if got := n.opened("dkim"); got != value {
			t.Errorf("%s opens %q, want %q", n.local.Name, got, value)
		}
		if in := n.holds("carried-hunter"); in != nil {
			t.Errorf("%s: it stands in %q", n.local.Name, in)
		}
		if in := n.holds("dkim"); in == nil {
			t.Errorf("%s: its name stands nowhere", n.local.Name)
		}
		if strings.Contains(n.stderr.String(), "carried-hunter") {
			t.Errorf("%s has logged it:\n%s", n.local.Name, n.stderr)
		}
	}
	if history := master.must("config", "history", "--json"); !strings.Contains(history, "mailproxy secret set --file "+file+" dkim") ||
		strings.Contains(history, "hunter") {
		t.Errorf("history:\n%s", history)
	}
	// What the master refuses fails here the same way.
	if out, errs, code := slave.run("mailproxy", "secret", "remove", "none"); code != 1 || errs != "mailproxy: secret none: is not there\nhint: mailproxy secret list\n" {
		t.Errorf("secret remove: exit code %d, %s%s", code, out, errs)
	}

	key := filepath.Join(slave.local.KeyDir(), "node.key")
	text, err := os.ReadFile(key)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.Remove(key); err != nil {
		t.Fatal(err)
	}
	master.must("secret", "set", "smtp", "--file", file)
	eventually(t, func() error {
		out, _, code := slave.run("pmgcm", "status")
		if !strings.Contains(out, "this node cannot open 2 secrets, dkim the first: ") || !strings.Contains(out, "put keys/node.key back from a backup") {
			return fmt.Errorf("status: exit code %d\n%s", code, out)
		}
		return nil
	})
	if err := os.WriteFile(key, text, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Chown(key, ownerOf(t, slave.local.KeyDir()), -1); err != nil {
		t.Fatal(err)
	}
	master.must("secret", "remove", "smtp")
	eventually(t, func() error {
		if out, _, _ := slave.run("pmgcm", "status"); strings.Contains(out, "cannot open") {
			return fmt.Errorf("status:\n%s", out)
		}
		return nil
	})
}

func TestSecretsAreCarriedAsTheirInput(t *testing.T) {
	for _, args := range [][]string{{"secret", "set", "x", "--file", "-"}, {"secret", "remove", "x", "y"}} {
		if !mayCarry(args) {
			t.Errorf("%v is not carried", args)
		}
	}
	for _, args := range [][]string{
		{"secret", "set", "x", "--file", "/etc/shadow"}, {"secret", "set", "--file=/etc/shadow", "--file", "-"}, {"secret", "set", "x"},
		{"secret", "set", "x", "--file", "-", "--file=/etc/shadow"}, {"secret", "list"}, {"secret"},
	} {
		if mayCarry(args) {
			t.Errorf("%v is carried", args)
		}
	}
}

func ownerOf(t *testing.T, path string) int {
	t.Helper()
	info, err := os.Stat(path)
	if err != nil {
		t.Fatal(err)
	}
	return int(info.Sys().(*syscall.Stat_t).Uid)
}
