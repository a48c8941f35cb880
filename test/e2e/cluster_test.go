package e2e

import (
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"mailproxy/test/lab"
)

func (n *node) report() lab.Report {
	n.t.Helper()
	r, err := n.Report()
	n.done(err)
	return r
}

// inSync gives nil when `pmgcm status` says so.
func (n *node) inSync() error { return n.InSync() }

// cutOff drops what the node and the others say to each other; heal lets it through again.
func (n *node) cutOff() { n.t.Helper(); n.done(n.lab.Isolate(n.Host)) }

func (n *node) heal() { n.t.Helper(); n.done(n.lab.Rejoin(n.Host)) }

// newCluster starts nodes n1, n2, …, makes the first the master and lets the others join.
func newCluster(t testing.TB, size int) []*node {
	t.Helper()
	return formCluster(t, size, lab.HostOptions{})
}

// formCluster is newCluster with what else its hosts may have.
func formCluster(t testing.TB, size int, o lab.HostOptions) []*node {
	t.Helper()
	var nodes []*node
	var hosts []*lab.Host
	for i := range size {
		o.Name = fmt.Sprintf("n%d.test", i+1)
		n := newHost(t, o)
		nodes, hosts = append(nodes, n), append(hosts, n.Host)
	}
	nodes[0].done(lab.Form(hosts...))
	return nodes
}

// joinArgs asks the master for the line for a new node, and gives what stands behind pmgcm there.
func (n *node) joinArgs() []string {
	n.t.Helper()
	args, err := n.JoinArgs()
	n.done(err)
	return args
}

// refuses gives nil where nobody listens at an address.
func refuses(address string) error {
	c, err := net.DialTimeout("tcp", address, time.Second)
	if errors.Is(err, syscall.ECONNREFUSED) {
		return nil
	}
	if err == nil {
		_ = c.Close()
	}
	return fmt.Errorf("%s: %w", address, errors.Join(err, errors.New("not refused")))
}

// heard is how many octets have come to the host.
func (n *node) heard() int64 {
	n.t.Helper()
	octets, err := strconv.ParseInt(strings.TrimSpace(n.must("cat", "/sys/class/net/eth0/statistics/rx_bytes")), 10, 64)
	if err != nil {
		n.t.Fatal(err)
	}
	return octets
}

// A line within a site that carries little is as slow as a far one: what goes over it is packed.
func TestBulkIsPackedOnAThinLine(t *testing.T) {
	t.Parallel()
	master, slave := newHost(t, lab.HostOptions{Name: "n1.test"}), newHost(t, lab.HostOptions{Name: "n2.test"})
	slave.done(slave.Thin("20mbit"))
	master.done(lab.Form(master.Host, slave.Host))
	text := master.must("mailproxy", "config", "show")
	for i := range 20_000 {
		text += fmt.Sprintf("[[domain]]\nname = \"d%06d.thin.test\"\nhosts = [\"192.0.2.1:25\"]\n", i)
	}
	file := filepath.Join(master.Dir, "thin.toml")
	if err := os.WriteFile(file, []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
	before := slave.heard()
	master.must("mailproxy", "config", "apply", "--yes", file)
	slave.eventually(slave.inSync)
	const plain = 20_000 * 100 // octets; a row is more in each of the forms that it is sent in
	if got := slave.heard() - before; got > plain/2 {
		t.Errorf("%d octets for what is over %d", got, plain)
	}
}
