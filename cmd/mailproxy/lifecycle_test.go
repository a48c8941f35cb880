package main

import (
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus/testutil/promlint"

	"mailproxy/db"
	"mailproxy/internal/pgtest"
)

func TestAFreshNodeIsReadyAtOnceAndAnswers451UntilItHasAConfiguration(t *testing.T) {
	n := newNode(t)
	n.start() // READY comes before PostgreSQL was ever initialised
	conn, err := net.Dial("tcp", n.smtp)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	greeting := make([]byte, 4)
	if _, err := io.ReadFull(conn, greeting); err != nil || greeting[0] == '5' {
		t.Errorf("greeting %q, %v: a refusal for good", greeting, err)
	}
	n.waitHealthy()
	n.psqlOfTheManPage()
	n.must("domain", "add", "example.test", "--to", freePort(t))
	eventually(t, func() error { // nobody listens there: the next hop is out of reach, and mail is queued
		return n.tryMail("to@example.test")
	})
	s := n.dialSMTP()
	s.want("EHLO client.test", "250 ")
	s.want("MAIL FROM:<a@b.test>", "250 ")
	s.want("RCPT TO:<to@elsewhere.test>", "554 5.7.1 ")
	if out := n.must("queue", "list"); !strings.Contains(out, "to@example.test") || !strings.Contains(out, "connect: connection refused") {
		t.Errorf("queue list: %s", out)
	}
	n.stop()
}

// psqlOfTheManPage runs psql as mailproxy(8) has it.
func (n *testNode) psqlOfTheManPage() {
	n.t.Helper()
	page, err := os.ReadFile(filepath.Join("..", "..", "man", "mailproxy.8.in"))
	if err != nil {
		n.t.Fatal(err)
	}
	_, rest, ok := strings.Cut(strings.ReplaceAll(string(page), `\-`, "-"), "psql -h /run/mailproxy/pg")
	options, _, _ := strings.Cut(rest, "\n")
	psql := exec.Command("psql", append([]string{"-h", n.local.PostgresSocketDir(), "-X", "-c", "SELECT epoch_n FROM node.position"}, strings.Fields(options)...)...)
	if out, err := psql.CombinedOutput(); err != nil || !ok {
		n.t.Errorf("psql%s: %v: %s", options, err, out)
	}
}

// tryMail sends one message and gives what was not 2xx.
func (n *testNode) tryMail(to string) error {
	c, err := net.Dial("tcp", n.smtp)
	if err != nil {
		return err
	}
	defer c.Close()
	_ = c.SetDeadline(time.Now().Add(10 * time.Second))
	buffer := make([]byte, 4096)
	for _, line := range []string{"", "HELO client.test\r\n", "MAIL FROM:<a@b.test>\r\n", "RCPT TO:<" + to + ">\r\n", "DATA\r\n",
		"Subject: x\r\n\r\nbody\r\n.\r\n"} {
		if _, err := c.Write([]byte(line)); err != nil {
			return err
		}
		n, err := c.Read(buffer)
		if err != nil {
			return err
		}
		if buffer[0] != '2' && buffer[0] != '3' {
			return fmt.Errorf("%s: %s", strings.TrimSpace(line), buffer[:n])
		}
	}
	return nil
}

func TestTheDaemonRunsAsTheUserOfItsNodeFile(t *testing.T) {
	n := newNode(t)
	n.start()
	status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", n.cmd.Process.Pid))
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{"Uid:\t65534\t65534\t65534\t65534", "Gid:\t65534\t65534\t65534\t65534", "CapEff:\t0000000000000000"} {
		if !strings.Contains(string(status), want) {
			t.Errorf("no %q in\n%s", want, status)
		}
	}
	for _, file := range []string{n.local.ControlSocket(), tlsFile(n.local)} {
		info, err := os.Stat(file)
		if err != nil {
			t.Fatal(err)
		}
		if s := info.Sys().(*syscall.Stat_t); s.Uid != 65534 || info.Mode().Perm() != 0o600 {
			t.Errorf("%s: uid %d, mode %v", file, s.Uid, info.Mode())
		}
	}
	n.stop()
}

