package e2e

import (
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

func TestDeletedNodesAreLetInNowhere(t *testing.T) {
	t.Parallel()
	c := newCluster(t, 3)
	master, living, dead := c[0], c[1], c[2]
	dead.crash()
	if out := master.must("pmgcm", "delete", "3", "--yes"); !strings.Contains(out, "n3.test(3) deleted") {
		t.Errorf("delete of a dead node: %s", out)
	}
	living.eventually(living.inSync) // of two now
	if out := master.must("pmgcm", "delete", "2", "--yes"); !strings.Contains(out, "n2.test(2) deleted") {
		t.Errorf("delete of a living node: %s", out)
	}
	dead.startHealthy()
	for _, n := range []*node{living, dead} {
		n.eventually(n.isOut)
		cid := strings.TrimSuffix(strings.TrimPrefix(n.name, "n"), ".test")
		if out := master.must("pmgcm", "delete", cid, "--yes"); !strings.Contains(out, n.name+"("+cid+") was deleted already") {
			t.Errorf("delete again: %s", out)
		}
		n.refused("cluster already defined", "pmgcm", append([]string{}, master.joinArgs()...)...)
	}
	if err := master.inSync(); err != nil { // alone
		t.Error(err)
	}
	if out := master.must("pmgcm", "status"); strings.Contains(out, "n2.test") || strings.Contains(out, "n3.test") {
		t.Errorf("status of the master:\n%s", out)
	}

	// Its key lets nobody in, wherever it is.
	thief := newNode(t, "n4.test")
	thief.startHealthy()
	key := filepath.Join("keys", "node.key")
	thief.sh(fmt.Sprintf("install -o nobody -g nogroup -m 600 %s %s", filepath.Join(dead.local.StateDir, key), filepath.Join(thief.local.StateDir, key)))
	thief.refused("this node's key belongs to a deleted node", "pmgcm", master.joinArgs()...)
	if _, errs, code := thief.run("pmgcm", "status"); code != 1 || !strings.HasPrefix(errs, "pmgcm: no cluster defined") {
		t.Errorf("after a join that was refused: %d, %s", code, errs)
	}

	// The way back that it is told.
	dead.must("pmgcm", "leave", "--yes")
	if out := dead.must("pmgcm", master.joinArgs()...); !strings.HasSuffix(out, "\njoined\n") {
		t.Errorf("join anew: %s", out)
	}
	dead.eventually(dead.healthy)
	if r := master.report(); !r.InSync || len(r.Nodes) != 2 || r.Nodes[1].CID != 4 {
		t.Errorf("after joining anew: %+v", r)
	}
}

// isOut gives nil where a deleted node reaches nobody, and says so itself with the remedy.
func (n *node) isOut() error {
	out, _, code := n.run("pmgcm", "status")
	if code != 3 || !strings.Contains(out, "node   ERROR: ") && !strings.Contains(out, "master ERROR: ") ||
		!strings.Contains(out, "deleted") || !strings.Contains(out, "  remedy: ") {
		return fmt.Errorf("status of %s: exit code %d\n%s", n.name, code, out)
	}
	if sql, err := n.peerSQL(1, []string{"-U", "any"}, "SELECT 1"); err == nil || strings.Contains(sql, "1\n") {
		return fmt.Errorf("%s reaches the master's PostgreSQL: %s", n.name, sql)
	}
	return n.tunnels(0)
}

// killedAt says at which moment a join is killed: when it has written a line that contains this; or, empty, when it has left a note.
var killedAt = []string{"", "took this node in", "own configuration emptied", "tunnel is up"}

func TestAJoinThatIsKilledIsRunAgain(t *testing.T) {
	t.Parallel()
	master, joining := newNode(t, "n1.test"), newNode(t, "n2.test")
	master.startHealthy()
	joining.startHealthy()
	sink := newSink()
	sink.listen(t)
	master.must("pmgcm", "create")
	master.must("mailproxy", "domain", "add", "example.test", "--to", sink.Address)
	joining.must("mailproxy", "domain", "add", "own.test", "--to", sink.Address)
	line := master.joinArgs()
	for _, moment := range killedAt {
		joining.joinAndKill(moment, line)
		if _, err := joining.health(); err != nil {
			t.Errorf("killed at %q, the daemon does not answer: %v", moment, err)
		}
	}
	// And together with its daemon and PostgreSQL.
	joining.joinAndKill("took this node in", line)
	joining.crash()
	joining.start()
	joining.eventually(func() error { _, err := joining.psql("SELECT 1"); return err })

	// And at its end: only the note may be left to be removed, or that is done too.
	joining.joinAndKill("in sync with", line)
	if _, err := os.Stat(filepath.Join(joining.local.StateDir, "join.json")); err == nil {
		if out := joining.must("pmgcm", line...); !strings.HasSuffix(out, "\njoined\n") {
			t.Errorf("join: %s", out)
		}
	}
	joining.refused("cluster already defined: this is node 2", "pmgcm", line...)
	joining.takes("to@example.test")
	if out := joining.must("mailproxy", "domain", "list"); strings.Contains(out, "own.test") {
		t.Errorf("after the join it has\n%s", out)
	}
	master.eventually(master.inSync)
	if r := joining.report(); !r.InSync || len(r.Nodes) != 2 || r.Nodes[1].CID != 2 {
		t.Errorf("status: %+v", r)
	}
}

func TestAJoinToAMasterBehindDroppedPacketsSaysSo(t *testing.T) {
	t.Parallel()
	master, joining := newNode(t, "n1.test"), newNode(t, "n2.test")
	master.startHealthy()
	joining.startHealthy()
	sink := newSink()
	sink.listen(t)
	master.must("pmgcm", "create")
	joining.must("mailproxy", "domain", "add", "own.test", "--to", sink.Address)
	joining.takes("to@own.test")
	line := master.joinArgs()
	master.cutOff()
	start := time.Now()
	joining.refused("master not reachable: "+master.address, "pmgcm", line...)
	if took := time.Since(start); took > 30*time.Second {
		t.Errorf("it says so after %v", took)
	}
	joining.mustSend("to@own.test", "still its own")
	if out := joining.must("mailproxy", "domain", "list"); !strings.Contains(out, "own.test") {
		t.Errorf("its configuration: %s", out)
	}
	master.heal()
	if out := joining.must("pmgcm", line...); !strings.HasSuffix(out, "\njoined\n") { // the token is as good as it was
		t.Errorf("join: %s", out)
	}
}

// joinAndKill begins a join and kills it at a moment.
func (n *node) joinAndKill(moment string, line []string) {
	n.t.Helper()
	out, in := n.lineByLine()
	defer out.Close()
	cmd := n.command("pmgcm", line...)
	cmd.Stdout = in
	if err := cmd.Start(); err != nil {
		n.t.Fatal(err)
	}
	_ = in.Close()
	var said string
	if moment == "" {
		n.eventually(func() error { _, err := os.Stat(filepath.Join(n.local.StateDir, "join.json")); return err })
	} else {
		for line := n.peek(out); line != ""; line = n.peek(out) {
			if said += line; strings.Contains(line, moment) {
				break
			}
			_, _ = out.Read(make([]byte, len(line))) // so much is there
		}
	}
	_ = cmd.Process.Kill() // it may have ended by itself, which the next lines see
	if err := cmd.Wait(); err == nil || moment != "" && !strings.Contains(said, moment) {
		n.t.Fatalf("join was not killed at %q: %v\n%s", moment, err, said)
	}
}

// lineByLine gives a pipe whose writer waits with its next line until the last has been read.
func (n *node) lineByLine() (out, in *os.File) {
	n.t.Helper()
	var ends [2]int
	n.done(unix.Pipe2(ends[:], unix.O_DIRECT|unix.O_CLOEXEC))
	if _, err := unix.FcntlInt(uintptr(ends[0]), unix.F_SETPIPE_SZ, os.Getpagesize()); err != nil {
		n.t.Fatal(err)
	}
	return os.NewFile(uintptr(ends[0]), "out"), os.NewFile(uintptr(ends[1]), "in")
}

// peek waits for a line in a pipe of lineByLine and leaves it there; empty when the writer has ended.
func (n *node) peek(out *os.File) string {
	n.t.Helper()
	copied, to := n.lineByLine()
	defer copied.Close()
	_, err := unix.Tee(int(out.Fd()), int(to.Fd()), os.Getpagesize(), 0)
	_ = to.Close()
	n.done(err)
	line, err := io.ReadAll(copied)
	n.done(err)
	return string(line)
}
