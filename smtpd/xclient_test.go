package smtpd

import (
	"fmt"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"mailproxy/config"
	"mailproxy/internal/mta"
)

func TestXCLIENTAttributes(t *testing.T) {
	say := func(s *string) string {
		if s == nil {
			return "-"
		}
		return *s
	}
	for said, want := range map[string]string{
		"ADDR=192.0.2.77":                           "- 192.0.2.77 - -",
		"addr=192.0.2.77 name=mail.client.test":     "mail.client.test 192.0.2.77 - -",
		"ADDR=IPV6:2001:db8::1 PROTO=esmtp":         "- 2001:db8::1 ESMTP -",
		"ADDR=ipv6:::ffff:192.0.2.1":                "- 192.0.2.1 - -",
		"ADDR=[UNAVAILABLE] NAME=[UNAVAILABLE]":     " invalid IP - -",
		"NAME=[TEMPUNAVAIL] HELO=[UNAVAILABLE]":     " - - ",
		"HELO=client+2Etest  PROTO=SMTP":            "- - SMTP client.test",
		"HELO=[192.0.2.1]":                          "- - - [192.0.2.1]",
		"HELO=" + strings.Repeat("x", 255):          "- - - " + strings.Repeat("x", 255),
		"HELO=a+0D+0Ab+20c+C3+BC+FF":                "- - - a??b?c??",
		"NAME=a_b-c.test ADDR=192.0.2.1 HELO=a+2Bb": "a_b-c.test 192.0.2.1 - a+b",
	} {
		x, ok := parseXclient(said)
		addr := "-"
		if x.addr != nil {
			addr = x.addr.String()
		}
		if got := strings.Join([]string{say(x.name), addr, say(x.proto), say(x.helo)}, " "); !ok || got != want {
			t.Errorf("%s: %q, %v, want %q", said, got, ok, want)
		}
	}
	for _, said := range []string{
		"", "ADDR", "ADDR=", "ADDR=client.test", "ADDR=2001:db8::1", "ADDR=IPV6:192.0.2.1", "ADDR=IPV6:fe80::1%eth0", "ADDR=192.0.2.1 ADDR=192.0.2.2",
		"NAME=", "NAME=a..b", "NAME=a)b", "NAME=a+0D+0Ab", "NAME=" + strings.Repeat("x", 64), "PROTO=LMTP", "PROTO=[UNAVAILABLE]", "HELO=",
		"HELO=a+2", "HELO=" + strings.Repeat("x", 256), "LOGIN=me", "PORT=25", "X=Y", "ADDR=192.0.2.1 X",
	} {
		if x, ok := parseXclient(said); ok {
			t.Errorf("%q gives %+v", said, x)
		}
	}
}

// FuzzXCLIENT: what is taken can stand in a header.
func FuzzXCLIENT(f *testing.F) {
	for _, s := range []string{"ADDR=192.0.2.77 NAME=a.test", "ADDR=IPV6:::1 PROTO=SMTP", "HELO=a+2Bb", "NAME=[TEMPUNAVAIL]", "ADDR=[UNAVAILABLE]", "NAME=a+0Db"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		x, ok := parseXclient(s)
		if !ok {
			return
		}
		for _, text := range []*string{x.name, x.helo, x.proto} {
			if text != nil && strings.ContainsFunc(*text, func(r rune) bool { return r <= ' ' || r >= 0x7f }) {
				t.Fatalf("%q gives %q", s, *text)
			}
		}
		if x.addr != nil && (x.addr.Is4In6() || x.addr.Zone() != "") {
			t.Fatalf("%q gives %v", s, x.addr)
		}
	})
}

// fronted has a rig let everybody from this host say who their client is.
func fronted(t *testing.T, s *config.Snapshot, change func(*Options)) *rig {
	t.Helper()
	return newRig(t, with(s, "xclient_from", "127.0.0.0/8"), change)
}

