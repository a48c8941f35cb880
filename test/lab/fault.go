package lab

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"
)

// Cut drops what two hosts say to each other.
func (l *Lab) Cut(a, b *Host) error {
	if a == b {
		return fmt.Errorf("%s cannot be cut off from itself", a.ID)
	}
	return l.cutting(func() {
		for _, pair := range [][2]*Host{{a, b}, {b, a}} {
			if !slices.Contains(pair[0].CutFrom, pair[1].ID) {
				pair[0].CutFrom = append(pair[0].CutFrom, pair[1].ID)
			}
		}
	}, a, b)
}

// Join lets two hosts talk to each other again, as far as neither is cut off from all.
func (l *Lab) Join(a, b *Host) error {
	return l.cutting(func() {
		a.CutFrom = slices.DeleteFunc(a.CutFrom, func(id string) bool { return id == b.ID })
		b.CutFrom = slices.DeleteFunc(b.CutFrom, func(id string) bool { return id == a.ID })
	}, a, b)
}

// Isolate cuts a host off from all others; clients, next hops and the DNS server are still there.
func (l *Lab) Isolate(h *Host) error { return l.cutting(func() { h.Isolated = true }, h) }

// Rejoin ends Isolate.
func (l *Lab) Rejoin(h *Host) error { return l.cutting(func() { h.Isolated = false }, h) }

// Heal lets all hosts talk to each other, without delay.
func (l *Lab) Heal() error {
	hosts := l.Hosts()
	err := l.cutting(func() {
		for _, h := range hosts {
			h.Isolated, h.CutFrom = false, nil
		}
	}, hosts...)
	for _, h := range hosts {
		err = errors.Join(err, h.Slow(0))
	}
	return err
}

func (l *Lab) cutting(f func(), hosts ...*Host) error {
	err := l.change(f)
	for _, h := range hosts {
		err = errors.Join(err, h.dropPackets())
	}
	return err
}

// Slow adds d to the round trips of everything that the host says and hears; 0 ends it. What is on the way when it begins or ends is lost,
// as on a network that finds another way.
func (h *Host) Slow(d time.Duration) error {
	if err := h.endDelay(); err != nil || d <= 0 {
		return err
	}
	if err := h.lab.change(func() { h.Delay = d.String() }); err != nil {
		return err
	}
	if err := h.delay(d); err != nil {
		return errors.Join(err, h.endDelay())
	}
	return nil
}

// delay puts a process between the host's cable and the bridge.
func (h *Host) delay(d time.Duration) error {
	// The cable leads to the process in place of the bridge, and a second one from there on. Nobody here is to answer for the frames.
	if err := ip(fmt.Sprintf("link add s-%[1]s type veth peer name t-%[1]s\nlink set s-%[1]s addrgenmode none arp off up\n"+
		"link set t-%[1]s master %[3]s addrgenmode none up\nlink set %[2]s nomaster arp off\n", h.ID, h.outer(), bridge)); err != nil {
		return err
	}
	cmd := again(stageDelay)
	cmd.Env = append(cmd.Env, fmt.Sprintf("%s=%s s-%s %s", delayVariable, h.outer(), h.ID, d))
	cmd.Stdin, cmd.Stdout, cmd.Stderr, cmd.SysProcAttr = nil, nil, h.log, &syscall.SysProcAttr{Setsid: true}
	ready, err := cmd.StdoutPipe()
	if err != nil {
		return err
	}
	if err := cmd.Start(); err != nil {
		return err
	}
	if err := h.lab.change(func() { h.Delayer = cmd.Process.Pid }); err != nil {
		return err
	}
	_, err = ready.Read(make([]byte, 1))
	go func() { _ = cmd.Wait() }() // ends when it is killed
	if err != nil {
		return fmt.Errorf("the frames of %s are not carried, see %s", h.ID, h.LogFile())
	}
	return nil
}

// endDelay plugs the cable into the bridge again, also where delay has not come to its end.
func (h *Host) endDelay() error {
	h.lab.mu.Lock()
	delayer, delayed := h.Delayer, h.Delay != ""
	h.lab.mu.Unlock()
	if !delayed {
		return nil
	}
	if delayer != 0 && alive(delayer) {
		_ = syscall.Kill(delayer, syscall.SIGKILL) // it may have ended by itself
	}
	_ = command("ip", "link", "del", "s-"+h.ID) // where there is one
	if err := ip(fmt.Sprintf("link set %s master %s arp on\n", h.outer(), bridge)); err != nil {
		return err
	}
	return h.lab.change(func() { h.Delay, h.Delayer = "", 0 })
}

