package relay

import (
	"context"
	"errors"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"mailproxy/config"
	"mailproxy/mail"
)

func (s *script) transport() config.Transport {
	return config.Transport{Name: "t", Hosts: []string{s.addr()}, TLS: config.TLSNone}
}

const asked = `
C: MAIL FROM:<from@a.test>
C: RCPT TO:<x@b.test>
C: RSET
`

func env(from string) *mail.Envelope { return &mail.Envelope{ReversePath: path(from)} }

func ask(t *testing.T, c *Client, s *script, from, to, want string) {
	t.Helper()
	got, err := c.Ask(bg(), s.transport(), "b.test", env(from), path(to))
	if err != nil || got.String() != want {
		t.Fatalf("got %v, %v; want %s", got, err, want)
	}
}

func TestAskThenDeliverOnTheSameConnection(t *testing.T) {
	s := newScript(t, hello+asked+"S: 250 ok\nS: 250 2.1.5 ok\nS: 250 reset"+one)
	c := testClient(t, nil)
	ask(t, c, s, "from@a.test", "x@b.test", "250 2.1.5 ok")
	ask(t, c, s, "from@a.test", "x@b.test", "250 2.1.5 ok")
	ask(t, c, s, "other@a.test", "x@b.test", "250 2.1.5 ok") // positive: for any sender
	deliverOne(t, c, s.addr(), "dot 250 taken")
}

func TestAskWithoutPipelining(t *testing.T) {
	s := newScript(t, helloPlain+"C: MAIL FROM:<from@a.test>\nS: 250 ok\nC: RCPT TO:<x@b.test>\nS: 550 5.7.1 no\nC: RSET\nS: 250 ok\n"+
		"C: MAIL FROM:<evil@a.test>\nS: 550 5.7.1 not you")
	c := testClient(t, nil)
	ask(t, c, s, "from@a.test", "x@b.test", "550 5.7.1 no")
	ask(t, c, s, "evil@a.test", "x@b.test", "550 5.7.1 not you")
}

func TestAskNegativeAnswersAreForTheSameSenderAndTemporaryOnesNotKept(t *testing.T) {
	s := newScript(t, hello+asked+"S: 250 ok\nS: 550 5.7.1 no\nS: 250 reset\n"+
		"C: MAIL FROM:<other@a.test>\nC: RCPT TO:<x@b.test>\nC: RSET\nS: 250 ok\nS: 450 4.2.0 grey\nS: 250 reset\n"+
		"C: MAIL FROM:<other@a.test>\nC: RCPT TO:<x@b.test>\nC: RSET\nS: 250 ok\nS: 250 ok\nS: 250 reset\n")
	c := testClient(t, nil)
	ask(t, c, s, "from@a.test", "x@b.test", "550 5.7.1 no")
	ask(t, c, s, "from@a.test", "x@b.test", "550 5.7.1 no")
	ask(t, c, s, "other@a.test", "x@b.test", "450 4.2.0 grey")
	ask(t, c, s, "other@a.test", "x@b.test", "250 ok")
}

func TestAskIsTheSameForEachSenderWhereThereIsNoSuchRecipient(t *testing.T) {
	s := newScript(t, hello+asked+"S: 250 ok\nS: 550 5.1.1 no\nS: 250 reset\n")
	c := testClient(t, nil)
	ask(t, c, s, "from@a.test", "x@b.test", "550 5.1.1 no")
	ask(t, c, s, "other@a.test", "x@b.test", "550 5.1.1 no")
}

// They wait for the first answer; where it is not for them each asks for itself.
func TestAskIsSingleFlightOverSenders(t *testing.T) {
	for _, tt := range []struct {
		first, then string
		dialogs     []string
	}{
		{"550 5.1.1 no", "550 5.1.1 no", nil},
		{"250 2.1.5 ok", "250 2.1.5 ok", nil},
		{"550 5.7.1 no", "250 2.1.5 ok", []string{"C: MAIL FROM:<other@a.test>\nC: RCPT TO:<x@b.test>\nC: RSET\nS: 250 ok\nS: 250 2.1.5 ok\nS: 250 reset"}},
		{"450 4.2.0 grey", "250 2.1.5 ok", []string{"C: MAIL FROM:<other@a.test>\nC: RCPT TO:<x@b.test>\nC: RSET\nS: 250 ok\nS: 250 2.1.5 ok\nS: 250 reset"}},
	} {
		t.Run(tt.first, func(t *testing.T) {
			s := newScript(t, hello+asked+"wait\nS: 250 ok\nS: "+tt.first+"\nS: 250 reset\n"+strings.Join(tt.dialogs, ""))
			c := testClient(t, nil)
			var wg sync.WaitGroup
			wg.Go(func() { ask(t, c, s, "from@a.test", "x@b.test", tt.first) })
			waitFor(t, "the first one asks", func() bool { return strings.HasSuffix(s.bytes(1), "RSET\r\n") })
			for range 5 {
				wg.Go(func() { ask(t, c, s, "other@a.test", "x@b.test", tt.then) })
			}
			for range 2 {
				wg.Go(func() { ask(t, c, s, "from@a.test", "x@b.test", tt.first) })
			}
			waitFor(t, "the others wait", func() bool { return waitingAsks() == 7 })
			s.goOn <- struct{}{}
			wg.Wait()
			if n := s.connections(); n != 1 {
				t.Errorf("%d connections", n)
			}
		})
	}
}

