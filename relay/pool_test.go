package relay

import (
	"context"
	"errors"
	"net"
	"strings"
	"sync"
	"testing"
	"time"
)

// one is a transaction of one message as the server sees it.
const one = `
C: MAIL FROM:<from@a.test> SIZE=7
C: RCPT TO:<x@b.test>
C: DATA
S: 250 ok
S: 250 ok
S: 354 go
C: hello
C: .
S: 250 taken
`

func deliverOne(t *testing.T, c *Client, addr, want string) {
	t.Helper()
	got, err := c.Deliver(bg(), attempt(addr, "hello\r\n", "x@b.test"))
	if err != nil || summary(got) != want {
		t.Fatalf("got %s, %v; want %s", summary(got), err, want)
	}
}

func TestConnectionIsKeptAndEndsWithQuit(t *testing.T) {
	s := newScript(t, hello+one+one+"C: QUIT")
	c := testClient(t, nil)
	deliverOne(t, c, s.addr(), "dot 250 taken")
	deliverOne(t, c, s.addr(), "dot 250 taken")
	c.Close()
	s.served.Wait()
	s.stop()
}

func TestConnectionIsKeptAfterRefusals(t *testing.T) {
	s := newScript(t, hello+`
C: MAIL FROM:<from@a.test> SIZE=7
C: RCPT TO:<x@b.test>
C: DATA
S: 250 ok
S: 550 no
S: 503 none
C: RSET
C: MAIL FROM:<from@a.test> SIZE=7
C: RCPT TO:<x@b.test>
C: DATA
S: 250 reset
S: 552 too big
S: 503 no
S: 503 no
C: MAIL FROM:<from@a.test> SIZE=7
C: RCPT TO:<x@b.test>
C: DATA
S: 250 ok
S: 250 ok
S: 451 no data
C: RSET`+strings.Replace(one, "S: 250 ok", "S: 250 reset\nS: 250 ok", 1))
	c := testClient(t, nil)
	deliverOne(t, c, s.addr(), "rcpt 550 no")
	deliverOne(t, c, s.addr(), "mail 552 too big")
	deliverOne(t, c, s.addr(), "data 451 no data")
	deliverOne(t, c, s.addr(), "dot 250 taken")
}

func TestDeadKeptConnectionIsReplacedOnce(t *testing.T) {
	for name, end := range map[string]string{
		"closed at the next MAIL":           "C~ DATA\nclose",
		"closed at once":                    "close",
		"421 for being idle":                "S: 421 idle\nclose",
		"421 behind the next MAIL":          "C~ DATA\nS: 421 idle\nclose",
		"hung: nothing comes for the burst": "C~ DATA\nhang",
	} {
		t.Run(name, func(t *testing.T) {
			s := newScript(t, hello+one+end, hello+one)
			c := testClient(t, func(o *Options) {
				if strings.HasPrefix(name, "hung") {
					o.Timeouts.Mail = 300 * time.Millisecond
				}
			})
			deliverOne(t, c, s.addr(), "dot 250 taken")
			deliverOne(t, c, s.addr(), "dot 250 taken")
			if n := s.connections(); n != 2 {
				t.Errorf("%d connections", n)
			}
		})
	}
	t.Run("but not once a reply of the transaction came", func(t *testing.T) {
		s := newScript(t, hello+one+"C~ DATA\nS: 250 ok\nclose", hello+one)
		c := testClient(t, nil)
		deliverOne(t, c, s.addr(), "dot 250 taken")
		deliverOne(t, c, s.addr(), "rcpt 451 4.4.2 connection to the next hop lost")
		if n := s.connections(); n != 1 {
			t.Errorf("%d connections", n)
		}
		s.l.Close()
	})
}

func TestPoolIsBounded(t *testing.T) {
	dialogs := make([]string, poolPerHop+10)
	for i := range dialogs {
		dialogs[i] = hello + one + "C: QUIT"
	}
	s := newScript(t, dialogs...)
	c := testClient(t, nil)
	var wg, ready sync.WaitGroup
	ready.Add(len(dialogs))
	for range dialogs {
		wg.Go(func() {
			a := attempt(s.addr(), "hello\r\n", "x@b.test")
			a.BeforeDot = func([]Result) error { ready.Done(); ready.Wait(); return nil } // all at once
			if got, err := c.Deliver(bg(), a); err != nil || summary(got) != "dot 250 taken" {
				t.Errorf("got %s, %v", summary(got), err)
			}
		})
	}
	wg.Wait()
	if c.pool.n != poolPerHop {
		t.Errorf("%d connections kept", c.pool.n)
	}
	c.pool.sweep(time.Now().Add(poolIdle - time.Second))
	if c.pool.n != poolPerHop {
		t.Errorf("sweep closed young ones: %d left", c.pool.n)
	}
	c.pool.sweep(time.Now().Add(poolIdle))
	if c.pool.n != 0 || len(c.pool.idle) != 0 {
		t.Errorf("sweep left %d", c.pool.n)
	}
	s.served.Wait()
}

