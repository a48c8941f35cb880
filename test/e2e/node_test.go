package e2e

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"mailproxy/config"
	"mailproxy/internal/testbin"
	"mailproxy/web"
)

// patience bounds every wait of these tests; the machine may be busy.
const patience = 90 * time.Second

// Every node has an address of its own, and the same ports.
const (
	smtpPort   = "2525"
	webPort    = "8025"
	tunnelPort = "7025"
)

// An account is a user that a node may run as.
type account struct {
	name string
	uid  int
}

// users are nobody, and users that every Debian has: a node that is to be cut off runs as one of its own.
func users() []account {
	return []account{{"nobody", 65534}, {"games", 5}, {"man", 6}, {"lp", 7}, {"news", 9}, {"uucp", 10}, {"backup", 34}, {"list", 38}}
}

// A node is a node with real programs.
type node struct {
	t       testing.TB
	name    string
	address string
	user    account
	dir     string
	file    string
	local   *config.Local

	cmd   *exec.Cmd
	ended chan error
	log   *os.File
}

// addresses and templates are shared by all tests of the binary.
var (
	addresses atomic.Int64
	template  = sync.OnceValues(makeTemplate)
)

// shortDir gives a directory that everyone may enter, with a path short enough for sockets.
func shortDir() (string, error) {
	dir, err := os.MkdirTemp(os.Getenv(dirVariable), "")
	if err != nil {
		return "", err
	}
	return dir, os.Chmod(dir, 0o755)
}

// makeTemplate runs a node for as long as it takes to make its database, and gives its state directory. Making one takes
// seconds of both processors, and how that goes is tested elsewhere.
func makeTemplate() (string, error) {
	dir, err := shortDir()
	if err != nil {
		return "", err
	}
	n, err := initNode(dir, "template.test", users()[0])
	if err != nil {
		return "", err
	}
	if err := n.launch(); err != nil {
		return "", err
	}
	defer n.kill()
	if err := poll(n.healthy); err != nil {
		return "", err
	}
	_ = n.cmd.Process.Signal(syscall.SIGTERM) // it runs; how it ends is next
	if err := <-n.ended; err != nil {
		return "", fmt.Errorf("template: %w", err)
	}
	n.ended = nil
	return n.local.StateDir, nil
}

// newNode makes a node file, with a fresh database; more are flags for init.
func newNode(t testing.TB, name string, more ...string) *node {
	t.Helper()
	return newNodeAs(t, name, users()[0], more...)
}

func newNodeAs(t testing.TB, name string, as account, more ...string) *node {
	t.Helper()
	from, err := template()
	if err != nil {
		t.Fatal(err)
	}
	dir, err := shortDir()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	n, err := initNode(dir, name, as, more...)
	if err != nil {
		t.Fatal(err)
	}
	n.t = t
	if err := os.MkdirAll(n.local.StateDir, 0o755); err != nil {
		t.Fatal(err)
	}
	data := n.local.PostgresDataDir()
	n.sh(fmt.Sprintf("cp -a %[1]s/pg %[1]s/pg.made %[2]s && chown -R %[3]d %[4]s %[4]s.made", from, n.local.StateDir, as.uid, data))
	t.Cleanup(n.destroy)
	return n
}

// initNode makes a node file.
func initNode(dir, name string, as account, more ...string) (*node, error) {
	i := addresses.Add(1)
	n := &node{name: name, user: as, dir: dir, file: filepath.Join(dir, "node.toml"), address: fmt.Sprintf("127.0.%d.%d", 1+i/200, 10+i%200)}
	args := append([]string{"--config", n.file, "init", "--name", name, "--address", n.address, "--state-dir", filepath.Join(dir, "s"),
		"--run-dir", filepath.Join(dir, "r"), "--smtp-listen", n.address + ":" + smtpPort, "--web-listen", n.address + ":" + webPort,
		"--tunnel-listen", n.address + ":" + tunnelPort, "--user", as.name}, more...)
	if out, err := exec.Command(filepath.Join(testbin.Dir(), "mailproxy"), args...).CombinedOutput(); err != nil {
		return nil, fmt.Errorf("mailproxy %s: %w: %s", strings.Join(args, " "), err, out)
	}
	var err error
	if n.local, err = config.LoadLocal(n.file); err != nil {
		return nil, err
	}
	n.log, err = os.OpenFile(filepath.Join(dir, "log"), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o644)
	return n, err
}

// launch starts the daemon and does not wait.
func (n *node) launch() error {
	n.cmd = exec.Command(filepath.Join(testbin.Dir(), "mailproxy"), "--config", n.file, "serve")
	n.cmd.Stderr = n.log
	if err := n.cmd.Start(); err != nil {
		return err
	}
	cmd, ended := n.cmd, make(chan error, 1)
	n.ended = ended
	go func() { ended <- cmd.Wait() }()
	return nil
}

// start starts the daemon and waits until its control socket answers, which is when its listeners are open.
func (n *node) start() {
	n.t.Helper()
	if err := n.launch(); err != nil {
		n.t.Fatal(err)
	}
	n.eventually(func() error { _, err := n.health(); return err })
}

// startHealthy starts it and waits until PostgreSQL is up too.
func (n *node) startHealthy() {
	n.t.Helper()
	n.start()
	n.eventually(n.healthy)
}

