package smtpd

import (
	"context"
	"io"
	"net"
	"net/netip"
	"strconv"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"mailproxy/config"
)

func with(s *config.Snapshot, pairs ...string) *config.Snapshot {
	for i := 0; i < len(pairs); i += 2 {
		s.Settings = append(s.Settings, config.Setting{Name: pairs[i], Value: pairs[i+1]})
	}
	return s
}

func TestSessionsAreLimitedInAllAndPerAddress(t *testing.T) {
	for _, c := range []struct{ name, setting, want string }{
		{"in all", "max_sessions", "421 4.3.2"},
		{"per address", "max_sessions_per_address", "421 4.7.0"},
	} {
		t.Run(c.name, func(t *testing.T) {
			g := newRig(t, with(snapshot(), c.setting, "2"), nil)
			first, second, third := g.dial(), g.dial(), g.dial()
			first.want("220")
			second.want("220")
			third.want(c.want)
			third.wantEnd()
			first.ask("QUIT", "221")
			waitFor(t, "the session has ended", func() bool { return g.server.Stats().Open == 1 })
			g.dial().want("220")
		})
	}
}

func TestIPv6ClientsAreCountedByTheir64(t *testing.T) {
	a, b := keyOf(netip.MustParseAddr("2001:db8::1")), keyOf(netip.MustParseAddr("2001:db8::ffff:0:0:1"))
	other, v4, next := keyOf(netip.MustParseAddr("2001:db8:0:1::1")), keyOf(netip.MustParseAddr("192.0.2.1")), keyOf(netip.MustParseAddr("192.0.2.2"))
	if a != b || a == other || v4 == next {
		t.Error(a, b, other, v4, next)
	}
}

func TestSilentClientIsSentAway(t *testing.T) {
	h := newHop(t)
	g := newRig(t, with(snapshot("one.test", h.addr()), "idle_timeout", "1s"), nil)
	silent, dripping, inBody := g.hello(), g.hello(), g.hello()
	inBody.begin("x@one.test")
	inBody.send("Subject: x\r\n")
	stop := make(chan struct{})
	go func() { // an octet at a time does not keep a command alive
		tick := time.NewTicker(100 * time.Millisecond)
		defer tick.Stop()
		for {
			if _, err := io.WriteString(dripping.Conn, "N"); err != nil {
				return
			}
			select {
			case <-tick.C:
			case <-stop:
				return
			}
		}
	}()
	defer close(stop)
	for _, p := range []*peer{silent, dripping, inBody} {
		p.want("421 4.4.2")
	}
	// What comes after the time-out is not run as commands.
	_, _ = io.WriteString(inBody.Conn, "MAIL FROM:<evil@test>\r\n")
	silent.wantEnd()
	inBody.wantEnd()
	if n := len(h.messages()); n != 0 {
		t.Errorf("%d messages", n)
	}
}

func TestAMessageMustComeAtAMinimumRate(t *testing.T) {
	now := time.Now()
	c := &conn{idle: time.Minute, expiry: now.Add(time.Hour)}
	in := func(d time.Time) time.Duration { return time.Until(d).Round(time.Second) }
	if d, _ := c.bodyDeadline(now, 0, 500); in(d) != time.Minute {
		t.Errorf("at its start: %v", in(d))
	}
	// Two minutes gone, 10,000 octets: 20 s of credit at 500 a second, used up 40 s ago.
	if d, late := c.bodyDeadline(now.Add(-2*time.Minute), 10_000, 500); in(d) != -40*time.Second || late != replyTooSlow {
		t.Errorf("too slow: %v, %v", in(d), late)
	}
	if d, late := c.bodyDeadline(now.Add(-2*time.Minute), 1_000_000, 500); in(d) != time.Minute || late != replyIdle {
		t.Errorf("fast enough: %v, %v", in(d), late)
	}
	c.expiry = now.Add(10 * time.Second)
	if d, late := c.bodyDeadline(now, 0, 500); in(d) != 10*time.Second || late != replyTooOld {
		t.Errorf("an old session: %v, %v", in(d), late)
	}
}

func TestASessionThatGoesOnTalkingEndsAtItsAge(t *testing.T) {
	g := newRig(t, with(snapshot(), "session_timeout", "1m"), nil)
	synctest.Test(t, func(t *testing.T) {
		near, far := net.Pipe()
		c := newConn(g.server, near, Kind{}, g.rules.Load())
		c.phase = phaseCommand
		var heard strings.Builder
		var wg sync.WaitGroup
		wg.Go(func() { _, _ = io.Copy(&heard, far) })
		wg.Go(func() {
			for range 100 {
				if _, err := io.WriteString(far, "NOOP\r\n"); err != nil {
					return
				}
				time.Sleep(7 * time.Second)
			}
			far.Close()
		})
		start := time.Now()
		for c.readLine() != nil {
			c.put(replyOK)
		}
		if d := time.Since(start); d != time.Minute {
			t.Errorf("ended after %v", d)
		}
		_ = c.Close()
		wg.Wait()
		if !strings.HasSuffix(heard.String(), "250 2.0.0 OK\r\n421 4.4.2 session lasts too long\r\n") {
			t.Errorf("heard %q", heard.String())
		}
	})
}

