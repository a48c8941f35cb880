package db

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"os/user"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"
)

// prepare makes everything ready to start, and gives the directory of the programs.
func (i *Instance) prepare(ctx context.Context) (bin string, err error) {
	if p := filepath.Join(i.o.SocketDir, ".s.PGSQL.5432"); len(p) > maxSocketPath {
		return "", fmt.Errorf("%w: %s has %d bytes, %d fit; choose a shorter run_dir", ErrPathTooLong, p, len(p), maxSocketPath)
	}
	version, err := os.ReadFile(filepath.Join(i.o.DataDir, "PG_VERSION"))
	switch {
	case errors.Is(err, fs.ErrNotExist):
		bin, err = i.initialise(ctx)
	case err != nil:
		return "", fmt.Errorf("data directory: %w", err)
	default:
		bin, err = i.programs(strings.TrimSpace(string(version)))
	}
	if err != nil {
		return "", err
	}
	if err := i.writeAccess(); err != nil {
		return "", err
	}
	if err := os.MkdirAll(filepath.Dir(i.o.SocketDir), 0o755); err != nil {
		return "", fmt.Errorf("socket directory: %w", err)
	}
	if err := i.ownDir(i.o.SocketDir); err != nil {
		return "", fmt.Errorf("socket directory: %w", err)
	}
	return bin, nil
}

// programs finds the programs for a data directory of a version.
func (i *Instance) programs(version string) (string, error) {
	bin := i.o.Bin
	if bin == "" {
		bin = filepath.Join(filepath.Dir(filepath.Dir(debianPostgres)), version, "bin")
	}
	_, found, err := FindPostgres(bin)
	if err == nil && strconv.Itoa(found) == version {
		return bin, nil
	}
	return "", fmt.Errorf("%w for %s, which is of version %s: install postgresql-%s; or, on a slave, move the directory and %s away and "+
		"run pmgcm join again; or, on the master, run pg_upgrade", ErrNoPostgres, i.o.DataDir, version, version, i.madeFile())
}

// madeFile says that the data directory was made once: one that is missing now was moved away, and is not made again as an empty one.
func (i *Instance) madeFile() string { return i.o.DataDir + ".made" }

// initialise makes the data directory beside its place and renames it, so that one half made is never taken for one.
func (i *Instance) initialise(ctx context.Context) (bin string, err error) {
	if _, err := os.Stat(i.madeFile()); err == nil {
		return "", fmt.Errorf("data directory %s is gone or broken: put it back; or, to begin with an empty one, move what is left of it "+
			"away and run \"rm %s\"", i.o.DataDir, i.madeFile())
	}
	if bin, _, err = FindPostgres(i.o.Bin); err != nil {
		return "", err
	}
	parent := filepath.Dir(i.o.DataDir)
	if err := os.MkdirAll(parent, 0o755); err != nil {
		return "", fmt.Errorf("make data directory: %w", err)
	}
	pattern := filepath.Base(i.o.DataDir) + ".new-*"
	old, err := filepath.Glob(filepath.Join(parent, pattern))
	if err != nil {
		return "", fmt.Errorf("make data directory: %w", err)
	}
	for _, dir := range old { // of attempts that were killed
		_ = os.RemoveAll(dir) // it is in nobody's way
	}
	dir, err := os.MkdirTemp(parent, pattern)
	if err != nil {
		return "", fmt.Errorf("make data directory: %w", err)
	}
	defer os.RemoveAll(dir) // gone where it was renamed
	if err := i.ownDir(dir); err != nil {
		return "", fmt.Errorf("make data directory: %w", err)
	}
	if err := i.initdb(ctx, bin, dir); err != nil {
		return "", err
	}
	if err := os.Rename(dir, i.o.DataDir); err != nil {
		return "", fmt.Errorf("make data directory: %w", err)
	}
	return bin, nil
}

func (i *Instance) initdb(ctx context.Context, bin, dir string) error {
	var out bytes.Buffer
	cmd := exec.CommandContext(ctx, filepath.Join(bin, "initdb"), "-D", dir, "-U", "mailproxy", "--data-checksums", "--locale=C", "-E", "UTF8",
		"--auth=reject")
	var err error
	if cmd.SysProcAttr, err = i.credential(); err != nil {
		return err
	}
	cmd.Dir, cmd.Stdout, cmd.Stderr = dir, &out, &out
	cmd.Env = []string{"PATH=" + os.Getenv("PATH"), "LC_ALL=C"}
	cmd.WaitDelay = 5 * time.Second // its own children may hold the pipe
	if err := cmd.Run(); err != nil {
		lines := strings.Split(strings.TrimSpace(out.String()), "\n")
		return fmt.Errorf("initdb: %w: %s", err, lines[len(lines)-1])
	}
	return nil
}

// accessText lets root and the service user in as the superuser. Roles of peers are for those two as well: the socket is theirs
// alone (0700), and PostgreSQL 15 cannot map one user to many roles.
const accessText = `# written at each start
local all mailproxy peer map=mailproxy
local mailproxy +mailproxy_peer trust
local mailproxy +mailproxy_push trust
`

// writeAccess writes who may log in, and that this directory was made.
func (i *Instance) writeAccess() error {
	names := []string{"root"}
	who := i.o.User
	if os.Geteuid() != 0 {
		me, err := user.LookupId(strconv.Itoa(os.Geteuid())) // user.Current remembers who we were before we gave up root
		if err != nil {
			return fmt.Errorf("service user: %w", err)
		}
		who = me.Username
	}
	if who != "root" {
		names = append(names, who)
	}
	ident := "# written at each start\n"
	for _, n := range names {
		ident += fmt.Sprintf("mailproxy %q mailproxy\n", n)
	}
	for name, text := range map[string]string{"pg_hba.conf": accessText, "pg_ident.conf": ident} {
		if err := i.writeOwned(filepath.Join(i.o.DataDir, name), text); err != nil {
			return fmt.Errorf("data directory: %w", err)
		}
	}
	if err := i.writeOwned(i.madeFile(), "PostgreSQL's data directory was made here once. See mailproxy(8).\n"); err != nil {
		return fmt.Errorf("data directory: %w", err)
	}
	return nil
}

