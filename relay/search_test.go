package relay

import (
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	"mailproxy/config"
)

// searchVar tells a test that its resolv.conf has a search list.
const searchVar = "RELAY_TEST_SEARCH"

// The search list of resolv.conf is for people: a host of MX records that does not exist must not become one of ours, which a
// wildcard there would make of it.
func TestTheSearchListIsNotForHostsOfTheDNS(t *testing.T) {
	if os.Getenv(searchVar) == "" {
		conf := filepath.Join(t.TempDir(), "resolv.conf")
		if err := os.WriteFile(conf, []byte("nameserver 127.0.0.1\nsearch ours.test\n"), 0o644); err != nil {
			t.Fatal(err)
		}
		cmd := exec.Command("unshare", "--mount", "sh", "-ec", `mount --bind "$0" /etc/resolv.conf; exec "$@"`, conf, os.Args[0], "-test.run", "^"+t.Name()+"$")
		cmd.Env = append(os.Environ(), searchVar+"=1")
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Fatalf("%v\n%s", err, out)
		}
		return
	}
	port, taken := mxHosts(t, "127.0.0.2")
	c := testClient(t, func(o *Options) {
		o.MXPort, o.Resolver = port, dnsServer(t, "b.test. MX 10 gone.test.", "gone.test.ours.test. A 127.0.0.2", "people.ours.test. A 127.0.0.2")
	})
	a := attempt("", "hello\r\n", "x@b.test")
	a.Transport, a.Domain = config.Transport{Name: "mx", TLS: config.TLSNone}, "b.test"
	if got, err := c.Deliver(bg(), a); !isOutOfReach(err) {
		t.Errorf("by MX: %s, %v", summary(got), err)
	}
	if n := len(taken["127.0.0.2"].messages()); n != 0 {
		t.Fatalf("a host of ours has %d", n)
	}
	if got, err := c.Deliver(bg(), attempt("people:"+port, "hello\r\n", "x@b.test")); err != nil { // which an administrator wrote
		t.Errorf("a host of the configuration: %s, %v", summary(got), err)
	}
}
