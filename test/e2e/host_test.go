package e2e

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"mailproxy/internal/testbin"
	"mailproxy/test/lab"
)

// A host is a machine as a README and an administrator know it: mailproxy in its usual places, in namespaces of its own, on a network with
// the others. Its file system is this machine's with a layer of its own, which is gone when the host is lost. What stands in for systemd is in
// systemctlText.
type host struct {
	t       testing.TB
	name    string // mx1
	address string // 192.0.2.11
	shared  string // what is mounted on /mnt
	tools   string // a directory with what stands in for programs

	holder *exec.Cmd // keeps the namespaces
}

// hostText makes a host's namespaces into one: names, users, places.
const hostText = `
hostname "$NAME.example.net"
mount -t tmpfs -o mode=755 host "$DIR"
for d in etc var/lib root; do
	mkdir -p "$DIR/up/$d" "$DIR/work/$d"
	mount -t overlay overlay -o "lowerdir=/$d,upperdir=$DIR/up/$d,workdir=$DIR/work/$d" "/$d"
done
mount -t tmpfs -o mode=755 run /run
mount --bind "$SHARED" /mnt
tr -d - </proc/sys/kernel/random/uuid >/etc/machine-id
getent passwd mailproxy >/dev/null || {
	echo mailproxy:x:64990:64990::/var/lib/mailproxy:/usr/sbin/nologin >>/etc/passwd
	echo mailproxy:x:64990: >>/etc/group
}
mkdir -p /etc/mailproxy /var/lib/mailproxy
cp -a "$TEMPLATE/pg" "$TEMPLATE/pg.made" /var/lib/mailproxy
chown -R mailproxy: /var/lib/mailproxy
ip link set lo up
echo made
exec sleep infinity
`

// systemctlText does of systemd what the texts want. It returns when the node answers, as late as a person would type the next command.
const systemctlText = `#!/bin/sh
case "$*" in
"enable --now mailproxy" | "start mailproxy")
	setsid mailproxy serve </dev/null >>/var/lib/mailproxy.log 2>&1 &
	until mailproxy domain list >/dev/null 2>&1; do sleep 0.1; done ;;
"enable --now mailproxy-pam.socket") # as its two units say
	setsid systemd-socket-activate --accept --inetd -l /run/mailproxy-pam.sock /mnt/mailproxy-pam </dev/null >>/var/lib/mailproxy-pam.log 2>&1 &
	until [ -S /run/mailproxy-pam.sock ]; do sleep 0.1; done
	chown root:mailproxy /run/mailproxy-pam.sock && chmod 660 /run/mailproxy-pam.sock ;;
*) echo "systemctl $*: not in these tests" >&2; exit 1 ;;
esac
`

// hostsMade is held by the test whose hosts there are: all have the same names.
var hostsMade sync.Mutex

// newHosts makes a network and n hosts on it: mx1 at 192.0.2.11, …
func newHosts(t testing.TB, n int) map[string]*host {
	t.Helper()
	hostsMade.Lock()
	t.Cleanup(hostsMade.Unlock)
	dir, err := shortDir()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	if err := os.Mkdir(filepath.Join(dir, "mnt"), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, "systemctl"), []byte(systemctlText), 0o755); err != nil {
		t.Fatal(err)
	}
	mustIP(t, "link add hosts type bridge", "addr add 192.0.2.1/24 dev hosts", "link set hosts up")
	t.Cleanup(func() { mustIP(t, "link del hosts") })
	hosts := map[string]*host{}
	for i := range n {
		h := &host{t: t, name: fmt.Sprintf("mx%d", i+1), address: fmt.Sprintf("192.0.2.%d", 11+i), shared: filepath.Join(dir, "mnt"), tools: dir}
		hosts[h.name] = h
		h.install()
		t.Cleanup(h.lose)
	}
	return hosts
}

func mustIP(t testing.TB, commands ...string) {
	t.Helper()
	for _, c := range commands {
		if out, err := exec.Command("ip", strings.Fields(c)...).CombinedOutput(); err != nil {
			t.Fatalf("ip %s: %v: %s", c, err, out)
		}
	}
}

// install makes the host as after an installation of the programs, with an empty database.
func (h *host) install() {
	h.t.Helper()
	from, err := template()
	if err != nil {
		h.t.Fatal(err)
	}
	dir, err := shortDir()
	if err != nil {
		h.t.Fatal(err)
	}
	h.holder = exec.Command("unshare", "--mount", "--net", "--uts", "--propagation", "private", "sh", "-ec", hostText)
	h.holder.Env = append(os.Environ(), "NAME="+h.name, "DIR="+dir, "SHARED="+h.shared, "TEMPLATE="+from)
	h.holder.Stderr = os.Stderr
	out, err := h.holder.StdoutPipe()
	if err == nil {
		err = h.holder.Start()
	}
	if err != nil {
		h.t.Fatal(err)
	}
	if line, err := bufio.NewReader(out).ReadString('\n'); line != "made\n" {
		h.t.Fatalf("make host %s: %q, %v", h.name, line, err)
	}
	pid := strconv.Itoa(h.holder.Process.Pid)
	mustIP(h.t, fmt.Sprintf("link add %s type veth peer name eth0 netns %s", h.name, pid), "link set "+h.name+" master hosts up")
	h.must("ip addr add " + h.address + "/24 dev eth0 && ip link set eth0 up")
}