func TestXCLIENTSaysWhoTheClientIs(t *testing.T) {
	h := newHop(t)
	s := narrow(snapshot("one.test", h.addr()))
	g := fronted(t, s, func(o *Options) { o.TLS, o.Resolver = selfSigned(t), dnsServer(t) })
	p := g.dial()
	p.want("220")
	if got := p.ask("EHLO front.test", "250"); !strings.Contains(got, "\n250-XCLIENT NAME ADDR PROTO HELO\n") {
		t.Errorf("not offered: %s", got)
	}
	p.ask("XCLIENT ADDR=here", "501 5.5.4")
	p.ask("XCLIENT NAME=mail.client.test ADDR=192.0.2.77", "220 mx.test ESMTP")
	p.ask("MAIL FROM:<a@sender.test>", "503 5.5.1 EHLO first")
	p.ask("XCLIENT HELO=client.test PROTO=SMTP", "220")
	p.ask("EHLO front.test", "250")
	p.begin("x@one.test")
	p.send("x\r\n.\r\n")
	p.want("250")
	if wire := h.messages()[0].wire; !strings.HasPrefix(wire, "Received: from client.test (mail.client.test [192.0.2.77])\r\n\tby mx.test with SMTP id ") {
		t.Errorf("Received: %q", wire)
	}
	for _, want := range []string{`"client":"192.0.2.77","frontend":"127.0.0.1","message":"session.client"`, `"client":"192.0.2.77","reverse_path"`} {
		if log := g.log.String(); !strings.Contains(log, want) {
			t.Errorf("%s is not in the log:\n%s", want, log)
		}
	}
	// The host in front is in one of our networks, and its client is not.
	p.ask("MAIL FROM:<a@sender.test>", "250")
	p.ask("RCPT TO:<x@elsewhere.test>", "554 5.7.1")
	p.ask("XCLIENT ADDR=192.0.2.1", "503 5.5.1")
	p.ask("RSET", "250")
	// Limits are each client's; the one in front has room for all.
	var more []*peer
	for range 4 {
		more = append(more, g.hello())
	}
	more[0].ask("XCLIENT ADDR=192.0.2.77", "421 4.7.0 too many sessions from your address")
	more[0].wantEnd()
	more[1].ask("XCLIENT ADDR=192.0.2.78", "220")
	for n := range 10 {
		p := g.hello()
		p.ask("XCLIENT ADDR=198.51.100."+strconv.Itoa(n), "220")
		p.ask("QUIT", "221")
		p.wantEnd()
	}
	// It may speak for another, and with its own name it is looked up anew.
	p.ask("XCLIENT ADDR=IPV6:2001:db8::1 HELO=[UNAVAILABLE]", "220")
	p.ask("EHLO six.test", "250")
	p.begin("x@one.test")
	p.send("x\r\n.\r\n")
	p.want("250")
	if wire := h.messages()[1].wire; !strings.HasPrefix(wire, "Received: from six.test (unknown [IPv6:2001:db8::1])\r\n") {
		t.Errorf("Received: %q", wire)
	}
	p.ask("XCLIENT ADDR=[UNAVAILABLE]", "220")
	p.ask("EHLO six.test", "250")
	p.begin("x@one.test")
	p.send("x\r\n.\r\n")
	p.want("250")
	if wire := h.messages()[2].wire; !strings.HasPrefix(wire, "Received: from six.test (unknown)\r\n") {
		t.Errorf("Received: %q", wire)
	}
}

func TestXCLIENTFromOthersIsRefused(t *testing.T) {
	g := newRig(t, with(snapshot(), "xclient_from", "127.0.0.2"), nil)
	p := g.dial()
	p.want("220")
	if got := p.ask("EHLO client.test", "250"); strings.Contains(got, "XCLIENT") {
		t.Errorf("offered: %s", got)
	}
	p.ask("XCLIENT ADDR=192.0.2.77", "550 5.7.0")
	// Behind a balancer it is the client that is asked about, and XCLIENT gives it no more rights than it had.
	g = newRig(t, with(snapshot(), "xclient_from", "127.0.0.1 203.0.113.1", "proxy_from", "127.0.0.1"), nil)
	p = g.dialFor("192.0.2.77")
	p.want("220")
	p.ask("EHLO client.test", "250")
	p.ask("XCLIENT ADDR=192.0.2.78", "550 5.7.0")
	p = g.dialFor("203.0.113.1")
	p.want("220")
	p.ask("EHLO client.test", "250")
	p.ask("XCLIENT ADDR=192.0.2.78", "220")
	p.ask("EHLO client.test", "250")
	p.ask("XCLIENT ADDR=192.0.2.79", "220")
}

func TestXCLIENTCountsForTheNetworksThatAreOurs(t *testing.T) {
	h := newHop(t)
	s := outbound(h.addr())
	s.Networks = []config.Network{{Prefix: netip.MustParsePrefix("192.0.2.0/24")}}
	g := fronted(t, s, nil)
	p := g.hello()
	p.ask("XCLIENT ADDR=192.0.2.77", "220")
	p.ask("EHLO client.test", "250")
	p.ask("MAIL FROM:<a@sender.test>", "250")
	p.ask("RCPT TO:<x@elsewhere.test>", "250")
}

