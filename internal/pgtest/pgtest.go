// Package pgtest gives tests a real PostgreSQL: one server per test binary, and per test a clone of a database that has been migrated.
//
//	func TestMain(m *testing.M) { os.Exit(pgtest.Main(m)) }
//	func TestX(t *testing.T)    { dsn := pgtest.New(t) }
package pgtest

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"os/user"
	"path/filepath"
	"strconv"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/rs/zerolog"

	"mailproxy/db"
)

// server is the one of this test binary. It is set by Main before any test runs, and never again.
var server struct {
	dir   string
	count atomic.Int64
}

// template is the migrated database that New clones.
const template = "template_mailproxy"

// Main runs a package's tests with a server, and gives the exit code. Where the server does not start it says why, and gives 1.
func Main(m *testing.M) int {
	stop, err := start()
	if err != nil {
		fmt.Fprintln(os.Stderr, "pgtest:", err)
		return 1
	}
	defer stop()
	return m.Run()
}

// start makes and starts a server in a temporary directory, without syncs. It listens on a Unix socket only.
func start() (stop func(), err error) {
	bin, _, err := db.FindPostgres("")
	if err != nil {
		return nil, err
	}
	dir, err := os.MkdirTemp("", "pgtest")
	if err != nil {
		return nil, err
	}
	remove := func() { _ = os.RemoveAll(dir) } // left behind in the temporary directory at worst
	own, err := Unprivileged(dir)
	if err != nil {
		remove()
		return nil, err
	}
	data := filepath.Join(dir, "data")
	initdb := exec.Command(filepath.Join(bin, "initdb"), "-D", data, "-U", "postgres", "-A", "trust", "--no-sync", "--locale=C", "-E", "UTF8")
	initdb.SysProcAttr, initdb.Dir = own, dir
	if out, err := initdb.CombinedOutput(); err != nil {
		remove()
		return nil, fmt.Errorf("initdb: %w: %s", err, out)
	}
	log, err := os.Create(filepath.Join(dir, "log"))
	if err != nil {
		remove()
		return nil, err
	}
	postgres := exec.Command(filepath.Join(bin, "postgres"), "-D", data, "-k", dir, "-c", "listen_addresses=", "-c", "fsync=off",
		"-c", "full_page_writes=off", "-c", "shared_buffers=64MB", "-c", "max_connections=300", "-c", "autovacuum_naptime=10s")
	postgres.SysProcAttr, postgres.Dir, postgres.Stdout, postgres.Stderr = own, dir, log, log
	own.Pdeathsig = syscall.SIGQUIT // a test binary that is killed takes its server along
	err = postgres.Start()
	_ = log.Close() // the server has its own copy
	if err != nil {
		remove()
		return nil, err
	}
	stop = func() {
		_ = postgres.Process.Signal(syscall.SIGQUIT) // its data is thrown away
		_ = postgres.Wait()
		remove()
	}
	server.dir = dir
	if err := prepare(); err != nil {
		out, _ := os.ReadFile(log.Name()) // said beside the error
		stop()
		return nil, fmt.Errorf("%w: %s", err, out)
	}
	return stop, nil
}

// Unprivileged gives a directory to nobody where we are root, whom PostgreSQL refuses, and how to start processes as that user.
func Unprivileged(dir string) (*syscall.SysProcAttr, error) {
	if os.Geteuid() != 0 {
		return &syscall.SysProcAttr{}, nil
	}
	nobody, err := user.Lookup("nobody")
	if err != nil {
		return nil, err
	}
	uid, err := strconv.ParseUint(nobody.Uid, 10, 32)
	if err != nil {
		return nil, err
	}
	gid, err := strconv.ParseUint(nobody.Gid, 10, 32)
	if err != nil {
		return nil, err
	}
	if err := os.Chown(dir, int(uid), int(gid)); err != nil {
		return nil, err
	}
	return &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: uint32(uid), Gid: uint32(gid)}}, nil
}

// prepare waits for the server and makes the template.
func prepare() error {
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	admin, err := db.Open(db.Options{DSN: dsn("postgres"), Log: zerolog.Nop()})
	if err != nil {
		return err
	}
	defer admin.Close()
	for admin.Ping(ctx) != nil {
		select {
		case <-ctx.Done():
			return errors.New("the server does not answer")
		case <-time.After(20 * time.Millisecond):
		}
	}
	if err := admin.CreateDatabase(ctx, template, ""); err != nil {
		return err
	}
	d, err := db.Open(db.Options{DSN: dsn(template), Log: zerolog.Nop()})
	if err != nil {
		return err
	}
	defer d.Close()
	return d.Migrate(ctx)
}

func dsn(database string) string {
	return fmt.Sprintf("host=%s port=5432 user=postgres dbname=%s sslmode=disable", server.dir, database)
}

// New clones the migrated database for one test and gives the DSN of a superuser on it. The clone is dropped when the test ends.
func New(t testing.TB) string { return clone(t, template) }

// NewEmpty makes a database without our schema for one test.
func NewEmpty(t testing.TB) string { return clone(t, "template1") }

func clone(t testing.TB, from string) string {
	t.Helper()
	if server.dir == "" {
		t.Fatal("pgtest: the package's TestMain does not call pgtest.Main")
	}
	name := "t" + strconv.FormatInt(server.count.Add(1), 10)
	admin, err := db.Open(db.Options{DSN: dsn("postgres"), Log: zerolog.Nop()})
	if err != nil {
		t.Fatal(err)
	}
	if err := admin.CreateDatabase(context.Background(), name, from); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		defer admin.Close()
		if err := admin.DropDatabase(context.Background(), name); err != nil {
			t.Errorf("drop %s: %v", name, err)
		}
	})
	return dsn(name)
}
