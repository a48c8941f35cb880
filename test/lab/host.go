package lab

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"mailproxy/config"
	"mailproxy/web"
)

// User is whom the daemons become.
const User = "nobody"

// Ports of every host.
const (
	SMTPPort = "25"
	WebPort  = "8025"
)

// ClockVariable names, to a daemon, the file with the seconds by which its clock is wrong (cmd/mailproxy/clock.go).
const ClockVariable = "MAILPROXY_TEST_CLOCK"

// A Host is a network namespace with one node.
type Host struct {
	ID      string `json:"id"`   // also its namespace's name
	Name    string `json:"name"` // of the node, a host name
	Address string `json:"address"`
	Disk    string `json:"disk,omitempty"` // size of the state directory's file system; "": it has none of its own

	// Faults. The paused and the dead are seen by their processes.
	Isolated bool     `json:"isolated,omitempty"` // cut off from all other hosts
	CutFrom  []string `json:"cut_from,omitempty"` // IDs; in each of the two hosts
	Delay    string   `json:"delay,omitempty"`    // what is added to its round trips
	Delayer  int      `json:"delayer,omitempty"`  // process that carries its frames
	Skew     int64    `json:"skew,omitempty"`     // seconds

	Bin string `json:"bin,omitempty"` // where its programs are; empty: where those of the lab are

	PID int `json:"pid,omitempty"` // of the daemon that was started last

	// Dir has the node file, the log, and below it state and run directory; File is the node file, Local what it says.
	Dir   string        `json:"-"`
	File  string        `json:"-"`
	Local *config.Local `json:"-"`

	lab *Lab
	log *os.File

	mu sync.Mutex // guards ended
	// ended is closed when the daemon that this process started has ended; nil where it has started none. err says how.
	ended chan struct{}
	err   error
}

// place says where its files are.
func (h *Host) place(l *Lab) {
	h.lab, h.Dir = l, filepath.Join(l.dir, h.ID)
	h.File = filepath.Join(h.Dir, "node.toml")
}

// own takes over a host that another process has made.
func (l *Lab) own(h *Host) error {
	h.place(l)
	local, err := config.LoadLocal(h.File)
	if err != nil {
		return err
	}
	h.Local = local
	return h.openLog()
}

func (h *Host) openLog() (err error) {
	h.log, err = os.OpenFile(h.LogFile(), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o644)
	return err
}

// LogFile is where its daemon logs.
func (h *Host) LogFile() string { return filepath.Join(h.Dir, "log") }

func (h *Host) clockFile() string { return filepath.Join(h.Dir, "clock") }

// furnish makes its namespace, its disk and its node file.
func (h *Host) furnish(o HostOptions) error {
	state := filepath.Join(h.Dir, "s")
	if err := errors.Join(os.Mkdir(h.Dir, 0o755), os.Mkdir(state, 0o755), os.WriteFile(h.clockFile(), []byte("0\n"), 0o644), h.plug()); err != nil {
		return err
	}
	if h.Disk != "" {
		if err := syscall.Mount("lab", state, "tmpfs", syscall.MS_NOSUID|syscall.MS_NODEV, "mode=755,size="+h.Disk); err != nil {
			return fmt.Errorf("mount %s: %w", state, err)
		}
	}
	args := append([]string{"init", "--name", h.Name, "--address", h.Address, "--state-dir", state, "--run-dir", filepath.Join(h.Dir, "r"),
		"--smtp-listen", ":" + SMTPPort, "--web-listen", h.Address + ":" + WebPort, "--user", User}, o.Init...)
	if out, err := h.Command("mailproxy", args...).CombinedOutput(); err != nil {
		return fmt.Errorf("mailproxy %s: %w: %s", strings.Join(args, " "), err, out)
	}
	return h.lab.own(h)
}

func (h *Host) unmount() error {
	return syscall.Unmount(filepath.Join(h.Dir, "s"), syscall.MNT_DETACH)
}

// Command is a program on the host, with the node's file and its programs in reach.
func (h *Host) Command(program string, args ...string) *exec.Cmd {
	cmd := exec.Command("ip", append([]string{"netns", "exec", h.ID, program}, args...)...)
	cmd.Env = append(os.Environ(), "PATH="+cmp.Or(h.Bin, h.lab.state.Bin)+":"+os.Getenv("PATH"), "MAILPROXY_CONFIG="+h.File, "SUDO_USER=")
	return cmd
}

