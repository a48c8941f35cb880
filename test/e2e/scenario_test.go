//go:build lab

package e2e

import (
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"mailproxy/config"
	"mailproxy/test/lab"
)

// These are stories of a cluster that take their time: `make e2e`. Those that measure come first, one at a time.

// addDomain adds a domain on the master, whose mail goes to the sink.
func (n *node) addDomain(domain string, to sink) {
	n.t.Helper()
	n.must("mailproxy", "domain", "add", domain, "--to", to.Address)
}

// has gives nil where the node has all of these domains and none of the others.
func (n *node) has(want []string, not ...string) error {
	out := n.must("mailproxy", "domain", "list")
	for _, d := range want {
		if !strings.Contains(out, d) {
			return fmt.Errorf("%s has no %s:\n%s", n.name, d, out)
		}
	}
	for _, d := range not {
		if strings.Contains(out, d) {
			return fmt.Errorf("%s has %s:\n%s", n.name, d, out)
		}
	}
	return nil
}

// says wants `pmgcm status` to have a line that contains this, and gives nil where it has.
func (n *node) says(parts ...string) error {
	out, errs, _ := n.run("pmgcm", "status")
	for _, part := range parts {
		if !strings.Contains(out, part) {
			return fmt.Errorf("pmgcm status on %s does not say %q:\n%s%s", n.name, part, out, errs)
		}
	}
	return nil
}

// promotes waits until a promote succeeds, and wants it to be this epoch.
func (n *node) promotes(epoch string, flags ...string) {
	n.t.Helper()
	n.eventually(func() error { // who has just gone may still be waited for
		out, errs, code := n.run("pmgcm", append([]string{"promote"}, flags...)...)
		if code != 0 {
			return fmt.Errorf("promote on %s: exit code %d\n%s%s", n.name, code, out, errs)
		}
		if !strings.Contains(out, "this node is master now, epoch "+epoch+"\n") {
			n.t.Fatalf("promote on %s, want epoch %s: %s", n.name, epoch, out)
		}
		return nil
	})
}

func received(s sink, subject string) func() error {
	return func() error {
		if s.Count(subject) == 0 {
			return fmt.Errorf("%s has not arrived", subject)
		}
		return nil
	}
}

func newTakingSink(t *testing.T) sink {
	t.Helper()
	s := newSink()
	s.listen(t)
	return s
}

func TestScenarioPausedPeersCostStatusTwoSeconds(t *testing.T) {
	c := newCluster(t, 4)
	for _, n := range c[1:] {
		n.done(n.Pause())
	}
	// The bound is 2 s for all of them; the machine gets some time to start the programs, and three tries.
	var took []time.Duration
	for range 3 {
		start := time.Now()
		if err := c[0].says("n2.test(2)", "n3.test(3)", "n4.test(4)"); err != nil {
			t.Error(err)
		}
		took = append(took, time.Since(start))
	}
	if slices.Min(took) > 2300*time.Millisecond {
		t.Errorf("status took %v", took)
	}
	for _, n := range c[1:] {
		n.done(n.Resume())
	}
	c[0].eventually(c[0].inSync)
}

func TestScenarioADeletedNodeOpensNoTunnelWithinASecond(t *testing.T) {
	c := newCluster(t, 3)
	master, other, gone := c[0], c[1], c[2]
	reaches := func(cid int) error {
		_, err := gone.peerSQL(cid, []string{"-U", "any"}, "SELECT 1")
		return err
	}
	for _, cid := range []int{1, 2} {
		gone.eventually(func() error { return reaches(cid) })
	}
	if out := master.must("pmgcm", "delete", "3", "--yes"); !strings.Contains(out, "n3.test(3) deleted") {
		t.Errorf("delete: %s", out)
	}
	deleted := time.Now()
	for _, cid := range []int{1, 2} {
		for reaches(cid) == nil {
			if time.Since(deleted) > time.Second {
				t.Fatalf("after %v it still reaches node %d", time.Since(deleted), cid)
			}
		}
	}
	if took := time.Since(deleted); took > time.Second {
		t.Errorf("it was let in for %v", took)
	}
	// Nor ever again, and restarted no more than before.
	gone.stop()
	gone.startHealthyOut()
	for _, cid := range []int{1, 2} {
		if err := reaches(cid); err == nil {
			t.Errorf("restarted it reaches node %d", cid)
		}
	}
	for _, n := range []*node{master, other} {
		if err := n.inSync(); err != nil {
			t.Error(err)
		}
	}
}