// stop ends the daemon in order.
func (n *node) stop() {
	n.t.Helper()
	n.signal(syscall.SIGTERM)
	select {
	case err := <-n.ended:
		if err != nil {
			n.t.Fatalf("the daemon of %s ends with %v", n.name, err)
		}
	case <-time.After(patience):
		n.t.Fatalf("the daemon of %s does not end", n.name)
	}
	n.ended = nil
}

// kill ends the daemon at once, and leaves its PostgreSQL running.
func (n *node) kill() {
	if n.ended == nil {
		return
	}
	_ = n.cmd.Process.Kill() // it may have ended by itself
	<-n.ended
	n.ended = nil
}

// crash ends the daemon and its PostgreSQL at once.
func (n *node) crash() {
	n.kill()
	n.killPostgres()
}

func (n *node) signal(s syscall.Signal) {
	n.t.Helper()
	if err := n.cmd.Process.Signal(s); err != nil {
		n.t.Fatal(err)
	}
}

// destroy ends what may still run, and shows the daemon's log where the test has failed.
func (n *node) destroy() {
	n.crash()
	_ = n.log.Close()
	if n.t.Failed() {
		b, _ := os.ReadFile(n.log.Name())
		n.t.Logf("daemon of %s:\n%s", n.name, b[max(0, len(b)-4<<10):])
	}
}

// postmaster gives the process ID of the node's PostgreSQL; 0 where none runs.
func (n *node) postmaster() int {
	files, _ := filepath.Glob(filepath.Join(n.dir, "s", "pg*", "postmaster.pid"))
	for _, file := range files {
		b, _ := os.ReadFile(file)
		first, _, _ := strings.Cut(string(b), "\n")
		pid, err := strconv.Atoi(strings.TrimSpace(first))
		cmdline, _ := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", pid))
		if err == nil && strings.Contains(string(cmdline), n.dir) {
			return pid
		}
	}
	return 0
}

// killPostgres kills the node's PostgreSQL; its other processes end by themselves.
func (n *node) killPostgres() {
	if pid := n.postmaster(); pid > 0 {
		_ = syscall.Kill(pid, syscall.SIGKILL) // gone already at worst
	}
}

// run runs a program for the node and gives what it wrote, and its exit code.
func (n *node) run(program string, args ...string) (stdout, stderr string, code int) {
	n.t.Helper()
	cmd := n.command(program, args...)
	var out, errs bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errs
	stop := time.AfterFunc(patience, func() { _ = cmd.Process.Kill() })
	defer stop.Stop()
	err := cmd.Run()
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		n.t.Fatal(err)
	}
	return out.String(), errs.String(), cmd.ProcessState.ExitCode()
}

func (n *node) command(program string, args ...string) *exec.Cmd {
	cmd := exec.Command(testbin.Path(n.t, program), args...)
	cmd.Env = append(os.Environ(), "MAILPROXY_CONFIG="+n.file, "SUDO_USER=")
	return cmd
}

// must runs a program and wants it to succeed; it gives what it wrote.
func (n *node) must(program string, args ...string) string {
	n.t.Helper()
	out, errs, code := n.run(program, args...)
	if code != 0 {
		n.t.Fatalf("%s: %s %s: exit code %d\n%s%s", n.name, program, strings.Join(args, " "), code, out, errs)
	}
	return out
}

// refused runs a program and wants exit code 1, an error that begins so, and a hint.
func (n *node) refused(want, program string, args ...string) {
	n.t.Helper()
	out, errs, code := n.run(program, args...)
	if code != 1 || !strings.HasPrefix(errs, program+": "+want) || !strings.Contains(errs, "\nhint: ") {
		n.t.Errorf("%s: %s %s: exit code %d\n%s%swant: %s", n.name, program, strings.Join(args, " "), code, out, errs, want)
	}
}

// sh runs a shell command.
func (n *node) sh(command string) {
	n.t.Helper()
	if out, err := exec.Command("sh", "-ec", command).CombinedOutput(); err != nil {
		n.t.Fatalf("%s: %v: %s", command, err, out)
	}
}

// psql runs SQL in the node's own PostgreSQL as its superuser, as root may.
func (n *node) psql(sql string) (string, error) {
	out, err := exec.Command("psql", "-XAtq", "-h", n.local.PostgresSocketDir(), "-U", "mailproxy", "-d", "mailproxy",
		"-v", "ON_ERROR_STOP=1", "-v", "VERBOSITY=verbose", "-c", sql).CombinedOutput()
	return strings.TrimSpace(string(out)), err
}

// health asks the control socket.
func (n *node) health() (web.Health, error) {
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
	defer cancel()
	return web.Control(n.local.ControlSocket()).Health(ctx)
}

// healthy gives nil when every check is well.
func (n *node) healthy() error {
	h, err := n.health()
	if err == nil && h.Status != "ok" {
		err = fmt.Errorf("health of %s: %+v", n.name, h)
	}
	return err
}

// poll waits until ok gives nil.
func poll(ok func() error) error {
	deadline := time.Now().Add(patience)
	for {
		err := ok()
		if err == nil {
			return nil
		}
		if time.Now().After(deadline) {
			return fmt.Errorf("not in %v: %w", patience, err)
		}
		time.Sleep(20 * time.Millisecond) // between two looks at a condition
	}
}

func (n *node) eventually(ok func() error) {
	n.t.Helper()
	if err := poll(ok); err != nil {
		n.t.Fatal(err)
	}
}