// Where the first answer was for its sender alone, the others ask at once, and not one behind another.
func TestSendersWhoMustEachAskDoNotWaitInLine(t *testing.T) {
	const own = "C~ RSET\nwait\nS: 250 ok\nS: 450 4.2.0 grey\nS: 250 reset\n"
	s := newScript(t, hello+own+own, hello+own)
	c := testClient(t, nil)
	var wg sync.WaitGroup
	wg.Go(func() { ask(t, c, s, "from@a.test", "x@b.test", "450 4.2.0 grey") })
	waitFor(t, "the first one asks", func() bool { return strings.HasSuffix(s.bytes(1), "RSET\r\n") })
	for _, from := range []string{"second@a.test", "third@a.test"} {
		wg.Go(func() { ask(t, c, s, from, "x@b.test", "450 4.2.0 grey") })
	}
	waitFor(t, "the others wait", func() bool { return waitingAsks() == 2 })
	s.goOn <- struct{}{}
	waitFor(t, "both ask", func() bool {
		return strings.Count(s.bytes(1), "RSET\r\n") == 2 && strings.HasSuffix(s.bytes(2), "RSET\r\n")
	})
	s.goOn <- struct{}{}
	s.goOn <- struct{}{}
	wg.Wait()
}

// waitingAsks counts the goroutines that wait for another's answer.
func waitingAsks() (n int) {
	stacks := make([]byte, 1<<20)
	for g := range strings.SplitSeq(string(stacks[:runtime.Stack(stacks, true)]), "\n\n") {
		if head, rest, _ := strings.Cut(g, "\n"); strings.Contains(head, "[select") && strings.HasPrefix(rest, "mailproxy/relay.(*Client).Ask(") {
			n++
		}
	}
	return n
}

func TestAskOutOfReach(t *testing.T) {
	s := newScript(t, "S: 554 no", "hang", hello+asked+"hang")
	c := testClient(t, func(o *Options) { o.Timeouts.Ask = 100 * time.Millisecond })
	for range 3 {
		var out *OutOfReach
		if r, err := c.Ask(bg(), s.transport(), "b.test", env("from@a.test"), path("x@b.test")); !errors.As(err, &out) || r != nil {
			t.Errorf("got %v, %v", r, err)
		}
	}
	ctx, cancel := context.WithCancel(bg())
	cancel()
	if _, err := c.Ask(ctx, s.transport(), "b.test", env("from@a.test"), path("x@b.test")); !errors.Is(err, context.Canceled) {
		t.Errorf("got %v", err)
	}
}

func TestHopThatHangsAtAskIsLeftAloneForAWhile(t *testing.T) {
	s := newScript(t, "hang", "hang")
	c := testClient(t, func(o *Options) { o.Timeouts.Ask = downCost + 100*time.Millisecond })
	for range 2 {
		if _, err := c.Ask(bg(), s.transport(), "b.test", env("from@a.test"), path("x@b.test")); !isOutOfReach(err) {
			t.Errorf("got %v", err)
		}
	}
	if s.connections() != 1 {
		t.Errorf("%d connections", s.connections())
	}
	c.Forget()
	ctx, cancel := context.WithCancel(bg())
	stop := time.AfterFunc(downCost+100*time.Millisecond, cancel)
	defer stop.Stop()
	if _, err := c.Ask(ctx, s.transport(), "b.test", env("from@a.test"), path("x@b.test")); err == nil {
		t.Error("answered")
	}
	if s.connections() != 2 {
		t.Errorf("%d connections", s.connections())
	}
	s.l.Close()
}

func TestHopThatHangsAtOneRecipientAnswersTheNextAtOnce(t *testing.T) {
	for name, dialog := range map[string]string{
		"at MAIL": hello + asked + "hang",
		"at RCPT": hello + asked + "S: 250 ok\nhang",
	} {
		t.Run(name, func(t *testing.T) {
			s := newScript(t, dialog, dialog)
			c := testClient(t, func(o *Options) { o.Timeouts.Ask = downCost + 100*time.Millisecond })
			for _, to := range []string{"x@b.test", "y@b.test"} {
				if _, err := c.Ask(bg(), s.transport(), "b.test", env("from@a.test"), path(to)); !isOutOfReach(err) {
					t.Errorf("%s: %v", to, err)
				}
			}
			if n := s.connections(); n != 1 {
				t.Errorf("%d connections: the second recipient waited as long as the first", n)
			}
			if c.down.has(s.addr(), time.Now().Add(downTime)) {
				t.Error("left alone for ever")
			}
			s.l.Close()
		})
	}
}

