package db_test

import (
	"context"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/rs/zerolog"

	"mailproxy/db"
	"mailproxy/internal/pgtest"
)

// supervisorEnv makes this test binary a supervisor of the instance in that directory, to be killed.
const supervisorEnv = "DB_TEST_SUPERVISOR"

// idleEnv makes it a process that waits for the end of its input.
const idleEnv = "DB_TEST_IDLE"

func supervise(dir string) int {
	i := db.NewInstance(instanceOptions(dir))
	err := i.Run(context.Background(), func(string) { fmt.Println("ready") })
	fmt.Println(err)
	return 1
}

func instanceOptions(dir string) db.InstanceOptions {
	return db.InstanceOptions{DataDir: filepath.Join(dir, "pg"), SocketDir: filepath.Join(dir, "run"), User: "nobody", Log: zerolog.Nop()}
}

// place makes a directory that the server's user can reach.
func place(t testing.TB) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "dbi")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	if _, err := pgtest.Unprivileged(dir); err != nil {
		t.Fatal(err)
	}
	return dir
}

// running is an instance under Run.
type running struct {
	*db.Instance
	ready chan string
	stop  func()
}

func run(t testing.TB, o db.InstanceOptions) *running {
	t.Helper()
	r := &running{Instance: db.NewInstance(o), ready: make(chan string, 100)}
	ctx, cancel := context.WithCancel(context.Background())
	var wg sync.WaitGroup
	wg.Go(func() {
		if err := r.Run(ctx, func(dsn string) { r.ready <- dsn }); err != nil {
			t.Error(err)
		}
	})
	r.stop = sync.OnceFunc(func() {
		cancel()
		wg.Wait()
	})
	t.Cleanup(r.stop)
	return r
}

func (r *running) wait(t testing.TB) string {
	t.Helper()
	select {
	case dsn := <-r.ready:
		return dsn
	case <-time.After(time.Minute):
		t.Fatalf("not ready: %s", r.Problem())
		return ""
	}
}

// waitProblem waits for a problem that says all of that.
func (r *running) waitProblem(t testing.TB, want ...string) {
	t.Helper()
	deadline := time.Now().Add(30 * time.Second)
	for {
		p, all := r.Problem(), true
		for _, w := range want {
			all = all && strings.Contains(p, w)
		}
		if all {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("problem %q, want %q", p, want)
		}
		time.Sleep(10 * time.Millisecond) // between two looks
	}
}

func postmasterPID(t testing.TB, dir string) int {
	t.Helper()
	b, err := os.ReadFile(filepath.Join(dir, "pg", "postmaster.pid"))
	if err != nil {
		t.Fatal(err)
	}
	first, _, _ := strings.Cut(string(b), "\n")
	pid, err := strconv.Atoi(first)
	if err != nil {
		t.Fatal(err)
	}
	return pid
}

func TestAnInstanceLivesAndKeepsItsData(t *testing.T) {
	t.Parallel()
	dir := place(t)
	r := run(t, instanceOptions(dir))
	dsn := r.wait(t)
	if dsn != r.DSN() || r.Problem() != "" {
		t.Errorf("DSN %q, %q; problem %q", dsn, r.DSN(), r.Problem())
	}
	d := openDSN(t, dsn)
	if err := d.Migrate(t.Context()); err != nil {
		t.Fatal(err)
	}
	put(t, d, "a.test")
	for setting, want := range map[string]string{"listen_addresses": "", "data_checksums": "on", "server_encoding": "UTF8", "lc_collate": "C",
		"synchronous_commit": "on", "fsync": "on", "unix_socket_permissions": "0700"} {
		if got := one[string](t, dsn, "SELECT current_setting($1)", setting); got != want {
			t.Errorf("%s = %q, want %q", setting, got, want)
		}
	}
	// a peer's role gets in through Backend
	n := &node{DB: d, dsn: dsn, cid: 1}
	if err := n.CreateCluster(t.Context(), db.CreateParams{ClusterID: clusterID, Node: member(1)}); err != nil {
		t.Fatal(err)
	}
	var who string
	if err := as(t, n, 1).QueryRow(t.Context(), "SELECT session_user").Scan(&who); err != nil || who != "peer_1" {
		t.Errorf("logged in as %q, %v", who, err)
	}
	d.Close()
	r.stop()
	if r.Problem() == "" {
		t.Error("stopped, and no problem")
	}
	if _, err := os.Stat(filepath.Join(dir, "pg", "postmaster.pid")); err == nil {
		t.Error("the server was not stopped in order")
	}
	again := run(t, instanceOptions(dir))
	if got := names(t, openDSN(t, again.wait(t))); len(got) != 1 {
		t.Errorf("domains %v after a restart", got)
	}
}

