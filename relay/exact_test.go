package relay

import (
	"bytes"
	"context"
	"errors"
	"io"
	"net"
	"strings"
	"testing"
	"time"
)

const accepted = hello + `
C: MAIL FROM:<from@a.test> SIZE=7
C: RCPT TO:<x@b.test>
C: DATA
S: 250 ok
S: 250 ok
S: 354 go
`

func hasDot(b string) bool { return strings.HasPrefix(b, ".\r\n") || strings.Contains(b, "\r\n.\r\n") }

func TestContextEndBeforeTheDotNeverSendsIt(t *testing.T) {
	t.Run("while BeforeDot runs", func(t *testing.T) {
		s := newScript(t, accepted+"hang")
		ctx, cancel := context.WithCancel(bg())
		a := attempt(s.addr(), "hello\r\n", "x@b.test")
		a.BeforeDot = func([]Result) error {
			waitFor(t, "the body is there", func() bool { return strings.HasSuffix(s.bytes(1), "DATA\r\nhello\r\n") })
			cancel()
			return nil
		}
		got, err := testClient(t, nil).Deliver(ctx, a)
		if !errors.Is(err, context.Canceled) || got != nil {
			t.Errorf("got %v, %v", got, err)
		}
		s.stop()
		if b := s.bytes(1); hasDot(b) || !strings.HasSuffix(b, "hello\r\n") {
			t.Errorf("the server got %q", b)
		}
	})
	t.Run("while the replies are waited for", func(t *testing.T) {
		s := newScript(t, hello+"C~ DATA\nS: 250 ok\nhang")
		ctx, cancel := context.WithCancel(bg())
		defer cancel()
		go func() {
			for !strings.HasSuffix(s.bytes(1), "DATA\r\n") {
				time.Sleep(time.Millisecond)
			}
			cancel()
		}()
		got, err := testClient(t, nil).Deliver(ctx, attempt(s.addr(), "hello\r\n", "x@b.test"))
		if !errors.Is(err, context.Canceled) || got != nil {
			t.Errorf("got %v, %v", got, err)
		}
		s.stop()
		if b := s.bytes(1); !strings.HasSuffix(b, "DATA\r\n") {
			t.Errorf("the server got %q", b)
		}
	})
	t.Run("in the middle of a body that the server does not read", func(t *testing.T) {
		l, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		defer l.Close()
		ctx, cancel := context.WithCancel(bg())
		got := make(chan []byte)
		go func() {
			c, err := l.Accept()
			if err != nil {
				close(got)
				return
			}
			defer c.Close()
			_, _ = io.WriteString(c, "220 a\r\n")
			b := make([]byte, 4096)
			_, _ = c.Read(b)
			_, _ = io.WriteString(c, "250-a\r\n250 PIPELINING\r\n")
			_, _ = c.Read(b)
			_, _ = io.WriteString(c, "250 ok\r\n250 ok\r\n354 go\r\n")
			_, _ = io.ReadFull(c, b)
			cancel()
			rest, _ := io.ReadAll(c)
			got <- rest
		}()
		body := strings.Repeat("0123456789012345678901234567890123456789\r\n", 1<<20)
		res, err := testClient(t, nil).Deliver(ctx, attempt(l.Addr().String(), body, "x@b.test"))
		if !errors.Is(err, context.Canceled) || res != nil {
			t.Errorf("got %v, %v", res, err)
		}
		if b := <-got; bytes.HasSuffix(b, []byte(".\r\n")) || len(b) >= len(body) {
			t.Errorf("the server got %d octets, ending %q", len(b), b[max(0, len(b)-10):])
		}
	})
	t.Run("before it begins", func(t *testing.T) {
		s := newScript(t)
		ctx, cancel := context.WithCancel(bg())
		cancel()
		_, err := testClient(t, nil).Deliver(ctx, attempt(s.addr(), "hello\r\n", "x@b.test"))
		if !errors.Is(err, context.Canceled) || s.connections() != 0 {
			t.Errorf("got %v, %d connections", err, s.connections())
		}
	})
	t.Run("in the greeting", func(t *testing.T) {
		s := newScript(t, "hang")
		ctx, cancel := context.WithTimeout(bg(), 50*time.Millisecond)
		defer cancel()
		_, err := testClient(t, nil).Deliver(ctx, attempt(s.addr(), "hello\r\n", "x@b.test"))
		if !errors.Is(err, context.DeadlineExceeded) || isOutOfReach(err) {
			t.Errorf("got %v", err)
		}
	})
}

