package main

import (
	"fmt"
	"os"
	"os/exec"
	"runtime"
	"strings"

	"golang.org/x/sys/unix"
)

// machine says in one line what the figures were measured on.
func machine(dir string) string {
	return fmt.Sprintf("%d processors, Linux %s, %s, %s, %s; spool and queue on %s (%s)", runtime.NumCPU(), kernel(), runtime.Version(),
		version("postfix", "mail_version = ", "postconf", "-d", "mail_version"), version("haproxy", "HAProxy version ", "haproxy", "-v"),
		dir, fileSystem(dir))
}

func kernel() string {
	b, err := os.ReadFile("/proc/sys/kernel/osrelease")
	if err != nil {
		return "?"
	}
	return strings.TrimSpace(string(b))
}

// version gives "name 1.2", with the word behind before in a command's output.
func version(name, before, command string, args ...string) string {
	out, err := exec.Command(command, args...).Output()
	_, rest, found := strings.Cut(string(out), before)
	if words := strings.Fields(rest); err == nil && found && len(words) > 0 {
		return name + " " + words[0]
	}
	return name + " ?"
}

// loadAverage gives the three load averages as the kernel prints them.
func loadAverage() string {
	b, err := os.ReadFile("/proc/loadavg")
	if err != nil {
		return "?"
	}
	return strings.Join(strings.Fields(string(b))[:3], " ")
}

// fileSystem names the kind of file system that dir is on: on tmpfs, syncing would cost nothing.
func fileSystem(dir string) string {
	var st unix.Statfs_t
	if err := unix.Statfs(dir, &st); err != nil {
		return "unknown file system"
	}
	switch st.Type {
	case unix.EXT4_SUPER_MAGIC:
		return "ext4"
	case unix.XFS_SUPER_MAGIC:
		return "xfs"
	case unix.BTRFS_SUPER_MAGIC:
		return "btrfs"
	case unix.TMPFS_MAGIC:
		return "tmpfs: syncing costs nothing here"
	case unix.OVERLAYFS_SUPER_MAGIC:
		return "overlayfs"
	}
	return fmt.Sprintf("file system %#x", st.Type)
}