func TestAServerThatIsKilledComesBack(t *testing.T) {
	t.Parallel()
	dir := place(t)
	r := run(t, instanceOptions(dir))
	d := openDSN(t, r.wait(t))
	if err := d.Migrate(t.Context()); err != nil {
		t.Fatal(err)
	}
	p := put(t, d, "a.test")
	for range 2 {
		pid := postmasterPID(t, dir)
		if err := syscall.Kill(pid, syscall.SIGKILL); err != nil {
			t.Fatal(err)
		}
		r.wait(t)
		if now := postmasterPID(t, dir); now == pid {
			t.Errorf("still pid %d", pid)
		}
		deadline := time.Now().Add(20 * time.Second)
		for d.Ping(t.Context()) != nil && time.Now().Before(deadline) { // connections of the old server go first
		}
		if s, err := d.State(t.Context()); err != nil || s.Position != p {
			t.Errorf("position %v, %v; want %v", s.Position, err, p)
		}
	}
}

// supervised starts an instance from another process and kills that one.
func supervised(t testing.TB, dir string) {
	t.Helper()
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(self)
	cmd.Env = append(os.Environ(), supervisorEnv+"="+dir)
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	line := make([]byte, 6)
	if _, err := out.Read(line); err != nil || string(line) != "ready\n" {
		t.Fatalf("the supervisor says %q, %v", line, err)
	}
	if err := cmd.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	_ = cmd.Wait()
}

func TestAServerOutlivesItsSupervisorAndIsAdopted(t *testing.T) {
	t.Parallel()
	dir := place(t)
	supervised(t, dir)
	pid := postmasterPID(t, dir)
	if err := syscall.Kill(pid, 0); err != nil {
		t.Fatalf("the server went with its supervisor: %v", err)
	}
	r := run(t, instanceOptions(dir))
	r.wait(t)
	if now := postmasterPID(t, dir); now != pid {
		t.Errorf("pid %d was not adopted, %d runs", pid, now)
	}
	// an adopted one is looked after as one's own
	if err := syscall.Kill(pid, syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	r.wait(t)
	r.stop()
	if _, err := os.Stat(filepath.Join(dir, "pg", "postmaster.pid")); err == nil {
		t.Error("the server was not stopped")
	}
}

// idle starts a process of the server's user, with threads, and gives its process ID and that of one of its other threads.
func idle(t testing.TB, dir string) (pid, thread int) {
	t.Helper()
	cmd := exec.Command("/proc/self/exe") // by its own path the binary may be out of that user's reach
	cmd.Env = append(os.Environ(), idleEnv+"=1")
	var err error
	if cmd.SysProcAttr, err = pgtest.Unprivileged(dir); err != nil {
		t.Fatal(err)
	}
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = in.Close()
		_ = cmd.Wait()
	})
	pid = cmd.Process.Pid
	deadline := time.Now().Add(20 * time.Second)
	for time.Now().Before(deadline) {
		tasks, err := os.ReadDir(filepath.Join("/proc", strconv.Itoa(pid), "task"))
		if err != nil {
			t.Fatal(err)
		}
		for _, e := range tasks {
			if thread, _ = strconv.Atoi(e.Name()); thread != pid {
				return pid, thread
			}
		}
	}
	t.Fatal("a process of one thread")
	return 0, 0
}

// A server that was killed leaves its process ID in two files, and by the next start that is somebody else's.
func TestAPIDFileOfAnotherProcessIsNotAdoptedAndKeepsNothingDown(t *testing.T) {
	t.Parallel()
	dir := place(t)
	pid, thread := idle(t, dir)
	for _, c := range []struct{ name, pidFile, socketLock string }{
		{"another process of the same user", strconv.Itoa(pid), ""},
		{"a thread", strconv.Itoa(thread), ""},
		{"the socket's lock names another process", "", strconv.Itoa(pid)},
		{"our own", strconv.Itoa(os.Getpid()), strconv.Itoa(os.Getpid())},
		{"a file that was never written out", "\x00\x00\x00", ""},
	} {
		t.Run(c.name, func(t *testing.T) {
			r := run(t, instanceOptions(dir))
			r.wait(t)
			r.stop()
			data := filepath.Join(dir, "pg")
			for file, first := range map[string]string{filepath.Join(data, "postmaster.pid"): c.pidFile,
				filepath.Join(dir, "run", ".s.PGSQL.5432.lock"): c.socketLock} {
				if first == "" {
					continue
				}
				if err := os.WriteFile(file, []byte(first+"\n"+data+"\n"), 0o600); err != nil {
					t.Fatal(err)
				}
				if _, err := pgtest.Unprivileged(file); err != nil {
					t.Fatal(err)
				}
			}
			run(t, instanceOptions(dir)).wait(t)
		})
	}
}

