package smtpd

import (
	"strings"
	"testing"
)

// A next hop that takes fewer recipients at once than the client has named (RFC 9422): the first ones have the message while the client
// waits, the others are in the spool before the dot, and have it by the queue.
func TestRecipientsThatAreTooManyForTheNextHopAreQueued(t *testing.T) {
	for _, c := range []struct {
		dot, answer string
		left        int // recipients in the queue
	}{
		{"250 2.0.0 taken", "250 2.0.0", 3},
		{"550 5.7.1 spam", "550 5.7.1", 0},
		{"451 4.3.0 later", "451 4.3.0", 0},
	} {
		h := newHop(t)
		h.set("ehlo", "250-hop\r\n250-PIPELINING\r\n250 LIMITS RCPTMAX=2")
		h.set("dot", c.dot)
		g := newRig(t, snapshot("one.test", h.addr()), nil)
		p := g.hello()
		p.begin("a@one.test", "b@one.test", "c@one.test", "d@one.test", "e@one.test")
		if got := p.ask("body\r\n.", c.answer[:3]); !strings.HasPrefix(got, c.answer) {
			t.Errorf("answer %q, want %q", got, c.answer)
		}
		taken := h.messages()
		if c.left > 0 && (len(taken) != 1 || strings.Join(taken[0].to, " ") != "a@one.test b@one.test") {
			t.Errorf("%s: taken %+v", c.dot, taken)
		}
		left := 0
		for _, i := range g.queue.List() {
			left += len(i.ForwardPaths)
		}
		if left != c.left {
			t.Errorf("%s: %d recipients in the queue, want %d", c.dot, left, c.left)
		}
	}
}