// lose ends all that runs on the host, and its disk is gone.
func (h *host) lose() {
	if h.holder == nil {
		return
	}
	if h.t.Failed() {
		out, _, _ := h.run("tail -c 3000 /var/lib/mailproxy.log")
		h.t.Logf("daemon of %s:\n%s", h.name, out)
	}
	net, err := os.Readlink(fmt.Sprintf("/proc/%d/ns/net", h.holder.Process.Pid))
	if err != nil {
		h.t.Fatal(err)
	}
	for alive := true; alive; { // until none is left that could start another
		alive = false
		links, _ := filepath.Glob("/proc/[0-9]*/ns/net")
		for _, link := range links {
			pid, _ := strconv.Atoi(strings.Split(link, "/")[2])
			if ns, err := os.Readlink(link); err == nil && ns == net && syscall.Kill(pid, syscall.SIGKILL) == nil && pid != h.holder.Process.Pid {
				alive = true
			}
		}
	}
	_ = h.holder.Wait() // it was killed
	h.holder = nil
	_ = exec.Command("ip", "link", "del", h.name).Run() // gone with the host's network, unless the kernel takes its time
	h.eventually(func() error {
		if exec.Command("ip", "link", "show", h.name).Run() == nil {
			return fmt.Errorf("the link of %s is still there", h.name)
		}
		return nil
	})
}

func (h *host) eventually(ok func() error) {
	h.t.Helper()
	if err := lab.Poll(ok); err != nil {
		h.t.Fatal(err)
	}
}

func (h *host) command(line string) *exec.Cmd {
	cmd := exec.Command("nsenter", "-t", strconv.Itoa(h.holder.Process.Pid), "-m", "-n", "-u", "--", "sh", "-c", line)
	cmd.Env = append(os.Environ(), "PATH="+h.tools+":"+testbin.Dir()+":"+os.Getenv("PATH"), "SUDO_USER=", "HOME=/root")
	cmd.Dir = "/"
	return cmd
}

// run runs a line as root's shell does, without a terminal, and gives all that it writes.
func (h *host) run(line string) (out string, code int, err error) {
	cmd := h.command(line)
	var b bytes.Buffer
	cmd.Stdout, cmd.Stderr = &b, &b
	cmd.WaitDelay = time.Second // what stays in the background may hold the pipe
	return finish(cmd, &b, cmd.Start())
}

func finish(cmd *exec.Cmd, b *bytes.Buffer, err error) (string, int, error) {
	if err != nil {
		return "", 0, err
	}
	stop := time.AfterFunc(patience, func() { _ = cmd.Process.Kill() })
	defer stop.Stop()
	err = cmd.Wait()
	var exit *exec.ExitError
	if errors.As(err, &exit) || errors.Is(err, exec.ErrWaitDelay) {
		err = nil
	}
	return b.String(), cmd.ProcessState.ExitCode(), err
}

func (h *host) must(line string) {
	h.t.Helper()
	if out, code, err := h.run(line); err != nil || code != 0 {
		h.t.Fatalf("%s# %s: exit code %d, %v\n%s", h.name, line, code, err, out)
	}
}

// An asked is a question that a command ends a line with, and what is typed then; a secret, when the terminal does not show it any more.
type asked struct {
	question, typed string
	secret          bool
}

// typing is run on a terminal, with answers typed as they are asked for. A question that does not come is an error.
func (h *host) typing(line string, answers []asked) (out string, code int, err error) {
	master, slave, err := terminal()
	if err != nil {
		return "", 0, err
	}
	defer master.Close()
	cmd := h.command(line)
	cmd.Stdin, cmd.Stdout, cmd.Stderr = slave, slave, slave
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true, Setctty: true}
	err = cmd.Start()
	_ = slave.Close() // the command has its own
	if err != nil {
		return "", 0, err
	}
	stop := time.AfterFunc(patience, func() { _ = cmd.Process.Kill() })
	defer stop.Stop()
	var b bytes.Buffer
	buffer := make([]byte, 4096)
	seen := 0
	for {
		n, readErr := master.Read(buffer) // EIO when the command has ended
		b.Write(buffer[:n])
		if readErr != nil {
			break
		}
		if len(answers) > 0 && strings.Contains(b.String()[seen:], answers[0].question) {
			seen = b.Len()
			if answers[0].secret {
				if err := lab.Poll(func() error { return hidden(master) }); err != nil {
					return b.String(), 0, err
				}
			}
			if _, err := io.WriteString(master, answers[0].typed+"\n"); err != nil {
				return "", 0, err
			}
			answers = answers[1:]
		}
	}
	_ = cmd.Wait() // its exit code says how
	if len(answers) > 0 {
		err = fmt.Errorf("it did not ask %q", answers[0].question)
	}
	return strings.ReplaceAll(b.String(), "\r\n", "\n"), cmd.ProcessState.ExitCode(), err
}

// hidden gives nil where a terminal does not show what is typed.
func hidden(terminal *os.File) error {
	state, err := unix.IoctlGetTermios(int(terminal.Fd()), unix.TCGETS)
	if err == nil && state.Lflag&unix.ECHO != 0 {
		err = errors.New("the terminal shows what is typed")
	}
	return err
}

// terminal makes one, and gives both its ends (pts(4)).
func terminal() (master, slave *os.File, err error) {
	if master, err = os.OpenFile("/dev/ptmx", os.O_RDWR|unix.O_NOCTTY, 0); err != nil {
		return nil, nil, err
	}
	var n int
	err = unix.IoctlSetPointerInt(int(master.Fd()), unix.TIOCSPTLCK, 0)
	if err == nil {
		n, err = unix.IoctlGetInt(int(master.Fd()), unix.TIOCGPTN)
	}
	if err == nil {
		slave, err = os.OpenFile(fmt.Sprintf("/dev/pts/%d", n), os.O_RDWR|unix.O_NOCTTY, 0)
	}
	if err != nil {
		_ = master.Close()
		return nil, nil, err
	}
	return master, slave, nil
}
