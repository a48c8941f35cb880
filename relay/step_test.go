package relay

import (
	"errors"
	"strings"
	"testing"

	"mailproxy/config"
)

// A hop whose replies are out of step with our commands: none of its answers may be taken for another's.

func TestAReplyThatCameBeforeTheDotIsNotItsAnswer(t *testing.T) {
	for _, c := range []struct{ name, dialog, want string }{
		{"with the 354", accepted[:len(accepted)-1] + `\r\n250 2.0.0 taken` + "\nhang", "data 451 4.5.0 next hop gave no valid reply"},
		{"while the body is on its way", accepted + "C: hello\nS: 250 2.0.0 taken\nhang", "data 451 4.5.0 next hop gave no valid reply"},
		{"a refusal", accepted + "C: hello\nS: 552 5.3.4 enough\nhang", "data 552 5.3.4 enough"},
		{"its end", accepted + "C: hello\nclose", "data 451 4.4.2 connection to the next hop lost"},
	} {
		t.Run(c.name, func(t *testing.T) {
			s := newScript(t, c.dialog)
			client := testClient(t, nil)
			cn, err := client.acquire(bg(), hop{addr: s.addr(), tls: config.TLSNone}, true)
			if err != nil {
				t.Fatal(err)
			}
			defer cn.abort()
			a := attempt(s.addr(), "hello\r\n", "x@b.test")
			a.BeforeDot = func([]Result) error {
				waitFor(t, "what the hop says is here", func() bool { return !cn.alive() })
				return nil
			}
			got := make([]Result, 1)
			x := newTransaction(cn, &a, got)
			err = x.deliver(bg())
			x.end()
			if err != nil || summary(got) != c.want {
				t.Errorf("got %v, %v; want %s", summary(got), err, c.want)
			}
			s.stop()
			if b := s.bytes(1); hasDot(b) {
				t.Errorf("the dot was sent: %q", b)
			}
		})
	}
}

func TestRepliesOutOfCountRefuseNobodyForGood(t *testing.T) {
	s := newScript(t, hello+`
C: MAIL FROM:<from@a.test> SIZE=7
C: RCPT TO:<x@b.test>
C: RCPT TO:<y@b.test>
C: DATA
S: 250 ok\r\n250 ok\r\n550 5.1.1 no x\r\n250 ok\r\n354 go
hang`)
	got, err := testClient(t, nil).Deliver(bg(), attempt(s.addr(), "hello\r\n", "x@b.test", "y@b.test"))
	want := "data 451 4.5.0 next hop gave no valid reply\ndata 451 4.5.0 next hop gave no valid reply"
	if err != nil || summary(got) != want {
		t.Errorf("got %v, %v; want %s", summary(got), err, want)
	}
}

func TestAReplyBeforeEhloIsNotItsAnswer(t *testing.T) {
	s := newScript(t, `S: 220 hop ready\r\n250 hop`+"\nhang")
	reply, err := testClient(t, nil).Ask(bg(), s.transport(), "b.test", env("from@a.test"), path("x@b.test"))
	if reply != nil || !isOutOfReach(err) || !strings.Contains(err.Error(), "protocol error") {
		t.Errorf("got %v, %v", reply, err)
	}
}

func TestAskOnAConnectionThatRefusesRsetHasAnAnswer(t *testing.T) {
	for _, pipelining := range []bool{true, false} {
		greeting, rest := helloPlain, "C: RSET\nS: 451 4.3.0 no\n"
		refused := "C: MAIL FROM:<from@a.test>\nS: 250 ok\nC: RCPT TO:<x@b.test>\nS: 550 5.1.1 no\n"
		if pipelining {
			greeting, rest = hello, "C: RSET\n"+asked[1:]+"S: 451 4.3.0 no\n"
			refused = "C: MAIL FROM:<from@a.test> SIZE=7\nC: RCPT TO:<x@b.test>\nC: DATA\nS: 250 ok\nS: 550 5.1.1 no\nS: 554 no\n"
		}
		s := newScript(t, greeting+refused+rest+"hang")
		c := testClient(t, nil)
		if _, err := c.Deliver(bg(), attempt(s.addr(), "hello\r\n", "x@b.test")); err != nil {
			t.Fatal(err)
		}
		reply, err := c.Ask(bg(), s.transport(), "b.test", env("from@a.test"), path("x@b.test"))
		if err != nil || !reply.Temporary() || !errors.Is(reply, ErrProtocol) { // ours, not the hop's 451 to another question
			t.Errorf("pipelining %v: got %v, %v", pipelining, reply, err)
		}
	}
}
