package e2e

import (
	"fmt"
	"net"
	"net/http"
	"os"
	"regexp"
	"strings"
	"syscall"
	"testing"
	"time"
)

// timely bounds `pmgcm status`: peers are asked side by side for 2 s each, and a busy machine needs some more.
const timely = 4 * time.Second

// statusInTime runs `pmgcm status`, wants it to end in time with exit code 3, and to have lines that match.
func (n *node) statusInTime(want ...string) {
	n.t.Helper()
	start := time.Now()
	out, errs, code := n.run("pmgcm", "status")
	if took := time.Since(start); took > timely || code != 3 {
		n.t.Errorf("exit code %d after %v\n%s%s", code, took, out, errs)
	}
	for _, line := range want {
		if !regexp.MustCompile("(?m)" + line).MatchString(out) {
			n.t.Errorf("no line %s in\n%s", line, out)
		}
	}
}

func TestStatusAnswersInTimeWithPeersThatDoNot(t *testing.T) {
	t.Parallel()
	c := newCluster(t, 3)
	asked, stopped, cut := c[0], c[1], c[2]
	const header = `^NAME\(CID\)--------------IPADDRESS----ROLE-STATE---------UPTIME---LOAD----MEM---DISK$`
	dead := []string{header, `^n2\.test\(2\) .* node   ERROR: .+`, `^n3\.test\(3\) .* node   ERROR: .+`}
	master := append([]string{`^n1\.test\(1\) .* master A `}, dead...)

	stopped.signal(syscall.SIGSTOP)
	cut.cutOff()
	asked.statusInTime(master...) // the tunnels have noticed nothing yet
	asked.eventually(func() error { return asked.tunnels(0) })
	asked.statusInTime(master...)

	// With PostgreSQL away here too, the control sockets know.
	data := asked.local.PostgresDataDir()
	if err := os.Rename(data, data+".away"); err != nil {
		t.Fatal(err)
	}
	asked.killPostgres()
	without := append([]string{`^n1\.test\(1\) .* master S `, `^n1\.test\(1\): .*PostgreSQL`, `^  remedy: `}, dead...)
	asked.eventually(func() error {
		if r := asked.report(); r.Nodes[0].Database {
			return fmt.Errorf("the database of n1 still answers: %+v", r)
		}
		return nil
	})
	asked.statusInTime(without...)
	asked.stop()
	asked.start() // and after a restart, from the snapshot
	asked.statusInTime(append([]string{`^n1\.test\(1\) .* master S `}, dead...)...)

	if err := os.Rename(data+".away", data); err != nil {
		t.Fatal(err)
	}
	cut.heal()
	stopped.signal(syscall.SIGCONT)
	asked.eventually(asked.inSync)
}

// tunnels gives nil when the daemon has so many tunnels up.
func (n *node) tunnels(want int) error {
	n.t.Helper()
	up := 0
	for _, row := range n.report().Nodes {
		for _, p := range row.Peers {
			if p.Tunnel {
				up++
			}
		}
	}
	if up != want {
		return fmt.Errorf("%d tunnels of %s are up, want %d", up, n.name, want)
	}
	return nil
}

func TestANodeWithoutSMTPIsAFullMember(t *testing.T) {
	t.Parallel()
	master, member := newNode(t, "n1.test"), newNode(t, "n2.test", "--services", "web")
	master.startHealthy()
	member.startHealthy()
	sink := newSink()
	sink.listen(t)
	master.must("pmgcm", "create")
	master.must("mailproxy", "domain", "add", "first.test", "--to", sink.Address)
	member.must("pmgcm", master.joinArgs()...)

	if err := refuses(member.address + ":" + smtpPort); err != nil {
		t.Error(err)
	}
	if err := member.healthy(); err != nil {
		t.Error(err)
	}
	resp, err := http.Get("http://" + net.JoinHostPort(member.address, webPort) + "/health")
	if err != nil {
		t.Fatal(err)
	}
	_ = resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		t.Errorf("GET /health: %s", resp.Status)
	}
	if out := member.must("mailproxy", "domain", "list"); !strings.Contains(out, "first.test") {
		t.Errorf("its configuration: %s", out)
	}
	if out := member.must("mailproxy", "queue", "list"); out != "queue is empty\n" {
		t.Errorf("queue list: %s", out)
	}

	out := member.must("pmgcm", "promote")
	if !strings.Contains(out, "this node is master now, epoch 2.2") {
		t.Errorf("promote: %s", out)
	}
	member.must("mailproxy", "domain", "add", "second.test", "--to", sink.Address)
	master.takes("to@second.test")
	member.eventually(member.inSync)
	if err := refuses(member.address + ":" + smtpPort); err != nil {
		t.Error(err)
	}
}