func TestBeforeDotErrorDropsTheConnectionWithoutTheDot(t *testing.T) {
	s := newScript(t, accepted+"hang")
	a := attempt(s.addr(), "hello\r\n", "x@b.test")
	a.BeforeDot = func(r []Result) error {
		if summary(r) != "rcpt 250 ok" {
			t.Errorf("BeforeDot got %s", summary(r))
		}
		return errStop
	}
	c := testClient(t, nil)
	if got, err := c.Deliver(bg(), a); err != errStop || got != nil {
		t.Errorf("got %v, %v", got, err)
	}
	if c.pool.n != 0 {
		t.Error("the connection was kept")
	}
	s.stop()
	if b := s.bytes(1); hasDot(b) {
		t.Errorf("the server got %q", b)
	}
}

func TestBeforeDotComesBetweenBodyAndDot(t *testing.T) {
	s := newScript(t, accepted+"C: hello\nC: .\nS: 250 taken")
	a := attempt(s.addr(), "hello\r\n", "x@b.test")
	calls := 0
	a.BeforeDot = func([]Result) error {
		calls++
		waitFor(t, "the body is there", func() bool { return strings.HasSuffix(s.bytes(1), "hello\r\n") })
		return nil
	}
	got, err := testClient(t, nil).Deliver(bg(), a)
	if err != nil || calls != 1 || summary(got) != "dot 250 taken" {
		t.Errorf("got %v, %v; %d calls", summary(got), err, calls)
	}
}

func TestBeforeDotIsNotCalledWhereNothingWasAccepted(t *testing.T) {
	s := newScript(t, hello+"C~ DATA\nS: 250 ok\nS: 550 no\nS: 354 go\nC: .\nS: 250 ok")
	a := attempt(s.addr(), "hello\r\n", "x@b.test")
	a.BeforeDot = func([]Result) error { t.Error("called"); return nil }
	if got, err := testClient(t, nil).Deliver(bg(), a); err != nil || summary(got) != "rcpt 550 no" {
		t.Errorf("got %v, %v", summary(got), err)
	}
}

func TestContextEndBehindTheDotIsIgnored(t *testing.T) {
	s := newScript(t, accepted+"C: hello\nC: .\nwait\nS: 250 taken")
	c := testClient(t, nil)
	ctx, cancel := context.WithCancel(bg())
	defer cancel()
	// The server answers only when it is told to: when ctx is over.
	go func() {
		for !hasDot(s.bytes(1)) {
			time.Sleep(time.Millisecond)
		}
		cancel()
		<-ctx.Done()
		s.goOn <- struct{}{}
	}()
	got, err := c.Deliver(ctx, attempt(s.addr(), "hello\r\n", "x@b.test"))
	if err != nil || summary(got) != "dot 250 taken" {
		t.Errorf("got %v, %v", summary(got), err)
	}
}

func TestNoAnswerToTheDot(t *testing.T) {
	for name, end := range map[string]string{"the hop closes": "close", "the hop hangs": "hang", "half an answer": "S- 25\nclose"} {
		t.Run(name, func(t *testing.T) {
			s := newScript(t, hello+"C~ DATA\nS: 250 ok\nS: 250 ok\nS: 550 5.1.1 no\nS: 354 go\nC: hello\nC: .\n"+end)
			c := testClient(t, func(o *Options) { o.Timeouts.Dot = 50 * time.Millisecond })
			got, err := c.Deliver(bg(), attempt(s.addr(), "hello\r\n", "x@b.test", "y@b.test"))
			if !errors.Is(err, ErrNoAnswer) || summary(got) != "dot 451 4.4.2 connection to the next hop lost\nrcpt 550 5.1.1 no" {
				t.Errorf("got %s, %v", summary(got), err)
			}
		})
	}
}

