package lab

import (
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"mailproxy/internal/testbin"
)

func TestMain(m *testing.M) {
	Main(func() int { return testbin.Main(m, "mailproxy", "pmgcm") })
}

// connects gives how long a TCP connection from one host to another's tunnel takes to be made.
func connects(from, to *Host) (time.Duration, error) {
	began := time.Now()
	out, errs, code, err := from.Run("timeout", "1.5", "bash", "-c", fmt.Sprintf("exec 3<>/dev/tcp/%s/7025", to.Address))
	if err == nil && code != 0 {
		err = fmt.Errorf("exit code %d %s%s", code, out, errs)
	}
	return time.Since(began), err
}

// clockOf asks a daemon what time it is.
func clockOf(h *Host) (time.Time, error) {
	out, _, _, err := h.Run("pmgcm", "status", "--json")
	var r struct{ Nodes []struct{ Time time.Time } }
	if err == nil {
		err = json.Unmarshal([]byte(out), &r)
	}
	if err != nil || len(r.Nodes) == 0 {
		return time.Time{}, errors.Join(err, errors.New(out))
	}
	return r.Nodes[0].Time, nil
}

// One lab for all, since making it takes longest; each fault is ended before the next comes.
func TestWhatALabDoesToItsHosts(t *testing.T) {
	dir := filepath.Join(Dir(), "l")
	must(t, os.Mkdir(dir, 0o755))
	l, err := New(dir, testbin.Dir())
	must(t, err)
	var hosts []*Host
	for _, id := range []string{"n1", "n2"} {
		h, err := l.Add(HostOptions{ID: id, Name: id + "." + Domain, Disk: "300m"})
		must(t, err)
		hosts = append(hosts, h)
	}
	must(t, l.Serve())
	must(t, Form(hosts...))
	_, err = hosts[0].Must("mailproxy", "domain", "add", MailDomain, "--to", Receiver)
	must(t, err)

	// What follows is done by another process as well: it finds all in the file.
	again, err := Open(dir)
	must(t, err)
	a, err := again.Host("n1")
	must(t, err)
	b, err := again.Host("n2")
	must(t, err)
	if _, err := again.Host("n3"); !errors.Is(err, ErrNoHost) {
		t.Errorf("a host that is not there: %v", err)
	}

	t.Run("mail goes through a host to the receiving MTA, which the DNS server knows", func(t *testing.T) {
		must(t, Poll(func() error { return b.SendMany(3, "to@"+MailDomain) }))
		if files, err := os.ReadDir(l.MailDir()); err != nil || len(files) != 3 {
			t.Errorf("%d messages arrived, %v", len(files), err)
		}
	})
	t.Run("hosts that are cut off from each other hear nothing, and others do", func(t *testing.T) {
		for _, c := range []struct{ cut, join func() error }{
			{func() error { return again.Cut(a, b) }, func() error { return again.Join(a, b) }},
			{func() error { return again.Isolate(b) }, func() error { return again.Rejoin(b) }},
			{func() error { return errors.Join(again.Cut(a, b), again.Isolate(a)) }, again.Heal},
		} {
			must(t, c.cut())
			for _, pair := range [][2]*Host{{a, b}, {b, a}} {
				if _, err := connects(pair[0], pair[1]); err == nil {
					t.Errorf("%s reaches %s", pair[0].ID, pair[1].ID)
				}
			}
			must(t, b.SendMany(1, "to@"+MailDomain)) // the hub still reaches it
			must(t, c.join())
			if _, err := connects(a, b); err != nil {
				t.Error(err)
			}
		}
	})
	t.Run("a slow host's round trips take longer, by what was said", func(t *testing.T) {
		const longer = 400 * time.Millisecond
		for range 2 { // and once more, when it is slow already
			must(t, a.Slow(longer))
			var took time.Duration
			must(t, Poll(func() (err error) { took, err = connects(b, a); return err }))
			began := time.Now()
			c, err := net.Dial("tcp", net.JoinHostPort(a.Address, SMTPPort))
			must(t, err)
			_ = c.Close()
			if d := time.Since(began); d < longer || took < longer {
				t.Errorf("connected after %v, and from the other host after %v", d, took)
			}
		}
		must(t, a.Slow(0))
		must(t, Poll(func() error { // soon: the machine may be busy
			if took, err := connects(b, a); err != nil || took >= longer {
				return fmt.Errorf("connected after %v, %w", took, err)
			}
			return nil
		}))
	})
	t.Run("a clock jumps under a running daemon", func(t *testing.T) {
		must(t, a.SetSkew(-48*time.Hour))
		now, err := clockOf(a)
		if off := time.Until(now); err != nil || off > -47*time.Hour || off < -49*time.Hour {
			t.Errorf("the daemon's clock is off by %v, %v", off, err)
		}
		must(t, a.SetSkew(0))
	})
	t.Run("a paused host does nothing, and goes on", func(t *testing.T) {
		must(t, b.Pause())
		if _, err := b.Health(); err == nil || !b.Paused() {
			t.Errorf("it answers: %v", err)
		}
		must(t, b.Resume())
		must(t, Poll(b.Healthy))
	})
	t.Run("a full disk is full, and has room again", func(t *testing.T) {
		probe := filepath.Join(b.Local.StateDir, "probe")
		must(t, Poll(func() error { // what PostgreSQL gives back meanwhile is taken too
			_ = os.Remove(probe) // writing it again would find the room that it has
			if err := b.FillDisk(); err != nil {
				return err
			}
			if err := os.WriteFile(probe, make([]byte, 64<<10), 0o644); err == nil {
				return errors.New("there is room")
			}
			return nil
		}))
		must(t, b.FreeDisk())
		must(t, Poll(b.Healthy))
	})
	t.Run("a host that is rolled back has yesterday's database", func(t *testing.T) {
		must(t, a.Snapshot())
		_, err := a.Must("mailproxy", "domain", "add", "today.test", "--to", Receiver)
		must(t, err)
		must(t, a.Rollback())
		must(t, Poll(a.Healthy))
		if out, err := a.Must("mailproxy", "domain", "list"); err != nil || strings.Contains(out, "today.test") {
			t.Errorf("it has %s, %v", out, err)
		}
	})
	t.Run("nothing runs on a host that was killed", func(t *testing.T) {
		must(t, b.Kill())
		if pids, err := b.processes(); err != nil || len(pids) > 0 || b.Runs() || b.Postmaster() != 0 {
			t.Errorf("processes %v, %v", pids, err)
		}
		must(t, b.Start())
		must(t, Poll(b.Healthy))
	})
	for _, h := range again.Hosts() {
		must(t, again.Remove(h))
	}
	if out, err := os.ReadDir("/run/netns"); err != nil || len(out) > 0 {
		t.Errorf("namespaces are left: %v, %v", out, err)
	}
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}
