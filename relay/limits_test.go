package relay

import (
	"strings"
	"testing"
)

// limited is hello with LIMITS (RFC 9422).
func limited(limits string) string {
	return "S: 220 hop ready\nC: EHLO test.example\n" + `S: 250-hop\r\n250-PIPELINING\r\n250 LIMITS ` + limits + "\n"
}

// burst is a transaction for recipients, all of whom get the answer, and the message's.
func burst(answer, taken string, to ...string) string {
	b := "C: MAIL FROM:<from@a.test>\n"
	for _, r := range to {
		b += "C: RCPT TO:<" + r + ">\n"
	}
	return b + "C: DATA\nS: 250 ok\n" + strings.Repeat("S: "+answer+"\n", len(to)) + "S: 354 go\nC: hello\nC: .\nS: " + taken + "\n"
}

func TestLimitsOfTheHop(t *testing.T) {
	for _, tt := range []struct {
		name    string
		dialogs []string
		to      string
		want    string
	}{
		{"RCPTMAX: the rest in further transactions", []string{limited("RCPTMAX=2") + burst("250 ok", "250 one", "a@b.test", "b@b.test") +
			burst("250 ok", "250 two", "c@b.test", "d@b.test") + burst("250 ok", "250 three", "e@b.test")},
			"a@b.test b@b.test c@b.test d@b.test e@b.test", "dot 250 one\ndot 250 one\ndot 250 two\ndot 250 two\ndot 250 three"},
		{"RCPTDOMAINMAX", []string{limited("RCPTDOMAINMAX=1") + burst("250 ok", "250 one", "a@b.test", "c@b.test") +
			burst("250 ok", "250 two", "b@c.test")}, "a@b.test b@c.test c@b.test", "dot 250 one\ndot 250 two\ndot 250 one"},
		{"MAILMAX: another connection", []string{limited("MAILMAX=1 RCPTMAX=1") + burst("250 ok", "250 one", "a@b.test") + "C: QUIT",
			limited("MAILMAX=1 RCPTMAX=1") + burst("250 ok", "250 two", "b@b.test") + "C: QUIT"}, "a@b.test b@b.test", "dot 250 one\ndot 250 two"},
		{"what is no limit", []string{limited("RCPTMAX=x MAILMAX RCPTMAX=9999999 RCPTMAX=0 FUTURE=1") + burst("250 ok", "250 one", "a@b.test", "b@b.test")},
			"a@b.test b@b.test", "dot 250 one\ndot 250 one"},
		{"the rest where the connection is lost behind the first", []string{limited("RCPTMAX=1 MAILMAX=1") + burst("250 ok", "250 one", "a@b.test"), "S: 421 busy"},
			"a@b.test b@b.test", "dot 250 one\nrcpt 452 4.5.3 too many recipients for the next hop at once"},
		{"452 from the hop, where others were taken", []string{hello + "C: MAIL FROM:<from@a.test> SIZE=7\nC: RCPT TO:<a@b.test>\nC: RCPT TO:<b@b.test>\nC: DATA\n" +
			"S: 250 ok\nS: 250 ok\nS: 452 4.5.3 too many\nS: 354 go\nC: hello\nC: .\nS: 250 one\n" +
			strings.ReplaceAll(burst("250 ok", "250 two", "b@b.test"), "a.test>\n", "a.test> SIZE=7\n")}, "a@b.test b@b.test", "dot 250 one\ndot 250 two"},
		{"452 for want of room is no such thing", []string{hello + "C: MAIL FROM:<from@a.test> SIZE=7\nC: RCPT TO:<a@b.test>\nC: RCPT TO:<b@b.test>\nC: DATA\n" +
			"S: 250 ok\nS: 250 ok\nS: 452 4.3.1 disk full\nS: 354 go\nC: hello\nC: .\nS: 250 one"}, "a@b.test b@b.test", "dot 250 one\nrcpt 452 4.3.1 disk full"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			s := newScript(t, tt.dialogs...)
			got, err := testClient(t, nil).Deliver(bg(), attempt(s.addr(), "hello\r\n", strings.Fields(tt.to)...))
			if err != nil || summary(got) != tt.want {
				t.Errorf("got %s, %v", summary(got), err)
			}
			if n := s.connections(); n != len(tt.dialogs) {
				t.Errorf("%d connections", n)
			}
		})
	}
}

func TestWhereTheMessageIsRefusedTheRestIsNotTriedWithIt(t *testing.T) {
	s := newScript(t, limited("RCPTMAX=1 MAILMAX=1")+burst("250 ok", "554 5.7.1 spam", "a@b.test")+"C: QUIT",
		limited("RCPTMAX=1")+burst("250 ok", "250 two", "b@b.test"))
	got, err := testClient(t, nil).Deliver(bg(), attempt(s.addr(), "hello\r\n", "a@b.test", "b@b.test"))
	if err != nil || summary(got) != "dot 554 5.7.1 spam\nrcpt 452 4.5.3 too many recipients for the next hop at once" {
		t.Errorf("got %s, %v", summary(got), err)
	}
	if n := s.connections(); n != 1 {
		t.Errorf("%d connections: there was a second transaction", n)
	}
	s.l.Close()
}

// What is more than the hop takes is known before the dot, so that it can be spooled; it is one transaction.
func TestWithBeforeDotTheRestHasItsAnswerThere(t *testing.T) {
	s := newScript(t, limited("RCPTMAX=1 MAILMAX=1")+burst("250 ok", "250 one", "a@b.test")+"C: QUIT",
		limited("RCPTMAX=1")+burst("250 ok", "250 two", "b@b.test"))
	a := attempt(s.addr(), "hello\r\n", "a@b.test", "b@b.test")
	a.BeforeDot = func(r []Result) error {
		if summary(r) != "rcpt 250 ok\nrcpt 452 4.5.3 too many recipients for the next hop at once" {
			t.Errorf("BeforeDot got %s", summary(r))
		}
		return nil
	}
	got, err := testClient(t, nil).Deliver(bg(), a)
	if err != nil || summary(got) != "dot 250 one\nrcpt 452 4.5.3 too many recipients for the next hop at once" {
		t.Errorf("got %s, %v", summary(got), err)
	}
	if n := s.connections(); n != 1 {
		t.Errorf("%d connections: there was a second transaction", n)
	}
	s.l.Close()
}
