package main

import (
	"crypto/tls"
	"fmt"
	"net"
	"os"
	"strings"
	"testing"
)

func TestANodeHasListenersForTheInternetAndForItsNetworks(t *testing.T) {
	internal, secure := freePort(t), freePort(t)
	n := newNode(t, "--internal-listen", internal)
	text, err := os.ReadFile(n.file)
	if err != nil {
		t.Fatal(err)
	}
	before, after, _ := strings.Cut(string(text), "[internal]")
	text = []byte(before + "[internal]" + strings.Replace(after, `#tls_listen = [":465"]`, fmt.Sprintf("tls_listen = [%q]", secure), 1))
	if err := os.WriteFile(n.file, text, 0o640); err != nil {
		t.Fatal(err)
	}
	n.start()
	n.waitHealthy()
	n.must("domain", "add", "example.test", "--to", freePort(t))
	n.must("network", "add", "127.0.0.0/8")
	eventually(t, func() error { return n.tryMail("to@example.test") }) // its networks are known by now
	for _, c := range []struct{ address, want string }{{n.smtp, "554 5.7.1 relay access denied"}, {internal, "250 "}} {
		s := n.dialSMTPAt(c.address)
		s.want("EHLO client.test", "250 ")
		s.want("MAIL FROM:<a@b.test>", "250 ")
		s.want("RCPT TO:<to@example.test>", "250 ")
		s.want("RCPT TO:<to@elsewhere.test>", c.want)
	}
	c, err := tls.Dial("tcp", secure, &tls.Config{InsecureSkipVerify: true})
	if err != nil {
		t.Fatal(err)
	}
	_ = c.Close()
	_, port, _ := net.SplitHostPort(internal)
	other := newNode(t, "--internal-listen", internal)
	if _, errs, code := other.run("mailproxy", "serve"); code != 1 || !strings.HasPrefix(errs, "mailproxy: [internal] listen "+internal+": the port is in use\n") {
		t.Errorf("port %s twice: exit code %d, %s", port, code, errs)
	}
	n.stop()
}
