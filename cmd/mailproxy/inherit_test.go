package main

import (
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"mailproxy/internal/testbin"
)

// A manager does for a daemon what systemd does: hears its notifications, keeps the files that it stores, and passes them to the next one.
type manager struct {
	t    testing.TB
	path string
	conn *net.UnixConn

	mu    sync.Mutex
	kept  []*os.File
	late  bool // it has yet to let go of what it kept: it takes its time, until it hears more
	ready int
	heard []string
}

func newManager(t testing.TB, dir string) *manager {
	t.Helper()
	path := filepath.Join(dir, "notify")
	conn, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: path, Net: "unixgram"})
	if err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(path, 0o777); err != nil {
		t.Fatal(err)
	}
	m := &manager{t: t, path: path, conn: conn}
	done := make(chan struct{})
	go func() { defer close(done); m.hear() }()
	t.Cleanup(func() {
		_ = conn.Close()
		<-done
		m.drop()
	})
	return m
}

func (m *manager) drop() {
	for _, f := range m.kept {
		_ = f.Close()
	}
	m.kept = nil
}

// hear does what it is told until its socket is closed.
func (m *manager) hear() {
	b, oob := make([]byte, 4096), make([]byte, 4096)
	for {
		n, oobn, _, _, err := m.conn.ReadMsgUnix(b, oob)
		if err != nil {
			return
		}
		var files []*os.File
		if messages, err := syscall.ParseSocketControlMessage(oob[:oobn]); err == nil {
			for _, c := range messages {
				fds, _ := syscall.ParseUnixRights(&c)
				for _, fd := range fds {
					files = append(files, os.NewFile(uintptr(fd), "kept"))
				}
			}
		}
		text := string(b[:n])
		m.mu.Lock()
		m.heard = append(m.heard, strings.ReplaceAll(text, "\n", " "))
		if m.late {
			m.drop()
			m.late = false
		}
		switch {
		case strings.HasPrefix(text, "FDSTORE=1\n"):
			m.keep(files)
		case strings.HasPrefix(text, "FDSTOREREMOVE=1\n"):
			m.late = true
		default: // a barrier ends with its file
			for _, f := range files {
				_ = f.Close()
			}
		}
		m.ready += strings.Count(text, "READY=1")
		m.mu.Unlock()
	}
}

// keep takes files that it has not yet.
func (m *manager) keep(files []*os.File) {
	for _, f := range files {
		for _, have := range m.kept {
			if name(have) == name(f) {
				_ = f.Close()
				f = nil
				break
			}
		}
		if f != nil {
			m.kept = append(m.kept, f)
		}
	}
}

// name is the address of a listener.
func name(f *os.File) (address string) {
	l, err := net.FileListener(f)
	if err != nil {
		return err.Error()
	}
	defer l.Close()
	return l.Addr().String()
}

// start starts the node's daemon as systemd does, and waits until it is ready.
func (m *manager) start(n *testNode) {
	n.t.Helper()
	m.mu.Lock()
	files, ready := append([]*os.File{}, m.kept...), m.ready
	m.mu.Unlock()
	n.stderr = &syncBuffer{}
	n.cmd = exec.Command("sh", "-c", `LISTEN_PID=$$ exec "$@"`, "sh", testbin.Path(n.t, "mailproxy"), "--config", n.file, "serve")
	n.cmd.Env = append(os.Environ(), "NOTIFY_SOCKET="+m.path)
	if len(files) > 0 {
		n.cmd.ExtraFiles = files
		n.cmd.Env = append(n.cmd.Env, fmt.Sprintf("LISTEN_FDS=%d", len(files)), "LISTEN_FDNAMES="+strings.Repeat("smtp:", len(files)-1)+"smtp")
	}
	n.cmd.Stderr = n.stderr
	if err := n.cmd.Start(); err != nil {
		n.t.Fatal(err)
	}
	cmd, ended := n.cmd, make(chan error, 1)
	n.ended = ended
	go func() { ended <- cmd.Wait() }()
	eventually(n.t, func() error {
		m.mu.Lock()
		defer m.mu.Unlock()
		if m.ready == ready {
			return errors.New("not ready: " + n.stderr.String())
		}
		return nil
	})
}