func TestAClientThatDoesNotTakeItsRepliesIsGone(t *testing.T) {
	g := newRig(t, snapshot(), nil)
	synctest.Test(t, func(t *testing.T) {
		near, far := net.Pipe()
		defer far.Close()
		c := newConn(g.server, near, Kind{}, g.rules.Load())
		c.phase = phaseCommand
		c.put(replyOK)
		start := time.Now()
		c.flush() // nobody reads
		if d := time.Since(start); d != writeTimeout || c.phase != phaseEnded {
			t.Errorf("after %v, in phase %d", d, c.phase)
		}
	})
}

func TestEndlessLineIsCutOff(t *testing.T) {
	g := newRig(t, snapshot(), nil)
	p := g.hello()
	go io.WriteString(p.Conn, strings.Repeat("x", 100<<10)) // ends with the connection
	p.want("500 5.5.2")
	p.wantEnd()
}

func TestDrainSends421ToIdleSessionsAndLetsAMessageFinish(t *testing.T) {
	h := newHop(t)
	g := newRig(t, snapshot("one.test", h.addr()), nil)
	idle, open, body := g.hello(), g.hello(), g.hello()
	greeted := g.dial()
	greeted.want("220")
	open.ask("MAIL FROM:<a@sender.test>", "250")
	body.begin("x@one.test")
	body.send("Subject: x\r\n")
	done := make(chan error, 1)
	go func() { done <- g.server.Drain(context.Background()) }()
	for _, p := range []*peer{idle, open, greeted} {
		p.want("421 4.3.2")
		p.wantEnd()
	}
	body.send("\r\nx\r\n.\r\n")
	body.want("250 2.0.0 taken")
	body.want("421 4.3.2")
	if err := <-done; err != nil {
		t.Error(err)
	}
	if n := len(h.messages()); n != 1 {
		t.Errorf("%d messages", n)
	}
}

func TestPauseSends421AndResumeTakesMailAgain(t *testing.T) {
	h := newHop(t)
	g := newRig(t, snapshot("one.test", h.addr()), nil)
	idle, open, body := g.hello(), g.hello(), g.hello()
	open.ask("MAIL FROM:<a@sender.test>", "250")
	body.begin("x@one.test")
	body.send("Subject: x\r\n")
	g.server.Pause()
	g.server.Pause()
	for _, p := range []*peer{idle, open} {
		p.want("421 4.3.2")
		p.wantEnd()
	}
	fresh := g.dial()
	fresh.want("421 4.3.2")
	fresh.wantEnd()
	body.send("\r\nx\r\n.\r\n")
	body.want("250 2.0.0 taken")
	body.want("421 4.3.2")
	body.wantEnd()
	g.server.Resume()
	again := g.hello()
	again.ask("MAIL FROM:<a@sender.test>", "250")
	waitFor(t, "the others have ended", func() bool { return g.server.Stats().Open == 1 })
	if n := g.server.Cut(); n != 1 {
		t.Errorf("cut %d sessions, want 1", n)
	}
	if got := again.read(); got != "EOF" {
		t.Errorf("got %q", got)
	}
	g.hello().ask("NOOP", "250")
}

func TestDrainEndsAtItsBound(t *testing.T) {
	h := newHop(t)
	g := newRig(t, snapshot("one.test", h.addr()), nil)
	body := g.hello()
	body.begin("x@one.test")
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- g.server.Drain(ctx) }()
	waitFor(t, "draining", g.server.sessions.isDraining)
	cancel()
	if err := <-done; err != context.Canceled {
		t.Error(err)
	}
	if got := body.read(); got != "EOF" {
		t.Errorf("got %q", got)
	}
}

func TestServeEndsWithItsContextAndSessionsGoOn(t *testing.T) {
	g := newRig(t, snapshot(), nil)
	l := g.listen()
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- g.server.Serve(ctx, l, Kind{}) }()
	p := dialTo(t, l.Addr().String())
	p.want("220")
	cancel()
	if err := <-done; err != nil {
		t.Error(err)
	}
	p.ask("NOOP", "250")
	g.server.Close()
	got := p.read()
	if strings.HasPrefix(got, "421 4.3.2 ") { // a session that is between two commands says so
		got = p.read()
	}
	if got != "EOF" {
		t.Errorf("got %q, want the end of the connection", got)
	}
}

func TestBodiesLeaveFreeWhatTheSpoolLeavesFree(t *testing.T) {
	h := newHop(t)
	g := newRig(t, snapshot("one.test", h.addr()), func(o *Options) { o.MinFree = 1 << 60 })
	p := g.hello()
	p.begin("x@one.test")
	p.send(strings.Repeat(strings.Repeat("x", 70)+"\r\n", 2*memoryBound/72) + ".\r\n")
	p.want("452 4.3.1")
	p.begin("x@one.test")
	p.send("small\r\n.\r\n")
	p.want("250")
}

func TestRecipientsPastTheLimitAreRefusedForNowAndCostNoSession(t *testing.T) {
	h := newHop(t)
	g := newRig(t, with(snapshot("one.test", h.addr()), "max_recipients", "100", "max_errors", "5"), nil)
	p := g.hello()
	p.ask("MAIL FROM:<a@sender.test>", "250")
	for n := range 110 {
		want := "250"
		if n >= 100 {
			want = "452 4.5.3" // RFC 5321 §4.5.3.1.10: the client sends what was taken, and the rest in another transaction
		}
		p.ask("RCPT TO:<x"+strconv.Itoa(n)+"@one.test>", want)
	}
	p.ask("DATA", "354")
	p.send("x\r\n.\r\n")
	p.want("250")
	if m := h.messages(); len(m) != 1 || len(m[0].to) != 100 {
		t.Errorf("%d messages", len(m))
	}
}