// Run runs a program on the host and gives what it wrote, and its exit code; -1 where it was killed, at last by our patience. The error
// says that it could not be run at all.
func (h *Host) Run(program string, args ...string) (stdout, stderr string, code int, err error) {
	ctx, cancel := context.WithTimeout(context.Background(), Patience)
	defer cancel()
	return h.RunContext(ctx, program, args...)
}

// RunContext is Run with another bound: the program is killed when ctx ends.
func (h *Host) RunContext(ctx context.Context, program string, args ...string) (stdout, stderr string, code int, err error) {
	cmd := h.Command(program, args...)
	var out, errs bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errs
	if err := cmd.Start(); err != nil {
		return "", "", -1, err
	}
	stop := context.AfterFunc(ctx, func() { _ = cmd.Process.Kill() })
	defer stop()
	err = cmd.Wait()
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		return "", "", -1, err
	}
	return out.String(), errs.String(), cmd.ProcessState.ExitCode(), nil
}

// Must runs a program that is to succeed, and gives what it wrote.
func (h *Host) Must(program string, args ...string) (string, error) {
	out, errs, code, err := h.Run(program, args...)
	if err == nil && code != 0 {
		err = fmt.Errorf("%s: %s %s: exit code %d\n%s%s", h.ID, program, strings.Join(args, " "), code, out, errs)
	}
	return out, err
}

// SQL runs SQL in the node's own PostgreSQL as its superuser, as root may, and gives what psql says.
func (h *Host) SQL(sql string) (string, error) {
	return h.psql(h.Local.PostgresSocketDir(), sql, "-U", "mailproxy", "-d", "mailproxy")
}

// PeerSQL runs SQL in a peer's PostgreSQL, over the socket that leads there; login are psql's flags for whom it says that it is.
func (h *Host) PeerSQL(cid int, sql string, login ...string) (string, error) {
	return h.psql(h.Local.PeerDir(config.CID(cid)), sql, login...)
}

func (h *Host) psql(socketDir, sql string, login ...string) (string, error) {
	args := append([]string{"-XAtq", "-h", socketDir, "-v", "ON_ERROR_STOP=1", "-v", "VERBOSITY=verbose", "-c", sql}, login...)
	out, err := exec.Command("psql", args...).CombinedOutput()
	return strings.TrimSpace(string(out)), err
}

// Install gives the host the programs in bin; a daemon that runs goes on with those that it has.
func (h *Host) Install(bin string) error {
	return h.lab.change(func() { h.Bin = bin })
}

// Start starts the daemon, and returns when its control socket answers, which is when its listeners are open.
func (h *Host) Start() error {
	if err := h.Launch(); err != nil {
		return err
	}
	var ended error
	err := Poll(func() error {
		if !h.Runs() {
			said, _ := os.ReadFile(h.LogFile())
			ended = fmt.Errorf("the daemon of %s has ended: %s", h.ID, said[max(0, len(said)-1000):])
			return nil
		}
		_, err := h.Health()
		return err
	})
	return errors.Join(err, ended)
}

// Launch starts the daemon and does not wait.
func (h *Host) Launch() error {
	if h.Runs() {
		return fmt.Errorf("the daemon of %s runs", h.ID)
	}
	cmd := h.Command("mailproxy", "serve")
	cmd.Env = append(cmd.Env, ClockVariable+"="+h.clockFile())
	cmd.Stderr = h.log
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	if err := cmd.Start(); err != nil {
		return err
	}
	ended := make(chan struct{})
	h.mu.Lock()
	h.ended = ended
	h.mu.Unlock()
	go func() { // ends with the daemon; Stop and Kill wait for it
		err := cmd.Wait()
		h.mu.Lock()
		h.err = err
		h.mu.Unlock()
		close(ended)
	}()
	return h.lab.change(func() { h.PID = cmd.Process.Pid })
}

// Runs says whether the daemon does, or is paused.
func (h *Host) Runs() bool { return h.daemon() != 0 }

// daemon gives the daemon's process ID; 0 where none runs.
func (h *Host) daemon() int {
	h.lab.mu.Lock()
	pid := h.PID
	h.lab.mu.Unlock()
	if pid == 0 || !alive(pid) {
		return 0
	}
	// Its arguments say whether the number is another's by now; while a program takes the place of another there are none.
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", pid))
	if err != nil || len(b) > 0 && !strings.HasSuffix(string(b), "serve\x00") {
		return 0
	}
	return pid
}

