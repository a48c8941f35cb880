package lab

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"runtime"
	"syscall"
)

// stageVariable says which process of a sandbox this one is, dirVariable where its files are made.
const (
	stageVariable = "MAILPROXY_LAB_STAGE"
	dirVariable   = "MAILPROXY_LAB_DIR"
)

// The stages. Main goes through the first three, Hold stays in the second.
const (
	stageInit  = "init"  // prepares the namespaces, starts stageRun, takes in orphans (PostgreSQL outlives its daemon) until that ends
	stageRun   = "run"   // does what the caller wants done
	stageHold  = "hold"  // stageInit without anything to run: until it is killed
	stageDelay = "delay" // carries the frames of a host that is slow
)

// Main runs a program in a sandbox, and exits with the code that run gives. It must be the first thing that main, or TestMain, calls:
// the program is started again for each stage.
func Main(run func() int) {
	var code int
	var err error
	switch os.Getenv(stageVariable) {
	case "":
		code, err = outside()
	case stageInit:
		code, err = initNamespaces(stageRun)
	case stageRun:
		_ = os.Unsetenv(stageVariable) // it is for us alone
		code = run()
	default:
		err = Staged()
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "lab:", err)
		code = 1
	}
	os.Exit(code)
}

// Staged does the work of a process that a lab has started by Hold or for a slow host, and returns when that is over; at once, with
// nil, in any other process.
func Staged() error {
	switch os.Getenv(stageVariable) {
	case stageHold:
		_, err := initNamespaces("")
		return err
	case stageDelay:
		return carryFrames()
	}
	return nil
}

// Dir is where all files of the sandbox are made.
func Dir() string { return os.Getenv(dirVariable) }

// TempDir makes a directory in a sandbox that everyone may enter, with a path short enough for sockets.
func TempDir() (string, error) {
	dir, err := os.MkdirTemp(Dir(), "")
	if err != nil {
		return "", err
	}
	return dir, os.Chmod(dir, 0o755)
}

// again is this program in another stage.
func again(stage string, args ...string) *exec.Cmd {
	cmd := exec.Command("/proc/self/exe", args...)
	cmd.Env = append(os.Environ(), stageVariable+"="+stage)
	cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
	return cmd
}

const newNamespaces = syscall.CLONE_NEWNET | syscall.CLONE_NEWNS | syscall.CLONE_NEWPID

// outside makes the namespaces, and removes the files when all in them has ended.
func outside() (int, error) {
	dir, err := os.MkdirTemp("/tmp", "lab")
	if err != nil {
		return 1, err
	}
	defer os.RemoveAll(dir)
	if err := errors.Join(os.Chmod(dir, 0o755), os.Setenv(dirVariable, dir)); err != nil {
		return 1, err
	}
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM)
	defer stop()
	runtime.LockOSThread() // Pdeathsig is about the thread
	cmd := again(stageInit, os.Args[1:]...)
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: newNamespaces, Pdeathsig: syscall.SIGKILL}
	if err = cmd.Start(); err == nil {
		defer context.AfterFunc(ctx, func() { _ = cmd.Process.Kill() })() // and the kernel ends all that is in them
		err = cmd.Wait()
	}
	var exit *exec.ExitError
	if errors.As(err, &exit) {
		return max(exit.ExitCode(), 1), nil // -1: it was killed
	}
	if err != nil {
		return 1, fmt.Errorf("make namespaces (as root): %w", err)
	}
	return 0, nil
}

// Hold starts a sandbox that stays until the process whose ID it gives is killed. Enter leads there.
func Hold(dir string) (int, error) {
	cmd := again(stageHold, dir) // the argument is for ps
	cmd.Env = append(cmd.Env, dirVariable+"="+dir)
	log, err := os.Create(filepath.Join(dir, "sandbox.log"))
	if err != nil {
		return 0, err
	}
	defer log.Close()
	ready, tell, err := os.Pipe()
	if err != nil {
		return 0, err
	}
	defer ready.Close()
	cmd.Stdin, cmd.Stdout, cmd.Stderr = nil, tell, log
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: newNamespaces, Setsid: true}
	err = cmd.Start()
	_ = tell.Close()
	if err != nil {
		return 0, fmt.Errorf("make namespaces (as root): %w", err)
	}
	if _, err := ready.Read(make([]byte, 1)); err != nil {
		_ = cmd.Wait()
		said, _ := os.ReadFile(log.Name())
		return 0, fmt.Errorf("make namespaces: %s", said)
	}
	return cmd.Process.Pid, nil
}

// Enter gives this program in the sandbox of Hold, to be run there with these arguments.
func Enter(pid int, dir string, args ...string) (*exec.Cmd, error) {
	self, err := os.Executable()
	if err != nil {
		return nil, err
	}
	enter := []string{"--target", fmt.Sprint(pid), "--net", "--mount", "--pid", self}
	cmd := exec.Command("nsenter", append(enter, args...)...)
	cmd.Env = append(os.Environ(), dirVariable+"="+dir)
	cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
	return cmd, nil
}

// initNamespaces prepares the namespaces, then reaps until what it has started in the next stage has ended; for ever without one.
func initNamespaces(next string) (int, error) {
	if err := prepareNamespaces(); err != nil {
		return 1, err
	}
	child := 0
	if next != "" {
		cmd := again(next, os.Args[1:]...)
		if err := cmd.Start(); err != nil {
			return 1, err
		}
		child = cmd.Process.Pid
	} else {
		fmt.Print("ready")
	}
	more := make(chan os.Signal, 1)
	signal.Notify(more, syscall.SIGCHLD)
	for {
		var status syscall.WaitStatus
		pid, err := syscall.Wait4(-1, &status, 0, nil)
		switch {
		case errors.Is(err, syscall.EINTR):
		case errors.Is(err, syscall.ECHILD) && child == 0:
			<-more
		case err != nil:
			return 1, fmt.Errorf("wait: %w", err)
		case pid == child && status.Exited():
			return status.ExitStatus(), nil
		case pid == child:
			return 1, fmt.Errorf("ended by %v", status.Signal())
		}
	}
}

// prepareNamespaces makes mounts private, so that none is seen outside, and shows the processes, the names of network namespaces and
// the DNS server of the sandbox in place of the machine's.
func prepareNamespaces() error {
	if err := syscall.Mount("", "/", "", syscall.MS_REC|syscall.MS_PRIVATE, ""); err != nil {
		return fmt.Errorf("make mounts private: %w", err)
	}
	if err := syscall.Mount("proc", "/proc", "proc", syscall.MS_NOSUID|syscall.MS_NODEV|syscall.MS_NOEXEC, ""); err != nil {
		return fmt.Errorf("mount /proc: %w", err)
	}
	if err := os.MkdirAll("/run/netns", 0o755); err != nil {
		return err
	}
	if err := syscall.Mount("lab", "/run/netns", "tmpfs", 0, "mode=755"); err != nil {
		return fmt.Errorf("mount /run/netns: %w", err)
	}
	resolver := filepath.Join(Dir(), "resolv.conf")
	if err := os.WriteFile(resolver, []byte("nameserver "+HubAddress+"\n"), 0o644); err != nil {
		return err
	}
	if err := syscall.Mount(resolver, "/etc/resolv.conf", "", syscall.MS_BIND, ""); err != nil {
		return fmt.Errorf("mount /etc/resolv.conf: %w", err)
	}
	return command("ip", "link", "set", "lo", "up")
}
