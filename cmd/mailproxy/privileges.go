package main

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
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

// daemonAccount gives whom root's daemon becomes. Root with no other user in its node file stays root, where it needs no PostgreSQL
// of its own.
func daemonAccount(l *config.Local) (*account, error) {
	if os.Geteuid() != 0 {
		return nil, nil
	}
	if l.User == "" {
		return nil, checkUnprivileged(l, nil)
	}
	a, err := accountOf(l)
	if err != nil {
		return nil, err
	}
	if a.uid == 0 {
		return nil, checkUnprivileged(l, a)
	}
	return a, nil
}

// checkUnprivileged refuses root (nil: we are) where the node is to have a PostgreSQL of its own, which never runs as root.
func checkUnprivileged(l *config.Local, a *account) error {
	if l.Database.DSN != "" || a != nil && a.uid != 0 {
		return nil
	}
	return withHint(errors.New("user: the node's own PostgreSQL does not run as root"),
		"let \"user\" in the node file, --user of init, name another: %s is the usual one", config.DefaultUser)
}

// accountOf gives the account of the node file's user.
func accountOf(l *config.Local) (*account, error) {
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
	for _, dir := range []string{l.StateDir, l.RunDir} {
		if err := os.MkdirAll(dir, 0o755); err != nil {
			return fmt.Errorf("make directory: %w", err)
		}
		if err := a.give(dir); err != nil {
			return err
		}
	}
	state, err := os.OpenRoot(l.StateDir)
	if err != nil {
		return err
	}
	defer func() { _ = state.Close() }()
	for _, d := range []struct {
		path string
		all  bool // with what is in it
	}{{l.SpoolDir(), true}, {l.KeyDir(), true}, {tlsDir(l), true}, {tempDir(l), false}} {
		if err := os.MkdirAll(d.path, 0o700); err != nil {
			return fmt.Errorf("make directory: %w", err)
		}
		if err := a.own(state, filepath.Base(d.path), d.all); err != nil {
			return fmt.Errorf("give %s to %s: %w", d.path, a.name, err)
		}
	}
	for _, file := range []string{l.LockFile(), l.SnapshotFile()} {
		if err := a.own(state, filepath.Base(file), false); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return fmt.Errorf("give %s to %s: %w", file, a.name, err)
		}
	}
	run, err := os.OpenRoot(l.RunDir)
	if err != nil {
		return err
	}
	defer func() { _ = run.Close() }()
	if err := a.own(run, filepath.Base(l.RunLockFile()), false); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("give %s to %s: %w", l.RunLockFile(), a.name, err)
	}
	return nil
}

// own gives a name in a directory, and with all what is below it, to the account. Whoever can write there must not get more by it
// than what is there, also by changing it under us: links are not followed, none leads out of the directory, and files with a second
// name are left alone.
func (a *account) own(dir *os.Root, name string, all bool) error {
	if a == nil {
		return nil
	}
	give := func(path string) error {
		info, err := dir.Lstat(path)
		if err != nil {
			return err
		}
		s, ok := info.Sys().(*syscall.Stat_t)
		if !ok || int(s.Uid) == a.uid || !info.IsDir() && (!info.Mode().IsRegular() || s.Nlink > 1) {
			return nil
		}
		return dir.Lchown(path, a.uid, a.gid)
	}
	info, err := dir.Lstat(name)
	if err != nil {
		return err
	}
	if !all || !info.IsDir() {
		return give(name)
	}
	return fs.WalkDir(dir.FS(), name, func(path string, _ fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		return give(path)
	})
}

// checkWritable says early, and with the directory's name, what would fail in the middle of a mail. It is for whom the daemon is by
// then: a directory that is its own is of no use to it below one that it may not enter.
func checkWritable(l *config.Local) error {
	for _, dir := range []string{l.StateDir, l.RunDir, l.SpoolDir(), l.KeyDir()} {
		if err := tryWrite(dir); errors.Is(err, fs.ErrPermission) {
			return withHint(fmt.Errorf("user %s may not write in %s", userName(), dir), "\"namei -l %s\" shows whose the directories on the way are", dir)
		} else if err != nil {
			return err
		}
	}
	return nil
}

// userName is whom we are by now; user.Current remembers who we were before we gave up root.
func userName() string {
	id := strconv.Itoa(os.Geteuid())
	if u, err := user.LookupId(id); err == nil {
		return u.Username
	}
	return id
}

// checkEnter refuses a directory below one that the account may not enter, as test(1) says when it is that user.
func (a *account) checkEnter(dir string) error {
	for parent := filepath.Dir(dir); parent != "/"; parent = filepath.Dir(parent) {
		if _, err := os.Stat(parent); errors.Is(err, fs.ErrNotExist) {
			continue // it will be made
		}
		cmd := exec.Command("test", "-x", parent)
		cmd.Dir = "/"
		cmd.SysProcAttr = &syscall.SysProcAttr{Credential: a.credential()}
		var exit *exec.ExitError
		if err := cmd.Run(); errors.As(err, &exit) {
			return withHint(fmt.Errorf("user %s may not enter %s", a.name, parent), "chmod o+x %s", shellQuote(parent))
		} else if err != nil {
			return fmt.Errorf("may user %s enter %s: %w", a.name, parent, err)
		}
	}
	return nil
}

func (a *account) credential() *syscall.Credential {
	c := &syscall.Credential{Uid: uint32(a.uid), Gid: uint32(a.gid)}
	for _, g := range a.groups {
		c.Groups = append(c.Groups, uint32(g))
	}
	return c
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
