package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"time"
)

// A bench is one run: its directory, the parts that are running, and what was measured.
type bench struct {
	root    string // all that the parts write; removed at the end
	dir     string // of the measurement that runs: what one leaves behind is none of the next one's
	bin     string // where mailproxy and pmgcm are
	parts   []stopper
	results []result
	starts  chan func() // calls on one thread that lives as long as the run, see start
}

// A stopper is a part that was started.
type stopper interface {
	stop() error
}

// tempRoot is on a disk also where /tmp is in memory: both queues must pay for their syncs.
const tempRoot = "/var/tmp"

func newBench() (*bench, error) {
	bin, err := filepath.Abs(os.Getenv("BENCH_BIN"))
	if err != nil {
		return nil, err
	}
	for _, name := range []string{filepath.Join(bin, "mailproxy"), filepath.Join(bin, "pmgcm"), "postfix", "smtp-source", "smtp-sink", "haproxy"} {
		if _, err := exec.LookPath(name); err != nil {
			return nil, fmt.Errorf("%w (scripts/bench installs and builds what is needed)", err)
		}
	}
	if os.Getuid() != 0 {
		return nil, errors.New("not root: Postfix's master needs it")
	}
	dir, err := os.MkdirTemp(tempRoot, "mailproxy-bench-")
	if err != nil {
		return nil, err
	}
	if err := os.Chmod(dir, 0o755); err != nil { // the parts run as users of their own
		return nil, err
	}
	b := &bench{root: dir, dir: dir, bin: bin, starts: make(chan func())}
	go func() {
		runtime.LockOSThread()
		for f := range b.starts {
			f()
		}
	}()
	return b, nil
}

// say tells what goes on, on standard error.
func (b *bench) say(format string, args ...any) { fmt.Fprintf(os.Stderr, format+"\n", args...) }

// stopParts ends what was started, last first.
func (b *bench) stopParts() error {
	var errs []error
	for i := len(b.parts) - 1; i >= 0; i-- {
		errs = append(errs, b.parts[i].stop())
	}
	b.parts = nil
	return errors.Join(errs...)
}

// close removes the directory, unless BENCH_KEEP asks for it.
func (b *bench) close() {
	close(b.starts)
	if os.Getenv("BENCH_KEEP") != "" {
		b.say("kept: %s", b.root)
		return
	}
	if err := os.RemoveAll(b.root); err != nil {
		b.say("bench: %v", err)
	}
}

// A part is one running process.
type part struct {
	name string
	cmd  *exec.Cmd
	log  string        // the file of its output
	done chan struct{} // closed when it has ended
}

// stopTimeout is how long a part may take to end on SIGTERM; mailproxy's own bound is 30 s.
const stopTimeout = 40 * time.Second

// start runs a program with both its outputs in a file. Each is a session of its own: Ctrl-C is for us alone, and the kernel, which
// may share out processors by session, treats all alike (Postfix's master makes its own anyway). The kernel sends it SIGTERM should
// this process die: that goes by the thread that started it, so one thread starts all.
func (b *bench) start(name string, env []string, argv ...string) (*part, error) {
	p := &part{name: name, cmd: exec.Command(argv[0], argv[1:]...), log: filepath.Join(b.dir, name+".log"), done: make(chan struct{})}
	out, err := os.OpenFile(p.log, os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o600)
	if err != nil {
		return nil, err
	}
	defer out.Close()
	p.cmd.Stdout, p.cmd.Stderr = out, out
	p.cmd.Env = append(os.Environ(), env...)
	p.cmd.Dir = b.dir
	p.cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGTERM, Setsid: true}
	started := make(chan error, 1)
	b.starts <- func() { started <- p.cmd.Start() }
	if err := <-started; err != nil {
		return nil, fmt.Errorf("start %s: %w", name, err)
	}
	go func() {
		_ = p.cmd.Wait() // how it ended is in ProcessState
		close(p.done)
	}()
	b.parts = append(b.parts, p)
	return p, nil
}

func (p *part) pid() int { return p.cmd.Process.Pid }

// stop ends the process and waits for its end.
func (p *part) stop() error {
	if p.ended() {
		return nil
	}
	if err := p.cmd.Process.Signal(syscall.SIGTERM); err != nil && !errors.Is(err, os.ErrProcessDone) {
		return fmt.Errorf("stop %s: %w", p.name, err)
	}
	select {
	case <-p.done:
		return nil
	case <-time.After(stopTimeout):
	}
	_ = p.cmd.Process.Kill() // it may just have ended
	<-p.done
	return fmt.Errorf("%s did not end within %s of SIGTERM and was killed", p.name, stopTimeout)
}

func (p *part) ended() bool {
	select {
	case <-p.done:
		return true
	default:
		return false
	}
}

// answers waits until the part listens at addr.
func (p *part) answers(ctx context.Context, addr string) error {
	return poll(ctx, 30*time.Second, 20*time.Millisecond, func() error {
		if p.ended() {
			return final{fmt.Errorf("%s ended (%s)\n%s", p.name, p.cmd.ProcessState, p.tail())}
		}
		c, err := net.DialTimeout("tcp", addr, time.Second)
		if err != nil {
			return fmt.Errorf("%s: %w\n%s", p.name, err, p.tail())
		}
		return c.Close()
	})
}

// tail gives the last lines that the part wrote.
func (p *part) tail() string {
	b, err := os.ReadFile(p.log)
	if err != nil {
		return err.Error()
	}
	lines := strings.Split(strings.TrimSpace(string(b)), "\n")
	return strings.Join(lines[max(0, len(lines)-8):], "\n")
}

// A final error ends a poll at once.
type final struct{ error }

func (f final) Unwrap() error { return f.error }

// poll calls f until it gives nil, and gives its last error when the time is over.
func poll(ctx context.Context, limit, every time.Duration, f func() error) error {
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	for {
		err := f()
		if err == nil {
			return nil
		}
		var end final
		if errors.As(err, &end) {
			return err
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("within %s: %w", limit, err)
		case <-time.After(every):
		}
	}
}

// output runs a command to its end and gives its standard output; the error holds what it said.
func (b *bench) output(ctx context.Context, env []string, argv ...string) (string, error) {
	cmd := exec.CommandContext(ctx, argv[0], argv[1:]...)
	cmd.Env = append(os.Environ(), env...)
	cmd.Dir = b.dir
	var stderr strings.Builder
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		return string(out), fmt.Errorf("%s: %w: %s%s", strings.Join(argv, " "), err, out, stderr.String())
	}
	return string(out), nil
}
