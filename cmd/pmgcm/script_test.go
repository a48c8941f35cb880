package main

import (
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/rogpeppe/go-internal/testscript"

	"mailproxy/config"
	"mailproxy/internal/pgtest"
	"mailproxy/internal/testbin"
)

// programs is where TestMain has built mailproxy and pmgcm. It is set before any test runs, and never again.
var programs string

func TestMain(m *testing.M) {
	dir, err := testbin.Build("mailproxy", "pmgcm")
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	programs = dir
	code := pgtest.Main(m)
	_ = os.RemoveAll(dir)
	os.Exit(code)
}

// patience bounds every wait; the machine may be busy.
const patience = 60 * time.Second

// TestScripts runs each transcript in testdata/script, with real daemons. Beside testscript's own commands they have:
//
//	node NAME          make a node file, start its daemon and wait until it answers; $NAME is the file's path
//	nodefile NAME      make a node file only
//	on NAME            let the following commands be this node's (MAILPROXY_CONFIG)
//	halt NAME          end the daemon; start NAME starts it again (stop is testscript's own: it would end the script)
//	drift NAME SQL     run SQL on the node's database with all triggers off
//	sql NAME SQL       run SQL on the node's database
//	smtp NAME CODE     connect to the node's SMTP and want this code
//	eventually CMD...  run a command until it succeeds
func TestScripts(t *testing.T) {
	files, err := filepath.Glob("testdata/script/*.txtar")
	if err != nil || len(files) == 0 {
		t.Fatalf("no scripts: %v", err)
	}
	for _, f := range files {
		if text, err := os.ReadFile(f); err != nil || strings.Contains(string(text), "\nstop") {
			t.Fatalf("%s: %v, or testscript's own stop in it, behind which nothing is tested", f, err)
		}
		t.Run(strings.TrimSuffix(filepath.Base(f), ".txtar"), func(t *testing.T) {
			lab := &lab{t: t, nodes: map[string]*labNode{}}
			testscript.Run(t, testscript.Params{
				Files: []string{f}, RequireExplicitExec: true, RequireUniqueNames: true,
				Setup: func(env *testscript.Env) error {
					env.Setenv("PATH", programs+string(filepath.ListSeparator)+env.Getenv("PATH"))
					env.Setenv("MAILPROXY_CONFIG", filepath.Join(env.WorkDir, "none.toml"))
					return nil
				},
				Cmds: map[string]func(ts *testscript.TestScript, neg bool, args []string){
					"node": lab.node, "nodefile": lab.nodefile, "on": lab.on, "halt": lab.halt, "start": lab.start, "drift": lab.drift,
					"sql": lab.sql, "smtp": lab.smtp, "eventually": eventually,
				},
			})
		})
	}
}

// A lab is the nodes of one script.
type lab struct {
	t     *testing.T
	nodes map[string]*labNode
}

type labNode struct {
	file, dsn string
	local     *config.Local
	cmd       *exec.Cmd
}

func one(ts *testscript.TestScript, args []string) string {
	if len(args) != 1 {
		ts.Fatalf("want one argument, have %q", args)
	}
	return args[0]
}

// freePort gives host:port that nobody listens on, on an address of its own.
func freePort(t testing.TB) (host, port string) {
	t.Helper()
	for {
		host = fmt.Sprintf("127.%d.%d.%d", 1+rand.IntN(250), rand.IntN(250), 1+rand.IntN(250))
		port = fmt.Sprint(10_000 + rand.IntN(20_000))
		if l, err := net.Listen("tcp", net.JoinHostPort(host, port)); err == nil {
			_ = l.Close()
			return host, port
		}
	}
}

func (l *lab) nodefile(ts *testscript.TestScript, _ bool, args []string) {
	name := one(ts, args)
	dir, err := os.MkdirTemp("", "mpt") // short, for the sockets in it
	ts.Check(err)
	l.t.Cleanup(func() { _ = os.RemoveAll(dir) })
	ts.Check(os.Chmod(dir, 0o755)) // the daemon becomes nobody
	n := &labNode{file: filepath.Join(dir, "node.toml"), dsn: pgtest.New(l.t)}
	host, port := freePort(l.t)
	out, err := exec.Command(filepath.Join(programs, "mailproxy"), "--config", n.file, "init", "--name", name, "--address", host, "--state-dir",
		filepath.Join(dir, "s"), "--run-dir", filepath.Join(dir, "r"), "--smtp-listen", host+":2525", "--web-listen", host+":8025",
		"--tunnel-listen", net.JoinHostPort(host, port), "--user", "nobody", "--dsn", n.dsn).CombinedOutput()
	if err != nil {
		ts.Fatalf("init %s: %v: %s", name, err, out)
	}
	n.local, err = config.LoadLocal(n.file)
	ts.Check(err)
	l.nodes[name] = n
	ts.Setenv(name, n.file)
}