// What a hop does at each step, and how it is classified.
func TestFailuresByStage(t *testing.T) {
	burst := hello + "C~ DATA\n"
	for _, tt := range []struct {
		name, dialog string
		want         string // summary, or ! and the stage of the OutOfReach, or ? and the summary of an ErrNoAnswer
	}{
		{"greeting: closes", "close", "!greeting"},
		{"greeting: hangs", "hang", "!greeting"},
		{"greeting: nonsense", "S: hello there", "!greeting"},
		{"greeting: 554", "S: 554 go away", "!greeting"},
		{"greeting: 421", "S: 421 busy", "!greeting"},
		{"greeting: 250", "S: 250 hm", "!greeting"},
		{"EHLO: closes", "S: 220 a\nC: EHLO test.example\nclose", "!ehlo"},
		{"EHLO: hangs", "S: 220 a\nC: EHLO test.example\nhang", "!ehlo"},
		{"EHLO: nonsense", "S: 220 a\nC: EHLO test.example\nS: 25x what", "!ehlo"},
		{"EHLO: 421", "S: 220 a\nC: EHLO test.example\nS: 421 busy", "!ehlo"},
		{"EHLO: 354", "S: 220 a\nC: EHLO test.example\nS: 354 hm", "!ehlo"},
		{"HELO: 550", "S: 220 a\nC: EHLO test.example\nS: 500 what\nC: HELO test.example\nS: 550 no", "!ehlo"},
		{"EHLO: two codes", "S: 220 a\nC: EHLO test.example\nS: 250-a\nS: 220 b", "!ehlo"},
		{"more than was asked for", strings.TrimRight(hello, "\n") + `\r\n250 and more`, "!mail"},
		{"MAIL: closes", burst + "close", "!mail"},
		{"MAIL: hangs", burst + "hang", "!mail"},
		{"MAIL: nonsense", burst + "S: eh", "mail 451 4.5.0 next hop gave no valid reply"},
		{"MAIL: 354", burst + "S: 354 go", "mail 451 4.5.0 next hop gave no valid reply"},
		{"MAIL: endless line", burst + "S: 250 " + strings.Repeat("x", 3000), "mail 451 4.5.0 next hop gave no valid reply"},
		{"MAIL: endless reply", burst + strings.Repeat("S: 250-x\n", 200), "mail 451 4.5.0 next hop gave no valid reply"},
		{"RCPT: closes", burst + "S: 250 ok\nclose", "rcpt 451 4.4.2 connection to the next hop lost"},
		{"RCPT: hangs", burst + "S: 250 ok\nhang", "rcpt 451 4.4.2 connection to the next hop lost"},
		{"RCPT: nonsense", burst + "S: 250 ok\nS: 999 what", "rcpt 451 4.5.0 next hop gave no valid reply"},
		{"DATA: hangs", burst + "S: 250 ok\nS: 250 ok\nhang", "rcpt 451 4.4.2 connection to the next hop lost"},
		{"DATA: closes", burst + "S: 250 ok\nS: 250 ok\nclose", "rcpt 451 4.4.2 connection to the next hop lost"},
		{"DATA: nonsense", burst + "S: 250 ok\nS: 250 ok\nS: 35", "data 451 4.5.0 next hop gave no valid reply"},
		{"DATA: 250", burst + "S: 250 ok\nS: 250 ok\nS: 250 ok", "data 451 4.5.0 next hop gave no valid reply"},
		{"dot: nonsense", burst + "S: 250 ok\nS: 250 ok\nS: 354 go\nC~ .\nS: okay", "?dot 451 4.5.0 next hop gave no valid reply"},
		{"dot: 354", burst + "S: 250 ok\nS: 250 ok\nS: 354 go\nC~ .\nS: 354 go on", "?dot 451 4.5.0 next hop gave no valid reply"},
		{"dot: 554", burst + "S: 250 ok\nS: 250 ok\nS: 354 go\nC~ .\nS: 554 5.7.1 spam", "dot 554 5.7.1 spam"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			s := newScript(t, tt.dialog)
			start := time.Now()
			c := testClient(t, func(o *Options) { // each wait is bounded by its own time: the others stay long
				at, hangs := strings.CutSuffix(tt.name, ": hangs")
				if d := map[string]*time.Duration{
					"greeting": &o.Timeouts.Greeting, "EHLO": &o.Timeouts.Ehlo, "MAIL": &o.Timeouts.Mail, "RCPT": &o.Timeouts.Rcpt,
					"DATA": &o.Timeouts.Data,
				}[at]; hangs {
					*d = 50 * time.Millisecond
				}
			})
			got, err := c.Deliver(bg(), attempt(s.addr(), "hello\r\n", "x@b.test"))
			s.l.Close()
			if took := time.Since(start); took > 4*time.Second {
				t.Errorf("took %v", took)
			}
			var out *OutOfReach
			if stage, ok := strings.CutPrefix(tt.want, "!"); ok {
				if !errors.As(err, &out) || out.Stage.String() != stage || out.Hop != s.addr() || got != nil {
					t.Errorf("got %s, %v; want out of reach at %s", summary(got), err, stage)
				}
			} else if text, ok := strings.CutPrefix(tt.want, "?"); ok {
				if !errors.Is(err, ErrNoAnswer) || summary(got) != text {
					t.Errorf("got %s, %v; want %s and no answer", summary(got), err, text)
				}
			} else if err != nil || summary(got) != tt.want {
				t.Errorf("got %s, %v; want %s", summary(got), err, tt.want)
			}
			if c.pool.n != 0 && tt.want != "dot 554 5.7.1 spam" {
				t.Error("the connection was kept")
			}
		})
	}
}