// startHealthyOut starts a node that was deleted, and waits until it knows that nobody lets it in.
func (n *node) startHealthyOut() {
	n.t.Helper()
	n.start()
	n.eventually(n.isOut)
}

func TestScenarioTheMasterIsLostAndAnotherTakesOver(t *testing.T) {
	t.Parallel()
	c := newCluster(t, 3)
	old, next, third := c[0], c[1], c[2]
	s := newTakingSink(t)
	old.addDomain("first.test", s)
	third.takes("to@first.test")
	next.takes("to@first.test")

	old.crash()
	next.eventually(func() error {
		return next.says("the master does not answer: mail goes on, configuration cannot be changed", "`pmgcm promote`")
	})
	for _, n := range []*node{next, third} {
		n.mustSend("to@first.test", "master lost, "+n.name)
		next.eventually(received(s, "master lost, "+n.name))
	}
	next.refused("", "mailproxy", "domain", "add", "no.test", "--to", s.Address)
	next.promotes("2.2")
	next.addDomain("second.test", s)
	third.takes("to@second.test") // it follows by itself

	old.start()
	old.eventually(old.inSync)
	if err := old.has([]string{"first.test", "second.test"}); err != nil {
		t.Error(err)
	}
	for _, n := range c {
		if r := n.report(); r.Nodes[0].Role != "slave" || r.Nodes[1].Role != "master" || r.Nodes[0].Journal != 0 {
			t.Errorf("on %s: %+v", n.name, r)
		}
	}
}

func TestScenarioBothSidesOfAPartitionArePromotedByForceAndHeal(t *testing.T) {
	t.Parallel()
	c := newCluster(t, 3)
	old, left, right := c[0], c[1], c[2]
	s := newTakingSink(t)
	old.addDomain("both.test", s)
	left.takes("to@both.test")
	right.takes("to@both.test")

	old.crash()
	left.done(left.lab.Cut(left.Host, right.Host))
	for _, n := range []*node{left, right} {
		n.eventually(func() error {
			out, errs, code := n.run("pmgcm", "promote")
			if code != 1 || !strings.Contains(errs, "majority") || !strings.Contains(errs, "--force") {
				return fmt.Errorf("promote without majority on %s: exit code %d\n%s%s", n.name, code, out, errs)
			}
			return nil
		})
	}
	left.promotes("2.2", "--force")
	right.promotes("2.3", "--force")
	left.addDomain("left.test", s)
	right.addDomain("right.test", s)
	left.takes("to@left.test")
	right.takes("to@right.test")

	left.done(left.lab.Join(left.Host, right.Host))
	right.eventually(func() error { return right.says("n2.test(2): ", "were set aside here", "`pmgcm journal list`") })
	old.start()
	right.eventually(right.inSync)
	for _, n := range c {
		if err := errors.Join(n.has([]string{"both.test", "right.test"}, "left.test"), n.says("were set aside here", "`pmgcm journal list`")); err != nil {
			t.Error(err)
		}
		if r := n.report(); r.Nodes[2].Role != "master" || r.Nodes[1].Role != "slave" || r.Nodes[0].Role != "slave" {
			t.Errorf("on %s: %+v", n.name, r)
		}
	}
	if out := left.must("pmgcm", "journal", "list"); !strings.Contains(out, "2.2") {
		t.Errorf("journal list: %s", out)
	}
	var shown strings.Builder
	for _, e := range left.journal() {
		shown.WriteString(left.must("pmgcm", "journal", "show", e))
	}
	if !strings.Contains(shown.String(), "left.test") {
		t.Errorf("the journal does not have left.test:\n%s", shown.String())
	}
}

// journal gives the numbers of the node's journal entries.
func (n *node) journal() []string {
	n.t.Helper()
	out, err := n.psql("SELECT id FROM node.journal ORDER BY id")
	n.done(err)
	return strings.Fields(out)
}

func TestScenarioAMasterThatWasRolledBackIsNamedAndLosesNothing(t *testing.T) {
	t.Parallel()
	c := newCluster(t, 3)
	master, next := c[0], c[1]
	s := newTakingSink(t)
	master.addDomain("yesterday.test", s)
	next.takes("to@yesterday.test")
	master.done(master.Snapshot())
	master.addDomain("today.test", s)
	for _, n := range c[1:] {
		n.takes("to@today.test")
	}

	// By itself it knows from its file, and takes mail by what it had.
	master.eventually(func() error {
		s, err := config.LoadSnapshot(master.local.SnapshotFile())
		if err == nil && s.Domains.Len() != 2 {
			err = fmt.Errorf("its file has %d domains", s.Domains.Len())
		}
		return err
	})
	master.cutOff()
	master.done(master.Rollback())
	master.eventually(func() error {
		return master.says("rolled back: this master's database is at", "remedy: bring back a node that holds it")
	})
	master.mustSend("to@today.test", "on a rolled-back node")
	master.eventually(received(s, "on a rolled-back node"))
	master.heal()
	master.eventually(func() error { return master.says("rolled back: node 2 holds", "remedy: `pmgcm promote` on node 2") })
	for _, n := range c[1:] {
		if err := n.has([]string{"today.test"}); err != nil {
			t.Errorf("a slave was taken back too: %v", err)
		}
	}
	next.promotes("2.2")
	master.eventually(master.inSync)
	for _, n := range c {
		if err := n.has([]string{"yesterday.test", "today.test"}); err != nil {
			t.Error(err)
		}
	}
}

