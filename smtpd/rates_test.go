package smtpd

import (
	"fmt"
	"io"
	"net"
	"net/netip"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"mailproxy/config"
	"mailproxy/mail"
)

func TestARateFillsUpEvenly(t *testing.T) {
	var r rates
	now := time.Unix(1_800_000_000, 0)
	a, b := keyOf(netip.MustParseAddr("192.0.2.1")), keyOf(netip.MustParseAddr("192.0.2.2"))
	takes := func(key clientKey, at time.Time) (n int) {
		for n < 100 && r.take(key, rateMessages, 6, time.Minute, at) {
			n++
		}
		return n
	}
	for _, c := range []struct {
		what  string
		key   clientKey
		after time.Duration
		want  int
	}{
		{"at first as many as a minute has", a, 0, 6},
		{"then none", a, 9 * time.Second, 0},
		{"one in each sixth of a minute", a, 10 * time.Second, 1},
		{"another client has its own", b, 10 * time.Second, 6},
		{"after a long rest no more than a minute has", a, time.Hour, 6},
		{"the clock is set back", a, -24 * time.Hour, 0},
		{"it goes on from there", a, -24*time.Hour + 10*time.Second, 1},
		{"and a minute later all is as ever", a, -24*time.Hour + 70*time.Second, 6},
	} {
		if n := takes(c.key, now.Add(c.after)); n != c.want {
			t.Errorf("%s: %d, want %d", c.what, n, c.want)
		}
	}
	now = now.Add(-24*time.Hour + 70*time.Second)
	if !r.isSpent(a, rateMessages, 6, time.Minute, now) || r.isSpent(a, rateUnknown, 6, time.Minute, now) {
		t.Error("isSpent does not say what take does")
	}
	if !r.take(a, rateMessages, 0, time.Minute, now) {
		t.Error("0 is a limit")
	}
}

func TestClientsAreRememberedWithinABound(t *testing.T) {
	var r rates
	now := time.Now()
	busy := keyOf(netip.MustParseAddr("192.0.2.1"))
	for i := range 3 * maxTallies {
		if i%1000 == 0 { // who comes again and again is not forgotten
			if !r.take(busy, rateUnknown, 100_000, time.Hour, now) {
				t.Fatal("refused")
			}
		}
		r.take(netip.PrefixFrom(netip.AddrFrom4([4]byte{10, byte(i >> 16), byte(i >> 8), byte(i)}), 32), rateUnknown, 10, time.Hour, now)
	}
	if n := len(r.young) + len(r.old); n > maxTallies {
		t.Errorf("%d clients, want at most %d", n, maxTallies)
	}
	gone := time.Duration(r.tallyLocked(busy)[rateUnknown] - now.UnixNano()).Round(time.Millisecond)
	if want := 3 * maxTallies / 1000 * time.Hour / 100_000; gone != want {
		t.Errorf("of a busy client's rate %v are used up, want %v", gone, want)
	}
}

// dialFrom connects from another address of this host.
func (g *rig) dialFrom(address string) *peer {
	g.t.Helper()
	d := net.Dialer{LocalAddr: &net.TCPAddr{IP: net.ParseIP(address)}}
	c, err := d.Dial("tcp", g.addr)
	if err != nil {
		g.t.Fatal(err)
	}
	g.t.Cleanup(func() { _ = c.Close() })
	_ = c.SetDeadline(time.Now().Add(patience))
	return newPeer(g.t, c)
}

func TestSessionsAreLimitedPerNetwork(t *testing.T) {
	g := newRig(t, with(snapshot(), "max_sessions_per_network", "2", "max_sessions_per_address", "1"), nil)
	first := g.dialFrom("127.0.0.1")
	first.want("220")
	g.dialFrom("127.0.0.2").want("220")
	g.dialFrom("127.0.0.3").want("421 4.7.0 too many sessions from your network")
	g.dialFrom("127.0.1.3").want("220")
	first.ask("QUIT", "221")
	waitFor(t, "the session has ended", func() bool { return g.server.Stats().Open == 2 })
	g.dialFrom("127.0.0.3").want("220")
	for s, want := range map[string]string{"192.0.2.200": "192.0.2.0/24", "2001:db8:0:1:2::3": "2001:db8:0:1::/64"} {
		if got := networkOf(netip.MustParseAddr(s)).String(); got != want {
			t.Errorf("network of %s: %s, want %s", s, got, want)
		}
	}
}

// However many come from the Internet, there is room for our own networks, and the other way round; on one port too.
func TestEachSideHasItsOwnRoom(t *testing.T) {
	s := with(snapshot(), "max_sessions", "1", "internal_max_sessions", "2")
	s.Networks = []config.Network{{Prefix: netip.MustParsePrefix("127.0.0.2/32")}}
	g := newRig(t, s, nil)
	g.dialFrom("127.0.0.1").want("220")
	g.dialFrom("127.0.0.1").want("421 4.3.2")
	g.dialFrom("127.0.0.2").want("220")
	g.dialFrom("127.0.0.2").want("220")
	g.dialFrom("127.0.0.2").want("421 4.3.2")
}

