package e2e

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"mailproxy/test/lab"
)

// loseDisk ends the node at once, takes all that it kept, and starts it as after an installation with the same node file.
func (n *node) loseDisk() {
	n.t.Helper()
	from, err := template()
	if err != nil {
		n.t.Fatal(err)
	}
	n.crash()
	n.sh(fmt.Sprintf("rm -rf %[2]s && mkdir %[2]s && cp -a %[1]s/pg %[1]s/pg.made %[2]s && chown -R %[3]s %[2]s", from, n.local.StateDir, lab.User))
	n.startHealthy()
}

// backup makes a backup of the node as it is.
func (n *node) backup(name string) (file string, args []string) {
	n.t.Helper()
	pass := filepath.Join(n.dir, "pass")
	if err := os.WriteFile(pass, []byte("correct horse battery staple\n"), 0o600); err != nil {
		n.t.Fatal(err)
	}
	file = filepath.Join(n.dir, name)
	n.must("mailproxy", "backup", file, "--passphrase-file", pass)
	return file, []string{"restore", file, "--identity", "--yes", "--passphrase-file", pass}
}

// The cluster has gone on with another master. The old one comes back from a backup with a commit that only it had, and a slave from one
// of its own: both as slaves, and the commit is in the journal.
func TestNodesThatAreRestoredFollowAClusterThatHasGoneOn(t *testing.T) {
	t.Parallel()
	c := newCluster(t, 3)
	old, second, third := c[0], c[1], c[2]
	sink := newSink()
	sink.listen(t)
	_, restoreThird := third.backup("third.age")
	old.cutOff()
	old.must("mailproxy", "domain", "add", "lost.test", "--to", sink.Address) // as long as its lease lasts
	_, restoreOld := old.backup("old.age")
	second.eventually(func() error {
		if out, errs, code := second.run("pmgcm", "promote"); code != 0 {
			return fmt.Errorf("promote: exit code %d\n%s%s", code, out, errs)
		}
		return nil
	})
	second.must("mailproxy", "domain", "add", "kept.test", "--to", sink.Address)
	third.takes("to@kept.test")

	for _, n := range []*node{third, old} {
		n.loseDisk()
	}
	third.must("mailproxy", restoreThird...)
	old.must("mailproxy", restoreOld...) // cut off still: it hears of no other epoch
	old.refused("not the master: this node was restored from a backup", "mailproxy", "domain", "add", "split.test", "--to", sink.Address)
	out, _, code := old.run("pmgcm", "status")
	if code != 3 || !strings.Contains(out, "n1.test(1): restored from a backup of ") || strings.Contains(out, "n1.test(1)  A") {
		t.Errorf("status of the old master, restored and cut off: exit code %d\n%s", code, out)
	}
	old.refused("this node has not finished joining", "pmgcm", "promote", "--force")

	old.heal()
	second.eventually(second.inSync)
	r := second.report()
	if len(r.Nodes) != 3 || r.Nodes[0].Role != "slave" || r.Nodes[1].Role != "master" || r.Nodes[2].Role != "slave" || r.Nodes[0].Journal != 1 {
		t.Errorf("status: %+v", r)
	}
	for _, n := range []*node{third, old} {
		n.takes("to@kept.test")
		if out := n.must("mailproxy", "domain", "list"); strings.Contains(out, "lost.test") {
			t.Errorf("%s has\n%s", n.name, out)
		}
	}
	if out := old.must("pmgcm", "journal", "show", "1"); !strings.Contains(out, "domain add lost.test") {
		t.Errorf("journal: %s", out)
	}
	// They are members like the others: either can be the master again.
	if out := old.must("pmgcm", "promote"); !strings.Contains(out, "this node is master now, epoch 3.1") {
		t.Errorf("promote: %s", out)
	}
	old.must("mailproxy", "domain", "add", "again.test", "--to", sink.Address)
	third.takes("to@again.test")
}
