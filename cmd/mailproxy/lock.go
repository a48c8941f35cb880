package main

import (
	"errors"
	"fmt"
	"io"
	"os"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// takeLock makes this process the one daemon of a node. The lock goes with the process, however it ends; the file stays. We may be
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
		pid, _ := io.ReadAll(io.LimitReader(f, 32))
		_ = f.Close()
		if errors.Is(err, unix.EWOULDBLOCK) {
			return nil, &lockedError{file, strings.TrimSpace(string(pid))}
		}
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

// lockedError says that a daemon of this node runs.
type lockedError struct{ file, pid string }

// Error is part of error.
func (e *lockedError) Error() string {
	if e.pid == "" {
		return fmt.Sprintf("a daemon of this node is running (%s is locked)", e.file)
	}
	return fmt.Sprintf("a daemon of this node is running, pid %s (%s is locked)", e.pid, e.file)
}
