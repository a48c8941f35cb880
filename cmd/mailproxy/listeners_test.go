package main

import (
	"bufio"
	"crypto/tls"
	"errors"
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
	eventually(t, func() error { return n.tryMail("to@example.test") })
	eventually(t, func() error { // until its networks are known it sends everyone away
		c, err := net.Dial("tcp", internal)
		if err != nil {
			return err
		}
		defer c.Close()
		line, err := bufio.NewReader(c).ReadString('\n')
		if err == nil && !strings.HasPrefix(line, "220 ") {
			err = errors.New(line)
		}
		return err
	})
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
