package e2e

import (
	"errors"
	"fmt"
	"regexp"
	"strings"
	"testing"
)

func TestAMasterThatWasCutOffStepsDownAndItsOwnCommitIsInItsJournal(t *testing.T) {
	t.Parallel()
	c := newCluster(t, 3)
	old, second, third := c[0], c[1], c[2]
	sink := newSink()
	sink.listen(t)
	old.cutOff()
	old.must("mailproxy", "domain", "add", "lost.test", "--to", sink.Address) // at once: it has no lease any more in a moment
	old.eventually(func() error { return old.tunnels(0) })
	old.takes("to@lost.test")

	second.eventually(func() error { // the old master is in the list, and does not answer
		out, errs, code := second.run("pmgcm", "promote")
		if code == 0 && strings.Contains(out, "this node is master now, epoch 2.2") {
			return nil
		}
		return fmt.Errorf("promote: exit code %d\n%s%s", code, out, errs)
	})
	second.must("mailproxy", "domain", "add", "kept.test", "--to", sink.Address)
	third.takes("to@kept.test") // it follows by itself
	if out := old.must("mailproxy", "domain", "list"); strings.Contains(out, "kept.test") || !strings.Contains(out, "lost.test") {
		t.Errorf("the old master is not cut off, it has\n%s", out)
	}

	old.heal()
	old.eventually(old.inSync)
	for _, n := range c {
		out := n.must("pmgcm", "status")
		for _, line := range []string{`^n1\.test\(1\) .* node   A `, `^n2\.test\(2\) .* master A `, `^n3\.test\(3\) .* node   A `,
			`^n1\.test\(1\): 1 commit that the master does not have was set aside here$`, "^  remedy: `pmgcm journal list`"} {
			if !regexp.MustCompile("(?m)" + line).MatchString(out) {
				t.Errorf("on %s: no line %s in\n%s", n.name, line, out)
			}
		}
	}
	out := old.must("pmgcm", "journal", "show", "1")
	for _, want := range []string{"command: mailproxy domain add lost.test", "insert domain ", "lost.test"} {
		if !strings.Contains(out, want) {
			t.Errorf("journal show: no %q in\n%s", want, out)
		}
	}
	old.takes("to@kept.test")
	old.eventually(func() error {
		_, err := old.send("to@lost.test", "lost", 0)
		var no *refusal
		if errors.As(err, &no) && no.Code == 554 {
			return nil
		}
		return fmt.Errorf("the old master's own domain: %w, want 554", err)
	})
	if err := old.inSync(); err != nil {
		t.Error(err)
	}
}