func TestOnAnMXListenerOurNetworksHaveNoRoomOfTheirOwn(t *testing.T) {
	s := with(snapshot(), "max_sessions", "1")
	s.Networks = []config.Network{loopback}
	g := newRig(t, s, nil)
	g.dialKind(Kind{Purpose: MX}).want("220")
	g.dialKind(Kind{Purpose: MX}).want("421 4.3.2")
	g.dialKind(Kind{Purpose: Internal}).want("220")
}

func TestClientsAreLimitedByTheMinute(t *testing.T) {
	h := newHop(t)
	trusted := config.Network{Prefix: netip.MustParsePrefix("127.0.0.9/32")}
	for _, side := range []struct{ prefix, address string }{{"", "127.0.0.8"}, {"internal_", "127.0.0.9"}} {
		rig := func(setting, value string) *rig {
			s := with(snapshot("one.test", h.addr()), side.prefix+setting, value)
			s.Networks = []config.Network{trusted}
			return newRig(t, s, nil)
		}
		t.Run(side.prefix+"connections", func(t *testing.T) {
			g := rig("max_connections_per_minute", "2")
			g.dialFrom(side.address).want("220")
			g.dialFrom(side.address).want("220")
			for range 3 {
				p := g.dialFrom(side.address)
				p.want("421 4.7.0 too many connections")
				p.wantEnd()
			}
			g.dialFrom("127.0.0.7").want("220")
			if n := g.server.Stats().Limited["connections"]; n != 3 {
				t.Errorf("counted %d, want 3", n)
			}
			if n := strings.Count(g.log.String(), `"limit":"connections"`); n != 1 {
				t.Errorf("logged %d times, want once", n)
			}
			if n := g.server.Stats().Open; n != 3 {
				t.Errorf("%d sessions are open, want 3: a refused one takes no room", n)
			}
		})
		t.Run(side.prefix+"messages", func(t *testing.T) {
			g := rig("max_messages_per_minute", "2")
			p := g.dialFrom(side.address)
			p.want("220")
			p.ask("EHLO client.test", "250")
			for range 2 {
				p.ask("MAIL FROM:<a@sender.test>", "250")
				p.ask("RSET", "250")
			}
			p.ask("MAIL FROM:<a@sender.test>", "450 4.7.1")
			p.ask("RCPT TO:<x@one.test>", "503")
			other := g.dialFrom("127.0.0.7")
			other.want("220")
			other.ask("EHLO client.test", "250")
			other.ask("MAIL FROM:<a@sender.test>", "250")
			if n := g.server.Stats().Limited["messages"]; n != 1 {
				t.Errorf("counted %d, want 1", n)
			}
		})
		t.Run(side.prefix+"recipients", func(t *testing.T) {
			g := rig("max_recipients_per_minute", "2")
			p := g.dialFrom(side.address)
			p.want("220")
			p.ask("EHLO client.test", "250")
			p.ask("MAIL FROM:<a@sender.test>", "250")
			p.ask("RCPT TO:<a@one.test>", "250")
			p.ask("RCPT TO:<b@one.test>", "250")
			p.ask("RCPT TO:<c@one.test>", "450 4.7.1")
			p.ask("DATA", "354")
			p.send("x\r\n.\r\n")
			p.want("250")
			if n := g.server.Stats().Limited["recipients"]; n != 1 {
				t.Errorf("counted %d, want 1", n)
			}
		})
	}
}

// unknown makes a hop refuse so many recipients, u0 and on.
func (h *hop) unknown(n int) {
	for i := range n {
		h.set(fmt.Sprintf("rcpt u%d@one.test", i), "550 5.1.1 no such user")
	}
}

func TestASessionThatHarvestsIsToldNothingMore(t *testing.T) {
	h := newHop(t)
	h.unknown(3)
	g := newRig(t, with(snapshot("one.test", h.addr()), "max_unknown_recipients", "3", "max_recipients", "100"), nil)
	p := g.hello()
	p.ask("MAIL FROM:<a@sender.test>", "250")
	p.ask("RCPT TO:<known@one.test>", "250")
	for i := range 3 {
		p.ask(fmt.Sprintf("RCPT TO:<u%d@one.test>", i), "550 5.1.1")
	}
	before := h.rcpts()
	p.ask("RCPT TO:<other@one.test>", "450 4.7.1 too many unknown recipients") // whether there is one or not
	p.ask("RCPT TO:<u0@one.test>", "450 4.7.1 too many unknown recipients")
	if n := h.rcpts(); n != before {
		t.Errorf("the next hop was asked %d times more", n-before)
	}
	p.ask("DATA", "354") // an old list: whom it reached has the mail
	p.send("x\r\n.\r\n")
	p.want("250")
	p.ask("MAIL FROM:<a@sender.test>", "421 4.7.1 too many unknown recipients")
	p.wantEnd()
	if m := h.messages(); len(m) != 1 || len(m[0].to) != 1 || m[0].to[0] != "known@one.test" {
		t.Errorf("%+v", m)
	}
	if n := g.server.Stats().Limited["unknown_recipients"]; n != 3 {
		t.Errorf("counted %d, want 3", n)
	}
}

