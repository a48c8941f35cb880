package db

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/rs/zerolog"
)

// InstanceOptions describe a private PostgreSQL.
type InstanceOptions struct {
	// DataDir is its data directory; made where it is missing. Its log of the start is DataDir.log, the others are inside.
	DataDir string
	// SocketDir is where it listens: a Unix socket, and nothing else.
	SocketDir string
	// Bin is the directory of PostgreSQL's programs; empty: Debian's.
	Bin string
	// User is whom the server runs as where we are root, whom it refuses.
	User string
	Log  zerolog.Logger
}

// An Instance is the node's own PostgreSQL server.
//
//	stopped ──start──> starting ──answers──> ready ──dies──> waiting ──back-off──> starting
//	   ^                  └──────dies─────────────────────────^
//	   └───────────────── ctx ends, from any state
//
// The server is in a session of its own and outlives a daemon that is killed; the next Run adopts it.
type Instance struct {
	o InstanceOptions

	mu      sync.Mutex
	problem string // "" while the server answers
	failing bool   // an attempt to bring the server up has failed, and none has succeeded since
}

// Waits of the supervisor.
const (
	startBackOffMin = 200 * time.Millisecond
	startBackOffMax = 30 * time.Second
	steadyAfter     = time.Minute            // up that long, the back-off begins anew
	pingEvery       = 25 * time.Millisecond  // while it starts
	watchEvery      = 200 * time.Millisecond // for an adopted server, which is not our child
	fastStop        = 25 * time.Second       // for SIGINT: rolls back, writes a checkpoint; both together are below what the daemon waits for
	immediateStop   = 5 * time.Second        // for SIGQUIT
)

// maxSocketPath is what fits into sockaddr_un, but for the final NUL (unix(7)).
const maxSocketPath = 107

// NewInstance describes a server; Run starts it.
func NewInstance(o InstanceOptions) *Instance {
	return &Instance{o: o, problem: "PostgreSQL is starting"}
}

// DSN says how to reach the server as its superuser.
func (i *Instance) DSN() string { return i.dsn("mailproxy") }

