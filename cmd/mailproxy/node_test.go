package main

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"mailproxy/config"
	"mailproxy/internal/testbin"
	"mailproxy/web"
)

func TestMain(m *testing.M) { os.Exit(testbin.Main(m, "mailproxy", "pmgcm")) }

// patience bounds every wait of these tests; the machine may be busy.
const patience = 60 * time.Second

// eventually waits until ok, which says what it still waits for.
func eventually(t testing.TB, ok func() error) {
	t.Helper()
	deadline := time.Now().Add(patience)
	for {
		err := ok()
		if err == nil {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("after %v: %v", patience, err)
		}
		time.Sleep(20 * time.Millisecond) // between two looks at a condition
	}
}

// freePort gives host:port that nobody listens on: on an address of its own, below the ports of outgoing connections.
func freePort(t testing.TB) string {
	t.Helper()
	for {
		address := fmt.Sprintf("127.%d.%d.%d:%d", 1+rand.IntN(250), rand.IntN(250), 1+rand.IntN(250), 10_000+rand.IntN(20_000))
		if l, err := net.Listen("tcp", address); err == nil {
			_ = l.Close()
			return address
		}
	}
}

// shortDir gives a directory that everyone may enter, with a path short enough for sockets.
func shortDir(t testing.TB) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "mp-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	if err := os.Chmod(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	return dir
}

// testNode is a node with real programs, whose daemon becomes nobody.
type testNode struct {
	t                 testing.TB
	dir, file         string
	smtp, web, tunnel string
	local             *config.Local

	cmd    *exec.Cmd
	ended  chan error
	stderr *syncBuffer
}

// syncBuffer can be read while a program writes.
type syncBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (b *syncBuffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.Write(p)
}

func (b *syncBuffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.String()
}

// newNode makes the node file of a node; more are flags for init.
func newNode(t testing.TB, more ...string) *testNode {
	t.Helper()
	dir := shortDir(t)
	n := &testNode{t: t, dir: dir, file: filepath.Join(dir, "node.toml"), smtp: freePort(t), web: freePort(t), tunnel: freePort(t)}
	address, _, _ := net.SplitHostPort(n.tunnel)
	n.must(append([]string{"init", "--name", "n1.test", "--address", address, "--state-dir", filepath.Join(dir, "s"),
		"--run-dir", filepath.Join(dir, "r"), "--smtp-listen", n.smtp, "--web-listen", n.web, "--tunnel-listen", n.tunnel,
		"--user", "nobody"}, more...)...)
	local, err := config.LoadLocal(n.file)
	if err != nil {
		t.Fatal(err)
	}
	n.local = local
	t.Cleanup(n.destroy)
	return n
}

// run runs a program for the node and gives what it wrote, and its exit code.
func (n *testNode) run(program string, args ...string) (stdout, stderr string, code int) {
	n.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	cmd := exec.CommandContext(ctx, testbin.Path(n.t, program), args...)
	cmd.Env = append(os.Environ(), "MAILPROXY_CONFIG="+n.file, "SUDO_USER=")
	var out, errs bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errs
	err := cmd.Run()
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		n.t.Fatal(err)
	}
	return out.String(), errs.String(), cmd.ProcessState.ExitCode()
}

// must runs mailproxy and wants it to succeed.
func (n *testNode) must(args ...string) string {
	n.t.Helper()
	out, errs, code := n.run("mailproxy", args...)
	if code != 0 {
		n.t.Fatalf("mailproxy %s: exit code %d\n%s%s", strings.Join(args, " "), code, out, errs)
	}
	return out
}

// start starts the daemon and waits until it says that it is ready, as systemd would.
func (n *testNode) start() {
	n.t.Helper()
	notify, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: filepath.Join(n.dir, "notify"), Net: "unixgram"})
	if err != nil {
		n.t.Fatal(err)
	}
	defer os.Remove(filepath.Join(n.dir, "notify"))
	defer notify.Close()
	if err := os.Chmod(filepath.Join(n.dir, "notify"), 0o777); err != nil {
		n.t.Fatal(err)
	}
	n.launch("NOTIFY_SOCKET=" + filepath.Join(n.dir, "notify"))
	_ = notify.SetReadDeadline(time.Now().Add(patience))
	state := make([]byte, 256)
	length, err := notify.Read(state)
	for err == nil && strings.HasPrefix(string(state[:length]), "FDSTORE=1\n") { // its listeners, which nobody keeps here
		length, err = notify.Read(state)
	}
	if err != nil || string(state[:length]) != "READY=1" {
		n.t.Fatalf("systemd is told %q, %v\n%s", state[:length], err, n.stderr)
	}
}

// launch starts the daemon and does not wait.
func (n *testNode) launch(env ...string) {
	n.t.Helper()
	n.stderr = &syncBuffer{}
	n.cmd = exec.Command(testbin.Path(n.t, "mailproxy"), "--config", n.file, "serve", "--log-level", "debug")
	n.cmd.Env = append(os.Environ(), env...)
	n.cmd.Stderr = n.stderr
	if err := n.cmd.Start(); err != nil {
		n.t.Fatal(err)
	}
	cmd, ended := n.cmd, make(chan error, 1)
	n.ended = ended
	go func() { ended <- cmd.Wait() }()
}