func TestASecondDaemonIsRefusedAndAPortInUseIsNamed(t *testing.T) {
	n := newNode(t)
	n.start()
	_, errs, code := n.run("mailproxy", "serve")
	if want := fmt.Sprintf("mailproxy: a daemon is running, pid %d (%s is locked)\n", n.cmd.Process.Pid, n.local.LockFile()); code != 1 || errs != want {
		t.Errorf("exit code %d, %q, want %q", code, errs, want)
	}
	other := newNode(t, "--dsn", "host=/nonexistent")
	text, err := os.ReadFile(other.file)
	if err != nil {
		t.Fatal(err)
	}
	shared := strings.ReplaceAll(string(text), other.local.RunDir, n.local.RunDir)
	if err := os.WriteFile(other.file, []byte(shared), 0o640); err != nil {
		t.Fatal(err)
	}
	want := fmt.Sprintf("mailproxy: run_dir %s is in use: a daemon is running, pid %d (%s is locked)\nhint: every node has a run_dir of its own: "+
		"\"run_dir\" in its node file, --run-dir of init\n", n.local.RunDir, n.cmd.Process.Pid, n.local.RunLockFile())
	if _, errs, code := other.run("mailproxy", "serve"); code != 1 || errs != want {
		t.Errorf("the run_dir of another node: exit code %d, %q, want %q", code, errs, want)
	}
	for _, path := range []string{n.local.RunDir, n.local.StateDir} { // each beside a fresh one
		file := filepath.Join(n.dir, "second.toml")
		dirs := map[string]string{n.local.RunDir: "--run-dir", n.local.StateDir: "--state-dir"}
		args := []string{"--config", file, "init", "--name", "n2.test", "--address", "192.0.2.2", "--user", "nobody",
			"--run-dir", filepath.Join(n.dir, "r2"), "--state-dir", filepath.Join(n.dir, "s2"), dirs[path], path}
		if _, errs, code := n.run("mailproxy", args...); code != 1 || !strings.Contains(errs, fmt.Sprintf("pid %d (%s/lock is locked)", n.cmd.Process.Pid, path)) {
			t.Errorf("init with %s: exit code %d, %s", path, code, errs)
		}
		if _, err := os.Stat(file); err == nil {
			t.Errorf("init with %s wrote its file", path)
		}
	}
	if _, err := n.health(); err != nil {
		t.Errorf("the first daemon does not answer any more: %v", err)
	}
	for _, door := range []struct{ flag, address, section string }{
		{"--smtp-listen", n.smtp, "smtp"}, {"--web-listen", n.web, "web"}, {"--tunnel-listen", n.tunnel, "tunnel"},
	} {
		other := newNode(t, door.flag, door.address)
		_, errs, code := other.run("mailproxy", "serve")
		_, port, _ := net.SplitHostPort(door.address)
		want := fmt.Sprintf("mailproxy: [%s] listen %s: the port is in use\nhint: \"ss -ltnp sport = :%s\" shows by whom\n", door.section, door.address, port)
		if code != 1 || errs != want {
			t.Errorf("exit code %d, %q, want %q", code, errs, want)
		}
	}
	n.stop()
	n.start() // the lock went with the daemon
	n.stop()
}

// damages are what can happen to the database while mail flows.
var damages = []struct {
	name string
	do   func(n *testNode) error
	// later: the daemon that is running does not meet it, only the next one.
	later bool
}{
	{"its data directory is moved away", func(n *testNode) error {
		return os.Rename(n.local.PostgresDataDir(), n.local.PostgresDataDir()+".away")
	}, false},
	{"its data directory is broken", func(n *testNode) error {
		return os.WriteFile(filepath.Join(n.local.PostgresDataDir(), "global", "pg_control"), []byte("broken"), 0o600)
	}, false},
	{"its programs are gone", func(n *testNode) error {
		text, err := os.ReadFile(n.file)
		if err != nil {
			return err
		}
		return os.WriteFile(n.file, []byte(strings.Replace(string(text), "#bin = \"/usr/lib/postgresql/15/bin\"", "bin = \"/nonexistent\"", 1)), 0o640)
	}, true},
}

func TestMailFlowsWithoutPostgreSQLAlsoAfterARestart(t *testing.T) {
	for _, damage := range damages {
		t.Run(damage.name, func(t *testing.T) {
			n := newNode(t)
			n.start()
			n.waitHealthy()
			n.must("domain", "add", "example.test", "--to", freePort(t))
			eventually(t, func() error { return n.tryMail("to@example.test") })
			eventually(t, func() error { _, err := os.Stat(n.local.SnapshotFile()); return err })

			if err := damage.do(n); err != nil {
				t.Fatal(err)
			}
			if pid := n.postmaster(); pid > 0 {
				if err := syscall.Kill(pid, syscall.SIGKILL); err != nil {
					t.Fatal(err)
				}
			}
			queued := 1
			if !damage.later {
				queued++
				n.answersWithoutDatabase(queued)
			}
			n.signal(syscall.SIGTERM)
			n.wait()
			n.start()
			n.answersWithoutDatabase(queued + 1)
			n.stop()
		})
	}
}

