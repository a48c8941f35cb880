package pgtest

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/rs/zerolog"

	"mailproxy/db"
)

// pairPatience bounds what is waited for in a pair.
const pairPatience = time.Minute

// A Pair is a PostgreSQL and its standby by streaming replication, each on a socket in a directory of its own. Both have a migrated
// database, mailproxy.
type Pair struct {
	Primary, Standby *PairServer

	t testing.TB
}

// A PairServer is one of a Pair.
type PairServer struct {
	// SocketDir is where it listens.
	SocketDir string

	t    testing.TB
	own  *syscall.SysProcAttr
	data string

	mu  sync.Mutex
	cmd *exec.Cmd // nil while it does not run
}

// seed is makeSeed once, below the directory of the test binary's server, with which it goes.
var seed = sync.OnceValues(func() (string, error) { return makeSeed(server.dir) })

// makeSeed makes a data directory with a migrated database, of a server that was stopped in order.
func makeSeed(below string) (string, error) {
	dir, err := os.MkdirTemp(below, "seed")
	if err != nil {
		return "", err
	}
	s := &PairServer{SocketDir: dir, data: filepath.Join(dir, "data")}
	if s.own, err = Unprivileged(dir); err != nil {
		return "", err
	}
	if err := s.program("initdb", "-D", s.data, "-U", "postgres", "-A", "trust", "--no-sync", "--locale=C", "-E", "UTF8"); err != nil {
		return "", err
	}
	if err := s.start(); err != nil {
		return "", err
	}
	err = s.migrate()
	_ = s.cmd.Process.Signal(syscall.SIGINT) // in order: the copies of it begin at one place of the log
	return s.data, errorOr(err, s.cmd.Wait())
}

func errorOr(err, other error) error {
	if err != nil {
		return err
	}
	return other
}