func TestTimesThatAreNotGivenAreThoseOfTheRFC(t *testing.T) {
	got := New(Options{Timeouts: Timeouts{Data: time.Second}}).t
	want := Timeouts{
		Lookup: 30 * time.Second, Connect: 15 * time.Second, Greeting: 5 * time.Minute, Ehlo: 5 * time.Minute, TLS: time.Minute,
		Mail: 5 * time.Minute, Rcpt: 5 * time.Minute, Data: time.Second, Block: 3 * time.Minute, Dot: 5 * time.Minute, Ask: time.Minute,
	}
	if got != want {
		t.Errorf("got %+v, want %+v", got, want)
	}
	if d := New(Options{}).t.Data; d != 2*time.Minute {
		t.Errorf("DATA: %v", d)
	}
}

func TestReasonGivenInTheMiddleOfTheBodyIsPassedOn(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	go func() {
		c, err := l.Accept()
		if err != nil {
			return
		}
		defer c.Close()
		_, _ = io.WriteString(c, "220 a\r\n")
		b := make([]byte, 4096)
		_, _ = c.Read(b)
		_, _ = io.WriteString(c, "250-a\r\n250 PIPELINING\r\n")
		_, _ = c.Read(b)
		_, _ = io.WriteString(c, "250 ok\r\n250 ok\r\n354 go\r\n")
		_, _ = io.ReadFull(c, b)
		_, _ = io.WriteString(c, "552 5.3.4 too big\r\n")
		for { // reads nothing more; the client's write ends by its deadline
			if _, err := c.Write([]byte{}); err != nil {
				return
			}
			one := make([]byte, 1)
			_ = c.SetReadDeadline(time.Now().Add(time.Second))
			if _, err := c.Read(one); err != nil {
				return
			}
			time.Sleep(10 * time.Millisecond)
		}
	}()
	c := testClient(t, func(o *Options) { o.Timeouts.Block = 200 * time.Millisecond })
	got, err := c.Deliver(bg(), attempt(l.Addr().String(), strings.Repeat("0123456789\r\n", 3<<20), "x@b.test"))
	if err != nil || summary(got) != "data 552 5.3.4 too big" {
		t.Errorf("got %s, %v", summary(got), err)
	}
}
