package e2e

import (
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"strings"
	"syscall"
	"testing"
	"time"
)

// A report is what `pmgcm status --json` says.
type report struct {
	InSync bool `json:"in_sync"`
	Nodes  []struct {
		CID      int    `json:"cid"`
		Name     string `json:"name"`
		Role     string `json:"role"`
		State    string `json:"state"`
		Error    string `json:"error"`
		Database bool   `json:"database"`
		Journal  int    `json:"journal"`
		Problems []struct{ What, Remedy string }
		Peers    []struct {
			CID    int
			Tunnel bool
		}
	} `json:"nodes"`
}

func (n *node) report() report {
	n.t.Helper()
	var r report
	out, errs, _ := n.run("pmgcm", "status", "--json")
	if err := json.Unmarshal([]byte(out), &r); err != nil {
		n.t.Fatalf("pmgcm status --json: %v\n%s%s", err, out, errs)
	}
	return r
}

// inSync gives nil when `pmgcm status` says so.
func (n *node) inSync() error {
	if out, errs, code := n.run("pmgcm", "status"); code != 0 {
		return fmt.Errorf("pmgcm status on %s: exit code %d\n%s%s", n.name, code, out, errs)
	}
	return nil
}

// cutOff drops what goes to and from the node over its tunnels; heal lets it through again.
func (n *node) cutOff() {
	n.t.Helper()
	n.nft("add")
	n.t.Cleanup(func() { _ = nft(n.elements("destroy")) })
}

func (n *node) heal() { n.t.Helper(); n.nft("delete") }

func (n *node) nft(verb string) {
	n.t.Helper()
	if err := nft(n.elements(verb)); err != nil {
		n.t.Fatal(err)
	}
}

func (n *node) elements(verb string) string {
	return fmt.Sprintf("%[1]s element inet cut users { %[2]d }\n%[1]s element inet cut addresses { %[3]s }\n", verb, n.user.uid, n.address)
}

// newCluster starts nodes n1, n2, …, each run by its account, makes the first the master and lets the others join.
func newCluster(t testing.TB, as ...account) []*node {
	t.Helper()
	var nodes []*node
	for i, a := range as {
		nodes = append(nodes, newNodeAs(t, fmt.Sprintf("n%d.test", i+1), a))
	}
	for _, n := range nodes {
		if err := n.launch(); err != nil {
			t.Fatal(err)
		}
	}
	for _, n := range nodes {
		n.eventually(n.healthy)
	}
	nodes[0].must("pmgcm", "create")
	for _, n := range nodes[1:] {
		n.must("pmgcm", nodes[0].joinArgs()...)
	}
	nodes[0].eventually(nodes[0].inSync)
	return nodes
}

// joinArgs asks the master for the line for a new node, and gives what stands behind pmgcm there.
func (n *node) joinArgs() []string {
	n.t.Helper()
	return strings.Fields(n.must("pmgcm", "join-cmd"))[1:]
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