// NewPair starts a server and its standby; they end with the test.
func NewPair(t testing.TB) *Pair {
	t.Helper()
	makes := seed
	if server.dir == "" { // a package whose tests use no server but this
		dir := shortDir(t)
		makes = func() (string, error) { return makeSeed(dir) }
	}
	from, err := makes()
	if err != nil {
		t.Fatal("pgtest: ", err)
	}
	p := &Pair{t: t}
	p.Primary = newPairServer(t, from)
	p.Standby = newPairServer(t, from)
	p.Primary.Start()
	conf := fmt.Sprintf("primary_conninfo = 'host=%s port=5432 user=postgres'\nhot_standby = on\n", p.Primary.SocketDir)
	for name, text := range map[string]string{"standby.signal": "", "postgresql.auto.conf": conf} {
		if err := os.WriteFile(filepath.Join(p.Standby.data, name), []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	p.Standby.Start()
	p.Primary.Await("the standby to follow", "SELECT count(*) = 1 FROM pg_stat_replication WHERE state = 'streaming'")
	return p
}

// shortDir is a directory for sockets, for which t.TempDir's path is too long, in reach of any user.
func shortDir(t testing.TB) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "pgpair")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	if err := os.Chmod(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	return dir
}

func newPairServer(t testing.TB, from string) *PairServer {
	t.Helper()
	dir := shortDir(t)
	s := &PairServer{SocketDir: dir, t: t, data: filepath.Join(dir, "data")}
	var err error
	if s.own, err = Unprivileged(dir); err != nil {
		t.Fatal(err)
	}
	if err := s.run("cp", "-a", from, s.data); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(s.Kill)
	return s
}

// DSN says how to reach the pair's database, the standby first. Directories given are taken in place of the servers' own.
func (p *Pair) DSN(dirs ...string) string {
	if len(dirs) == 0 {
		dirs = []string{p.Standby.SocketDir, p.Primary.SocketDir}
	}
	hosts, ports := "", ""
	for i, d := range dirs {
		if i > 0 {
			hosts, ports = hosts+",", ports+","
		}
		hosts, ports = hosts+d, ports+"5432"
	}
	return fmt.Sprintf("host=%s port=%s user=postgres dbname=mailproxy sslmode=disable target_session_attrs=read-write", hosts, ports)
}

// Sync makes the primary's commits wait for the standby.
func (p *Pair) Sync() {
	p.t.Helper()
	p.Primary.SQL("ALTER SYSTEM SET synchronous_standby_names = '*'")
	p.Primary.SQL("SELECT pg_reload_conf()")
	p.Primary.Await("the standby to be waited for", "SELECT count(*) = 1 FROM pg_stat_replication WHERE sync_state = 'sync'")
}

// Cut ends the replication, with both servers up.
func (p *Pair) Cut() {
	p.t.Helper()
	p.Standby.SQL("ALTER SYSTEM SET primary_conninfo = ''")
	p.Standby.SQL("SELECT pg_reload_conf()")
	p.Primary.Await("the standby to be cut off", "SELECT count(*) = 0 FROM pg_stat_replication")
}

// Follow begins the replication again.
func (p *Pair) Follow() {
	p.t.Helper()
	p.Standby.SQL(fmt.Sprintf("ALTER SYSTEM SET primary_conninfo = 'host=%s port=5432 user=postgres'", p.Primary.SocketDir))
	p.Standby.SQL("SELECT pg_reload_conf()")
}

// Failover kills the primary and promotes the standby; it returns once that can be written.
func (p *Pair) Failover() {
	p.t.Helper()
	p.Primary.Kill()
	if err := p.Standby.program("pg_ctl", "promote", "-w", "-D", p.Standby.data); err != nil {
		p.t.Error(err) // may be called beside the test
	}
}

// Start starts the server and waits until it answers.
func (s *PairServer) Start() {
	s.t.Helper()
	if err := s.start(); err != nil {
		s.t.Fatal(err)
	}
}

// Kill ends the server at once, without a checkpoint.
func (s *PairServer) Kill() {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.cmd == nil {
		return
	}
	_ = s.cmd.Process.Signal(syscall.SIGQUIT) // it takes its processes along, as SIGKILL would not
	_ = s.cmd.Wait()
	s.cmd = nil
}

// SQL runs a statement as the superuser.
func (s *PairServer) SQL(sql string) {
	s.t.Helper()
	if _, err := s.ask(sql); err != nil {
		s.t.Fatalf("%s: %v", sql, err)
	}
}

// Await waits until a query gives true.
func (s *PairServer) Await(what, sql string) {
	s.t.Helper()
	deadline := time.Now().Add(pairPatience)
	for {
		got, err := s.ask(sql)
		if got == true {
			return
		}
		if time.Now().After(deadline) {
			s.t.Fatalf("not in %v: %s: %v, %v", pairPatience, what, got, err)
		}
		time.Sleep(20 * time.Millisecond) // between two looks at a condition
	}
}

// ask runs a statement and gives what it says first.
func (s *PairServer) ask(sql string) (any, error) {
	ctx, cancel := context.WithTimeout(context.Background(), pairPatience)
	defer cancel()
	c, err := pgx.Connect(ctx, s.dsn("mailproxy"))
	if err != nil {
		return nil, err
	}
	defer c.Close(ctx)
	rows, err := c.Query(ctx, sql)
	if err != nil {
		return nil, err
	}
	defer rows.Close()
	if !rows.Next() {
		return nil, rows.Err()
	}
	v, err := rows.Values()
	if err != nil || len(v) == 0 {
		return nil, err
	}
	return v[0], nil
}

func (s *PairServer) dsn(database string) string {
	return fmt.Sprintf("host=%s port=5432 user=postgres dbname=%s sslmode=disable", s.SocketDir, database)
}

func (s *PairServer) start() error {
	bin, _, err := db.FindPostgres("")
	if err != nil {
		return err
	}
	log, err := os.OpenFile(s.SocketDir+"/log", os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o644)
	if err != nil {
		return err
	}
	own := *s.own
	own.Pdeathsig = syscall.SIGQUIT
	cmd := exec.Command(filepath.Join(bin, "postgres"), "-D", s.data, "-k", s.SocketDir, "-c", "listen_addresses=", "-c", "fsync=off",
		"-c", "shared_buffers=32MB")
	cmd.SysProcAttr, cmd.Dir, cmd.Stdout, cmd.Stderr = &own, s.SocketDir, log, log
	err = cmd.Start()
	_ = log.Close() // the server has its own copy
	if err != nil {
		return err
	}
	s.mu.Lock()
	s.cmd = cmd
	s.mu.Unlock()
	return s.answers()
}

// answers waits until the server does.
func (s *PairServer) answers() error {
	d, err := pgx.ParseConfig(s.dsn("postgres"))
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(context.Background(), pairPatience)
	defer cancel()
	for {
		c, err := pgx.ConnectConfig(ctx, d)
		if err == nil {
			return c.Close(ctx)
		}
		select {
		case <-ctx.Done():
			said, _ := os.ReadFile(s.SocketDir + "/log") // said beside the error
			return fmt.Errorf("%w: %s", err, said)
		case <-time.After(20 * time.Millisecond):
		}
	}
}

// migrate makes the database.
func (s *PairServer) migrate() error {
	admin, err := db.Open(db.Options{DSN: s.dsn("postgres"), Log: zerolog.Nop()})
	if err != nil {
		return err
	}
	defer admin.Close()
	if err := admin.CreateDatabase(context.Background(), "mailproxy", ""); err != nil {
		return err
	}
	d, err := db.Open(db.Options{DSN: s.dsn("mailproxy"), Log: zerolog.Nop()})
	if err != nil {
		return err
	}
	defer d.Close()
	return d.Migrate(context.Background())
}

// program runs one of PostgreSQL's programs to its end, as the server's user.
func (s *PairServer) program(name string, args ...string) error {
	bin, _, err := db.FindPostgres("")
	if err != nil {
		return err
	}
	return s.run(filepath.Join(bin, name), args...)
}

func (s *PairServer) run(name string, args ...string) error {
	cmd := exec.Command(name, args...)
	cmd.SysProcAttr, cmd.Dir = s.own, s.SocketDir
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("%s: %w: %s", name, err, out)
	}
	return nil
}