// answersWithoutDatabase sends a message and wants this many in the queue then, and every answer that needs no database.
func (n *testNode) answersWithoutDatabase(queued int) {
	n.t.Helper()
	if err := n.tryMail("to@example.test"); err != nil {
		n.t.Errorf("no mail is taken: %v", err)
	}
	if out := n.must("queue", "list"); strings.Count(out, "to@example.test") != queued {
		n.t.Errorf("queue list: %s", out)
	}
	eventually(n.t, func() error {
		h, err := n.health()
		if err != nil {
			return err
		}
		if h.Status != "degraded" {
			return fmt.Errorf("health: %+v", h)
		}
		return nil
	})
	if s := n.status(); s["database"] != "false" || s["problems"] == "" {
		n.t.Errorf("status: %v", s)
	}
	if _, errs, code := n.run("mailproxy", "domain", "add", "b.test", "--to", "127.0.0.1"); code != 1 ||
		!strings.HasPrefix(errs, "mailproxy: the node's database does not answer: ") || !strings.Contains(errs, "\nhint: ") {
		n.t.Errorf("domain add: exit code %d, %s", code, errs)
	}
}

func TestCommandsRightAfterTheFirstStartWaitForTheDatabase(t *testing.T) {
	for _, first := range [][]string{{"mailproxy", "domain", "add", "example.test", "--to", "192.0.2.1"}, {"pmgcm", "create"}} {
		t.Run(strings.Join(first, " "), func(t *testing.T) {
			n := newNode(t)
			n.start()
			if out, errs, code := n.run(first[0], first[1:]...); code != 0 {
				t.Errorf("exit code %d, %s%s", code, out, errs)
			}
			n.stop()
		})
	}
}

func TestANodeInNoClusterSaysWhatIsWrong(t *testing.T) {
	n := newNode(t)
	text, err := os.ReadFile(n.file)
	if err != nil {
		t.Fatal(err)
	}
	text = []byte(strings.Replace(string(text), "#bin = \"/usr/lib/postgresql/15/bin\"", "bin = \"/nonexistent\"", 1))
	if err := os.WriteFile(n.file, text, 0o640); err != nil {
		t.Fatal(err)
	}
	n.start()
	start := time.Now()
	for _, c := range [][]string{{"mailproxy", "domain", "add", "b.test", "--to", "192.0.2.1"}, {"pmgcm", "create"}} {
		_, errs, code := n.run(c[0], c[1:]...)
		if code != 1 || !strings.Contains(errs, "\nhint: ") || !strings.Contains(errs, `"pmgcm status" `) {
			t.Errorf("%v: exit code %d, %s", c, code, errs)
		}
	}
	if took := time.Since(start); took > 20*time.Second { // what will not come is not waited for
		t.Errorf("they took %v", took)
	}
	out, errs, code := n.run("pmgcm", "status")
	if code != 1 || !strings.Contains(out, "\nn1.test: PostgreSQL is not installed in /nonexistent ") || !strings.Contains(out, "\n  remedy: ") ||
		!strings.HasPrefix(errs, "pmgcm: no cluster defined: something is wrong with this node\nhint: put right what is named above; ") {
		t.Errorf("pmgcm status: exit code %d, %s%s", code, out, errs)
	}
	if out, _, code := n.run("pmgcm", "status", "--json"); code != 1 || !strings.Contains(out, `"remedy": "`) {
		t.Errorf("pmgcm status --json: exit code %d, %s", code, out)
	}
	n.stop()
	if out, errs, _ := n.run("pmgcm", "status"); !strings.Contains(out, "the daemon is not running\n  remedy: systemctl start mailproxy\n") {
		t.Errorf("pmgcm status without a daemon: %s%s", out, errs)
	}
}

