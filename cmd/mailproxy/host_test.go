package main

import (
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"mailproxy/cluster"
	"mailproxy/config"
	"mailproxy/db"
	"mailproxy/smtpd"
	"mailproxy/tunnel"
)

func mustLeaf(t *testing.T, file string) *x509.Certificate {
	t.Helper()
	cert, err := tls.LoadX509KeyPair(file, file)
	if err != nil {
		t.Fatal(err)
	}
	return cert.Leaf
}

func TestTheLockIsForOneAndGoesWithItsHolder(t *testing.T) {
	file := filepath.Join(t.TempDir(), "lock")
	first, err := takeLock(file)
	if err != nil {
		t.Fatal(err)
	}
	_, err = takeLock(file)
	if want := fmt.Sprintf("a daemon is running, pid %d (%s is locked)", os.Getpid(), file); err == nil || err.Error() != want {
		t.Errorf("got %v, want %s", err, want)
	}
	if err := first.Close(); err != nil {
		t.Fatal(err)
	}
	second, err := takeLock(file)
	if err != nil {
		t.Fatal(err)
	}
	_ = second.Close()
}

// The directory is the daemon's, and root takes the lock.
func TestTheLockLeadsToNoOtherFile(t *testing.T) {
	dir := t.TempDir()
	other, file := filepath.Join(dir, "other"), filepath.Join(dir, "lock")
	if err := os.WriteFile(other, []byte("precious"), 0o600); err != nil {
		t.Fatal(err)
	}
	for name, plant := range map[string]func() error{
		"a link":        func() error { return os.Symlink(other, file) },
		"a second name": func() error { return os.Link(other, file) },
		"a pipe":        func() error { return syscall.Mkfifo(file, 0o600) },
	} {
		if err := plant(); err != nil {
			t.Fatal(err)
		}
		if f, err := takeLock(file); err == nil {
			t.Errorf("%s was taken", name)
			_ = f.Close()
		}
		if b, err := os.ReadFile(other); err != nil || string(b) != "precious" {
			t.Errorf("%s: the other file has %q, %v", name, b, err)
		}
		if err := os.Remove(file); err != nil {
			t.Fatal(err)
		}
	}
}

// What root walks through may be changed under it by the directory's owner.
func TestADirectoryThatBecomesALinkLeadsRootNowhere(t *testing.T) {
	dir := shortDir(t)
	l := &config.Local{StateDir: filepath.Join(dir, "s"), RunDir: filepath.Join(dir, "r"), User: "nobody"}
	inside, outside, link := filepath.Join(l.SpoolDir(), "d"), filepath.Join(dir, "outside"), filepath.Join(l.SpoolDir(), "link")
	for _, d := range []string{inside, outside} {
		if err := os.MkdirAll(d, 0o700); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(d, "f"), nil, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Symlink(outside, link); err != nil {
		t.Fatal(err)
	}
	who, err := daemonAccount(l)
	if err != nil {
		t.Fatal(err)
	}
	end, ended := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(ended)
		for {
			select {
			case <-end:
				return
			default:
				_ = unix.Renameat2(unix.AT_FDCWD, inside, unix.AT_FDCWD, link, unix.RENAME_EXCHANGE)
			}
		}
	}()
	for range 3000 {
		_ = prepareDirs(l, who) // an error for what changed meanwhile is fine
	}
	close(end)
	<-ended
	info, err := os.Stat(filepath.Join(outside, "f"))
	if err != nil {
		t.Fatal(err)
	}
	if uid := info.Sys().(*syscall.Stat_t).Uid; uid != 0 {
		t.Errorf("the file outside belongs to %d", uid)
	}
}