// writeOwned writes a small file that the server may read, whole or not at all. A file that is so already is left.
func (i *Instance) writeOwned(file, text string) error {
	if b, err := os.ReadFile(file); err == nil && string(b) == text {
		return nil
	}
	attr, err := i.credential()
	if err != nil {
		return err
	}
	if err := os.WriteFile(file+".new", []byte(text), 0o600); err != nil {
		return err
	}
	if c := attr.Credential; c != nil {
		if err := os.Chown(file+".new", int(c.Uid), int(c.Gid)); err != nil {
			return err
		}
	}
	return os.Rename(file+".new", file)
}

// ownDir makes a directory for the server's user alone.
func (i *Instance) ownDir(dir string) error {
	if err := os.Mkdir(dir, 0o700); err != nil && !errors.Is(err, fs.ErrExist) {
		return err
	}
	attr, err := i.credential()
	if err != nil {
		return err
	}
	if c := attr.Credential; c != nil {
		if err := os.Chown(dir, int(c.Uid), int(c.Gid)); err != nil {
			return err
		}
	}
	return os.Chmod(dir, 0o700)
}

// credential makes a process run as the service user where we are root.
func (i *Instance) credential() (*syscall.SysProcAttr, error) {
	if os.Geteuid() != 0 {
		return &syscall.SysProcAttr{}, nil
	}
	u, err := user.Lookup(i.o.User)
	if err != nil {
		return nil, fmt.Errorf("PostgreSQL does not run as root; user %q: %w", i.o.User, err)
	}
	uid, err := strconv.ParseUint(u.Uid, 10, 32)
	if err != nil {
		return nil, fmt.Errorf("user %q: %w", i.o.User, err)
	}
	gid, err := strconv.ParseUint(u.Gid, 10, 32)
	if err != nil {
		return nil, fmt.Errorf("user %q: %w", i.o.User, err)
	}
	if uid == 0 {
		return nil, fmt.Errorf("PostgreSQL does not run as root: set another user than %q", i.o.User)
	}
	return &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: uint32(uid), Gid: uint32(gid)}}, nil
}

// adopt takes over a server of this data directory that runs, or gives nil. One whose socket is not where it is looked for, since the
// directory has changed or was cleared, is of no use and is stopped.
func (i *Instance) adopt() (*postmaster, error) {
	b, err := os.ReadFile(filepath.Join(i.o.DataDir, "postmaster.pid"))
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("adopt PostgreSQL: %w", err)
	}
	first, _, _ := strings.Cut(string(b), "\n")
	pid, err := strconv.Atoi(strings.TrimSpace(first))
	if err != nil || !i.isPostmaster(pid) {
		return nil, i.removeLocks()
	}
	p, err := os.FindProcess(pid)
	if err != nil {
		return nil, fmt.Errorf("adopt PostgreSQL: %w", err)
	}
	s := &postmaster{pid: pid, adopted: true, process: p, done: make(chan struct{})}
	go func() { // ends with the server, which Run waits for
		tick := time.NewTicker(watchEvery)
		defer tick.Stop()
		for i.isPostmaster(pid) {
			<-tick.C
		}
		close(s.done)
	}()
	// The fifth line is the directory of the socket (miscadmin.h, LOCK_FILE_LINE_SOCKET_DIR).
	lines := strings.Split(string(b), "\n")
	if _, err := os.Stat(filepath.Join(i.o.SocketDir, ".s.PGSQL.5432")); err != nil || len(lines) > 4 && lines[4] != i.o.SocketDir {
		i.o.Log.Info().Int("pid", pid).Str("reason", "its socket is elsewhere").Msg("postgres.stopping")
		return nil, s.stop()
	}
	return s, nil
}

// removeLocks removes the lock files of a server that died. A new one would do that itself, but not where their process ID is another
// process's of its user by now, or a thread's: then it would never start. Nobody else starts a server here, since we hold the node's
// lock; and processes that a server left behind keep the next one from starting by its shared memory.
func (i *Instance) removeLocks() error {
	for _, file := range []string{filepath.Join(i.o.DataDir, "postmaster.pid"), filepath.Join(i.o.SocketDir, ".s.PGSQL.5432.lock")} {
		if err := os.Remove(file); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return fmt.Errorf("remove what a PostgreSQL that died has left: %w", err)
		}
	}
	return nil
}

// isPostmaster says whether a process is alive and a server of this data directory, in which it stands.
func (i *Instance) isPostmaster(pid int) bool {
	dir := filepath.Join("/proc", strconv.Itoa(pid))
	stat, err := os.ReadFile(filepath.Join(dir, "stat"))
	if err != nil {
		return false
	}
	// "pid (comm) state ...": the name may hold anything, so the state is behind the last parenthesis
	at := bytes.LastIndexByte(stat, ')')
	if at < 0 || at+2 >= len(stat) || stat[at+2] == 'Z' {
		return false
	}
	cwd, err := os.Stat(filepath.Join(dir, "cwd"))
	if err != nil {
		return false
	}
	data, err := os.Stat(i.o.DataDir)
	return err == nil && os.SameFile(cwd, data)
}