func TestPostgreSQLIsStartedAgainWhenItDies(t *testing.T) {
	n := newNode(t)
	n.start()
	n.waitHealthy()
	pid := n.postmaster()
	if err := syscall.Kill(pid, syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	eventually(t, func() error {
		if now := n.postmaster(); now == 0 || now == pid {
			return errors.New("it was not started again")
		}
		return nil
	})
	n.waitDatabase()
	n.must("domain", "add", "example.test", "--to", "127.0.0.1")
	n.stop()
	if pid := n.postmaster(); pid != 0 {
		t.Errorf("PostgreSQL, pid %d, runs without its daemon", pid)
	}
}

func TestPostgreSQLOutlivesADaemonThatIsKilledAndIsAdopted(t *testing.T) {
	n := newNode(t)
	n.start()
	n.waitHealthy()
	pid := n.postmaster()
	n.signal(syscall.SIGKILL)
	n.wait()
	n.start()
	n.waitHealthy()
	if now := n.postmaster(); now != pid {
		t.Errorf("pid %d before, %d now", pid, now)
	}
	n.stop()
}

func TestANodeWithoutSMTPTakesNoMail(t *testing.T) {
	n := newNode(t, "--services", "web")
	n.start()
	n.waitHealthy()
	if c, err := net.Dial("tcp", n.smtp); err == nil {
		_ = c.Close()
		t.Error("it listens for SMTP")
	}
	resp, err := http.Get("http://" + n.web + "/health")
	if err != nil {
		t.Fatal(err)
	}
	_ = resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		t.Errorf("health: %s", resp.Status)
	}
	n.must("domain", "add", "example.test", "--to", "127.0.0.1") // a full member
	if out := n.must("queue", "list"); out != "queue is empty\n" {
		t.Errorf("queue list: %s", out)
	}
	n.stop()
}

func TestAConfigurationThatDoesNotCompileIsRefusedAndTheOldOneStaysInForce(t *testing.T) {
	n := newNode(t)
	n.start()
	n.waitHealthy()
	n.must("domain", "add", "example.test", "--to", freePort(t))
	eventually(t, func() error { return n.tryMail("to@example.test") })
	// Past all checks of the commands, as an administrator with psql could.
	psql := exec.Command("psql", "-X", "-h", n.local.PostgresSocketDir(), "-U", "mailproxy", "-d", "mailproxy", "-v", "ON_ERROR_STOP=1", "-c",
		"UPDATE config.domain SET hosts = '{}', transport = 'nowhere'")
	if out, err := psql.CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	eventually(t, func() error {
		h, err := n.health()
		if err != nil {
			return err
		}
		for _, c := range h.Checks {
			if c.Name == "configuration" && strings.Contains(c.Error, "domain example.test: no such transport: nowhere") && h.Status == "degraded" {
				return nil
			}
		}
		return fmt.Errorf("health: %+v", h)
	})
	if s := n.status(); !strings.Contains(fmt.Sprint(s["problems"]), "no such transport: nowhere") {
		t.Errorf("status: %v", s)
	}
	if err := n.tryMail("to@example.test"); err != nil {
		t.Errorf("the old configuration is not in force: %v", err)
	}
	n.stop()
	n.start() // by the file, which has what was in force
	if err := n.tryMail("to@example.test"); err != nil {
		t.Errorf("the old configuration is not in force after a restart: %v", err)
	}
	n.waitDatabase()
	n.must("domain", "set", "example.test", "--to", "127.0.0.1")
	n.waitHealthy()
	n.stop()
}

func TestSIGTERMLetsATransactionEnd(t *testing.T) {
	n := newNode(t)
	n.start()
	n.waitHealthy()
	n.must("domain", "add", "example.test", "--to", freePort(t))
	eventually(t, func() error { return n.tryMail("to@example.test") })
	s := n.dialSMTP()
	s.want("EHLO client.test", "250 ")
	s.want("MAIL FROM:<a@b.test>", "250 ")
	s.want("RCPT TO:<to@example.test>", "250 ")
	s.want("DATA", "354 ")
	n.signal(syscall.SIGTERM)
	eventually(t, func() error {
		if c, err := net.Dial("tcp", n.smtp); err == nil {
			_ = c.Close()
			return errors.New("it still accepts")
		}
		return nil
	})
	s.want("Subject: x\r\n\r\nbody\r\n.", "250 ")
	if code := n.wait(); code != 0 {
		t.Errorf("exit code %d", code)
	}
	n.start()
	if out := n.must("queue", "list"); strings.Count(out, "to@example.test") != 2 {
		t.Errorf("queue list: %s", out)
	}
	n.stop()
	order := []string{}
	for line := range strings.Lines(n.stderr.String()) {
		if _, rest, ok := strings.Cut(line, `"part":"`); ok && strings.Contains(line, "part.stopped") {
			name, _, _ := strings.Cut(rest, `"`)
			order = append(order, name)
		}
	}
	if got := strings.Join(order, " "); got != "smtp queue relay configuration cluster tunnel web postgres" {
		t.Errorf("stopped in the order %s", got)
	}
}