// TestOneNodeTellsAnotherWhoItsClientIs: what relay says to a next hop that wants it, and what is understood here.
func TestOneNodeTellsAnotherWhoItsClientIs(t *testing.T) {
	h := newHop(t)
	nameless := func(o *Options) { o.Resolver = dnsServer(t) }
	second := map[config.Tell]*rig{
		config.TellXClient: fronted(t, snapshot("one.test", h.addr()), nameless), config.TellProxy: behind(t, snapshot("one.test", h.addr()), nameless),
	}
	names := dnsServer(t, ptr(77, "mail.client.test."), "mail.client.test. A 192.0.2.77")
	for tell, g := range second {
		s := &config.Snapshot{
			Domains:    config.NewDomains([]config.Domain{{Name: "one.test", Transport: "second"}}),
			Transports: []config.Transport{{Name: "second", Hosts: []string{g.addr}, TLS: config.TLSNone, Tell: tell}},
		}
		first := behind(t, s, func(o *Options) { o.Resolver = names })
		before := len(h.messages())
		p := first.dialFor("192.0.2.77")
		p.want("220")
		p.ask("EHLO cli\xc3\xa9nt.test", "250")
		p.begin("x@one.test")
		p.send("x\r\n.\r\n")
		p.want("250")
		if wire := h.messages()[before].wire; strings.Count(wire, "[192.0.2.77])") != 2 {
			t.Errorf("%s: %q", tell, wire)
		}
		if line, _, _ := strings.Cut(h.messages()[before].wire, "\r\n"); strings.Contains(line, "(mail.client.test [192.0.2.77])") != (tell == config.TellXClient) {
			t.Errorf("%s: the name: %s", tell, line)
		}
		// Of one session, that the recipient was asked about in and the message came by.
		if got, want := g.ports(), map[config.Tell]string{config.TellXClient: "[0]", config.TellProxy: "[4096]"}[tell]; fmt.Sprint(got) != want {
			t.Errorf("%s: sessions of clients with the ports %v, want %s", tell, got, want)
		}
	}
}

// ports are those of the clients that are there.
func (g *rig) ports() (all []uint16) {
	g.server.sessions.mu.Lock()
	defer g.server.sessions.mu.Unlock()
	for c := range g.server.sessions.conns {
		all = append(all, c.port)
	}
	return all
}

const nginxConfig = `load_module /usr/lib/nginx/modules/ngx_mail_module.so;
daemon off;
master_process off;
error_log %[1]s/error.log;
pid %[1]s/pid;
events { }
mail {
	server_name nginx.test;
	auth_http %[2]s;
	smtp_auth none;
	server {
		listen %[3]s;
		protocol smtp;
		xclient on;
	}
}
`

// TestNginxInFront: Debian's mail proxy, which says XCLIENT by itself.
func TestNginxInFront(t *testing.T) {
	h := newHop(t)
	g := fronted(t, snapshot("one.test", h.addr()), nil)
	host, port, err := net.SplitHostPort(g.addr)
	if err != nil {
		t.Fatal(err)
	}
	auth := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Auth-Status", "OK")
		w.Header().Set("Auth-Server", host)
		w.Header().Set("Auth-Port", port)
	}))
	defer auth.Close()
	addr, dir := mta.FreeAddr(t), t.TempDir()
	conf := filepath.Join(dir, "nginx.conf")
	if err := os.WriteFile(conf, []byte(fmt.Sprintf(nginxConfig, dir, strings.TrimPrefix(auth.URL, "http://"), addr)), 0o600); err != nil {
		t.Fatal(err)
	}
	mta.Start(t, addr, "/usr/sbin/nginx", "-c", conf, "-e", dir+"/error.log")
	from := net.Dialer{LocalAddr: &net.TCPAddr{IP: net.IPv4(127, 0, 0, 30)}}
	c, err := from.Dial("tcp", addr)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	p := newPeer(t, c)
	p.want("220")
	p.ask("EHLO client.test", "250")
	p.begin("x@one.test")
	p.send("x\r\n.\r\n")
	p.want("250")
	if wire := h.messages()[0].wire; !strings.Contains(wire, " [127.0.0.30])") {
		t.Errorf("Received: %q", wire)
	}
}

// A host in front that speaks for nobody, as with a DSN of its own, may find that recipients are unknown: its clients are taken all the same.
func TestAHostInFrontThatTriedUnknownRecipientsStillSpeaksForOthers(t *testing.T) {
	h := newHop(t)
	h.unknown(3)
	s := with(snapshot("one.test", h.addr()), "max_unknown_recipients_per_hour", "2", "max_unknown_recipients", "0", "xclient_from", "127.0.0.0/8")
	g := newRig(t, s, nil)
	try := func(p *peer) {
		p.ask("EHLO client.test", "250")
		p.ask("MAIL FROM:<>", "250")
		for i := range 3 {
			p.ask(fmt.Sprintf("RCPT TO:<u%d@one.test>", i), "550")
		}
	}
	p := g.dial()
	p.want("220")
	try(p)
	for _, client := range []string{"192.0.2.77", "192.0.2.78"} {
		p := g.dial()
		p.want("220")
		p.ask("XCLIENT ADDR="+client, "220")
		try(p)
		p = g.dial() // each client has its own limit
		p.want("220")
		p.ask("XCLIENT ADDR="+client, "421 4.7.1 too many unknown recipients")
	}
}
