package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"strings"
	"syscall"
	"testing"
	"time"

	"mailproxy/internal/mta"
)

// itemIDs lists a node's queue, with what is added to the command.
func (n *testNode) itemIDs(args ...string) (ids []string) {
	n.t.Helper()
	var list struct {
		Items []struct{ ID string }
	}
	if err := json.Unmarshal([]byte(n.must(append([]string{"queue", "list", "--json"}, args...)...)), &list); err != nil {
		n.t.Fatal(err)
	}
	for _, i := range list.Items {
		ids = append(ids, i.ID)
	}
	return ids
}

// cluster3 makes n1.test(1) a master and the other two its slaves: n2.test(2) and n3.test(3).
func cluster3(t *testing.T) (master, slave, third *testNode) {
	t.Helper()
	master, slave, third = newNode(t), newNode(t, "--name", "n2.test"), newNode(t, "--name", "n3.test")
	for _, n := range []*testNode{master, slave, third} {
		n.start()
	}
	for _, n := range []*testNode{master, slave, third} {
		n.waitHealthy()
	}
	if out, errs, code := master.run("pmgcm", "create"); code != 0 {
		t.Fatalf("pmgcm create: %d %s%s", code, out, errs)
	}
	join(t, master, slave)
	join(t, master, third)
	return master, slave, third
}

func TestAnyNodesQueueIsReachedFromAnyNode(t *testing.T) {
	master, slave, third := cluster3(t)
	master.must("domain", "add", "example.test", "--to", freePort(t))
	for _, n := range []*testNode{master, slave, third} {
		eventually(t, func() error { return n.tryMail("to@example.test") })
	}
	eventually(t, func() error { // each slave has tunnels to all
		if _, errs, code := slave.run("mailproxy", "queue", "list", "--all"); code != 0 {
			return errors.New(errs)
		}
		return nil
	})
	if ids := slave.itemIDs("--all"); len(ids) != 3 {
		t.Errorf("--all: %v", ids)
	}
	out := slave.must("queue", "summary", "--all")
	for _, want := range []string{"n1.test(1): 1 item of ", "n2.test(2): 1 item of ", "n3.test(3): 1 item of "} {
		if !strings.Contains(out, want) {
			t.Errorf("no %q in %s", want, out)
		}
	}
	theirs := third.itemIDs()
	for _, node := range []string{"3", "N3.test"} {
		if ids := slave.itemIDs("--node", node); len(ids) != 1 || ids[0] != theirs[0] {
			t.Errorf("--node %s: %v, want %v", node, ids, theirs)
		}
	}
	if out := slave.must("queue", "show", theirs[0], "--node", "3", "--content"); !strings.Contains(out, "\nbody") {
		t.Errorf("show --content: %s", out)
	}

	t.Run("an order is in the log with who gave it, and where", func(t *testing.T) {
		if out := slave.must("queue", "hold", "--to", "example.test", "--node", "3"); out != "1 item on hold\n" {
			t.Errorf("hold: %s", out)
		}
		for _, want := range []string{
			`"item":"` + theirs[0] + `","order":"hold","who":"root","node":2,`, `"order":"hold","who":"root","node":2,"items":1,"refused":0,`,
		} {
			if !strings.Contains(third.stderr.String(), want) {
				t.Errorf("no %s in the log of node 3", want)
			}
		}
		if out := third.must("queue", "show", theirs[0]); !strings.Contains(out, "by root at node 2") {
			t.Errorf("show: %s", out)
		}
		third.stop()
		third.start()
		if out := third.must("queue", "list"); !strings.Contains(out, " on hold ") {
			t.Errorf("after a restart: %s", out)
		}
		if s := fmt.Sprint(third.status()["problems"]); !strings.Contains(s, "1 queued item on hold, by an operator's order") {
			t.Errorf("status: %s", s)
		}
		eventually(t, func() error {
			if _, errs, code := slave.run("mailproxy", "queue", "release", theirs[0], "--all"); code != 0 {
				return errors.New(errs)
			}
			return nil
		})
	})

	t.Run("items are moved, by an order from a third node", func(t *testing.T) {
		eventually(t, func() error {
			out, errs, code := slave.run("mailproxy", "queue", "move", "ALL", "--node", "1", "--to-node", "N3.test")
			if code != 0 {
				return errors.New(errs)
			}
			if out != "1 item moved\n" {
				return fmt.Errorf("move: %s", out)
			}
			return nil
		})
		if here, there := master.itemIDs(), third.itemIDs(); len(here) != 0 || len(there) != 2 {
			t.Errorf("%v here, %v there", here, there)
		}
		if !strings.Contains(third.stderr.String(), `"from":1,`) || !strings.Contains(master.stderr.String(), `"reason":"moved"`) {
			t.Error("the logs do not say so")
		}
	})

	t.Run("what cannot be is refused", func(t *testing.T) {
		if _, errs, code := slave.run("mailproxy", "queue", "move", "ALL", "--to-node", "2"); code != 1 || errs != "mailproxy: node 2 is no other node of this cluster\n" {
			t.Errorf("to itself: exit code %d, %s", code, errs)
		}
		if _, errs, code := slave.run("mailproxy", "queue", "hold", "NONE", "--all"); code != 1 || !strings.HasPrefix(errs, "mailproxy: item NONE: no such item") {
			t.Errorf("nowhere: exit code %d, %s", code, errs)
		}
	})

	t.Run("a node that is dead is named, and costs 2 s", func(t *testing.T) {
		list := func() {
			t.Helper()
			began := time.Now()
			out, errs, code := slave.run("mailproxy", "queue", "list", "--all")
			if took := time.Since(began); took > 5*time.Second {
				t.Errorf("it took %v", took)
			}
			if code != 1 || !strings.Contains(out, "to@example.test") || !strings.HasPrefix(errs, "mailproxy: n3.test(3): the daemon does not answer: ") ||
				strings.Count(errs, "mailproxy: ") != 1 || !strings.Contains(errs, `hint: "pmgcm status" says since when; `) {
				t.Errorf("exit code %d, %s%s", code, out, errs)
			}
		}
		third.signal(syscall.SIGSTOP) // as a host that hangs
		list()
		third.signal(syscall.SIGCONT)
		third.stop()
		list()
		if _, errs, code := slave.run("mailproxy", "queue", "delete", "ALL", "--all"); code != 1 || !strings.Contains(errs, "n3.test(3)") {
			t.Errorf("delete: exit code %d, %s", code, errs)
		}
		if _, errs, code := slave.run("mailproxy", "queue", "move", "ALL", "--to-node", "3"); code != 1 || !strings.Contains(errs, "node 3 does not answer") {
			t.Errorf("move: exit code %d, %s", code, errs)
		}
		if ids := slave.itemIDs(); len(ids) != 1 {
			t.Errorf("left: %v", ids)
		}
		third.start()
		third.waitHealthy()
	})

	t.Run("a node that was deleted reaches nothing", func(t *testing.T) {
		if out, errs, code := master.run("pmgcm", "delete", "3", "--yes"); code != 0 {
			t.Fatalf("pmgcm delete: %d %s%s", code, out, errs)
		}
		for _, args := range [][]string{{"list", "--node", "2"}, {"delete", "ALL", "--yes", "--node", "2"}, {"move", "ALL", "--to-node", "2"}} {
			if out, errs, code := third.run("mailproxy", append([]string{"queue"}, args...)...); code != 1 || strings.Contains(out, "moved") {
				t.Errorf("%v: exit code %d, %s%s", args, code, out, errs)
			}
		}
		if ids := slave.itemIDs(); len(ids) != 1 {
			t.Errorf("left: %v", ids)
		}
		if _, errs, code := slave.run("mailproxy", "queue", "list", "--node", "3"); code != 1 || !strings.Contains(errs, "no such node: 3") {
			t.Errorf("the other way: exit code %d, %s", code, errs)
		}
	})
	for _, n := range []*testNode{master, slave, third} {
		n.stop()
	}
}