func (i *Instance) dsn(database string) string {
	quoted := strings.NewReplacer(`\`, `\\`, `'`, `\'`).Replace(i.o.SocketDir)
	return fmt.Sprintf("host='%s' port=5432 user=mailproxy dbname=%s sslmode=disable", quoted, database)
}

// Problem says what is wrong and what to do, or "" while the server answers and has room.
func (i *Instance) Problem() string {
	p := i.lastProblem()
	if !i.diskFull() {
		return p
	}
	if p == "" {
		p = "PostgreSQL runs, and cannot write"
	}
	return fmt.Sprintf("the disk of %s is full; make room, it goes on by itself (%s)", i.o.DataDir, p)
}

func (i *Instance) lastProblem() string {
	i.mu.Lock()
	defer i.mu.Unlock()
	return i.problem
}

// diskFull says whether there is less room than a server needs.
func (i *Instance) diskFull() bool {
	var fs syscall.Statfs_t
	return syscall.Statfs(i.o.DataDir, &fs) == nil && int64(fs.Bavail)*fs.Bsize < minFree
}

// Failing says whether an attempt to bring the server up has failed, so that it may be long in coming.
func (i *Instance) Failing() bool {
	i.mu.Lock()
	defer i.mu.Unlock()
	return i.failing
}

func (i *Instance) setFailing(failing bool) {
	i.mu.Lock()
	defer i.mu.Unlock()
	i.failing = failing
}

func (i *Instance) setProblem(err error) {
	i.mu.Lock()
	defer i.mu.Unlock()
	i.problem = ""
	if err != nil {
		i.problem = err.Error()
	}
}

// Run makes the data directory where there is none, starts the server or adopts the one that runs, calls ready each time it answers
// anew, and starts it again when it dies. When ctx ends it stops the server and returns nil; an error says that it did not stop.
func (i *Instance) Run(ctx context.Context, ready func(dsn string)) error {
	wait := startBackOffMin
	for {
		started := time.Now()
		err := i.runOnce(ctx, ready)
		if ctx.Err() != nil {
			i.setProblem(errors.New("PostgreSQL is stopped"))
			return err
		}
		if time.Since(started) > steadyAfter {
			wait = startBackOffMin
		}
		if before := i.lastProblem(); err.Error() != before {
			i.o.Log.Warn().Err(err).Dur("again_ms", wait).Msg("postgres.down")
		}
		i.setProblem(err)
		i.setFailing(true)
		timer := time.NewTimer(wait)
		select {
		case <-ctx.Done():
			timer.Stop()
			return nil
		case <-timer.C:
		}
		wait = min(2*wait, startBackOffMax)
	}
}

// runOnce has one server from start to end. The error says why it ended; nil where ctx ended it.
func (i *Instance) runOnce(ctx context.Context, ready func(dsn string)) error {
	s, err := i.adopt()
	if err == nil && s == nil {
		var bin string
		if bin, err = i.prepare(ctx); err == nil {
			s, err = i.start(bin)
		}
	}
	if err != nil {
		return err
	}
	if err := i.waitReady(ctx, s); err != nil {
		if ctx.Err() != nil {
			return s.stop()
		}
		return err
	}
	i.setProblem(nil)
	i.setFailing(false)
	i.o.Log.Info().Int("pid", s.pid).Bool("adopted", s.adopted).Msg("postgres.ready")
	ready(i.DSN())
	select {
	case <-ctx.Done():
		return s.stop()
	case <-s.done:
		return i.whyEnded()
	}
}

// waitReady waits until the server answers and has our database.
func (i *Instance) waitReady(ctx context.Context, s *postmaster) error {
	admin, err := Open(Options{DSN: i.dsn("postgres"), Log: i.o.Log})
	if err != nil {
		return err
	}
	defer admin.Close()
	tick := time.NewTicker(pingEvery)
	defer tick.Stop()
	for {
		err := admin.Ping(ctx)
		if err == nil {
			err = admin.CreateDatabase(ctx, "mailproxy", "")
		}
		if err == nil || errors.Is(err, ErrDatabaseExists) {
			return nil
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-s.done:
			return i.whyEnded()
		case <-tick.C:
		}
		i.setProblem(fmt.Errorf("PostgreSQL is starting: %w", err))
	}
}

// minFree is the space under which a server is taken to have no disk.
const minFree = 32 << 20

// whyEnded makes an error of what the server wrote last.
func (i *Instance) whyEnded() error {
	b, _ := os.ReadFile(i.startLog()) // nothing to say is fine
	lines := strings.Split(strings.TrimSpace(string(b)), "\n")
	for _, l := range lines {
		if strings.Contains(l, "FATAL:") || strings.Contains(l, "PANIC:") {
			return fmt.Errorf("PostgreSQL stopped: %s; see %s", strings.TrimSpace(l), i.startLog())
		}
	}
	return fmt.Errorf("PostgreSQL stopped; see %s and %s", i.startLog(), filepath.Join(i.o.DataDir, "log"))
}

func (i *Instance) startLog() string { return i.o.DataDir + ".log" }

// A postmaster is a running server.
type postmaster struct {
	pid     int
	adopted bool
	process *os.Process
	done    chan struct{} // closed when it has ended
}

// stop ends the server: first in order, then at once.
func (s *postmaster) stop() error {
	for _, step := range []struct {
		signal syscall.Signal
		wait   time.Duration
	}{{syscall.SIGINT, fastStop}, {syscall.SIGQUIT, immediateStop}} {
		_ = s.process.Signal(step.signal) // fails where it has ended, which is next
		timer := time.NewTimer(step.wait)
		select {
		case <-s.done:
			timer.Stop()
			return nil
		case <-timer.C:
		}
	}
	return fmt.Errorf("PostgreSQL (pid %d) does not stop", s.pid)
}

// start starts the server in a session of its own, so that what ends the daemon does not end it.
func (i *Instance) start(bin string) (*postmaster, error) {
	log, err := os.Create(i.startLog())
	if err != nil {
		return nil, fmt.Errorf("start PostgreSQL: %w", err)
	}
	defer log.Close()
	cmd := exec.Command(filepath.Join(bin, "postgres"), append([]string{"-D", i.o.DataDir, "-k", i.o.SocketDir}, settings()...)...)
	if cmd.SysProcAttr, err = i.credential(); err != nil {
		return nil, err
	}
	cmd.SysProcAttr.Setsid = true
	cmd.Dir, cmd.Stdout, cmd.Stderr = i.o.DataDir, log, log
	cmd.Env = []string{"PATH=" + os.Getenv("PATH"), "LC_ALL=C"}
	if err := cmd.Start(); err != nil {
		return nil, fmt.Errorf("start PostgreSQL: %w", err)
	}
	s := &postmaster{pid: cmd.Process.Pid, process: cmd.Process, done: make(chan struct{})}
	go func() { // ends with the server, which Run waits for
		_ = cmd.Wait() // how it ended is in its log
		close(s.done)
	}()
	return s, nil
}

// settings keep a server small, durable, and alone.
func settings() []string {
	var args []string
	for _, s := range []string{
		"listen_addresses=", "unix_socket_permissions=0700", "port=5432",
		"synchronous_commit=on", "fsync=on", "full_page_writes=on",
		"wal_level=minimal", "max_wal_senders=0", "max_wal_size=512MB", "min_wal_size=32MB",
		"shared_buffers=32MB", "max_connections=100", "max_worker_processes=2", "autovacuum_max_workers=1", "jit=off", "huge_pages=off",
		"idle_in_transaction_session_timeout=5min", "timezone=UTC", "log_timezone=UTC",
		"logging_collector=on", "log_directory=log", "log_filename=postgresql-%a.log", "log_truncate_on_rotation=on",
		"log_rotation_age=1d", "log_rotation_size=0", "log_line_prefix=%m [%p] %u ",
		// parameters of statements may be secrets
		"log_parameter_max_length=0", "log_parameter_max_length_on_error=0",
	} {
		args = append(args, "-c", s)
	}
	return args
}
