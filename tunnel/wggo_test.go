package tunnel

import (
	"encoding/base64"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"mailproxy/config"
)

// Debian's wireguard-go and wg make the device of member 2, in a network namespace; plain TCP of that namespace's kernel goes in and
// comes out. Both ways: SSH of a node there would do the same.
func TestDebiansWireGuardTalksToOurs(t *testing.T) {
	if os.Getenv("TUNNEL_TEST_INSIDE") == "" {
		inNamespace(t, t.Name(), 65536)
		return
	}
	ca := newCA(t)
	a, b := newNode(t, Options{}), newNode(t, Options{Listen: []string{}})
	a.enter(ca, 1)
	b.enter(ca, 2)
	b.addr = ""
	s := carriedBy(snapshot(ca, a, b), config.TunnelWireGuard)
	a.start()
	a.Reload(s)

	const device = "wgtest"
	daemon := exec.Command("wireguard-go", "-f", device)
	daemon.Env = append(os.Environ(), "LOG_LEVEL=error", "WG_I_PREFER_BUGGY_USERSPACE_TO_POLISHED_KMOD=1")
	daemon.Stderr = os.Stderr
	daemon.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if err := daemon.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		daemon.Process.Signal(syscall.SIGTERM)
		daemon.Wait()
	})
	run := func(name string, args ...string) {
		t.Helper()
		if out, err := exec.Command(name, args...).CombinedOutput(); err != nil {
			t.Fatalf("%s %s: %v: %s", name, strings.Join(args, " "), err, out)
		}
	}
	eventually(t, "wireguard-go is up", 10*time.Second, func() bool { return exec.Command("wg", "show", device).Run() == nil })
	key := filepath.Join(t.TempDir(), "key")
	private := wgPrivate(b.key.private)
	if err := os.WriteFile(key, []byte(base64.StdEncoding.EncodeToString(private[:])), 0o600); err != nil {
		t.Fatal(err)
	}
	parsed, err := parsePublic(a.key.Public())
	if err != nil {
		t.Fatal(err)
	}
	public, err := wgPublic(parsed)
	if err != nil {
		t.Fatal(err)
	}
	run("wg", "set", device, "private-key", key, "peer", base64.StdEncoding.EncodeToString(public[:]), "endpoint", a.addr,
		"allowed-ips", "10.0.0.1/32")
	run("ip", "address", "add", "10.0.0.2/8", "dev", device)
	run("ip", "link", "set", device, "mtu", fmt.Sprint(wgMTU), "up")

	// In: the tunnel of member 2, whose carrier here is the kernel's TCP, routed into that device.
	b.start()
	b.Reload(carriedBy(s, config.TunnelSSH))
	b.mu.Lock()
	tr := b.trust
	b.mu.Unlock()
	inside := net.JoinHostPort("10.0.0.1", fmt.Sprint(wgPort))
	if err := b.connect(t.Context(), 1, inside, tr, config.TunnelSSH, useAll); err != nil {
		t.Fatalf("member 2 through wireguard-go: %v", err)
	}
	a.waitCarried(2, config.TunnelWireGuard)
	bulk(t, b.mustDial(1, "echo"), 4<<20)
	for _, n := range []*node{a, b} {
		if got, err := io.ReadAll(n.mustDial(3-n.cid, "who")); err != nil || string(got) != cidPrincipal(n.cid) {
			t.Errorf("who at %d answered %q, %v", 3-n.cid, got, err)
		}
	}

	// Out: our device dials what listens behind wireguard-go.
	l, err := net.Listen("tcp", net.JoinHostPort("10.0.0.2", fmt.Sprint(wgPort)))
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	go func() {
		if c, err := l.Accept(); err == nil {
			io.Copy(c, c)
			c.Close()
		}
	}()
	c, err := a.wireguard.dial(t.Context(), 2, "127.0.0.1:1") // not used while there is a stream
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	ping(t, c, "hello, kernel")
}