func TestASecondSIGTERMEndsTheDaemonAtOnce(t *testing.T) {
	n := newNode(t)
	n.start()
	n.waitHealthy()
	n.must("domain", "add", "example.test", "--to", freePort(t))
	eventually(t, func() error { return n.tryMail("to@example.test") })
	s := n.dialSMTP()
	s.want("EHLO client.test", "250 ")
	s.want("MAIL FROM:<a@b.test>", "250 ")
	s.want("RCPT TO:<to@example.test>", "250 ")
	s.want("DATA", "354 ")
	start := time.Now()
	n.signal(syscall.SIGTERM)
	eventually(t, func() error {
		if !strings.Contains(n.stderr.String(), "daemon.stopping") {
			return errors.New("the first one was not seen")
		}
		return nil
	})
	n.signal(syscall.SIGTERM)
	if code := n.wait(); code != 1 || time.Since(start) > drainBound/2 {
		t.Errorf("exit code %d after %v", code, time.Since(start))
	}
}

func TestMetricsOfTheWholeDaemonAreNamedAsPrometheusWants(t *testing.T) {
	n := newNode(t)
	n.start()
	n.waitHealthy()
	resp, err := http.Get("http://" + n.web + "/metrics")
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{"mailproxy_build_info{", "mailproxy_queue_items 0", "mailproxy_smtp_sessions_total ", `mailproxy_smtp_limited_total{limit="unknown_recipients"} 0`, "mailproxy_config_serial 0"} {
		if !strings.Contains(string(body), want) {
			t.Errorf("no %s in\n%s", want, body)
		}
	}
	problems, err := promlint.New(strings.NewReader(string(body))).Lint()
	if err != nil || len(problems) > 0 {
		t.Errorf("%v, %v", problems, err)
	}
	n.stop()
}

