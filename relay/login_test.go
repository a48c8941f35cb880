package relay

import (
	"bufio"
	"bytes"
	"crypto/tls"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"slices"
	"strings"
	"testing"

	"mailproxy/config"
	"mailproxy/mail"
)

// secrets opens those of a test.
func secrets(name string) ([]byte, error) {
	switch name {
	case "smtp":
		return []byte("pass=word\x01"), nil
	case "line":
		return []byte("pass=word\x01\r\n"), nil
	}
	return nil, errors.New("is not there")
}

const helloTLS = `
S: 220 hop ready
C: EHLO test.example
S: 250-hop\r\n250-AUTH PLAIN LOGIN\r\n250 STARTTLS
C: STARTTLS
S: 220 go
tls
C: EHLO test.example
`

// onePlain is a transaction without PIPELINING.
const onePlain = `
C: MAIL FROM:<from@a.test>
S: 250 ok
C: RCPT TO:<x@b.test>
S: 250 ok
C: DATA
S: 354 go
C: hello
C: .
S: 250 taken`

func TestLogin(t *testing.T) {
	const plain = "C: AUTH PLAIN AHVzQGEudGVzdABwYXNzPXdvcmQB\n" // NUL us@a.test NUL pass=word 0x01
	for _, tt := range []struct {
		name, dialog, secret string
		want                 string // a summary, or ! and the stage of an OutOfReach with a part of its text
	}{
		{"by PLAIN", helloTLS + "S: 250-hop\\r\\n250 AUTH LOGIN PLAIN\n" + plain + "S: 235 2.7.0 welcome" + onePlain, "smtp", "dot 250 taken"},
		{"by LOGIN, in small letters", helloTLS + "S: 250-hop\\r\\n250 auth login\nC: AUTH LOGIN\nS: 334 VXNlcm5hbWU6\nC: dXNAYS50ZXN0\n" +
			"S: 334 UGFzc3dvcmQ6\nC: cGFzcz13b3JkAQ==\nS: 235 ok" + onePlain, "smtp", "dot 250 taken"},
		{"by what a file of one line has", helloTLS + "S: 250-hop\\r\\n250 AUTH PLAIN\n" + plain + "S: 235 2.7.0 welcome" + onePlain, "line", "dot 250 taken"},
		{"refused", helloTLS + "S: 250-hop\\r\\n250 AUTH PLAIN\n" + plain + "S: 535 5.7.8 wrong", "smtp", "!auth 535 5.7.8 wrong"},
		{"not offered inside TLS", helloTLS + "S: 250 hop", "smtp", "!auth neither AUTH PLAIN nor LOGIN"},
		{"an answer that is none", helloTLS + "S: 250-hop\\r\\n250 AUTH PLAIN\n" + plain + "S: 334 more", "smtp", "!auth protocol error"},
		{"without its secret", helloTLS + "S: 250-hop\\r\\n250 AUTH PLAIN", "other", "!auth secret other: is not there"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			cert, _ := certificate(t)
			s := newScript(t, tt.dialog)
			s.tls = &tls.Config{Certificates: []tls.Certificate{cert}}
			a := attempt(s.addr(), "hello\r\n", "x@b.test")
			a.Transport.TLS, a.Transport.User, a.Transport.Password = config.TLSEncrypt, "us@a.test", "secret:"+tt.secret
			got, err := testClient(t, func(o *Options) { o.Secret = secrets }).Deliver(bg(), a)
			stage, text, _ := strings.Cut(strings.TrimPrefix(tt.want, "!"), " ")
			var out *OutOfReach
			switch {
			case tt.want[0] != '!':
				if err != nil || summary(got) != tt.want {
					t.Errorf("got %s, %v", summary(got), err)
				}
			case !errors.As(err, &out) || out.Stage.String() != stage || out.Stage.Reason() != "auth" || !strings.Contains(err.Error(), text):
				t.Errorf("got %s, %v", summary(got), err)
			case strings.Contains(err.Error(), "pass"):
				t.Errorf("the password is in %v", err)
			}
		})
	}
}

