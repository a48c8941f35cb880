package main

import (
	"bytes"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"mailproxy/internal/testbin"
)

func TestMain(m *testing.M) { os.Exit(testbin.Main(m, "mailproxy", "pmgcm")) }

// TestTheProgram is what is typed, with all that a person sees; what happens to hosts is tested in test/lab.
func TestTheProgram(t *testing.T) {
	program := filepath.Join(testbin.Dir(), "lab")
	build := exec.Command("go", "build", "-o", program, ".")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	parent, err := os.MkdirTemp("/tmp", "labtest")                   // short, for sockets
	if err = errors.Join(err, os.Chmod(parent, 0o755)); err != nil { // daemons become nobody
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(parent) })
	dir := filepath.Join(parent, "lab")
	run := func(args ...string) (string, int) {
		cmd := exec.Command(program, args...)
		cmd.Env = append(os.Environ(), "LAB_DIR="+dir)
		var all bytes.Buffer
		cmd.Stdout, cmd.Stderr = &all, &all
		err := cmd.Run()
		var exit *exec.ExitError
		if err != nil && !errors.As(err, &exit) {
			t.Fatal(err)
		}
		return all.String(), cmd.ProcessState.ExitCode()
	}
	t.Cleanup(func() { run("down") })
	for _, c := range []struct {
		args string
		code int
		want string
	}{
		{"help", 0, "lab up N"},
		{"down", 0, ""}, // there is none, and that is fine
		{"status", 1, "no lab is up in " + dir + "\nhint: \"lab up 3\" makes one\n"},
		{"up", 2, "lab: up: want N [SIZE]"},
		{"up none", 2, "is no number of hosts"},
		{"nothing", 2, "no verb \"nothing\""},
		{"up 1 300m", 0, "1 hosts are up in " + dir},
		{"up 1", 1, "a lab is up in " + dir},
		{"status", 0, "n1.lab.test(1)       10.99.1.12      master A"},
		{"mail n1 3", 0, ""},
		{"status", 0, "\n4 messages received, in " + dir},
		{"exec n1 pmgcm promote", 1, "pmgcm: this node is already master"},
		{"exec n1 sh -c", 2, ""},
		{"kill n2", 1, "lab: no such host: n2\n"},
		{"slow n1 much", 2, "is no time like 200ms"},
		{"slow n1 50ms", 0, ""},
		{"skew n1 +3600", 0, ""},
		{"disk-full n1", 0, ""},
		{"cut n1", 0, ""},
		{"status", 0, "cut off, slow by 50ms, clock off by +3600 s, disk full\n"},
		{"heal", 0, ""},
		{"disk-free n1", 0, ""},
		{"skew n1 0", 0, ""},
		{"rollback n1", 0, ""},
		{"kill n1", 0, ""},
		{"status", 0, "n1.lab.test  down    \n"},
		{"start n1", 0, ""},
		{"pause n1", 0, ""},
		{"status", 0, "n1.lab.test  paused  \n"},
		{"down", 0, ""},
		{"status", 1, "no lab is up"},
	} {
		out, code := run(strings.Fields(c.args)...)
		if code != c.code || !strings.Contains(out, c.want) {
			t.Errorf("lab %s: exit code %d, want %d and %q\n%s", c.args, code, c.code, c.want, out)
		}
	}
	if _, err := os.Stat(dir); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("%s is left: %v", dir, err)
	}
}
