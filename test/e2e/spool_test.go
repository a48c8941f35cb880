package e2e

import (
	"errors"
	"fmt"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"mailproxy/config"
)

// reserve is what the daemon leaves free on the disks of the spool and of the bodies that are being taken (cmd/mailproxy).
const reserve = 64 << 20

func TestAFullSpoolIs452AndMailFlowsAgainWhenThereIsRoom(t *testing.T) {
	t.Parallel()
	n := newNode(t, "n1.test")
	n.sh(fmt.Sprintf("mkdir -p %s %s/tmp", n.local.SpoolDir(), n.local.StateDir))
	n.mount(n.local.SpoolDir(), "70m")
	n.mount(filepath.Join(n.local.StateDir, "tmp"), "66m")
	n.startHealthy()
	sink := newSink() // nobody listens yet: mail is queued
	n.must("mailproxy", "domain", "add", "example.test", "--to", sink.Address)
	n.takes("to@example.test")

	free := n.fill(n.local.SpoolDir(), reserve+1<<20)
	n.mustSend("to@example.test", "small") // there is room for this one
	full := func(subject string, filler int) {
		t.Helper()
		var no *refusal
		if reply, err := n.send("to@example.test", subject, filler); !errors.As(err, &no) || no.Code != 452 {
			t.Errorf("%s: %q, %v, want 452", subject, reply, err)
		}
	}
	full("too large for the spool", 1<<20+1<<19)
	full("too large for the file of a body", 4<<20)
	n.onlyWhole("probe", "small")
	sink.listen(t)
	if _, err := n.send("to@example.test", "cut through", 1<<20+1<<19); err != nil { // the spool is not needed for this
		t.Error(err)
	}
	n.must("mailproxy", "queue", "flush")
	n.eventually(func() error {
		if sink.Count("small") != 1 || sink.Count("probe") != 1 {
			return errors.New("what was queued has not arrived")
		}
		return nil
	})
	free()
	n.eventually(n.healthy)
	n.mustSend("to@example.test", "room again")
	if sink.Count("room again") != 1 {
		t.Error("with room again: not arrived")
	}
	for _, refused := range []string{"too large for the spool", "too large for the file of a body"} {
		if sink.Count(refused) != 0 {
			t.Errorf("%s: was refused and delivered", refused)
		}
	}
}

// onlyWhole wants the spool to hold these many messages and nothing else, also as a restarted daemon reads it.
func (n *node) onlyWhole(subjects ...string) {
	n.t.Helper()
	n.stop()
	n.start()
	if out := n.must("mailproxy", "queue", "list"); strings.Count(out, "to@example.test") != len(subjects) {
		n.t.Errorf("queue list, want %d:\n%s", len(subjects), out)
	}
	for _, sub := range []string{"new", "damaged"} {
		if left, _ := filepath.Glob(filepath.Join(n.local.SpoolDir(), sub, "*")); len(left) > 0 {
			n.t.Errorf("left behind: %v", left)
		}
	}
}

// What the daemon keeps of its configuration in a file may be older than what it had taken mail by.
func TestQueuedMailOfADomainThatIsNewWaitsForTheConfiguration(t *testing.T) {
	t.Parallel()
	n := newNode(t, "n1.test")
	n.startHealthy()
	sink := newSink() // nobody listens yet
	n.must("mailproxy", "domain", "add", "old.test", "--to", sink.Address)
	n.eventually(func() error { return n.saved("old.test") })
	n.must("mailproxy", "domain", "add", "example.test", "--to", sink.Address)
	n.takes("to@example.test")
	n.kill()
	file := n.local.SnapshotFile()
	if n.saved("example.test") == nil { // the machine was slow: make it what it may be
		n.sh("rm " + file)
	}
	n.start()
	sink.listen(t)
	n.must("mailproxy", "queue", "flush")
	n.eventually(func() error {
		if sink.Count("probe") == 0 {
			return errors.New(n.must("mailproxy", "queue", "list"))
		}
		return nil
	})
	if out := n.must("mailproxy", "queue", "list"); out != "queue is empty\n" || sink.Len() != 1 {
		t.Errorf("%d messages arrived, queue list: %s", sink.Len(), out)
	}
}

// saved gives nil where the daemon's file knows a domain.
func (n *node) saved(domain string) error {
	s, err := config.LoadSnapshot(n.local.SnapshotFile())
	if err != nil {
		return err
	}
	if s.Domains.Get(domain) != nil {
		return nil
	}
	return fmt.Errorf("%s is not in %s", domain, n.local.SnapshotFile())
}

func TestWhatWasAnsweredWith250IsDeliveredThoughTheDaemonIsKilled(t *testing.T) {
	t.Parallel()
	const messages, sessions = 200, 20
	n := newNode(t, "n1.test")
	n.startHealthy()
	sink := newSink() // nobody listens yet
	n.must("mailproxy", "domain", "add", "example.test", "--to", sink.Address)
	n.takes("to@example.test")

	var mu sync.Mutex
	var accepted []string
	kills := map[int]chan struct{}{messages / 4: make(chan struct{}), messages * 2 / 3: make(chan struct{})}
	next := make(chan string)
	var all sync.WaitGroup
	for range sessions {
		all.Go(func() {
			for subject := range next {
				// A message of which nothing was answered is sent again under another name: the first may arrive or not.
				for try := 0; ; try++ {
					name := fmt.Sprintf("%s.%d", subject, try)
					if _, err := n.send("to@example.test", name, 8<<10); err != nil {
						time.Sleep(20 * time.Millisecond) // between two looks at whether it is there again
						continue
					}
					mu.Lock()
					accepted = append(accepted, name)
					if k := kills[len(accepted)]; k != nil {
						close(k)
					}
					mu.Unlock()
					break
				}
			}
		})
	}
	var sending sync.WaitGroup
	sending.Go(func() {
		for i := range messages {
			next <- fmt.Sprint("message ", i)
		}
		close(next)
		all.Wait()
	})
	for _, at := range []int{messages / 4, messages * 2 / 3} {
		<-kills[at]
		n.kill()
		n.start()
	}
	sending.Wait()
	if len(accepted) != messages {
		t.Fatalf("%d were accepted", len(accepted))
	}

	sink.listen(t)
	n.must("mailproxy", "queue", "flush")
	n.eventually(func() error { // killed once more while they are delivered
		if got := sink.Len(); got < messages/4 {
			return fmt.Errorf("%d have arrived", got)
		}
		return nil
	})
	n.kill()
	n.start()
	n.must("mailproxy", "queue", "flush")
	n.eventually(func() error {
		for _, subject := range accepted {
			if sink.Count(subject) == 0 {
				return fmt.Errorf("%s has not arrived", subject)
			}
		}
		return nil
	})
	n.eventually(func() error {
		if out := n.must("mailproxy", "queue", "list"); out != "queue is empty\n" {
			return errors.New(out)
		}
		return nil
	})
}