func TestAPasswordNeverGoesInClear(t *testing.T) {
	for _, policy := range []config.TLS{config.TLSNone, config.TLSMay} {
		s := newScript(t, "S: 220 hop\nC: EHLO test.example\n"+`S: 250-hop\r\n250 AUTH PLAIN LOGIN`+"\nhang")
		a := attempt(s.addr(), "hello\r\n", "x@b.test")
		a.Transport.TLS, a.Transport.User, a.Transport.Password = policy, "us", "secret:smtp"
		_, err := testClient(t, func(o *Options) { o.Secret = secrets }).Deliver(bg(), a)
		if !errors.Is(err, errInClear) {
			t.Errorf("%s: got %v", policy, err)
		}
		s.stop()
		if b := s.bytes(1); strings.Contains(b, "AUTH") {
			t.Errorf("%s: the hop got %q", policy, b)
		}
	}
}

func TestAHopThatWantsTLSOrALoginIsOutOfReach(t *testing.T) {
	for _, greeting := range []string{hello, helloPlain} {
		s := newScript(t, greeting+"C~ MAIL FROM:<from@a.test>"+map[string]string{hello: " SIZE=7"}[greeting]+"\nS: 530 5.7.0 Must issue a STARTTLS command first\nhang")
		second := newScript(t, hello+one)
		a := attempt(s.addr(), "hello\r\n", "x@b.test")
		if _, err := testClient(t, nil).Deliver(bg(), a); !isOutOfReach(err) || !strings.Contains(err.Error(), "530 5.7.0") {
			t.Errorf("got %v", err)
		}
		s.stop()
		a.Transport.Hosts = []string{s.addr(), second.addr()}
		if got, err := testClient(t, nil).Deliver(bg(), a); err != nil || summary(got) != "dot 250 taken" {
			t.Errorf("the next host: got %s, %v", summary(got), err)
		}
	}
}

func from(client, helo string) *mail.Envelope {
	e := &mail.Envelope{ReversePath: path("from@a.test"), Helo: helo}
	if client != "" {
		e.Client = netip.MustParseAddr(client)
	}
	return e
}

func TestXClientTellsWhoTheClientIs(t *testing.T) {
	const offer = "S: 220 hop\nC: EHLO test.example\n" + `S: 250-hop\r\n250 XCLIENT NAME ADDR PROTO HELO` + "\n"
	again := func(line, name string) string {
		return "C: XCLIENT " + line + "\nS: 220 hop\nC: EHLO " + name + "\nS: 250 hop"
	}
	for _, tt := range []struct {
		name, client, helo, dialog, want string
	}{
		{"IPv4", "192.0.2.1", "mail.example", offer + again("NAME=[UNAVAILABLE] ADDR=192.0.2.1 PROTO=ESMTP", "mail.example") + onePlain, "dot 250 taken"},
		{"IPv6", "2001:db8::1", "[IPv6:2001:db8::1]", offer + again("NAME=[UNAVAILABLE] ADDR=IPV6:2001:db8::1 PROTO=ESMTP", "[IPv6:2001:db8::1]") + onePlain, "dot 250 taken"},
		{"IPv4 in IPv6", "::ffff:192.0.2.1", "", offer + again("NAME=[UNAVAILABLE] ADDR=192.0.2.1 PROTO=ESMTP", "test.example") + onePlain, "dot 250 taken"},
		{"a name that would be two commands", "192.0.2.1", "a\r\nQUIT", offer + again("NAME=[UNAVAILABLE] ADDR=192.0.2.1 PROTO=ESMTP", "test.example") + onePlain, "dot 250 taken"},
		{"a name", "192.0.2.3", "x", offer + again("NAME=mail_3.example ADDR=192.0.2.3 PROTO=ESMTP", "x") + onePlain, "dot 250 taken"},
		{"a name that would be two attributes", "192.0.2.4", "x", offer + again("NAME=[UNAVAILABLE] ADDR=192.0.2.4 PROTO=ESMTP", "x") + onePlain, "dot 250 taken"},
		{"a message of our own", "", "", offer + onePlain, "dot 250 taken"},
		{"only what is offered", "192.0.2.1", "x", "S: 220 hop\nC: EHLO test.example\n" + `S: 250-hop\r\n250 xclient addr` + "\n" + again("ADDR=192.0.2.1", "x") + onePlain, "dot 250 taken"},
		{"not offered: not in our own name either", "192.0.2.1", "x", helloPlain + "hang", "!XCLIENT is wanted and not offered"},
		{"refused", "192.0.2.1", "x", offer + "C~ XCLIENT NAME=[UNAVAILABLE] ADDR=192.0.2.1 PROTO=ESMTP\nS: 550 5.7.0 no\nhang", "!550 5.7.0 no"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			s := newScript(t, tt.dialog)
			a := attempt(s.addr(), "hello\r\n", "x@b.test")
			a.Transport.Tell, a.Envelope = config.TellXClient, from(tt.client, tt.helo)
			a.Envelope.Name = map[string]string{"192.0.2.3": "mail_3.example", "192.0.2.4": "mail.example ADDR=192.0.2.5"}[tt.client]
			got, err := testClient(t, nil).Deliver(bg(), a)
			if text, out := strings.CutPrefix(tt.want, "!"); out {
				if !isOutOfReach(err) || !strings.Contains(err.Error(), text) {
					t.Errorf("got %s, %v", summary(got), err)
				}
			} else if err != nil || summary(got) != tt.want {
				t.Errorf("got %s, %v", summary(got), err)
			}
		})
	}
}