func TestABalancerThatIsRefusedIsNamed(t *testing.T) {
	n := newNode(t)
	n.start()
	n.waitHealthy()
	n.must("setting", "set", "proxy_from", "127.0.0.1")
	eventually(t, func() error {
		c, err := net.Dial("tcp", n.smtp)
		if err != nil {
			return err
		}
		defer c.Close()
		_, _ = c.Write([]byte("EHLO client.test\r\n"))
		_, _ = io.Copy(io.Discard, io.LimitReader(c, 1))
		if s := fmt.Sprint(n.status()["problems"]); !strings.Contains(s, "connections from 127.0.0.1 were refused") {
			return errors.New(s)
		}
		return nil
	})
}

// What a next hop refuses that was never verified stays, and nobody is told: an administrator is.
func TestWhatIsKeptIsNamed(t *testing.T) {
	n := newNode(t)
	n.start()
	n.waitHealthy()
	n.must("domain", "add", "example.test", "--to", freePort(t))
	eventually(t, func() error { return n.tryMail("to@example.test") })
	n.must("domain", "set", "example.test", "--to", mta.StartSink(t, "-f", "RCPT").Addr)
	id := n.itemIDs()[0]
	eventually(t, func() error { // its daemon hears of the other hop a moment later
		if out := n.must("queue", "list", id); strings.Contains(out, " kept ") {
			return nil
		}
		_, errs, _ := n.run("mailproxy", "queue", "retry", id)
		return errors.New(errs)
	})
	if out := n.must("queue", "list", "--json"); !strings.Contains(out, `"kept":true`) {
		t.Errorf("list --json: %s", out)
	}
	eventually(t, func() error {
		if s := n.status(); s["kept"] != "1" || strings.Contains(fmt.Sprint(s["problems"]), "kept") {
			return fmt.Errorf("status: %v", s)
		}
		return nil
	})
	if out := n.must("queue", "summary"); !strings.Contains(out, "; 0 on hold, 1 kept\n") {
		t.Errorf("summary: %s", out)
	}
	if ids := n.itemIDs("--kept"); len(ids) != 1 || ids[0] != id {
		t.Errorf("list --kept: %v", ids)
	}
	if out := n.must("queue", "delete", "--kept", "--yes"); out != "1 item deleted\n" {
		t.Errorf("delete --kept: %s", out)
	}
	eventually(t, func() error {
		if s := n.status(); s["kept"] != nil {
			return fmt.Errorf("status: %v", s)
		}
		return nil
	})
}