func TestHopThatHangsIsNotAskedOnAnotherKeptConnection(t *testing.T) {
	s := newScript(t, hello+one+"hang", hello+one+"hang")
	c := testClient(t, func(o *Options) { o.Timeouts.Ask = downCost + 100*time.Millisecond })
	var wg, ready sync.WaitGroup
	ready.Add(2)
	for range 2 {
		wg.Go(func() {
			a := attempt(s.addr(), "hello\r\n", "x@b.test")
			a.BeforeDot = func([]Result) error { ready.Done(); ready.Wait(); return nil } // both at once
			if got, err := c.Deliver(bg(), a); err != nil || summary(got) != "dot 250 taken" {
				t.Errorf("got %s, %v", summary(got), err)
			}
		})
	}
	wg.Wait()
	if c.pool.n != 2 {
		t.Fatalf("%d connections kept", c.pool.n)
	}
	_, first := c.Ask(bg(), s.transport(), "b.test", env("from@a.test"), path("x@b.test"))
	_, second := c.Ask(bg(), s.transport(), "b.test", env("from@a.test"), path("y@b.test"))
	if !errors.Is(first, errAskTimeout) || !errors.Is(second, errRecentlyDown) || c.pool.n != 0 {
		t.Errorf("first %v, second %v, %d connections kept", first, second, c.pool.n)
	}
	s.stop()
}

// A client that goes away in the middle of a question says nothing of the hop.
func TestAskThatIsCancelledLeavesTheHopInReach(t *testing.T) {
	s := newScript(t, hello+asked+"hang", hello+asked+"S: 250 ok\nS: 250 2.1.5 ok\nS: 250 reset")
	c := testClient(t, nil)
	ctx, cancel := context.WithCancel(bg())
	stop := time.AfterFunc(downCost+100*time.Millisecond, cancel)
	defer stop.Stop()
	if _, err := c.Ask(ctx, s.transport(), "b.test", env("from@a.test"), path("x@b.test")); !errors.Is(err, context.Canceled) {
		t.Errorf("first: %v", err)
	}
	ask(t, c, s, "from@a.test", "x@b.test", "250 2.1.5 ok")
}

func TestAskIsSingleFlight(t *testing.T) {
	s := newScript(t, hello+asked+"wait\nS: 250 ok\nS: 250 2.1.5 ok\nS: 250 reset")
	c := testClient(t, nil)
	var wg sync.WaitGroup
	for range 10 {
		wg.Go(func() { ask(t, c, s, "from@a.test", "x@b.test", "250 2.1.5 ok") })
	}
	s.goOn <- struct{}{}
	wg.Wait()
	if s.connections() != 1 {
		t.Errorf("%d connections", s.connections())
	}
}

func TestAskOfOneWhoWentAwayIsAskedAgainByTheNext(t *testing.T) {
	s := newScript(t, hello+asked+"hang", hello+asked+"S: 250 ok\nS: 250 2.1.5 ok\nS: 250 reset")
	c := testClient(t, nil)
	ctx, cancel := context.WithCancel(bg())
	var wg sync.WaitGroup
	wg.Go(func() {
		if _, err := c.Ask(ctx, s.transport(), "b.test", env("from@a.test"), path("x@b.test")); !errors.Is(err, context.Canceled) {
			t.Errorf("first: %v", err)
		}
	})
	waitFor(t, "the first one asks", func() bool { return strings.HasSuffix(s.bytes(1), "RSET\r\n") })
	wg.Go(func() { ask(t, c, s, "from@a.test", "x@b.test", "250 2.1.5 ok") })
	cancel()
	wg.Wait()
}

func TestAnswersAreForgotten(t *testing.T) {
	var c answerCache
	now := time.Now()
	q := func(i int) question {
		return question{by: hop{addr: "w"}, to: mail.Path{Local: strconv.Itoa(i), Domain: "b.test"}, reverse: path("a@b.test")}
	}
	keep := func(i, code int) {
		_, ticket := c.get(q(i), q(i), now)
		c.finish(q(i), ticket.flight, &mail.Reply{Code: code}, nil, now)
	}
	has := func(i int, at time.Time) bool {
		r, ticket := c.get(q(i), q(i), at)
		if r == nil {
			c.finish(q(i), ticket.flight, nil, errStop, at)
		}
		return r != nil
	}
	keep(1, 250)
	keep(2, 550)
	keep(3, 450)
	for _, tt := range []struct {
		i     int
		after time.Duration
		want  bool
	}{{1, positiveTTL - 1, true}, {1, positiveTTL, false}, {2, negativeTTL - 1, true}, {2, negativeTTL, false}, {3, 0, false}} {
		if got := has(tt.i, now.Add(tt.after)); got != tt.want {
			t.Errorf("answer %d after %v: %v", tt.i, tt.after, got)
		}
	}
	for i := range 3 * maxAnswers {
		keep(i+10, 250)
		if n := len(c.young) + len(c.old); n > maxAnswers {
			t.Fatalf("%d answers kept", n)
		}
	}
	if !has(3*maxAnswers, now) {
		t.Error("a young answer was dropped")
	}
	if len(c.flights) != 0 {
		t.Errorf("%d flights left", len(c.flights))
	}
}
