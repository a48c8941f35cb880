package smtpd

import (
	"bufio"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/netip"
	"strings"
	"sync/atomic"
	"testing"
	"time"
	"unicode"
	"unicode/utf8"

	"mailproxy/config"
	"mailproxy/filter"
	"mailproxy/mail"
)

// begin opens a transaction up to 354.
func (p *peer) begin(to ...string) {
	p.t.Helper()
	p.ask("MAIL FROM:<a@sender.test>", "250")
	for _, r := range to {
		p.ask("RCPT TO:<"+r+">", "250")
	}
	p.ask("DATA", "354")
}

func TestOtherWaysToEndAMessageAreNotEndsForTheNextHopEither(t *testing.T) {
	h := newHop(t)
	g := newRig(t, snapshot("one.test", h.addr()), nil)
	p := g.hello()
	taken := 0
	for _, sequence := range notEnds {
		body := "one" + sequence + "MAIL FROM:<evil@test>\r\n.\r\n"
		want, _, _ := model(body)
		for cut := 0; cut <= len(body); cut++ {
			p.begin("x@one.test")
			p.send(body[:cut])
			p.send(body[cut:])
			p.want("250 2.0.0 taken")
			got := h.messages()
			if taken++; len(got) != taken {
				t.Fatalf("%q cut at %d: %d messages, want %d", body, cut, len(got), taken)
			}
			wire := withoutReceived(t, got[taken-1].wire)
			if message := strings.ReplaceAll("\r\n"+wire, "\r\n.", "\r\n")[2:]; message != want {
				t.Fatalf("%q cut at %d: next hop has %q, want %q", body, cut, message, want)
			}
			if strings.Contains("\r\n"+wire, "\r\n.\r\n") || strings.ContainsAny(strings.ReplaceAll(wire, "\r\n", ""), "\r\n") {
				t.Fatalf("%q: on the wire to the next hop: %q", body, wire)
			}
		}
	}
}

func TestMessageArrivesByteForByte(t *testing.T) {
	h := newHop(t)
	g := newRig(t, snapshot("one.test", h.addr()), nil)
	p := g.hello()
	for _, c := range []struct{ name, body string }{
		{"plain", "Subject: x\r\n\r\nhello\r\n"},
		{"8-bit and NUL", "\r\n\xff\x00\x80\r\n"},
		{"a line of 100,000 octets", strings.Repeat("x", 100_000) + "\r\n"},
		{"dots", ".\r\n..\r\n.x\r\nx.\r\n"},
		{"nothing", ""},
		{"5 MB, past what is held in memory", "Subject: x\r\n\r\n" + strings.Repeat(strings.Repeat("y", 70)+"\r\n", 5<<20/72)},
	} {
		t.Run(c.name, func(t *testing.T) {
			before := len(h.messages())
			p.begin("x@one.test")
			p.send(strings.ReplaceAll("\r\n"+c.body, "\r\n.", "\r\n..")[2:] + ".\r\n")
			p.want("250")
			wire := h.messages()[before].wire
			if got := strings.ReplaceAll("\r\n"+withoutReceived(t, wire), "\r\n.", "\r\n")[2:]; got != c.body {
				t.Errorf("%d octets arrived, %d sent", len(got), len(c.body))
			}
		})
	}
}

func TestReceivedSaysWhoAndHow(t *testing.T) {
	h := newHop(t)
	g := behind(t, snapshot("one.test", h.addr()), func(o *Options) { o.Resolver = dnsServer(t) })
	p := g.dialFor("192.0.2.77")
	p.want("220")
	p.ask("EHLO cl<i>e\"n\\t(.test", "250")
	p.begin("x@one.test")
	p.send("x\r\n.\r\n")
	id := ids.FindString(p.want("250"))
	wire := h.messages()[0].wire
	want := "Received: from cl?i?e?n?t?.test (unknown [192.0.2.77])\r\n\tby mx.test with ESMTP id " + id + "\r\n\tfor <x@one.test>;\r\n\t"
	date, ok := strings.CutPrefix(wire, want)
	if !ok {
		t.Fatalf("got %q, want %q", wire, want)
	}
	if _, err := time.Parse(time.RFC1123Z, date[:strings.Index(date, "\r\n")]); err != nil {
		t.Error(err)
	}
	if log := g.log.String(); !strings.Contains(log, id) {
		t.Errorf("the log does not know %s:\n%s", id, log)
	}
}

