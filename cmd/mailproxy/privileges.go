package main

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/user"
	"path/filepath"
	"strconv"
	"syscall"

	"mailproxy/config"
)

// An account is whom the daemon becomes once its listeners are open; nil where it stays who it is.
type account struct {
	name     string
	uid, gid int
	groups   []int
}

// daemonAccount gives whom root's daemon becomes. Root without a user in its node file stays root, which PostgreSQL refuses.
func daemonAccount(l *config.Local) (*account, error) {
	if os.Geteuid() != 0 || l.User == "" || l.User == "root" {
		return nil, nil
	}
	u, err := user.Lookup(l.User)
	if err != nil {
		return nil, withHint(fmt.Errorf("user %s: is not known here", l.User),
			"adduser --system --group --home %s --no-create-home %s", l.StateDir, l.User)
	}
	a := &account{name: u.Username}
	if a.uid, err = strconv.Atoi(u.Uid); err != nil {
		return nil, err
	}
	if a.gid, err = strconv.Atoi(u.Gid); err != nil {
		return nil, err
	}
	ids, err := u.GroupIds()
	if err != nil {
		return nil, fmt.Errorf("groups of user %s: %w", l.User, err)
	}
	for _, id := range ids {
		if gid, err := strconv.Atoi(id); err == nil {
			a.groups = append(a.groups, gid)
		}
	}
	return a, nil
}

// become gives up root for good, in every thread.
func (a *account) become() error {
	if a == nil {
		return nil
	}
	if err := syscall.Setgroups(a.groups); err != nil {
		return fmt.Errorf("become %s: groups: %w", a.name, err)
	}
	if err := syscall.Setgid(a.gid); err != nil {
		return fmt.Errorf("become %s: group: %w", a.name, err)
	}
	if err := syscall.Setuid(a.uid); err != nil {
		return fmt.Errorf("become %s: %w", a.name, err)
	}
	if a.uid != 0 && syscall.Setuid(0) == nil {
		return fmt.Errorf("become %s: root could be had back", a.name)
	}
	return nil
}

// prepareDirs makes the node's directories, and the account's own what root made there before. The database is left alone: its
// owner is checked by PostgreSQL itself.
func prepareDirs(l *config.Local, a *account) error {
	for _, d := range []struct {
		path string
		mode fs.FileMode
	}{
		{l.StateDir, 0o755}, {l.RunDir, 0o755}, {l.SpoolDir(), 0o700}, {l.KeyDir(), 0o700}, {tlsDir(l), 0o700},
		{tempDir(l), 0o700},
	} {
		if err := os.MkdirAll(d.path, d.mode); err != nil {
			return fmt.Errorf("make directory: %w", err)
		}
		if err := a.own(d.path, d.path == l.SpoolDir() || d.path == l.KeyDir() || d.path == tlsDir(l)); err != nil {
			return fmt.Errorf("give %s to %s: %w", d.path, a.name, err)
		}
	}
	for _, file := range []string{l.LockFile(), l.SnapshotFile()} {
		if err := a.own(file, false); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return fmt.Errorf("give %s to %s: %w", file, a.name, err)
		}
	}
	return checkWritable(l, a)
}

// own gives path, and with all what is below it, to the account. Whoever can write there must not get more by it than what is
// there: links are not followed, and files with a second name are left alone.
func (a *account) own(path string, all bool) error {
	if a == nil {
		return nil
	}
	give := func(path string, info fs.FileInfo) error {
		s, ok := info.Sys().(*syscall.Stat_t)
		if !ok || int(s.Uid) == a.uid || !info.IsDir() && (!info.Mode().IsRegular() || s.Nlink > 1) {
			return nil
		}
		return os.Lchown(path, a.uid, a.gid)
	}
	if !all {
		info, err := os.Lstat(path)
		if err != nil {
			return err
		}
		return give(path, info)
	}
	return filepath.WalkDir(path, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		info, err := d.Info()
		if err != nil {
			return err
		}
		return give(path, info)
	})
}

// checkWritable says early, and with the directory's name, what would fail in the middle of a mail.
func checkWritable(l *config.Local, a *account) error {
	if a != nil {
		return nil // root has just given them away
	}
	for _, dir := range []string{l.StateDir, l.RunDir, l.SpoolDir(), l.KeyDir()} {
		if err := tryWrite(dir); err != nil {
			return err
		}
	}
	return nil
}

// give makes path the account's own.
func (a *account) give(path string) error {
	if a == nil {
		return nil
	}
	if err := os.Lchown(path, a.uid, a.gid); err != nil {
		return fmt.Errorf("give %s to %s: %w", path, a.name, err)
	}
	return nil
}
