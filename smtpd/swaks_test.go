package smtpd

import (
	"errors"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

// swaks runs Debian's swaks with these options and gives its exit status and what it printed: the dialog.
func swaks(t *testing.T, addr string, options ...string) (status int, printed string) {
	t.Helper()
	args := append([]string{"--server", addr, "--helo", "client.test", "--timeout", "20"}, options...)
	cmd := exec.Command("swaks", args...)
	cmd.Env = append(os.Environ(), "HOME="+t.TempDir()) // no .swaksrc
	out, err := cmd.CombinedOutput()
	var exit *exec.ExitError
	switch {
	case errors.As(err, &exit):
		return exit.ExitCode(), string(out)
	case err != nil:
		t.Fatalf("%v: run scripts/deps test", err)
	}
	return 0, string(out)
}

// Exit statuses of swaks, by its manual.
const (
	swaksBanner = 21
	swaksMail   = 23
	swaksRcpt   = 24
	swaksDot    = 26
	swaksAuth   = 28
	swaksTLS    = 29
	swaksPRDR   = 30
	swaksXCL    = 33

	swaksSome = -1 // it depends on who is first
)

// TestSwaks plays what swaks can do to a mail server.
func TestSwaks(t *testing.T) {
	h := newHop(t)
	cert := selfSigned(t)
	plain := newRig(t, snapshot("one.test", h.addr()), func(o *Options) { o.TLS = cert })
	balanced := behind(t, snapshot("one.test", h.addr()), nil)
	front := fronted(t, snapshot("one.test", h.addr()), func(o *Options) { o.TLS = cert })
	narrow := newRig(t, with(snapshot("one.test", h.addr()), "max_message_size", "64kB", "refuse_bare_newlines", "yes"), nil)
	implicit := plain.listen()
	plain.serveKind(implicit, Kind{TLS: true})
	six, err := net.Listen("tcp", "[::1]:0")
	if err != nil {
		t.Fatal(err)
	}
	plain.serve(six)
	big, bare := filepath.Join(t.TempDir(), "big"), filepath.Join(t.TempDir(), "bare")
	for name, text := range map[string]string{
		big:  "Subject: big\n\n" + strings.Repeat(strings.Repeat("x", 70)+"\n", 1000),
		bare: "Subject: x\n\none\n.\ntwo\r\n.\r\n",
	} {
		if err := os.WriteFile(name, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	to := []string{"--from", "a@sender.test", "--to", "x@one.test"}
	for _, c := range []struct {
		name    string
		addr    string
		options []string
		status  int
		printed string // in the dialog
		wire    string // in what the next hop has; "" where nothing is to arrive
	}{
		{"plain", plain.addr, to, 0, "<-  250 2.0.0 taken (", "This is a test mailing"},
		{"SMTP without E", plain.addr, append(to, "--protocol", "SMTP"), 0, "-> HELO client.test", " with SMTP id "},
		{"pipelining", plain.addr, append(to, "--pipeline"), 0, " -> DATA", "This is a test mailing"},
		{"the null reverse-path", plain.addr, []string{"--from", "<>", "--to", "x@one.test"}, 0, "MAIL FROM:<>", "This is a test mailing"},
		{"several recipients", plain.addr, []string{"--from", "a@sender.test", "--to", "x@one.test,y@one.test"}, 0, "RCPT TO:<y@one.test>", "This is a test mailing"},
		{"one recipient of two", plain.addr, []string{"--from", "a@sender.test", "--to", "x@one.test,y@two.test"}, 0, "<** 554 5.7.1", "This is a test mailing"},
		{"a foreign recipient", plain.addr, []string{"--from", "a@sender.test", "--to", "y@two.test"}, swaksRcpt, "<** 554 5.7.1 relay access denied", ""},
		{"a sender that is none", plain.addr, []string{"--from", "a..b@sender.test", "--to", "x@one.test"}, swaksMail, "<** 501 5.1.7", ""},
		{"a header of its own", plain.addr, append(to, "--header", "X-Mark: one", "--body", "two"), 0, "X-Mark: one", "X-Mark: one\r\n"},
		{"dots", plain.addr, append(to, "--data", `Subject: x\n\n.\n..\n.three\n`), 0, "", "\r\n..\r\n...\r\n..three\r\n"},
		{"an attachment", plain.addr, append(to, "--attach", "@"+big), 0, "", "Content-Disposition: attachment"},
		{"STARTTLS", plain.addr, append(to, "-tls"), 0, "~> QUIT", " with ESMTPS id "},
		{"STARTTLS where there is any", plain.addr, append(to, "--tls-optional"), 0, "<~  250 2.0.0 taken", " with ESMTPS id "},
		{"STARTTLS by TLS 1.2 with a name", plain.addr, append(to, "-tls", "--tls-protocol", "tlsv1_2", "--tls-sni", "mx.test"), 0, "TLSv1.2", "(TLS 1.2 "},
		{"STARTTLS by TLS 1.1", plain.addr, append(to, "-tls", "--tls-protocol", "tlsv1_1"), swaksTLS, "TLS startup failed", ""},
		{"STARTTLS with a certificate to be right", plain.addr, append(to, "-tls", "--tls-verify"), swaksTLS, "TLS startup failed", ""},
		{"STARTTLS that is not offered", narrow.addr, append(to, "-tls"), swaksTLS, "Host did not advertise STARTTLS", ""},
		{"TLS from the first octet", implicit.Addr().String(), append(to, "-tlsc"), 0, "<~  220 mx.test", " with ESMTPS id "},
		{"TLS where clear text is spoken", plain.addr, append(to, "-tlsc"), swaksTLS, "TLS startup failed", ""},
		{"clear text where TLS is spoken", implicit.Addr().String(), append(to, "--timeout", "2"), swaksBanner, "", ""},
		{"IPv6", six.Addr().String(), to, 0, "=== Connected to ::1", "[IPv6:::1])"},
		{"another address of this host", plain.addr, append(to, "--local-interface", "127.0.0.9"), 0, "", "[127.0.0.9])"},
		{"AUTH that is not offered", plain.addr, append(to, "--auth", "PLAIN", "--auth-user", "u", "--auth-password", "p"), swaksAuth, "", ""},
		{"AUTH where there is any", plain.addr, append(to, "--auth-optional", "PLAIN", "--auth-user", "u", "--auth-password", "p"), 0, "", "This is a test mailing"},
		{"PRDR that is not offered", plain.addr, append(to, "--prdr"), swaksPRDR, "", ""},
		{"up to RCPT", plain.addr, append(to, "--quit-after", "RCPT"), 0, "<-  250 2.1.5 OK", ""},
		{"gone behind RCPT", plain.addr, append(to, "--drop-after", "RCPT"), 0, "", ""},
		{"gone behind DATA without its answer", plain.addr, append(to, "--drop-after-send", "DATA"), 0, "", ""},
		{"too big", narrow.addr, append(to, "--data", "@"+big), swaksDot, "<** 552 5.3.4", ""},
		{"bare newlines", narrow.addr, append(to, "--no-data-fixup", "--data", "@"+bare), swaksDot, "<** 521 5.5.2", ""},
		{"bare newlines that are made right", plain.addr, append(to, "--no-data-fixup", "--data", "@"+bare), 0, "", "one\r\n..\r\ntwo\r\n"},
		{"PROXY 1", balanced.addr, append(to, "--proxy-version", "1", "--proxy-family", "TCP4", "--proxy-source", "192.0.2.77", "--proxy-source-port", "4096",
			"--proxy-dest", "192.0.2.1", "--proxy-dest-port", "25"), 0, "", "[192.0.2.77])"},
		{"PROXY 2", balanced.addr, append(to, "--proxy-version", "2", "--proxy-family", "AF_INET", "--proxy-protocol", "STREAM", "--proxy-command", "PROXY",
			"--proxy-source", "192.0.2.77", "--proxy-source-port", "4096", "--proxy-dest", "192.0.2.1", "--proxy-dest-port", "25"), 0, "", "[192.0.2.77])"},
		{"PROXY 2 with IPv6", balanced.addr, append(to, "--proxy-version", "2", "--proxy-family", "AF_INET6", "--proxy-protocol", "STREAM", "--proxy-command", "PROXY",
			"--proxy-source", "2001:db8::1", "--proxy-source-port", "4096", "--proxy-dest", "2001:db8::2", "--proxy-dest-port", "25"), 0, "", "[IPv6:2001:db8::1])"},
		{"PROXY from one who is not listed", plain.addr, append(to, "--proxy", "TCP4 192.0.2.77 192.0.2.1 4096 25"), swaksSome, "", ""},
		{"XCLIENT", front.addr, append(to, "--xclient-addr", "192.0.2.77", "--xclient-name", "mail.client.test", "--xclient-helo", "one.client.test",
			"--xclient-proto", "SMTP"), 0, "-> XCLIENT", "from one.client.test (mail.client.test [192.0.2.77])\r\n\tby mx.test with SMTP id "},
		{"XCLIENT before STARTTLS", front.addr, append(to, "-tls", "--xclient-before-starttls", "--xclient-addr", "192.0.2.77"), 0, "<~  250 2.0.0 taken", "[192.0.2.77])"},
		{"XCLIENT behind STARTTLS", front.addr, append(to, "-tls", "--xclient-addr", "192.0.2.77"), 0, "~> XCLIENT", "[192.0.2.77])"},
		{"XCLIENT with what is not known here", front.addr, append(to, "--xclient-no-verify", "--xclient-port", "25"), swaksXCL, "<** 501 5.5.4", ""},
		{"XCLIENT from one who is not listed", plain.addr, append(to, "--xclient-addr", "192.0.2.77"), swaksXCL, "", ""},
	} {
		t.Run(c.name, func(t *testing.T) {
			before := len(h.messages())
			status, printed := swaks(t, c.addr, c.options...)
			if status != c.status && (c.status != swaksSome || status == 0) || !strings.Contains(printed, c.printed) {
				t.Errorf("status %d, want %d, and %q in:\n%s", status, c.status, c.printed, printed)
			}
			m := h.messages()[before:]
			switch {
			case c.wire == "" && len(m) > 0:
				t.Errorf("arrived: %q", m)
			case c.wire != "" && (len(m) != 1 || !strings.Contains(m[0].wire, c.wire)):
				t.Errorf("%q did not arrive: %q", c.wire, m)
			}
		})
	}
}