func (l *lab) node(ts *testscript.TestScript, neg bool, args []string) {
	l.nodefile(ts, neg, args)
	l.start(ts, neg, args)
}

func (l *lab) find(ts *testscript.TestScript, args []string) *labNode {
	n := l.nodes[one(ts, args)]
	if n == nil {
		ts.Fatalf("no node %s", args[0])
	}
	return n
}

func (l *lab) start(ts *testscript.TestScript, _ bool, args []string) {
	n := l.find(ts, args)
	log, err := os.OpenFile(n.file+".log", os.O_WRONLY|os.O_CREATE|os.O_APPEND, 0o644)
	ts.Check(err)
	n.cmd = exec.Command(filepath.Join(programs, "mailproxy"), "--config", n.file, "serve")
	n.cmd.Stdout, n.cmd.Stderr = log, log
	n.cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	ts.Check(n.cmd.Start())
	ts.Check(log.Close())
	l.t.Cleanup(n.end)
	// A status that is refused for want of a cluster, or is there, has come from a daemon whose database answers.
	wait(ts, "the daemon of "+args[0], func() error {
		out, err := exec.Command(filepath.Join(programs, "pmgcm"), "--config", n.file, "status", "--json").CombinedOutput()
		if strings.Contains(string(out), "no cluster defined") || strings.Contains(string(out), `"database": true`) {
			return nil
		}
		return fmt.Errorf("%v: %s", err, out)
	})
}

// end stops the daemon in an orderly way and waits for it.
func (n *labNode) end() {
	if n.cmd == nil {
		return
	}
	_ = n.cmd.Process.Signal(syscall.SIGTERM)
	kill := time.AfterFunc(patience, func() { _ = n.cmd.Process.Kill() })
	_ = n.cmd.Wait()
	kill.Stop()
	n.cmd = nil
}

func (l *lab) halt(ts *testscript.TestScript, _ bool, args []string) { l.find(ts, args).end() }

func (l *lab) on(ts *testscript.TestScript, _ bool, args []string) {
	ts.Setenv("MAILPROXY_CONFIG", l.find(ts, args).file)
}

func (l *lab) drift(ts *testscript.TestScript, neg bool, args []string) {
	if len(args) == 2 {
		args[1] = "SET session_replication_role = replica; " + args[1]
	}
	l.sql(ts, neg, args)
}

func (l *lab) sql(ts *testscript.TestScript, _ bool, args []string) {
	if len(args) != 2 {
		ts.Fatalf("want NAME SQL")
	}
	ts.Check(ts.Exec("psql", "-q", "-v", "ON_ERROR_STOP=1", l.find(ts, args[:1]).dsn, "-c", args[1]))
}

func (l *lab) smtp(ts *testscript.TestScript, _ bool, args []string) {
	if len(args) != 2 {
		ts.Fatalf("want NAME CODE")
	}
	address := l.find(ts, args[:1]).local.SMTP.Listen[0]
	wait(ts, "greeting "+args[1]+" of "+args[0], func() error {
		c, err := net.DialTimeout("tcp", address, patience)
		if err != nil {
			return err
		}
		defer func() { _ = c.Close() }()
		greeting := make([]byte, 3)
		if _, err := io.ReadFull(c, greeting); err != nil || string(greeting) != args[1] {
			return fmt.Errorf("%q, %v", greeting, err)
		}
		return nil
	})
}

func eventually(ts *testscript.TestScript, _ bool, args []string) {
	wait(ts, strings.Join(args, " "), func() error { return ts.Exec(args[0], args[1:]...) })
}

func wait(ts *testscript.TestScript, what string, f func() error) {
	deadline := time.Now().Add(patience)
	for {
		err := f()
		if err == nil {
			return
		}
		if time.Now().After(deadline) {
			ts.Fatalf("not in %v: %s: %v", patience, what, err)
		}
		time.Sleep(50 * time.Millisecond) // between two looks at a condition
	}
}