func TestProxyHeaderComesBeforeTheGreeting(t *testing.T) {
	hop := netip.MustParseAddrPort("192.0.2.9:25")
	for _, tt := range []struct {
		client string
		to     netip.AddrPort
		want   string
	}{
		{"192.0.2.1:4097", hop, "\x21\x11\x00\x0c\xc0\x00\x02\x01\xc0\x00\x02\x09\x10\x01\x00\x19"},
		{"[2001:db8::1]:0", hop, "\x21\x21\x00\x24\x20\x01\x0d\xb8\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x01" +
			"\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\xff\xff\xc0\x00\x02\x09\x00\x00\x00\x19"},
		{"", hop, "\x20\x00\x00\x00"},
	} {
		if got := proxyHeader(mustAddrPort(tt.client), tt.to); string(got) != proxySignature+tt.want {
			t.Errorf("%s: %q", tt.client, got)
		}
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	got := make(chan []byte, 1)
	go func() {
		c, err := l.Accept()
		if err != nil {
			return
		}
		defer c.Close()
		b := make([]byte, 28)
		n, _ := c.Read(b)
		got <- b[:n]
		c.Write([]byte("421 busy\r\n"))
	}()
	a := attempt(l.Addr().String(), "hello\r\n", "x@b.test")
	a.Transport.Tell, a.Envelope = config.TellProxy, from("192.0.2.1", "")
	a.Envelope.Port = 4097
	if _, err := testClient(t, nil).Deliver(bg(), a); !isOutOfReach(err) || !strings.Contains(err.Error(), "421 busy") {
		t.Errorf("got %v", err)
	}
	if b := <-got; !bytes.HasPrefix(b, []byte(proxySignature+"\x21\x11\x00\x0c\xc0\x00\x02\x01\x7f\x00\x00\x01\x10\x01")) {
		t.Errorf("the hop got %q", b)
	}
}

func mustAddrPort(s string) netip.AddrPort {
	if s == "" {
		return netip.AddrPort{}
	}
	return netip.MustParseAddrPort(s)
}

// The port is said by PROXY, and so a connection that has said one is not another's, though the client is the same; what the hop
// thinks of a recipient does not hang on it.
func TestAConnectionThatHasSaidAPortIsNotUsedForAnother(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	told := make(chan string, 10)
	go func() { // ends with the listener
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			go func() { // ends with the connection
				defer c.Close()
				header := make([]byte, 28)
				if _, err := io.ReadFull(c, header); err != nil {
					return
				}
				port := binary.BigEndian.Uint16(header[24:])
				io.WriteString(c, "220 hop\r\n")
				for lines := bufio.NewScanner(c); lines.Scan(); {
					word, _, _ := strings.Cut(lines.Text(), " ")
					switch word {
					case "DATA":
						io.WriteString(c, "354 go\r\n")
						continue
					case "hello", "":
						continue
					case "RCPT":
						told <- fmt.Sprint("RCPT ", port)
					case "EHLO":
						told <- fmt.Sprint("EHLO ", port)
					}
					io.WriteString(c, "250 ok\r\n")
				}
			}()
		}
	}()
	c := testClient(t, nil)
	for _, port := range []uint16{4097, 4098} {
		a := attempt(l.Addr().String(), "hello\r\n", "x@b.test")
		a.Transport.Tell, a.Envelope = config.TellProxy, from("192.0.2.1", "")
		a.Envelope.Port = port
		if r, err := c.Ask(bg(), a.Transport, "b.test", a.Envelope, path("x@b.test")); err != nil || r.Code != 250 {
			t.Fatalf("port %d: asked: %v, %v", port, r, err)
		}
		if got, err := c.Deliver(bg(), a); err != nil || summary(got) != "dot 250 ok" {
			t.Fatalf("port %d: got %s, %v", port, summary(got), err)
		}
	}
	var got []string
	for len(told) > 0 { // all was answered
		got = append(got, <-told)
	}
	if want := []string{"EHLO 4097", "RCPT 4097", "RCPT 4097", "EHLO 4098", "RCPT 4098"}; !slices.Equal(got, want) {
		t.Errorf("the hop was told %q, want %q", got, want)
	}
}