func TestScenarioAFullDiskIsNamedAndHeldAgainstNobodyElse(t *testing.T) {
	t.Parallel()
	c := formCluster(t, 3, lab.HostOptions{Disk: "400m"})
	master, full := c[0], c[1]
	s := newTakingSink(t)
	master.addDomain("before.test", s)
	full.takes("to@before.test")

	full.done(full.FillDisk())
	master.eventually(func() error { return master.says("the disk of "+full.local.PostgresDataDir()+" is full", "make room") })
	master.addDomain("meanwhile.test", s)
	c[2].takes("to@meanwhile.test")
	full.mustSend("to@before.test", "on a full disk") // it goes right through
	full.eventually(received(s, "on a full disk"))
	full.done(full.FreeDisk())
	full.takes("to@meanwhile.test")
	master.eventually(master.inSync)
}

func TestScenarioAClockThatIsWrongChangesNothing(t *testing.T) {
	t.Parallel()
	c := newCluster(t, 3)
	s := newTakingSink(t)
	c[0].addDomain("before.test", s)
	works := func(master *node, domain string) {
		t.Helper()
		master.addDomain(domain, s)
		for _, n := range c {
			n.takes("to@" + domain)
		}
		master.eventually(master.inSync)
	}
	// It jumps under daemons that run, and is as wrong when they start.
	for i, off := range []time.Duration{time.Hour, -time.Hour, 30 * 24 * time.Hour, -30 * 24 * time.Hour} {
		for j, n := range c {
			n.done(n.SetSkew(time.Duration(j%2*2-1) * off)) // each two are apart
		}
		works(c[0], fmt.Sprintf("jump%d.test", i))
	}
	for _, n := range c {
		n.crash()
		n.startHealthy()
	}
	works(c[0], "restart.test")
	c[1].promotes("2.2")
	works(c[1], "promoted.test")
	fresh := newNode(t, "n4.test")
	fresh.done(fresh.SetSkew(-365 * 24 * time.Hour))
	fresh.startHealthy()
	if out := fresh.must("pmgcm", c[1].joinArgs()...); !strings.HasSuffix(out, "\njoined\n") {
		t.Errorf("join: %s", out)
	}
	c = append(c, fresh)
	works(c[1], "joined.test")
}

func TestScenarioASlowLinkHoldsNobodyElseBack(t *testing.T) {
	t.Parallel()
	c := newCluster(t, 3)
	master, near, far := c[0], c[1], c[2]
	s := newTakingSink(t)
	const trip = 200 * time.Millisecond
	far.done(far.Slow(trip))
	master.eventually(master.inSync)
	for i := range 3 {
		domain := fmt.Sprintf("d%d.test", i)
		start := time.Now()
		master.addDomain(domain, s)
		near.eventually(func() error { return near.loaded(domain) })
		nearAfter := time.Since(start)
		far.eventually(func() error { return far.loaded(domain) })
		if farAfter := time.Since(start); nearAfter > farAfter || farAfter < trip {
			t.Errorf("%s: after %v on the near node, %v on the far one", domain, nearAfter, farAfter)
		}
	}
	if err := master.inSync(); err != nil {
		t.Error(err)
	}
	if out := far.must("pmgcm", "promote"); !strings.Contains(out, "epoch 2.3") {
		t.Errorf("promote of the far node: %s", out)
	}
	far.addDomain("last.test", s)
	near.takes("to@last.test")
	far.done(far.Slow(0))
	far.eventually(far.inSync)
}

// loaded gives nil where the node's own database has a domain.
func (n *node) loaded(domain string) error {
	out, err := n.psql("SELECT count(*) FROM config.domain WHERE name = '" + domain + "'")
	if err == nil && out != "1" {
		err = fmt.Errorf("%s has no %s", n.name, domain)
	}
	return err
}