func TestRootGivesTheDaemonItsFilesAndNothingElse(t *testing.T) {
	dir := shortDir(t)
	outside := filepath.Join(dir, "outside")
	l := &config.Local{StateDir: filepath.Join(dir, "s"), RunDir: filepath.Join(dir, "r"), User: "nobody"}
	for _, d := range []string{l.KeyDir(), filepath.Join(l.SpoolDir(), "item"), filepath.Join(l.StateDir, "other"), l.RunDir} {
		if err := os.MkdirAll(d, 0o700); err != nil {
			t.Fatal(err)
		}
	}
	key, item, other := filepath.Join(l.KeyDir(), "node.key"), filepath.Join(l.SpoolDir(), "item", "x"), filepath.Join(l.StateDir, "other", "f")
	link, second := filepath.Join(l.SpoolDir(), "link"), filepath.Join(l.SpoolDir(), "second")
	for _, f := range []string{key, item, other, outside, l.LockFile(), l.RunLockFile()} {
		if err := os.WriteFile(f, nil, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if err := errors.Join(os.Symlink(outside, link), os.Link(outside, second)); err != nil {
		t.Fatal(err)
	}
	who, err := daemonAccount(l)
	if err != nil {
		t.Fatal(err)
	}
	if err := prepareDirs(l, who); err != nil {
		t.Fatal(err)
	}
	for path, want := range map[string]int{l.StateDir: 65534, l.RunDir: 65534, l.LockFile(): 65534, l.RunLockFile(): 65534, key: 65534, item: 65534, filepath.Dir(item): 65534,
		tlsDir(l): 65534, tempDir(l): 65534, other: 0, outside: 0} {
		info, err := os.Stat(path)
		if err != nil {
			t.Fatal(err)
		}
		if uid := int(info.Sys().(*syscall.Stat_t).Uid); uid != want {
			t.Errorf("%s belongs to %d, want %d", path, uid, want)
		}
	}
}

func TestTheUnitIsHardened(t *testing.T) {
	unit, err := os.ReadFile(filepath.Join("..", "..", "systemd", "mailproxy.service"))
	if err != nil {
		t.Fatal(err)
	}
	wantHardened(t, "mailproxy.service", 20)
	for _, want := range []string{"Type=notify", "KillMode=mixed", "StateDirectory=mailproxy", "RuntimeDirectory=mailproxy"} {
		if !strings.Contains(string(unit), want+"\n") {
			t.Errorf("no %s in the unit", want)
		}
	}
}

// wantHardened wants a unit to be no more exposed than that, in tenths (systemd-analyze(1), security).
func wantHardened(t *testing.T, name string, most int) {
	t.Helper()
	unit, err := os.ReadFile(filepath.Join("..", "..", "systemd", name))
	if err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(t.TempDir(), name)
	text := strings.NewReplacer("@BIN@", "/usr/bin", "@LIBEXEC@/mailproxy-pam", "/bin/true").Replace(string(unit))
	if err := os.WriteFile(file, []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
	out, err := exec.Command("systemd-analyze", "security", "--offline=true", fmt.Sprintf("--threshold=%d", most), "--no-pager", file).CombinedOutput()
	if err != nil {
		t.Errorf("%s: %v\n%s", name, err, out)
	}
}

// The socket is where the daemon looks, for its group alone, and a daemon that was taken over cannot guess as fast as it likes.
func TestTheHelperIsForTheDaemonAlone(t *testing.T) {
	wantHardened(t, "mailproxy-pam@.service", 20)
	for name, lines := range map[string][]string{
		"mailproxy-pam.socket":   {"ListenStream=" + pamSocket, "SocketUser=root", "SocketGroup=" + config.DefaultUser, "SocketMode=0660", "Accept=yes", "MaxConnections=2"},
		"mailproxy-pam@.service": {"StandardInput=socket", "StandardOutput=socket", "CapabilityBoundingSet=CAP_AUDIT_WRITE", "NoNewPrivileges=yes", "LimitCORE=0"},
	} {
		unit, err := os.ReadFile(filepath.Join("..", "..", "systemd", name))
		if err != nil {
			t.Fatal(err)
		}
		for _, want := range lines {
			if !strings.Contains(string(unit), "\n"+want+"\n") {
				t.Errorf("no %s in %s", want, name)
			}
		}
	}
}

func TestTheUnitGivesAllPartsTheTimeToEnd(t *testing.T) {
	d := &daemon{instance: &db.Instance{}, tunnel: &tunnel.Tunnel{}, node: &cluster.Node{}, config: &configuration{}, smtpd: &smtpd.Server{}}
	var sum time.Duration
	for _, p := range d.parts() {
		sum += p.bound
	}
	unit, err := os.ReadFile(filepath.Join("..", "..", "systemd", "mailproxy.service"))
	if err != nil {
		t.Fatal(err)
	}
	_, after, _ := strings.Cut(string(unit), "\nTimeoutStopSec=")
	line, _, _ := strings.Cut(after, "\n")
	seconds, err := strconv.Atoi(line)
	if err != nil {
		t.Fatal(err)
	}
	if bound := time.Duration(seconds) * time.Second; sum >= bound {
		t.Errorf("the parts may take %v, and are killed after %v", sum, bound)
	}
}

func TestRootIsNotToldToBeRoot(t *testing.T) { // tests are
	if h := hint(fs.ErrPermission); h != "" {
		t.Errorf("hint: %s", h)
	}
}