// signal sends the daemon a signal.
func (n *testNode) signal(s syscall.Signal) {
	n.t.Helper()
	if err := n.cmd.Process.Signal(s); err != nil {
		n.t.Fatal(err)
	}
}

// wait waits for the daemon's end and gives its exit code.
func (n *testNode) wait() int {
	n.t.Helper()
	select {
	case <-n.ended:
	case <-time.After(patience):
		n.t.Fatalf("the daemon does not end\n%s", n.stderr)
	}
	n.ended = nil
	return n.cmd.ProcessState.ExitCode()
}

// stop ends the daemon in order.
func (n *testNode) stop() {
	n.t.Helper()
	n.signal(syscall.SIGTERM)
	if code := n.wait(); code != 0 {
		n.t.Fatalf("the daemon ends with %d\n%s", code, n.stderr)
	}
}

// destroy ends what may still run, by the process IDs that are ours.
func (n *testNode) destroy() {
	if n.ended != nil {
		_ = n.cmd.Process.Kill()
		<-n.ended
	}
	if n.t.Failed() && n.stderr != nil {
		n.t.Logf("daemon:\n%s", n.stderr)
	}
	if pid := n.postmaster(); pid > 0 {
		_ = syscall.Kill(pid, syscall.SIGQUIT)
		deadline := time.Now().Add(patience)
		for syscall.Kill(pid, 0) == nil && time.Now().Before(deadline) {
			time.Sleep(20 * time.Millisecond) // between two looks at a process that is not our child
		}
	}
}

// postmaster gives the process ID of the node's PostgreSQL; 0 where none runs.
func (n *testNode) postmaster() int {
	dirs, _ := filepath.Glob(filepath.Join(n.dir, "s", "pg*", "postmaster.pid"))
	for _, file := range dirs {
		b, err := os.ReadFile(file)
		if err != nil {
			continue
		}
		first, _, _ := strings.Cut(string(b), "\n")
		pid, err := strconv.Atoi(strings.TrimSpace(first))
		cmdline, _ := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", pid))
		if err == nil && strings.Contains(string(cmdline), n.dir) {
			return pid
		}
	}
	return 0
}

// health asks the control socket.
func (n *testNode) health() (web.Health, error) {
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
	defer cancel()
	return web.Control(n.local.ControlSocket()).Health(ctx)
}

// waitHealthy waits until every check is well: PostgreSQL is up and migrated.
func (n *testNode) waitHealthy() {
	n.t.Helper()
	eventually(n.t, func() error {
		h, err := n.health()
		if err != nil {
			return err
		}
		if h.Status != "ok" {
			return fmt.Errorf("health: %+v", h)
		}
		return nil
	})
}

// waitDatabase waits until commands reach the database.
func (n *testNode) waitDatabase() {
	n.t.Helper()
	eventually(n.t, func() error {
		if _, errs, code := n.run("mailproxy", "domain", "list"); code != 0 {
			return errors.New(errs)
		}
		return nil
	})
}

// status asks for GET /status.
func (n *testNode) status() map[string]any {
	n.t.Helper()
	var status map[string]json.RawMessage
	if err := web.Control(n.local.ControlSocket()).Status(context.Background(), &status); err != nil {
		n.t.Fatal(err)
	}
	out := map[string]any{}
	for k, v := range status {
		out[k] = string(v)
	}
	return out
}

// smtpSession is a client's side of an SMTP session.
type smtpSession struct {
	t    testing.TB
	conn net.Conn
	r    *bufio.Reader
}

// dialSMTP connects and wants the greeting.
func (n *testNode) dialSMTP() *smtpSession {
	n.t.Helper()
	return n.dialSMTPAt(n.smtp)
}

func (n *testNode) dialSMTPAt(address string) *smtpSession {
	n.t.Helper()
	conn, err := net.Dial("tcp", address)
	if err != nil {
		n.t.Fatal(err)
	}
	n.t.Cleanup(func() { _ = conn.Close() })
	s := &smtpSession{n.t, conn, bufio.NewReader(conn)}
	s.want("", "220 ")
	return s
}

// want sends a line (none where it is empty) and wants a reply that starts so; it gives the reply's last line.
func (s *smtpSession) want(line, prefix string) string {
	s.t.Helper()
	_ = s.conn.SetDeadline(time.Now().Add(patience))
	if line != "" {
		if _, err := s.conn.Write([]byte(line + "\r\n")); err != nil {
			s.t.Fatal(err)
		}
	}
	for {
		reply, err := s.r.ReadString('\n')
		if err != nil {
			s.t.Fatalf("C: %s: no reply: %v", line, err)
		}
		if len(reply) > 3 && reply[3] == '-' {
			continue
		}
		if !strings.HasPrefix(reply, prefix) {
			s.t.Fatalf("C: %s\nS: %swant %s", line, reply, prefix)
		}
		return strings.TrimSpace(reply)
	}
}
