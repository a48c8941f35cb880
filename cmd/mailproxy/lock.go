package main

import (
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"mailproxy/config"
)

// locks are what the one daemon of a node holds, one in each of its directories: a second node that was given the same run directory
// would take over the first one's sockets.
type locks []*os.File

// takeLocks takes both locks, or none.
func takeLocks(l *config.Local) (locks, error) {
	var held locks
	for _, file := range []string{l.LockFile(), l.RunLockFile()} {
		err := os.MkdirAll(filepath.Dir(file), 0o755)
		if err == nil {
			var f *os.File
			if f, err = takeLock(file); err == nil {
				held = append(held, f)
				continue
			}
		}
		held.close()
		return nil, sharedRunDir(err, l)
	}
	return held, nil
}

func (l locks) close() {
	for _, f := range l {
		_ = f.Close()
	}
}

// sharedRunDir gives the hint that belongs to a run directory whose lock another node's daemon holds.
func sharedRunDir(err error, l *config.Local) error {
	if held, ok := errors.AsType[*lockedError](err); ok && held.file == l.RunLockFile() {
		return withHint(fmt.Errorf("run_dir %s is in use: %w", l.RunDir, err), "every node has a run_dir of its own: \"run_dir\" in its node file, --run-dir of init")
	}
	return err
}

// checkLocks refuses directories in which a daemon runs. It takes nothing.
func checkLocks(l *config.Local) error {
	for _, file := range []string{l.LockFile(), l.RunLockFile()} {
		f, err := os.OpenFile(file, os.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0)
		if err != nil {
			continue // nobody has run there yet, or serve will say it
		}
		err = unix.Flock(int(f.Fd()), unix.LOCK_SH|unix.LOCK_NB)
		if errors.Is(err, unix.EWOULDBLOCK) {
			err = lockedBy(file, f)
		}
		_ = f.Close()
		if err != nil {
			return sharedRunDir(err, l)
		}
	}
	return nil
}

// takeLock makes this process the one that holds a lock. The lock goes with the process, however it ends; the file stays. We may be
// root, and the directory the daemon's: a link there must not lead us to another file.
func takeLock(file string) (*os.File, error) {
	f, err := os.OpenFile(file, os.O_RDWR|os.O_CREATE|unix.O_NOFOLLOW, 0o644)
	if err != nil {
		return nil, fmt.Errorf("take the node's lock: %w", err)
	}
	var info unix.Stat_t
	if err := unix.Fstat(int(f.Fd()), &info); err != nil || info.Mode&unix.S_IFMT != unix.S_IFREG || info.Nlink != 1 {
		_ = f.Close()
		return nil, fmt.Errorf("take the node's lock: %s is not a file of its own", file)
	}
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		if errors.Is(err, unix.EWOULDBLOCK) {
			err = lockedBy(file, f)
			_ = f.Close()
			return nil, err
		}
		_ = f.Close()
		return nil, fmt.Errorf("take the node's lock %s: %w", file, err)
	}
	err = f.Truncate(0)
	if err == nil {
		_, err = f.WriteAt([]byte(strconv.Itoa(os.Getpid())+"\n"), 0)
	}
	if err != nil {
		_ = f.Close()
		return nil, fmt.Errorf("take the node's lock: %w", err)
	}
	return f, nil
}

func lockedBy(file string, f io.Reader) error {
	pid, _ := io.ReadAll(io.LimitReader(f, 32)) // less said where it cannot be read
	return &lockedError{file, strings.TrimSpace(string(pid))}
}

// lockedError says that a daemon runs in the directory of the lock.
type lockedError struct{ file, pid string }

// Error is part of error.
func (e *lockedError) Error() string {
	if e.pid == "" {
		return fmt.Sprintf("a daemon is running (%s is locked)", e.file)
	}
	return fmt.Sprintf("a daemon is running, pid %s (%s is locked)", e.pid, e.file)
}