// A server that runs, but on a socket that is gone, is no use: it is started anew.
func TestAServerWhoseSocketIsGoneIsStartedAnew(t *testing.T) {
	t.Parallel()
	dir := place(t)
	supervised(t, dir)
	pid := postmasterPID(t, dir)
	if err := os.RemoveAll(filepath.Join(dir, "run")); err != nil {
		t.Fatal(err)
	}
	run(t, instanceOptions(dir)).wait(t)
	if now := postmasterPID(t, dir); now == pid {
		t.Errorf("still pid %d", pid)
	}
}

func TestWhatKeepsAnInstanceDownIsNamed(t *testing.T) {
	t.Parallel()
	t.Run("no programs", func(t *testing.T) {
		o := instanceOptions(place(t))
		o.Bin = "/nonexistent"
		run(t, o).waitProblem(t, "postgresql-15", "/nonexistent")
	})
	t.Run("socket path", func(t *testing.T) {
		o := instanceOptions(place(t))
		o.SocketDir = filepath.Join(o.SocketDir, strings.Repeat("x", 100))
		run(t, o).waitProblem(t, "too long", "107", "run_dir")
	})
	t.Run("user", func(t *testing.T) {
		if os.Geteuid() != 0 {
			return // who is not root needs no other user
		}
		o := instanceOptions(place(t))
		o.User = "root"
		run(t, o).waitProblem(t, "does not run as root")
	})
	t.Run("a version that is gone", func(t *testing.T) {
		dir := place(t)
		if err := os.Mkdir(filepath.Join(dir, "pg"), 0o700); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(dir, "pg", "PG_VERSION"), []byte("9\n"), 0o600); err != nil {
			t.Fatal(err)
		}
		run(t, instanceOptions(dir)).waitProblem(t, "version 9", "install postgresql-9", "pg_upgrade", "slave")
	})
	t.Run("a data directory that was moved away", func(t *testing.T) {
		dir := place(t)
		r := run(t, instanceOptions(dir))
		r.wait(t)
		r.stop()
		data, away := filepath.Join(dir, "pg"), filepath.Join(dir, "away")
		if err := os.Rename(data, away); err != nil {
			t.Fatal(err)
		}
		r = run(t, instanceOptions(dir))
		r.waitProblem(t, "gone", "put it back", "pg.made")
		if _, err := os.Stat(data); err == nil {
			t.Error("an empty one was made in its place")
		}
		if err := os.Rename(away, data); err != nil {
			t.Fatal(err)
		}
		r.wait(t)
	})
	t.Run("a broken data directory", func(t *testing.T) {
		dir := place(t)
		r := run(t, instanceOptions(dir))
		r.wait(t)
		r.stop()
		if err := os.Truncate(filepath.Join(dir, "pg", "global", "pg_control"), 0); err != nil {
			t.Fatal(err)
		}
		run(t, instanceOptions(dir)).waitProblem(t, "PostgreSQL stopped", "pg_control")
	})
}

// What an attempt left that was killed is no data directory, and goes.
func TestInitialisingIsTakenUpAgain(t *testing.T) {
	t.Parallel()
	dir := place(t)
	half := filepath.Join(dir, "pg.new-123")
	if err := os.MkdirAll(filepath.Join(half, "base"), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(half, "PG_VERSION"), []byte("15\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	run(t, instanceOptions(dir)).wait(t)
	if _, err := os.Stat(half); err == nil {
		t.Error("the half-made one is still there")
	}
}

func TestFindPostgres(t *testing.T) {
	dir, version, err := db.FindPostgres("")
	if err != nil || version < 15 || !strings.HasPrefix(dir, "/") {
		t.Errorf("%q, %d, %v", dir, version, err)
	}
	if _, _, err := db.FindPostgres(t.TempDir()); err == nil || !strings.Contains(err.Error(), "postgresql-15") {
		t.Errorf("an empty directory: %v", err)
	}
}

// A conn that knows no deadlines, as an SSH channel, is closed when its time is over.
func TestAPeerThatHangsIsLeft(t *testing.T) {
	ours, theirs := net.Pipe()
	defer theirs.Close()
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	opened := make(chan error, 1)
	go func() {
		_, err := db.OpenPeer(ctx, func(context.Context) (net.Conn, error) { return noDeadlines{ours}, nil })
		opened <- err
	}()
	select {
	case err := <-opened:
		if err == nil {
			t.Error("opened")
		}
	case <-time.After(20 * time.Second):
		t.Error("hangs")
	}
}

type noDeadlines struct{ net.Conn }

func (noDeadlines) SetDeadline(time.Time) error      { return os.ErrNoDeadline }
func (noDeadlines) SetReadDeadline(time.Time) error  { return os.ErrNoDeadline }
func (noDeadlines) SetWriteDeadline(time.Time) error { return os.ErrNoDeadline }