func TestASessionThatGoesOnHarvestingEnds(t *testing.T) {
	h := newHop(t)
	h.unknown(1)
	g := newRig(t, with(snapshot("one.test", h.addr()), "max_unknown_recipients", "1", "max_recipients", "100"), nil)
	p := g.hello()
	p.ask("MAIL FROM:<a@sender.test>", "250")
	p.ask("RCPT TO:<u0@one.test>", "550")
	for range 100 {
		p.ask("RCPT TO:<x@one.test>", "450")
	}
	p.ask("RCPT TO:<x@one.test>", "421 4.7.1")
	p.wantEnd()
}

func TestAClientThatHarvestsIsSentAway(t *testing.T) {
	h := newHop(t)
	h.unknown(4)
	s := with(snapshot("one.test", h.addr()), "max_unknown_recipients_per_hour", "4", "max_unknown_recipients", "0")
	s.Networks = []config.Network{{Prefix: netip.MustParsePrefix("127.0.0.9/32")}}
	g := newRig(t, s, nil)
	try := func(address string) {
		t.Helper()
		for i := range 4 { // a session each
			p := g.dialFrom(address)
			p.want("220")
			p.ask("EHLO client.test", "250")
			p.ask("MAIL FROM:<a@sender.test>", "250")
			p.ask(fmt.Sprintf("RCPT TO:<u%d@one.test>", i), "550")
			p.ask("QUIT", "221")
		}
	}
	try("127.0.0.8")
	p := g.dialFrom("127.0.0.8")
	p.want("421 4.7.1 too many unknown recipients")
	p.wantEnd()
	g.dialFrom("127.0.0.7").want("220")
	try("127.0.0.9") // one of ours is let in
	g.dialFrom("127.0.0.9").want("220")
}

func TestACommandThatHasBegunMustComeToItsEnd(t *testing.T) {
	g := newRig(t, snapshot(), nil)
	synctest.Test(t, func(t *testing.T) {
		near, far := net.Pipe()
		c := newConn(g.server, near, Kind{}, g.rules.Load())
		c.phase = phaseCommand
		heard := make(chan string)
		go func() {
			all, _ := io.ReadAll(far)
			heard <- string(all)
		}()
		go func() {
			time.Sleep(3 * time.Minute) // silence is allowed for that long
			for _, x := range "NOOP and so on, an octet at a time" {
				if _, err := io.WriteString(far, string(x)); err != nil {
					return
				}
				time.Sleep(10 * time.Second)
			}
		}()
		start := time.Now()
		if c.readLine() != nil {
			t.Error("a line")
		}
		if d := time.Since(start); d != 3*time.Minute+lineTime {
			t.Errorf("ended after %v", d)
		}
		_ = near.Close()
		if got := <-heard; got != "421 4.4.2 too slow\r\n" {
			t.Errorf("heard %q", got)
		}
		time.Sleep(time.Hour)
	})
	if n := g.server.Stats().Limited["slow"]; n != 1 {
		t.Errorf("counted %d, want 1", n)
	}
}

func TestALimitIsLoggedAtMostOnceInAWhileWithACount(t *testing.T) {
	var l limitLog
	now := time.Now()
	var said []uint64
	for i := range 100 {
		if n := l.met(now.Add(time.Duration(i) * time.Second)); n > 0 {
			said = append(said, n)
		}
	}
	if fmt.Sprint(said) != "[1 30 30 30]" || l.count() != 100 {
		t.Errorf("said %v of %d", said, l.count())
	}
}

func TestNoReplyForALimitIsForGood(t *testing.T) {
	for _, r := range append([]*mail.Reply{replyTooManyMessages, replyTooManyRecipients, replyUnknownMany}, replies(overReplies)...) {
		if !r.Temporary() || r.Code != 421 && r.Code != 450 {
			t.Errorf("%d %s", r.Code, r.Text)
		}
	}
}

func replies(m map[limit]*mail.Reply) (all []*mail.Reply) {
	for _, r := range m {
		all = append(all, r)
	}
	return all
}
