package smtpd

import (
	"fmt"
	"sync"
	"testing"

	"mailproxy/config"
)

func TestOfADomainWithAListTheNextHopIsNotAsked(t *testing.T) {
	h := newHop(t)
	s := snapshot("one.test", h.addr(), "two.test", h.addr())
	s.Recipients = []config.RecipientList{{Domain: "one.test", Locals: []string{"info"}}}
	g := newRig(t, s, nil)
	p := g.hello()
	p.ask("MAIL FROM:<a@sender.test>", "250")
	p.ask("RCPT TO:<Info+news@one.test>", "250")
	p.ask("RCPT TO:<nobody@one.test>", "550 5.1.1 no such recipient here")
	p.ask("RCPT TO:<postmaster@one.test>", "250")
	if n := h.rcpts(); n != 0 {
		t.Errorf("the next hop was asked %d times", n)
	}
	p.ask("RCPT TO:<x@two.test>", "250")
	if n := h.rcpts(); n != 1 {
		t.Errorf("the next hop of a domain without a list was asked %d times", n)
	}
	p.ask("DATA", "354")
	p.send("x\r\n.\r\n")
	p.want("250")
}

// Everyone on a list says nothing of whether a recipient exists: where mail for it is queued its next hop has yet to say so, and nobody
// outside is told if it does not.
func TestAListOfEveryoneVerifiesNobody(t *testing.T) {
	s := snapshot("one.test", newHop(t).addr(), "two.test", newHop(t).addr())
	s.Recipients = []config.RecipientList{{Domain: "one.test", Locals: []string{"*"}}, {Domain: "two.test", Locals: []string{"*", "info"}}}
	g := newRig(t, with(s, "cut_through", "no"), nil)
	p := g.hello()
	p.begin("anyone@one.test", "info@two.test", "other@two.test")
	p.ask("x\r\n.", "250")
	story, err := g.queue.Story(g.queue.List()[0].ID)
	if err != nil {
		t.Fatal(err)
	}
	for i, want := range []bool{true, false, true} {
		if got := story.Envelope.Param(i).Unverified; got != want {
			t.Errorf("%v: unverified %v, want %v", story.Envelope.ForwardPaths[i], got, want)
		}
	}
}

// Whoever asks, in however many sessions and in whatever names, the next hop hears once of a recipient that it does not have.
func TestAHarvestDoesNotReachTheNextHopTwice(t *testing.T) {
	const sessions, unknown = 20, 5
	h := newHop(t)
	h.unknown(unknown)
	g := newRig(t, with(snapshot("one.test", h.addr()), "max_unknown_recipients", "0", "max_unknown_recipients_per_hour", "0"), nil)
	var wg sync.WaitGroup
	for i := range sessions {
		p := g.hello()
		wg.Go(func() {
			p.send(fmt.Sprintf("MAIL FROM:<spam%d@sender.test>\r\n", i))
			p.read()
			for n := range unknown {
				p.send(fmt.Sprintf("RCPT TO:<u%d@one.test>\r\nRCPT TO:<known%d@one.test>\r\n", n, n))
				if no, yes := p.read(), p.read(); no[:9] != "550 5.1.1" || yes[:3] != "250" {
					t.Errorf("unknown %s, known %s", no, yes)
				}
			}
		})
	}
	wg.Wait()
	if n := h.rcpts(); n != 2*unknown {
		t.Errorf("the next hop was asked %d times about %d recipients", n, 2*unknown)
	}
}