func TestStatusAndQueueAnswerThroughPmgcmWithoutPostgreSQL(t *testing.T) {
	n := newNode(t)
	n.start()
	n.waitHealthy()
	if out, errs, code := n.run("pmgcm", "create"); code != 0 {
		t.Fatalf("pmgcm create: %d %s%s", code, out, errs)
	}
	if err := os.Rename(n.local.PostgresDataDir(), n.local.PostgresDataDir()+".away"); err != nil {
		t.Fatal(err)
	}
	if err := syscall.Kill(n.postmaster(), syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	for range 2 {
		eventually(t, func() error {
			out, errs, _ := n.run("pmgcm", "status")
			if !strings.Contains(out, "NAME(CID)--------------IPADDRESS----ROLE-STATE---------UPTIME---LOAD----MEM---DISK") ||
				!strings.Contains(out, "n1.test(1)") {
				return fmt.Errorf("pmgcm status: %s%s", out, errs)
			}
			return nil
		})
		n.signal(syscall.SIGTERM)
		n.wait()
		n.start()
	}
	n.stop()
}

func TestANodeRunsOnAnyPostgreSQLByDSN(t *testing.T) {
	server := newNode(t)
	server.start()
	server.waitHealthy()
	psql := exec.Command("psql", "-X", "-h", server.local.PostgresSocketDir(), "-U", "mailproxy", "-d", "mailproxy", "-c", "CREATE DATABASE other")
	if out, err := psql.CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	n := newNode(t, "--dsn", fmt.Sprintf("host=%s user=mailproxy dbname=other", server.local.PostgresSocketDir()))
	for command, want := range map[string]string{"mailproxy domain list": "the node's database does not answer: ",
		"pmgcm journal list": "the local PostgreSQL is not reachable: "} { // nobody has set it up
		words := strings.Fields(command)
		if _, errs, code := n.run(words[0], words[1:]...); code != 1 || !strings.Contains(errs, ": "+want) ||
			!strings.Contains(errs, db.ErrNoSchema.Error()) || !strings.Contains(errs, "\nhint: ") {
			t.Errorf("%s: exit code %d, %s", command, code, errs)
		}
	}
	n.start()
	n.waitHealthy()
	n.must("domain", "add", "example.test", "--to", "127.0.0.1")
	if _, err := os.Stat(n.local.PostgresDataDir()); err == nil {
		t.Error("it made an instance of its own")
	}
	if out := server.must("domain", "list"); strings.Contains(out, "example.test") {
		t.Errorf("it wrote into another database: %s", out)
	}
	n.stop()
	server.waitHealthy() // only its own
	server.stop()
}

func TestANodeFollowsTheFailoverOfItsDatabase(t *testing.T) {
	pair := pgtest.NewPair(t)
	n := newNode(t, "--dsn", pair.DSN())
	n.start()
	n.waitHealthy()
	pair.Sync()
	n.must("domain", "add", "before.test", "--to", freePort(t))
	eventually(t, func() error { return n.tryMail("to@before.test") })
	pair.Primary.Kill()
	if err := n.tryMail("to@before.test"); err != nil {
		t.Errorf("mail without a database: %v", err)
	}
	if _, errs, code := n.run("mailproxy", "domain", "add", "lost.test", "--to", "127.0.0.1"); code != 1 || !strings.Contains(errs, "the node's database does not answer") {
		t.Errorf("a change without a database: %d %s", code, errs)
	}
	pair.Failover()
	n.must("domain", "add", "after.test", "--to", freePort(t))
	eventually(t, func() error { return n.tryMail("to@after.test") })
	if out := n.must("domain", "list"); !strings.Contains(out, "before.test") || strings.Contains(out, "lost.test") {
		t.Errorf("domains: %s", out)
	}
	n.waitHealthy()
	n.stop()
}

func TestAMemberWhoseDatabaseWasMadeAnewRefusesNoMailForGood(t *testing.T) {
	n := newNode(t)
	n.start()
	n.waitHealthy()
	if out, errs, code := n.run("pmgcm", "create"); code != 0 {
		t.Fatalf("pmgcm create: %d %s%s", code, out, errs)
	}
	n.must("domain", "add", "example.test", "--to", freePort(t))
	eventually(t, func() error { return n.tryMail("to@example.test") })
	n.stop()
	for _, path := range []string{n.local.PostgresDataDir(), n.local.PostgresDataDir() + ".made"} {
		if err := os.RemoveAll(path); err != nil {
			t.Fatal(err)
		}
	}
	n.start()
	eventually(t, func() error { // the new database was read
		h, err := n.health()
		if err == nil && !strings.Contains(fmt.Sprintf("%+v", h), errEmptied.Error()) {
			err = fmt.Errorf("health: %+v", h)
		}
		return err
	})
	if err := n.tryMail("to@example.test"); err != nil {
		t.Errorf("mail: %v", err)
	}
	if s := fmt.Sprint(n.status()["problems"]); !strings.Contains(s, "join-cmd") {
		t.Errorf("problems: %s", s)
	}
	n.stop()
}

// A key that is damaged costs the tunnel, not the mail, and status says which file it is.
func TestADamagedKeyCostsTheTunnelAlone(t *testing.T) {
	n := newNode(t)
	n.start()
	n.waitHealthy()
	if out, errs, code := n.run("pmgcm", "create"); code != 0 {
		t.Fatalf("pmgcm create: %d %s%s", code, out, errs)
	}
	n.must("domain", "add", "example.test", "--to", freePort(t))
	n.stop()
	key := filepath.Join(n.local.KeyDir(), "node.key")
	good, err := os.ReadFile(key)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(key, good[:100], 0o600); err != nil {
		t.Fatal(err)
	}
	n.start()
	n.waitHealthy()
	if err := n.tryMail("a@example.test"); err != nil {
		t.Errorf("mail: %v", err)
	}
	if out, _, _ := n.run("pmgcm", "status"); !strings.Contains(out, "the tunnel is off") || !strings.Contains(out, "node.key: not an Ed25519 key") ||
		!strings.Contains(out, filepath.Dir(key)) || !strings.Contains(out, "remedy: ") {
		t.Errorf("status:\n%s", out)
	}
	n.stop()
	if err := os.WriteFile(key, good, 0o600); err != nil {
		t.Fatal(err)
	}
	n.start()
	n.waitHealthy()
	if out, _, code := n.run("pmgcm", "status"); code != 0 || strings.Contains(out, "the tunnel is off") {
		t.Errorf("status, %d:\n%s", code, out)
	}
}