// Pause stops every process of the host where it is, until Resume: a virtual machine that is frozen.
func (h *Host) Pause() error { return h.signalAll(syscall.SIGSTOP) }

// Resume ends Pause.
func (h *Host) Resume() error { return h.signalAll(syscall.SIGCONT) }

// signalAll sends a signal to every process of the host, until there is none that has not got it.
func (h *Host) signalAll(s syscall.Signal) error {
	sent := map[int]bool{}
	for {
		pids, err := h.processes()
		if err != nil {
			return err
		}
		before := len(sent)
		for _, pid := range pids {
			if !sent[pid] {
				sent[pid] = true
				_ = syscall.Kill(pid, s) // it may have ended
			}
		}
		if len(sent) == before {
			return nil
		}
	}
}

// Paused says whether the daemon is stopped.
func (h *Host) Paused() bool {
	b, _ := os.ReadFile(fmt.Sprintf("/proc/%d/stat", h.daemon()))
	_, rest, _ := strings.Cut(string(b), ") ")
	return strings.HasPrefix(rest, "T")
}

// SetSkew makes the daemon's clock wrong by d, from now on, also where it runs. PostgreSQL's and the machine's are as they were.
func (h *Host) SetSkew(d time.Duration) error {
	seconds := int64(d / time.Second)
	next := h.clockFile() + ".new"
	if err := os.WriteFile(next, fmt.Appendf(nil, "%d\n", seconds), 0o644); err != nil {
		return err
	}
	if err := os.Rename(next, h.clockFile()); err != nil {
		return err
	}
	return h.lab.change(func() { h.Skew = seconds })
}

func (h *Host) yesterday() string { return filepath.Join(h.Dir, "yesterday") }

// Snapshot copies the database as it is at one instant, as storage does. Rollback goes back to the last copy.
func (h *Host) Snapshot() error {
	next := h.yesterday() + ".new"
	if err := errors.Join(os.RemoveAll(next), h.Pause()); err != nil {
		return errors.Join(err, h.Resume())
	}
	err := errors.Join(command("cp", "-a", h.Local.PostgresDataDir(), next), h.Resume())
	if err != nil {
		return err
	}
	return errors.Join(os.RemoveAll(h.yesterday()), os.Rename(next, h.yesterday()))
}

// Rollback kills the host, puts the copy of its database in place, and starts it. Keys, spool and the daemon's own files stay.
func (h *Host) Rollback() error {
	if _, err := os.Stat(h.yesterday()); err != nil {
		return fmt.Errorf("%s has no copy of its database: %w", h.ID, err)
	}
	if err := h.Kill(); err != nil {
		return err
	}
	data := h.Local.PostgresDataDir()
	if err := errors.Join(os.RemoveAll(data), command("cp", "-a", h.yesterday(), data)); err != nil {
		return err
	}
	return h.Start()
}

func (h *Host) filler() string { return filepath.Join(h.Local.StateDir, "filler") }

// FillDisk leaves nothing on the host's disk, which must be its own.
func (h *Host) FillDisk() error {
	if h.Disk == "" {
		return fmt.Errorf("%s has no disk of its own", h.ID)
	}
	return Fill(h.filler(), 0)
}

// FreeDisk ends FillDisk.
func (h *Host) FreeDisk() error { return os.RemoveAll(h.filler()) }

// DiskFull says whether FillDisk has filled it.
func (h *Host) DiskFull() bool { _, err := os.Stat(h.filler()); return err == nil }

// Fill makes a file that leaves so many octets free on its file system.
func Fill(file string, leave int64) error {
	f, err := os.OpenFile(file, os.O_CREATE|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	defer f.Close()
	for { // others may write, too
		var fs syscall.Statfs_t
		if err := syscall.Fstatfs(int(f.Fd()), &fs); err != nil {
			return err
		}
		info, err := f.Stat()
		if err != nil {
			return err
		}
		more := int64(fs.Bavail)*fs.Bsize - leave
		if more <= 0 {
			return nil
		}
		if err := syscall.Fallocate(int(f.Fd()), 0, info.Size(), more); err == nil || !errors.Is(err, syscall.ENOSPC) {
			return err
		}
	}
}
