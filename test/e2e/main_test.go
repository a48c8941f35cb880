package e2e

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"runtime"
	"strings"
	"syscall"
	"testing"

	"mailproxy/internal/testbin"
)

// stageVariable says which of the three processes this one is, dirVariable where all directories of the tests are made.
const (
	stageVariable = "MAILPROXY_E2E_STAGE"
	dirVariable   = "MAILPROXY_E2E_DIR"
)

// TestMain starts this binary again as the first process of its own namespaces, and that starts it once more for the tests:
//
//	(none)   makes the namespaces; when it is killed, the kernel ends all that is in them
//	init     prepares them, and takes in orphans (PostgreSQL outlives its daemon) until the tests have ended
//	run      runs the tests
func TestMain(m *testing.M) {
	var code int
	var err error
	switch os.Getenv(stageVariable) {
	case "":
		code, err = inNamespaces()
	case "init":
		code, err = initNamespaces()
	default:
		code = testbin.Main(m, "mailproxy", "pmgcm")
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "e2e:", err)
		code = 1
	}
	os.Exit(code)
}

// again is this binary, with the same arguments.
func again(stage string, attr *syscall.SysProcAttr) *exec.Cmd {
	args := append([]string{"-test.parallel=6"}, os.Args[1:]...) // they wait, most of the time
	cmd := exec.Command("/proc/self/exe", args...)
	cmd.Env = append(os.Environ(), stageVariable+"="+stage)
	cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
	cmd.SysProcAttr = attr
	return cmd
}

func inNamespaces() (int, error) {
	dir, err := os.MkdirTemp("/tmp", "mpe") // short, for the sockets in it
	if err != nil {
		return 1, err
	}
	defer os.RemoveAll(dir)
	if err := errors.Join(os.Chmod(dir, 0o755), os.Setenv(dirVariable, dir)); err != nil {
		return 1, err
	}
	runtime.LockOSThread() // Pdeathsig is about the thread
	cmd := again("init", &syscall.SysProcAttr{
		Cloneflags: syscall.CLONE_NEWNET | syscall.CLONE_NEWNS | syscall.CLONE_NEWPID,
		Pdeathsig:  syscall.SIGKILL,
	})
	err = cmd.Run()
	var exit *exec.ExitError
	if errors.As(err, &exit) {
		return exit.ExitCode(), nil
	}
	if err != nil {
		return 1, fmt.Errorf("make namespaces (as root): %w", err)
	}
	return 0, nil
}

func initNamespaces() (int, error) {
	if err := syscall.Mount("", "/", "", syscall.MS_REC|syscall.MS_PRIVATE, ""); err != nil {
		return 1, fmt.Errorf("make mounts private: %w", err)
	}
	if err := syscall.Mount("proc", "/proc", "proc", syscall.MS_NOSUID|syscall.MS_NODEV|syscall.MS_NOEXEC, ""); err != nil {
		return 1, fmt.Errorf("mount /proc: %w", err)
	}
	if out, err := exec.Command("ip", "link", "set", "lo", "up").CombinedOutput(); err != nil {
		return 1, fmt.Errorf("ip link set lo up: %w: %s", err, out)
	}
	if err := nft(rules()); err != nil {
		return 1, err
	}
	tests := again("run", nil)
	if err := tests.Start(); err != nil {
		return 1, err
	}
	for {
		var status syscall.WaitStatus
		pid, err := syscall.Wait4(-1, &status, 0, nil)
		switch {
		case errors.Is(err, syscall.EINTR):
		case err != nil:
			return 1, fmt.Errorf("wait: %w", err)
		case pid == tests.Process.Pid && status.Exited():
			return status.ExitStatus(), nil
		case pid == tests.Process.Pid:
			return 1, fmt.Errorf("the tests were ended by %v", status.Signal())
		}
	}
}

// nft carries out commands of nft(8).
func nft(commands string) error {
	cmd := exec.Command("nft", "-f", "-")
	cmd.Stdin = strings.NewReader(commands)
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("nft: %w: %s\n%s", err, out, commands)
	}
	return nil
}

// rules drop what goes over the tunnels of nodes that are cut off: connections to their addresses, and those that they made
// themselves, which are known by the user that the node runs as.
func rules() string {
	var b strings.Builder
	b.WriteString("table inet cut {\n set users { type mark; }\n set addresses { type ipv4_addr; }\n" +
		" chain output { type filter hook output priority 0; policy accept;\n")
	for _, u := range users() {
		fmt.Fprintf(&b, "  tcp dport %s meta skuid %d ct mark set %d\n", tunnelPort, u.uid, u.uid)
	}
	fmt.Fprintf(&b, "  ct mark @users drop\n  ip daddr @addresses tcp dport %[1]s drop\n  ip saddr @addresses tcp sport %[1]s drop\n }\n}\n", tunnelPort)
	return b.String()
}