func TestARestartRefusesNoConnection(t *testing.T) {
	n, hop := newNode(t), newSink(t)
	systemd := newManager(t, n.dir)
	systemd.start(n)
	n.waitHealthy()
	n.must("domain", "add", "example.test", "--to", hop.addr)
	eventually(t, func() error { return n.tryMail("to@example.test") })
	eventually(t, func() error { _, err := os.Stat(n.local.SnapshotFile()); return err })

	l := startLoad(n.smtp, 8)
	more := func(what string) {
		t.Helper()
		before, _, _ := l.counts()
		eventually(t, func() error {
			if taken, _, _ := l.counts(); taken < before+100 {
				return fmt.Errorf("%s: %d taken", what, taken-before)
			}
			return nil
		})
	}
	more("at first")
	for range 2 {
		n.stop()
		waiting, err := net.DialTimeout("tcp", n.smtp, time.Second) // nobody runs
		if err != nil {
			t.Fatalf("between two daemons: %v", err)
		}
		systemd.start(n)
		greeting := make([]byte, 4)
		_ = waiting.SetDeadline(time.Now().Add(patience))
		if _, err := waiting.Read(greeting); err != nil || string(greeting) != "220 " {
			t.Errorf("who came between two daemons hears %q, %v", greeting, err)
		}
		_ = waiting.Close()
		more("behind a restart")
	}
	l.end()
	for _, err := range l.broken {
		t.Errorf("a client saw: %v", err)
	}

	// A crash breaks the sessions that there are, and refuses nobody either.
	crashed := startLoad(n.smtp, 8)
	eventually(t, func() error {
		if taken, _, _ := crashed.counts(); taken < 50 {
			return fmt.Errorf("%d taken", taken)
		}
		return nil
	})
	n.signal(syscall.SIGKILL)
	n.wait()
	systemd.start(n)
	before, _, _ := crashed.counts()
	eventually(t, func() error {
		if taken, _, _ := crashed.counts(); taken < before+50 {
			return fmt.Errorf("behind a crash: %d taken", taken-before)
		}
		return nil
	})
	crashed.end()
	for _, err := range crashed.broken {
		if errors.Is(err, syscall.ECONNREFUSED) {
			t.Errorf("a client saw: %v", err)
		}
	}
	eventually(t, func() error {
		if missing := hop.missing(append(l.taken, crashed.taken...)); len(missing) > 0 {
			return fmt.Errorf("answered with 250, and not there: %v", missing)
		}
		return nil
	})

	t.Run("what the node file names no more is given up", func(t *testing.T) {
		n.stop()
		text, err := os.ReadFile(n.file)
		if err != nil {
			t.Fatal(err)
		}
		_, port, _ := net.SplitHostPort(n.smtp)
		old := n.smtp
		// The same port on all addresses: it can be had only once systemd has let go of the one before.
		if err := os.WriteFile(n.file, []byte(strings.ReplaceAll(string(text), old, "0.0.0.0:"+port)), 0o640); err != nil {
			t.Fatal(err)
		}
		systemd.start(n)
		if err := n.tryMail("to@example.test"); err != nil {
			t.Error(err)
		}
		systemd.mu.Lock()
		if len(systemd.kept) != 1 || name(systemd.kept[0]) != "[::]:"+port {
			t.Errorf("kept: %d, heard %v", len(systemd.kept), systemd.heard)
		}
		systemd.mu.Unlock()
	})
	n.stop()
}

// Sockets of a unit of the administrator's serve as well.
func TestListenersOfASocketUnitAreTaken(t *testing.T) {
	n := newNode(t)
	cmd := exec.Command("systemd-socket-activate", "--listen="+n.smtp, testbin.Path(t, "mailproxy"), "--config", n.file, "serve")
	n.stderr = &syncBuffer{}
	cmd.Stderr = n.stderr
	if err := cmd.Start(); err != nil {
		t.Fatalf("%v (Debian package systemd)", err)
	}
	ended := make(chan error, 1)
	n.cmd, n.ended = cmd, ended
	go func() { ended <- cmd.Wait() }()
	eventually(t, func() error { // the first connection starts it
		conn, err := net.Dial("tcp", n.smtp)
		if err != nil {
			return err
		}
		defer conn.Close()
		_ = conn.SetDeadline(time.Now().Add(patience))
		_, err = conn.Read(make([]byte, 1))
		return err
	})
	n.stop()
}

func TestListenersAreTakenByTheirAddress(t *testing.T) {
	here := func(address string) net.Listener {
		l, err := net.Listen("tcp", address)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = l.Close() })
		return l
	}
	any4, one, any6 := here("0.0.0.0:0"), here("127.0.0.1:0"), here(":0")
	port := func(l net.Listener) string { _, p, _ := net.SplitHostPort(l.Addr().String()); return p }
	unix, err := net.Listen("unix", filepath.Join(t.TempDir(), "s"))
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close()
	for _, c := range []struct {
		l       net.Listener
		address string
		want    bool
	}{
		{any4, "0.0.0.0:" + port(any4), true}, {any4, "127.0.0.1:" + port(any4), false}, {any4, "[::]:" + port(any4), true},
		{one, "127.0.0.1:" + port(one), true}, {one, "localhost:" + port(one), true}, {one, "127.0.0.2:" + port(one), false}, {one, ":" + port(one), false},
		{one, "127.0.0.1:1", false}, {any6, ":" + port(any6), true}, {unix, ":25", false}, {one, "no port", false},
	} {
		if got := listensOn(c.l, c.address); got != c.want {
			t.Errorf("%v for %q: %v", c.l.Addr(), c.address, got)
		}
	}
	kept := inherited{any4, one}
	if l := kept.take("127.0.0.1:" + port(one)); l != one || len(kept) != 1 {
		t.Errorf("took %v, left %v", l, kept)
	}
	if l := kept.take("127.0.0.1:" + port(one)); l != nil {
		t.Errorf("took it twice: %v", l)
	}
}