// alive says whether a process is there and has not ended.
func alive(pid int) bool {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return false
	}
	_, rest, _ := strings.Cut(string(b), ") ")
	return !strings.HasPrefix(rest, "Z") && !strings.HasPrefix(rest, "X")
}

// Signal sends the daemon a signal.
func (h *Host) Signal(s syscall.Signal) error {
	pid := h.daemon()
	if pid == 0 {
		return fmt.Errorf("no daemon runs on %s", h.ID)
	}
	return syscall.Kill(pid, s)
}

// Stop ends the daemon in order, and its PostgreSQL with it.
func (h *Host) Stop() error {
	pid := h.daemon()
	if err := h.Signal(syscall.SIGTERM); err != nil {
		return err
	}
	if err := Poll(func() error { return gone(pid) }); err != nil {
		return fmt.Errorf("stop %s: %w", h.ID, err)
	}
	return h.ending()
}

// ending waits for a daemon that this process has started, and gives how it ended.
func (h *Host) ending() error {
	h.mu.Lock()
	ended := h.ended
	h.mu.Unlock()
	if ended == nil {
		return nil
	}
	<-ended
	h.mu.Lock()
	defer h.mu.Unlock()
	h.ended = nil
	if h.err != nil {
		return fmt.Errorf("the daemon of %s ended with %w", h.ID, h.err)
	}
	return nil
}

func gone(pid int) error {
	if alive(pid) {
		return fmt.Errorf("process %d is there", pid)
	}
	return nil
}

// KillDaemon ends the daemon at once and leaves its PostgreSQL running.
func (h *Host) KillDaemon() {
	if pid := h.daemon(); pid != 0 {
		_ = syscall.Kill(pid, syscall.SIGKILL) // it may have ended by itself
	}
	_ = h.ending() // by our signal
}

// Kill ends everything on the host at once, as a power failure does.
func (h *Host) Kill() error {
	err := Poll(func() error {
		pids, err := h.processes()
		if err != nil {
			return err
		}
		for _, pid := range pids {
			_ = syscall.Kill(pid, syscall.SIGKILL) // it may have ended by itself
		}
		if len(pids) > 0 {
			return fmt.Errorf("%s: %d processes are there", h.ID, len(pids))
		}
		return nil
	})
	if err == nil {
		_ = h.ending() // by our signal
	}
	return err
}

// processes are all on the host, PostgreSQL's too.
func (h *Host) processes() ([]int, error) {
	out, err := exec.Command("ip", "netns", "pids", h.ID).Output()
	if err != nil {
		return nil, fmt.Errorf("ip netns pids %s: %w", h.ID, err)
	}
	var pids []int
	for _, field := range strings.Fields(string(out)) {
		pid, err := strconv.Atoi(field)
		if err != nil {
			return nil, err
		}
		pids = append(pids, pid)
	}
	return pids, nil
}

// Postmaster gives the process ID of the node's PostgreSQL; 0 where none runs.
func (h *Host) Postmaster() int {
	files, _ := filepath.Glob(filepath.Join(h.Dir, "s", "pg*", "postmaster.pid"))
	for _, file := range files {
		b, _ := os.ReadFile(file)
		first, _, _ := strings.Cut(string(b), "\n")
		pid, err := strconv.Atoi(strings.TrimSpace(first))
		cmdline, _ := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", pid))
		if err == nil && strings.Contains(string(cmdline), h.Dir+"/") {
			return pid
		}
	}
	return 0
}

// KillPostgres kills the node's PostgreSQL; its other processes end by themselves.
func (h *Host) KillPostgres() {
	if pid := h.Postmaster(); pid > 0 {
		_ = syscall.Kill(pid, syscall.SIGKILL) // gone already at worst
	}
}

// Health asks the control socket.
func (h *Host) Health() (web.Health, error) {
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
	defer cancel()
	return web.Control(h.Local.ControlSocket()).Health(ctx)
}

// Healthy gives nil when every check is well.
func (h *Host) Healthy() error {
	health, err := h.Health()
	if err == nil && health.Status != "ok" {
		err = fmt.Errorf("health of %s: %+v", h.ID, health)
	}
	return err
}