func TestReceivedNamesARecipientOnlyWhereThereIsNoOther(t *testing.T) {
	h := newHop(t)
	g := newRig(t, snapshot("one.test", h.addr()), nil)
	p := g.hello()
	for _, to := range [][]string{{"x@one.test"}, {"x@one.test", "blind@one.test"}} {
		p.begin(to...)
		p.send(".\r\n")
		p.want("250")
		m := h.messages()
		wire := m[len(m)-1].wire
		if named := strings.Contains(wire, "for <x@one.test>"); named != (len(to) == 1) || strings.Contains(wire, "blind") {
			t.Errorf("to %q: %q", to, wire)
		}
	}
}

func TestQuotedLocalPartsReachTheNextHopAsTheyAre(t *testing.T) {
	h := newHop(t)
	s := snapshot("one.test", h.addr())
	s.Networks = []config.Network{{Prefix: netip.MustParsePrefix("127.0.0.0/8")}} // a stranger may not have the @
	g := newRig(t, s, nil)
	p := g.hello()
	for _, to := range []string{`"a> NOTIFY=NEVER <b"@one.test`, `"v@evil>"@one.test`, `"a b"@one.test`, `"a\"b\\c"@one.test`} {
		p.begin(to)
		p.send(".\r\n")
		p.want("250")
		m := h.messages()
		if got := m[len(m)-1].to; len(got) != 1 || got[0] != to {
			t.Errorf("%s arrived as %q", to, got)
		}
	}
	p.ask(`MAIL FROM:<"a> X=Y <b"@sender.test>`, "250")
	p.ask("RCPT TO:<x@one.test>", "250")
	p.ask("DATA", "354")
	p.send(".\r\n")
	p.want("250")
	m := h.messages()
	if got := m[len(m)-1].from; got != `<"a> X=Y <b"@sender.test>` {
		t.Errorf("reverse-path arrived as %s", got)
	}
	p.ask("MAIL FROM:<a@sender.test>", "250")
	for _, bad := range []string{`"a\`, `"a"b@one.test`, `a"b"@one.test`, `a>b@one.test`, `"a` + "\t" + `"@one.test`, `"a"@one.test@two.test`} {
		p.ask("RCPT TO:<"+bad+">", "501")
	}
}

func TestMessageOfExactlyTheLimitIsTaken(t *testing.T) {
	h := newHop(t)
	s := snapshot("one.test", h.addr())
	s.Settings = []config.Setting{{Name: "max_message_size", Value: "64kB"}}
	g := newRig(t, s, nil)
	p := g.hello()
	p.ask("MAIL FROM:<a@sender.test> SIZE=65537", "552 5.3.4")
	p.ask("MAIL FROM:<a@sender.test> SIZE=65536", "250")
	p.ask("RCPT TO:<x@one.test>", "250")
	p.ask("DATA", "354")
	body := strings.Repeat(strings.Repeat("x", 62)+"\r\n", 1024)
	p.send(body + ".\r\n")
	p.want("250")
	p.begin("x@one.test")
	p.send(body + "x\r\n.\r\n")
	p.want("552 5.3.4")
	p.wantEnd()
	if n := len(h.messages()); n != 1 {
		t.Errorf("%d messages arrived", n)
	}
	// One that does not end is cut off, and what follows is not run.
	p = g.hello()
	p.begin("x@one.test")
	go io.WriteString(p.Conn, strings.Repeat(strings.Repeat("x", 62)+"\r\n", (drainBytes+1<<20)/64)+"\r\n.\r\nNOOP\r\n") // ends with the connection
	p.want("552 5.3.4")
	p.wantEnd()
}

func TestMessageThatWentRoundIsRefused(t *testing.T) {
	h := newHop(t)
	g := newRig(t, snapshot("one.test", h.addr()), nil)
	p := g.hello()
	p.begin("x@one.test")
	p.send(strings.Repeat("Received: x\r\n", maxHops) + "\r\n.\r\n")
	p.want("250")
	p.begin("x@one.test")
	p.send(strings.Repeat("Received: x\r\n", maxHops+1) + "\r\n.\r\n")
	p.want("554 5.4.6")
}

func TestATransactionKeepsTheRulesOfItsMAIL(t *testing.T) {
	h := newHop(t)
	g := newRig(t, snapshot("one.test", h.addr()), nil)
	p := g.hello()
	p.ask("MAIL FROM:<a@sender.test>", "250")
	g.use(snapshot("two.test", h.addr()))
	p.ask("RCPT TO:<x@one.test>", "250")
	p.ask("RCPT TO:<x@two.test>", "554")
	p.ask("RSET", "250")
	p.ask("MAIL FROM:<a@sender.test>", "250")
	p.ask("RCPT TO:<x@one.test>", "554")
	p.ask("RCPT TO:<x@two.test>", "250")
}

func TestWithoutAConfigurationClientsAreToldToComeAgain(t *testing.T) {
	g := newRig(t, snapshot(), func(o *Options) { o.Rules = func() *filter.Ruleset { return nil } })
	p := g.dial()
	p.want("421 4.3.2 not ready")
	p.wantEnd()
}

func TestInputBeforeTheGreetingIsRefused(t *testing.T) {
	g := newRig(t, snapshot(), nil)
	l := g.listen()
	early, late := dialTo(t, l.Addr().String()), dialTo(t, l.Addr().String())
	early.send("EHLO client.test\r\n") // waits in the kernel: nobody has accepted yet
	g.serve(l)
	early.want("554 5.5.0")
	early.wantEnd()
	late.want("220")
}

func TestAnErrorOfOursIs451AndItsTextStaysInTheLog(t *testing.T) {
	g := newRig(t, snapshot(), nil)
	c := newConn(g.server, nopConn{}, Kind{}, g.rules.Load())
	err := c.door(nil, fmt.Errorf("password is hunter2"))
	if got := string(appendReply(nil, c.answer)); got != "451 4.3.0 local error, try again later\r\n" || strings.Contains(err.Error(), "hunter2") {
		t.Errorf("on the wire: %q, to go-smtp: %v", got, err)
	}
	if !strings.Contains(g.log.String(), "hunter2") {
		t.Error("the cause is not in the log")
	}
}

func TestOnlyOurOwnRepliesGoOut(t *testing.T) {
	g := newRig(t, snapshot(), nil)
	cases := []struct {
		name, wrote, want string
		answer            *mail.Reply
		phase             phase
	}{
		{"go-smtp agrees", "250 2.0.0 go-smtp's text\r\n", "250 2.1.5 OK\r\n", replyRcptOK, phaseCommand},
		{"go-smtp refuses what we would take", "501 5.5.2 go-smtp's text\r\n", "501 5.5.0 refused\r\n", replyRcptOK, phaseCommand},
		{"go-smtp takes what we know nothing of", "250 2.0.0 go-smtp's text\r\n", "451 4.3.0 local error, try again later\r\n", nil, phaseCommand},
		{"several lines", "250-a\r\n250-b\r\n250 c\r\n", "250 2.0.0 OK\r\n", replyOK, phaseCommand},
		{"354 for DATA", "354 go-smtp's text\r\n", "354 end with <CRLF>.<CRLF>\r\n", nil, phaseBody},
		{"354 from a next hop is no DATA", "354 go-smtp's text\r\n", "354 x\r\n", r(354, 0, "x"), phaseCommand},
	}
	for _, c := range cases {
		t.Run(c.name, func(t *testing.T) {
			for cut := range c.wrote {
				conn := newConn(g.server, nopConn{}, Kind{}, g.rules.Load())
				conn.phase, conn.answer = phaseCommand, c.answer
				for _, part := range []string{c.wrote[:cut], c.wrote[cut:]} {
					if n, err := conn.Write([]byte(part)); n != len(part) || err != nil {
						t.Fatal(n, err)
					}
				}
				if string(conn.out) != c.want || conn.phase != c.phase {
					t.Fatalf("cut at %d: %q, phase %d; want %q", cut, conn.out, conn.phase, c.want)
				}
			}
		})
	}
}

func TestAMessageTakenForgivesRefusals(t *testing.T) {
	h := newHop(t)
	s := snapshot("one.test", h.addr())
	s.Settings = []config.Setting{{Name: "max_errors", Value: "2"}}
	g := newRig(t, s, nil)
	p := g.hello()
	for range 3 {
		p.ask("FOO", "500")
		p.ask("FOO", "500")
		p.begin("x@one.test")
		p.send(".\r\n")
		p.want("250")
	}
	p.ask("FOO", "500")
	p.ask("FOO", "500")
	p.ask("FOO", "500")
	p.want("421 4.7.0")
	p.wantEnd()
	if n := g.server.Stats().Limited["errors"]; n != 1 {
		t.Errorf("counted %d, want 1", n)
	}
}

type nopConn struct{ net.Conn }

func (nopConn) RemoteAddr() net.Addr { return &net.TCPAddr{IP: net.IPv4(192, 0, 2, 1)} }

func TestAPanicEndsTheSessionWith421AndNoOther(t *testing.T) {
	var calls atomic.Int32
	g := newRig(t, snapshot(), func(o *Options) {
		rules := o.Rules
		o.Rules = func() *filter.Ruleset {
			if calls.Add(1) == 3 { // Accept, EHLO, MAIL
				panic("secret")
			}
			return rules()
		}
	})
	p := g.hello()
	if got := p.ask("MAIL FROM:<a@sender.test>", "421 4.3.0"); strings.Contains(got, "secret") {
		t.Errorf("leaks: %q", got)
	}
	p.wantEnd()
	waitFor(t, "the panic is in the log", func() bool { return strings.Contains(g.log.String(), "secret") })
	g.hello()
}

func TestNothingOfTheClientsIsEchoed(t *testing.T) {
	h := newHop(t)
	s := snapshot("one.test", h.addr())
	s.Settings = []config.Setting{{Name: "max_errors", Value: "100"}}
	g := newRig(t, s, nil)
	p := g.dial()
	p.want("220")
	for _, line := range []string{
		"MARK", "EHLO mark.test", "VRFY mark", "MAIL FROM:<mark@sender.test>", "RCPT TO:<mark@one.test>", "RCPT TO:<mark@no.test>", "RSET mark",
		"RCPT TO:<mark@mark@x>", "NOOP mark", "EXPN mark", "AUTH MARK", "RSET", "MAIL FROM:<mark> MARK=MARK",
	} {
		if got := p.ask(line, ""); strings.Contains(strings.ToLower(got), "mark") {
			t.Errorf("%s: %s", line, got)
		}
	}
}

// TestNothingOfTheNetworksIsUnescaped: what a client says of itself and of others, and what a next hop answers, comes into replies,
// headers and the log only as what can be printed.
func TestNothingOfTheNetworksIsUnescaped(t *testing.T) {
	h := newHop(t)
	h.set("rcpt no@one.test", "550 5.1.1 \x1b[31mno\x7f\xc2\x9b31m such \xff\xe2\x80\xa8 user")
	h.set("dot", "554 5.7.1 \x1b]0;title\x07 \xc2\x85 no")
	g := newRig(t, with(snapshot("one.test", h.addr()), "max_errors", "100"), nil)
	p := g.dial()
	var said strings.Builder
	p.r = bufio.NewReader(io.TeeReader(p.Conn, &said))
	p.want("220")
	p.ask("EHLO cl\xc2\x9bient\xe2\x80\xae(.te<st", "250")
	p.ask("MAIL FROM:<a\xe2\x80\xaeb@sender.test> SMTPUTF8", "501")
	p.ask("MAIL FROM:<\"a\xc2\x9bb\"@sender.test> SMTPUTF8", "501")
	p.ask(`MAIL FROM:<"(a\"\\b>"@sender.test> SMTPUTF8`, "250")
	p.ask("RCPT TO:<x@\xe2\x80\xaeone.test>", "501")
	p.ask("RCPT TO:<no@one.test>", "550")
	p.ask("RCPT TO:<\xc3\xa9@two.test>", "554")
	p.ask("RCPT TO:<x@one.test>", "250")
	p.ask("DATA", "354")
	p.send("Subject: x\r\n\r\n\x1b[31m\r\n.\r\n")
	p.want("554")
	h.set("dot", "250 2.0.0 \x1b[31m taken")
	p.begin("x@one.test")
	p.send("x\r\n.\r\n")
	p.want("250")
	unprintable := func(r rune) bool {
		return r != '\n' && (unicode.IsControl(r) || !unicode.IsPrint(r)) || r == utf8.RuneError
	}
	if i := strings.IndexFunc(strings.ReplaceAll(said.String(), "\r\n", "\n"), unprintable); i >= 0 {
		t.Errorf("in a reply: %q", said.String()[max(0, i-20):])
	}
	log := g.log.String()
	if i := strings.IndexFunc(log, unprintable); i >= 0 {
		t.Errorf("in the log: %q", log[max(0, i-100):])
	}
	for line := range strings.Lines(log) {
		if !json.Valid([]byte(line)) {
			t.Errorf("no JSON: %q", line)
		}
	}
	field, _, _ := strings.Cut(h.messages()[0].wire, "\r\nx\r\n")
	if strings.ContainsFunc(strings.ReplaceAll(field, "\r\n\t", ""), unprintable) || !strings.HasPrefix(field, "Received: from cl??ient????.te?st ") {
		t.Errorf("in the header: %q", field)
	}
}

func TestABurstIsAnsweredInOneWrite(t *testing.T) {
	h := newHop(t)
	g := newRig(t, snapshot("one.test", h.addr()), nil)
	l := &countingListener{Listener: g.listen()}
	g.serve(l)
	p := dialTo(t, l.Addr().String())
	p.want("220")
	p.ask("EHLO client.test", "250")
	l.writes.Store(0)
	p.send("MAIL FROM:<a@sender.test>\r\n" + strings.Repeat("RCPT TO:<x@one.test>\r\n", 20) + "DATA\r\n")
	for range 21 {
		p.want("250")
	}
	p.want("354")
	if n := l.writes.Load(); n != 1 {
		t.Errorf("%d writes for 22 replies", n)
	}
}

func TestALongBurstIsTakenWhole(t *testing.T) {
	h := newHop(t)
	g := newRig(t, snapshot("one.test", h.addr()), nil)
	p := g.hello()
	const recipients = 990
	go io.WriteString(p.Conn, "MAIL FROM:<a@sender.test>\r\n"+strings.Repeat("RCPT TO:<x@one.test>\r\n", recipients)+"DATA\r\n")
	for range recipients + 1 {
		p.want("250")
	}
	p.want("354")
	p.send(".\r\n" + strings.Repeat("RSET\r\n", 20000) + "QUIT\r\n") // more than is read ahead
	p.want("250 2.0.0 taken")
	for range 20000 {
		p.want("250 2.0.0 OK")
	}
	p.want("221")
	if m := h.messages(); len(m) != 1 || len(m[0].to) != recipients {
		t.Errorf("%d messages", len(m))
	}
}

func TestInternationalizedAddresses(t *testing.T) {
	h := newHop(t)
	g := newRig(t, snapshot("xn--bcher-kva.test", h.addr()), nil)
	p := g.hello()
	p.ask("MAIL FROM:<a@sender.test>", "250")
	p.ask("RCPT TO:<b\u00fc@b\u00fccher.test>", "553 5.6.7")
	p.ask("RSET", "250")
	p.ask("MAIL FROM:<\u00e4@sender.test> SMTPUTF8", "250")
	p.ask("RCPT TO:<b\u00fc@b\u00fccher.test>", "250")
	p.ask("DATA", "354")
	p.send("x\r\n.\r\n")
	p.want("250")
	if m := h.messages(); len(m) != 1 || m[0].to[0] != "b\u00fc@b\u00fccher.test" || !strings.Contains(m[0].wire, " with UTF8SMTP id ") ||
		!strings.HasSuffix(m[0].from, " SMTPUTF8") || strings.Contains(m[0].wire, "for <") {
		t.Errorf("%+v", m)
	}
}

func TestBothFormsOfADomainGoToOneNextHop(t *testing.T) {
	s := &config.Snapshot{Domains: config.NewDomains([]config.Domain{{Name: "xn--bcher-kva.test", Transport: "way"}}), Transports: []config.Transport{{Name: "way"}}}
	g := newRig(t, s, nil)
	c := newConn(g.server, nopConn{}, Kind{}, g.rules.Load())
	c.tx = &transaction{rules: g.rules.Load(), settings: g.rules.Load().Settings()}
	for _, domain := range []string{"b\u00fccher.test", "xn--bcher-kva.test"} {
		to, hop, refused := c.recipient(mail.Path{Local: "postmaster", Domain: domain}) // whom no next hop is asked about
		if refused != nil || to.Domain != domain {
			t.Fatal(to, refused)
		}
		c.tx.envelope.ForwardPaths, c.tx.hops = append(c.tx.envelope.ForwardPaths, to), append(c.tx.hops, hop)
	}
	if now, _ := c.tx.groups(); len(now) != 1 || len(now[0].recipients) != 2 {
		t.Errorf("%d next hops", len(now))
	}
}

type countingListener struct {
	net.Listener
	writes atomic.Int32
}

func (l *countingListener) Accept() (net.Conn, error) {
	c, err := l.Listener.Accept()
	return &countingConn{c, l}, err
}

type countingConn struct {
	net.Conn
	l *countingListener
}

func (c *countingConn) Write(p []byte) (int, error) {
	c.l.writes.Add(1)
	return c.Conn.Write(p)
}
