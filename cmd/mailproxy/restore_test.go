package main

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"mailproxy/internal/testbin"
)

// backedUp makes a backup of a node's cluster of one, with a domain, and gives the file and that of its passphrase.
func (n *testNode) backedUp() (file, pass string) {
	n.t.Helper()
	file, pass = filepath.Join(n.dir, "b.age"), filepath.Join(n.dir, "pass")
	if err := os.WriteFile(pass, []byte("correct horse battery staple\n"), 0o600); err != nil {
		n.t.Fatal(err)
	}
	if out, errs, code := n.run("pmgcm", "create"); code != 0 {
		n.t.Fatalf("pmgcm create: %d %s%s", code, out, errs)
	}
	n.must("domain", "add", "example.test", "--to", "192.0.2.1:25")
	n.must("backup", file, "--passphrase-file", pass)
	return file, pass
}

// traced runs a command of the node under strace.
func (n *testNode) traced(options []string, args ...string) (out string, killed bool) {
	n.t.Helper()
	trace := append([]string{"-f", "-qq", "-o", filepath.Join(n.dir, "trace")}, options...)
	cmd := exec.Command("strace", append(append(trace, testbin.Path(n.t, "mailproxy")), args...)...)
	cmd.Env = append(os.Environ(), "MAILPROXY_CONFIG="+n.file, "SUDO_USER=")
	b, err := cmd.CombinedOutput()
	if err != nil && cmd.ProcessState.Sys().(syscall.WaitStatus).Signal() != syscall.SIGKILL {
		n.t.Fatalf("strace mailproxy %s: %v: %s (Debian package strace)", strings.Join(args, " "), err, b)
	}
	return string(b), err != nil
}

// A restore is killed at each step of the keys, and all along its way to the database. Between the two the node says so.
func TestARestoreThatIsKilledIsRunAgain(t *testing.T) {
	t.Parallel()
	lost, fresh := newNode(t), newNode(t)
	for _, n := range []*testNode{lost, fresh} {
		n.start()
		n.waitHealthy()
	}
	file, pass := lost.backedUp()
	fresh.must("domain", "add", "own.test", "--to", "192.0.2.1:25")
	restore := []string{"restore", file, "--identity", "--yes", "--passphrase-file", pass}
	key := filepath.Join("keys", "node.key")

	at := map[string]int{}
	kill := func(call string, when int) bool {
		_, killed := fresh.traced([]string{"-e", "trace=" + call, "-e", fmt.Sprintf("inject=%s:signal=SIGKILL:when=%d", call, when)}, restore...)
		if killed {
			at[call]++
		}
		return killed
	}
	// Up to the commit nothing is changed, then all is.
	for when := 1; when < 60; when += 6 {
		kill("write", when)
		out := fresh.must("domain", "list")
		if strings.Contains(out, "own.test") == strings.Contains(out, "example.test") {
			t.Fatalf("killed at write %d: half a configuration:\n%s", when, out)
		}
		if strings.Contains(out, "example.test") {
			break
		}
	}
	for when := 1; kill("renameat", when); when++ {
		out, _, code := fresh.run("pmgcm", "status")
		if code != 3 || !strings.Contains(out, "a restore was begun here and is not finished") || !strings.Contains(out, "restore --identity` again") {
			t.Fatalf("killed at rename %d, status: exit code %d\n%s", when, code, out)
		}
		if out, errs, code := fresh.run("pmgcm", "create"); code != 1 {
			t.Fatalf("killed at rename %d, pmgcm create: exit code %d\n%s%s", when, code, out, errs)
		}
	}
	if at["write"] < 3 || at["renameat"] < 3 { // strace counts by thread, and the calls move between those
		t.Errorf("killed %v times; want some writes, and most of the six files", at)
	}
	a, err := os.ReadFile(filepath.Join(lost.local.StateDir, key))
	if err != nil {
		t.Fatal(err)
	}
	b, err := os.ReadFile(filepath.Join(fresh.local.StateDir, key))
	if err != nil || string(a) != string(b) {
		t.Errorf("the key is another: %v", err)
	}
	if out, _, code := fresh.run("pmgcm", "status"); code != 3 || !strings.Contains(out, "restored from a backup of ") {
		t.Errorf("status: exit code %d\n%s", code, out)
	}
	out, errs, code := fresh.run("mailproxy", "domain", "add", "more.test", "--to", "192.0.2.1:25")
	if code != 1 || !strings.Contains(errs, "this node was restored from a backup, and no master has pushed to it yet") {
		t.Errorf("domain add: exit code %d\n%s%s", code, out, errs)
	}
	if out, errs, code := fresh.run("pmgcm", "promote", "--force"); code != 1 || !strings.Contains(errs, `"pmgcm status" says what is to be done`) {
		t.Errorf("promote: exit code %d\n%s%s", code, out, errs)
	}
}

// A backup that was written is on the disk: the file is synced before it gets its name, and the directory after.
func TestABackupIsSyncedBeforeItIsThere(t *testing.T) {
	t.Parallel()
	n := newNode(t)
	n.start()
	n.waitHealthy()
	_, pass := n.backedUp()
	file := filepath.Join(n.dir, "second.age")
	if out, killed := n.traced([]string{"-e", "trace=fsync,renameat2", "-e", "inject=renameat2:signal=SIGKILL"}, "backup", file, "--passphrase-file", pass); !killed {
		t.Errorf("it was not killed: %s", out)
	}
	n.traced([]string{"-y", "-e", "trace=fsync,renameat2"}, "backup", filepath.Join(n.dir, "third.age"), "--passphrase-file", pass)
	b, err := os.ReadFile(filepath.Join(n.dir, "trace"))
	if err != nil {
		t.Fatal(err)
	}
	var calls []string
	for line := range strings.SplitSeq(string(b), "\n") {
		// A call that another thread's line interrupts ends in a line of its own, "<... fsync resumed>) = 0".
		for _, call := range []string{"fsync", "renameat2"} {
			if (strings.Contains(line, call+"(") || strings.Contains(line, call+" resumed")) && strings.HasSuffix(line, "= 0") {
				calls = append(calls, call)
			}
		}
	}
	if got := strings.Join(calls, " "); got != "fsync renameat2 fsync" {
		t.Errorf("calls: %s\n%s", got, b)
	}
}