func TestAConnectionInOneClientsNameIsNotUsedForAnother(t *testing.T) {
	tell := func(addr string) string {
		return "S: 220 hop\nC: EHLO test.example\n" + `S: 250-hop\r\n250 XCLIENT ADDR` + "\nC: XCLIENT ADDR=" + addr + "\nS: 220 hop\nC: EHLO test.example\nS: 250 hop"
	}
	s := newScript(t, tell("192.0.2.1")+onePlain+onePlain, tell("192.0.2.2")+onePlain)
	c := testClient(t, nil)
	for _, client := range []string{"192.0.2.1", "192.0.2.2", "192.0.2.1"} {
		a := attempt(s.addr(), "hello\r\n", "x@b.test")
		a.Transport.Tell, a.Envelope = config.TellXClient, from(client, "")
		if got, err := c.Deliver(bg(), a); err != nil || summary(got) != "dot 250 taken" {
			t.Fatalf("got %s, %v", summary(got), err)
		}
	}
}

func TestAnswersForOneClientAreNotAnothers(t *testing.T) {
	tell := func(addr, answer string) string {
		return "S: 220 hop\nC: EHLO test.example\n" + `S: 250-hop\r\n250 XCLIENT ADDR` + "\nC: XCLIENT ADDR=" + addr +
			"\nS: 220 hop\nC: EHLO test.example\nS: 250 hop\nC: MAIL FROM:<from@a.test>\nS: 250 ok\nC: RCPT TO:<x@b.test>\nS: " + answer + "\nC: RSET\nS: 250 ok"
	}
	s := newScript(t, tell("192.0.2.1", "250 yes"), tell("192.0.2.2", "550 5.7.1 not you"))
	c := testClient(t, nil)
	tr := s.transport()
	tr.Tell = config.TellXClient
	for _, tt := range []struct{ client, want string }{
		{"192.0.2.1", "250 yes"}, {"192.0.2.2", "550 5.7.1 not you"}, {"192.0.2.1", "250 yes"}, {"192.0.2.2", "550 5.7.1 not you"},
	} {
		if r, err := c.Ask(bg(), tr, "b.test", from(tt.client, ""), path("x@b.test")); err != nil || r.String() != tt.want {
			t.Errorf("%s: got %v, %v", tt.client, r, err)
		}
	}
}