func TestConnectionIsUsedForAHundredMessagesAtMost(t *testing.T) {
	s := newScript(t, hello+strings.Repeat(one, poolMessages)+"C: QUIT", hello+one)
	c := testClient(t, nil)
	for range poolMessages + 1 {
		deliverOne(t, c, s.addr(), "dot 250 taken")
	}
	if n := s.connections(); n != 2 {
		t.Errorf("%d connections", n)
	}
}

func TestIdleTooLongIsNotUsedAgain(t *testing.T) {
	s := newScript(t, hello+one+"C: QUIT", hello+one)
	c := testClient(t, nil)
	deliverOne(t, c, s.addr(), "dot 250 taken")
	for _, list := range c.pool.idle {
		list[0].idleSince = time.Now().Add(-poolIdle)
	}
	deliverOne(t, c, s.addr(), "dot 250 taken")
}

func TestRunClosesKeptConnectionsAtItsEnd(t *testing.T) {
	s := newScript(t, hello+one+"C: QUIT")
	c := testClient(t, nil)
	deliverOne(t, c, s.addr(), "dot 250 taken")
	ctx, cancel := context.WithCancel(bg())
	cancel()
	if err := c.Run(ctx); err != nil || c.pool.n != 0 {
		t.Errorf("Run: %v, %d kept", err, c.pool.n)
	}
	s.served.Wait()
}

func TestHostsAreTriedInTheirOrder(t *testing.T) {
	refusing, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	refusing.Close()
	second := newScript(t, "S: 421 busy")
	third := newScript(t, hello+one)
	a := attempt(refusing.Addr().String(), "hello\r\n", "x@b.test")
	a.Transport.Hosts = append(a.Transport.Hosts, second.addr(), third.addr())
	got, err := testClient(t, nil).Deliver(bg(), a)
	if err != nil || summary(got) != "dot 250 taken" || got[0].Hop != third.addr() || second.connections() != 1 {
		t.Errorf("got %+v, %v", got, err)
	}
	a.Transport.Hosts = []string{refusing.Addr().String(), "[::1]:1"}
	var out *OutOfReach
	if _, err := testClient(t, nil).Deliver(bg(), a); !errors.As(err, &out) || out.Stage != StageConnect || out.Hop != "[::1]:1" {
		t.Errorf("got %v", err)
	}
}

func TestHostThatLetsUsWaitIsLeftAloneForAWhile(t *testing.T) {
	slow := newScript(t, "hang", "hang")
	good := newScript(t, hello+one+one)
	c := testClient(t, func(o *Options) { o.Timeouts.Greeting = downCost + 100*time.Millisecond })
	a := attempt(slow.addr(), "hello\r\n", "x@b.test")
	a.Transport.Hosts = append(a.Transport.Hosts, good.addr())
	for range 2 {
		if got, err := c.Deliver(bg(), a); err != nil || got[0].Hop != good.addr() {
			t.Fatalf("got %v, %v", got, err)
		}
	}
	if n := slow.connections(); n != 1 {
		t.Errorf("%d connections to the slow one", n)
	}
	if now := time.Now().Add(downTime); c.down.has(slow.addr(), now) {
		t.Error("left alone for ever")
	}
	slow.l.Close()
}

func TestManyRecipientsGoInGroups(t *testing.T) {
	var rcpt, mailbox []string
	dialog := hello + "C: MAIL FROM:<from@a.test> SIZE=7\n"
	for i := range 250 {
		a := "u" + strings.Repeat("x", i%60) + "@b.test"
		rcpt = append(rcpt, "C: RCPT TO:<"+a+">\n")
		mailbox = append(mailbox, a)
	}
	// RSET or MAIL, and at most 100 more, before the first reply.
	dialog += strings.Join(rcpt[:100], "") + "S: 250 ok\n" + strings.Repeat("S: 250 ok\n", 100)
	dialog += strings.Join(rcpt[100:201], "") + strings.Repeat("S: 250 ok\n", 101)
	dialog += strings.Join(rcpt[201:], "") + "C: DATA\n" + strings.Repeat("S: 250 ok\n", 49) + "S: 354 go\nC: hello\nC: .\nS: 250 taken"
	s := newScript(t, dialog)
	got, err := testClient(t, nil).Deliver(bg(), attempt(s.addr(), "hello\r\n", mailbox...))
	if err != nil || len(got) != 250 {
		t.Fatalf("got %d, %v", len(got), err)
	}
	for _, r := range got {
		if r.Reply.Code != 250 || r.Stage != StageDot {
			t.Fatalf("got %+v", r)
		}
	}
}

func TestMailRefusedEndsTheGroups(t *testing.T) {
	dialog := hello + "C: MAIL FROM:<from@a.test> SIZE=7\n"
	var mailbox []string
	for range 150 {
		mailbox = append(mailbox, "x@b.test")
	}
	dialog += strings.Repeat("C: RCPT TO:<x@b.test>\n", 100) + "S: 550 no\n" + strings.Repeat("S: 503 no\n", 100) + one
	s := newScript(t, dialog)
	c := testClient(t, nil)
	got, err := c.Deliver(bg(), attempt(s.addr(), "hello\r\n", mailbox...))
	if err != nil || got[149].Reply.String() != "550 no" {
		t.Fatalf("got %v, %v", got, err)
	}
	deliverOne(t, c, s.addr(), "dot 250 taken")
}
