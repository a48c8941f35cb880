package e2e

import (
	"os"
	"os/exec"
	"strings"
	"syscall"
	"testing"

	"mailproxy/config"
	"mailproxy/test/lab"
	"mailproxy/web"
)

// patience bounds every wait of these tests; the machine may be busy.
const patience = lab.Patience

// Every node is a host with an address of its own, and the same ports.
const (
	smtpPort = lab.SMTPPort
	webPort  = lab.WebPort
)

// A node is a node with real programs on a host of its own.
type node struct {
	*lab.Host
	t       testing.TB
	lab     *lab.Lab
	name    string
	address string
	dir     string
	file    string
	local   *config.Local
}

// newNode makes a node file, with a fresh database; more are flags for init.
func newNode(t testing.TB, name string, more ...string) *node {
	t.Helper()
	return newHost(t, lab.HostOptions{Name: name, Init: more})
}

// newHost is newNode with what else a host may have.
func newHost(t testing.TB, o lab.HostOptions) *node {
	t.Helper()
	l, err := network()
	if err != nil {
		t.Fatal(err)
	}
	h, err := l.Add(o)
	if err != nil {
		t.Fatal(err)
	}
	n := &node{Host: h, t: t, lab: l, name: h.Name, address: h.Address, dir: h.Dir, file: h.File, local: h.Local}
	t.Cleanup(n.destroy)
	return n
}

// start starts the daemon and waits until its control socket answers, which is when its listeners are open.
func (n *node) start() { n.t.Helper(); n.done(n.Start()) }

// done wants something to have succeeded.
func (n *node) done(err error) {
	n.t.Helper()
	if err != nil {
		n.t.Fatal(err)
	}
}

// startHealthy starts it and waits until PostgreSQL is up too.
func (n *node) startHealthy() {
	n.t.Helper()
	n.start()
	n.eventually(n.healthy)
}

// stop ends the daemon in order.
func (n *node) stop() { n.t.Helper(); n.done(n.Stop()) }

// kill ends the daemon at once, and leaves its PostgreSQL running.
func (n *node) kill() { n.KillDaemon() }

// crash ends the daemon and its PostgreSQL at once.
func (n *node) crash() { n.t.Helper(); n.done(n.Kill()) }

func (n *node) signal(s syscall.Signal) { n.t.Helper(); n.done(n.Signal(s)) }

// destroy ends what may still run, and shows the daemon's log where the test has failed.
func (n *node) destroy() {
	if n.t.Failed() {
		b, _ := os.ReadFile(n.LogFile())
		n.t.Logf("daemon of %s:\n%s", n.name, b[max(0, len(b)-4<<10):])
	}
	if err := n.lab.Remove(n.Host); err != nil {
		n.t.Error(err)
	}
}

// postmaster gives the process ID of the node's PostgreSQL; 0 where none runs.
func (n *node) postmaster() int { return n.Postmaster() }

// killPostgres kills the node's PostgreSQL; its other processes end by themselves.
func (n *node) killPostgres() { n.KillPostgres() }

// run runs a program for the node and gives what it wrote, and its exit code.
func (n *node) run(program string, args ...string) (stdout, stderr string, code int) {
	n.t.Helper()
	out, errs, code, err := n.Run(program, args...)
	n.done(err)
	return out, errs, code
}

func (n *node) command(program string, args ...string) *exec.Cmd { return n.Command(program, args...) }

// must runs a program and wants it to succeed; it gives what it wrote.
func (n *node) must(program string, args ...string) string {
	n.t.Helper()
	out, err := n.Must(program, args...)
	n.done(err)
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
func (n *node) psql(sql string) (string, error) { return n.SQL(sql) }

// peerSQL runs SQL in a peer's PostgreSQL, over the socket that leads there.
func (n *node) peerSQL(cid int, login []string, sql string) (string, error) {
	return n.PeerSQL(cid, sql, login...)
}

// health asks the control socket.
func (n *node) health() (web.Health, error) { return n.Health() }

// healthy gives nil when every check is well.
func (n *node) healthy() error { return n.Healthy() }

func (n *node) eventually(ok func() error) { n.t.Helper(); n.done(lab.Poll(ok)) }
