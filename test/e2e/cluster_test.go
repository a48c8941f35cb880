package e2e

import (
	"errors"
	"fmt"
	"net"
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
