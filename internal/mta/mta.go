// Package mta runs mail software that nobody here wrote, for tests: Debian's Postfix, Exim, smtp-sink and postgrey, each a private instance on
// loopback with its own configuration, queue and log, which ends with the test.
//
//  1. A port of loopback is found that nobody has.
//  2. Configuration and directories are made in a folder that every user may enter: all of these servers give up root.
//  3. The program is started and asked until it answers; where it does not, the test fails with its log.
//
// The programs are those of scripts/deps. Postfix and Exim exclude each other as Debian packages, so Exim is only unpacked.
package mta

import (
	"context"
	"fmt"
	"net"
	"os"
	"os/exec"
	"os/user"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"
)

// patience bounds every wait.
const patience = 30 * time.Second

// folder makes a directory that every user may enter, removed at the end.
func folder(t testing.TB) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "mta")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	if err := os.Chmod(dir, 0o755); err != nil { //nolint:gosec // it holds nothing secret
		t.Fatal(err)
	}
	return dir
}

// give makes a directory that belongs to a user.
func give(t testing.TB, name, dir string) {
	t.Helper()
	if err := os.MkdirAll(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	u, err := user.Lookup(name)
	if err != nil {
		t.Fatalf("%v: run scripts/deps test", err)
	}
	uid, _ := strconv.Atoi(u.Uid)
	gid, _ := strconv.Atoi(u.Gid)
	if err := os.Chown(dir, uid, gid); err != nil {
		t.Fatal(err)
	}
}

// FreeAddr gives an address of loopback where nobody listens.
func FreeAddr(t testing.TB) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	return l.Addr().String()
}

func write(t testing.TB, path, text string) {
	t.Helper()
	if err := os.WriteFile(path, []byte(text), 0o644); err != nil { //nolint:gosec // servers that gave up root read it
		t.Fatal(err)
	}
}

// run runs a program to its end and gives what it printed.
func run(t testing.TB, program string, args ...string) string {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute) // also in a cleanup
	defer cancel()
	cmd := exec.CommandContext(ctx, program, args...)
	cmd.WaitDelay = time.Second // what it has started holds its output
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("%s %s: %v\n%s", program, strings.Join(args, " "), err, out)
	}
	return string(out)
}

// Start runs a server in the foreground until the test ends, and waits until it listens at addr.
func Start(t testing.TB, addr, program string, args ...string) {
	t.Helper()
	log, err := os.Create(filepath.Join(t.TempDir(), "log"))
	if err != nil {
		t.Fatal(err)
	}
	defer log.Close()
	cmd := exec.Command(program, args...)
	cmd.Stdout, cmd.Stderr = log, log
	if err := cmd.Start(); err != nil {
		t.Fatalf("%v: run scripts/deps test", err)
	}
	ended := make(chan struct{})
	go func() { // waited for below
		defer close(ended)
		_ = cmd.Wait()
	}()
	t.Cleanup(func() {
		_ = cmd.Process.Kill()
		<-ended
	})
	await(t, addr, log.Name())
}

// await waits until somebody listens at addr.
func await(t testing.TB, addr, log string) {
	t.Helper()
	Until(t, func() error {
		c, err := net.DialTimeout("tcp", addr, time.Second)
		if err != nil {
			text, _ := os.ReadFile(log)
			return fmt.Errorf("%w; its log:\n%s", err, text)
		}
		return c.Close()
	})
}

// Until polls until f gives nil.
func Until(t interface{ Fatalf(string, ...any) }, f func() error) {
	tick := time.NewTicker(10 * time.Millisecond)
	defer tick.Stop()
	deadline := time.After(patience)
	for {
		err := f()
		if err == nil {
			return
		}
		select {
		case <-deadline:
			t.Fatalf("not within %v: %v", patience, err)
		case <-tick.C:
		}
	}
}
