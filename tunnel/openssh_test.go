package tunnel

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"mailproxy/config"
)

// An opensshClient is Debian's ssh with the certificate of member 2, towards member 1. No daemon of member 2 runs.
type opensshClient struct {
	t    *testing.T
	n    *node // member 1
	dir  string
	args []string
	s    *config.Snapshot
}

func newOpenSSH(t *testing.T) *opensshClient {
	t.Helper()
	ca := newCA(t)
	n, member := newNode(t, Options{}), newNode(t, Options{})
	n.enter(ca, 1)
	member.enter(ca, 2)
	member.addr = ""
	c := &opensshClient{t: t, n: n, dir: member.run, s: snapshot(ca, n, member)}
	n.start()
	n.Reload(c.s)
	known := filepath.Join(member.run, "known_hosts")
	if err := os.WriteFile(known, []byte("@cert-authority * "+ca.Config(1).PublicKey+"\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	host, port, err := net.SplitHostPort(n.addr)
	if err != nil {
		t.Fatal(err)
	}
	c.args = []string{
		"-F", "none", "-o", "BatchMode=yes", "-o", "IdentitiesOnly=yes", "-o", "IdentityAgent=none", "-o", "ExitOnForwardFailure=yes",
		"-o", "StrictHostKeyChecking=yes", "-o", "UserKnownHostsFile=" + known, "-o", "GlobalKnownHostsFile=none", "-o", "HostKeyAlias=cid-1",
		"-o", "CertificateFile=" + filepath.Join(member.dir, userCertFile), "-i", filepath.Join(member.dir, nodeKeyFile),
		"-l", "cid-2", "-p", port, host,
	}
	return c
}

// run gives what ssh says; extra come before what it has in any case, command behind.
func (c *opensshClient) run(extra []string, command ...string) (string, error) {
	ctx, cancel := context.WithTimeout(c.t.Context(), 20*time.Second)
	defer cancel()
	cmd := exec.CommandContext(ctx, "ssh", append(append(extra, c.args...), command...)...)
	out, err := cmd.CombinedOutput()
	return string(out), err
}

// forward runs ssh -N until the test ends.
func (c *opensshClient) forward(extra ...string) {
	c.t.Helper()
	cmd := exec.Command("ssh", append(append([]string{"-N"}, extra...), c.args...)...)
	var said bytes.Buffer
	cmd.Stdout, cmd.Stderr = &said, &said
	if err := cmd.Start(); err != nil {
		c.t.Fatal(err)
	}
	c.t.Cleanup(func() {
		cmd.Process.Kill()
		cmd.Wait()
		if c.t.Failed() {
			c.t.Logf("ssh said: %s", said.String())
		}
	})
}

func (c *opensshClient) dial(socket string) net.Conn {
	c.t.Helper()
	var s net.Conn
	eventually(c.t, "ssh listens at "+socket, 10*time.Second, func() (ok bool) {
		var err error
		s, err = net.Dial("unix", socket)
		return err == nil
	})
	c.t.Cleanup(func() { s.Close() })
	s.SetDeadline(time.Now().Add(10 * time.Second))
	return s
}

func TestOpenSSHReachesAService(t *testing.T) {
	c := newOpenSSH(t)
	who, echo := filepath.Join(c.dir, "who.sock"), filepath.Join(c.dir, "echo.sock")
	c.forward("-L", who+":/who", "-L", echo+":/echo")
	if got, err := io.ReadAll(c.dial(who)); err != nil || string(got) != "cid-2" {
		t.Errorf("who answered %q, %v", got, err)
	}
	s := c.dial(echo)
	data := bytes.Repeat([]byte("0123456789abcdef"), 1<<16)
	go func() {
		s.Write(data)
		s.(*net.UnixConn).CloseWrite()
	}()
	if got, err := io.ReadAll(s); err != nil || !bytes.Equal(got, data) {
		t.Errorf("%d bytes of %d came back, %v", len(got), len(data), err)
	}
	// It is no connection to the member's daemon, and none of its streams go there.
	if st := c.n.state(2); st.Connected {
		t.Errorf("ssh is taken for the node itself: %+v", st)
	}
	// It is cut with the member all the same.
	s = c.dial(echo)
	ping(t, s, "before")
	c.n.Reload(without(c.s, 2))
	if _, err := s.Read(make([]byte, 1)); err == nil || c.n.sessions(2) != 0 {
		t.Errorf("a deleted node's ssh goes on: %v", err)
	}
	if out, err := c.run(nil, "true"); err == nil || !strings.Contains(out, "too many authentication failures") {
		t.Errorf("a deleted node's ssh is let in: %v, %s", err, out)
	}
}

func TestOpenSSHGetsNothingElse(t *testing.T) {
	c := newOpenSSH(t)
	agent := filepath.Join(c.dir, "agent.sock")
	l, err := net.Listen("unix", agent)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	t.Setenv("DISPLAY", "127.0.0.1:99")
	for _, x := range []struct {
		what    string
		extra   []string
		command []string
	}{
		{"a shell", []string{"-tt"}, nil},
		{"a command", nil, []string{"id"}},
		{"a subsystem", []string{"-s"}, []string{"sftp"}},
		{"the agent", []string{"-o", "ForwardAgent=" + agent}, []string{"ssh-add", "-l"}},
		{"X11", []string{"-Y"}, []string{"xterm"}},
		{"a port of the host", []string{"-W", "127.0.0.1:22"}, nil},
	} {
		t.Run(x.what, func(t *testing.T) {
			out, err := c.run(x.extra, x.command...)
			if err == nil || !strings.Contains(out, "unknown channel type") && !strings.Contains(out, "unknown service") &&
				!strings.Contains(out, "open failed") {
				t.Errorf("%v, %s", err, out)
			}
		})
	}
	for _, x := range []struct{ what, way, to string }{
		{"a listening port", "-R", "0:127.0.0.1:22"},
		{"a listening socket", "-R", "/tmp/x.sock:127.0.0.1:22"},
	} {
		t.Run(x.what, func(t *testing.T) {
			if out, err := c.run([]string{"-N", x.way, x.to}); err == nil || !strings.Contains(out, "remote port forwarding failed") {
				t.Errorf("%v, %s", err, out)
			}
		})
	}
	// Through -L ssh itself listens; what comes of a connection is what counts.
	var extra []string
	targets := []string{"/spool", "/", "/run/mailproxy/control.sock", "/run/who", "//who", "/../who"}
	for i, target := range targets {
		extra = append(extra, "-L", filepath.Join(c.dir, fmt.Sprint(i))+":"+target)
	}
	c.forward(extra...)
	for i, target := range targets {
		if got, _ := io.ReadAll(c.dial(filepath.Join(c.dir, fmt.Sprint(i)))); len(got) > 0 {
			t.Errorf("%s answered %q", target, got)
		}
	}
	if !c.n.log.has("tunnel.refused", "reason", "unknown service") {
		t.Error("nothing about it is in the log")
	}
}

func TestSSHAuditFindsNoFailure(t *testing.T) {
	n := newNode(t, Options{})
	n.enter(newCA(t), 1)
	n.start()
	n.Reload(nil)
	host, port, err := net.SplitHostPort(n.addr)
	if err != nil {
		t.Fatal(err)
	}
	// Exit code 3 is a failure; 2 is a warning, about what is newer than Debian's ssh-audit.
	cmd := exec.CommandContext(t.Context(), "ssh-audit", "--no-colors", "-4", "-p", port, host)
	out, _ := cmd.CombinedOutput()
	if code := cmd.ProcessState.ExitCode(); code != 0 && code != 2 || bytes.Contains(out, []byte("[fail]")) {
		t.Errorf("exit code %d\n%s", code, out)
	}
	for line := range strings.Lines(string(out)) {
		if strings.Contains(line, "[warn]") && !strings.Contains(line, "unknown algorithm") {
			t.Errorf("ssh-audit warns: %s", line)
		}
	}
	if !bytes.Contains(out, []byte("curve25519-sha256")) || !bytes.Contains(out, []byte("ssh-ed25519")) {
		t.Errorf("it saw nothing: %s", out)
	}
}
