package smtpd

import (
	"strings"
	"testing"

	"mailproxy/config"
	"mailproxy/mail"
	"mailproxy/spool"
)

// envelopes gives what lies in the spool.
func envelopes(t *testing.T, g *rig) (all []*mail.Envelope) {
	t.Helper()
	there, _, err := spool.Inspect(g.spool)
	if err != nil {
		t.Fatal(err)
	}
	defer there.Close()
	for _, i := range g.queue.List() {
		m, err := there.Open(i.ID)
		if err != nil {
			t.Fatal(err)
		}
		all = append(all, m.Envelope)
		m.Close()
	}
	return all
}

func TestWhoWasNeverVerifiedIsMarked(t *testing.T) {
	for _, c := range []struct {
		name, to string
		trusted  bool
		when     string // the next hop is out of reach: at RCPT, at DATA
		want     bool
	}{
		{"taken while the next hop was out of reach", "x@one.test", false, "RCPT", true},
		{"from our networks", "x@one.test", true, "RCPT", false},
		{"the next hop said yes", "x@one.test", false, "DATA", false},
		{"postmaster is not asked about", "postmaster@one.test", false, "DATA", true},
	} {
		t.Run(c.name, func(t *testing.T) {
			h := newHop(t)
			s := snapshot("one.test", h.addr())
			if c.trusted {
				s.Networks = []config.Network{loopback}
			}
			g := newRig(t, s, nil)
			p := g.hello()
			if c.when == "RCPT" {
				h.close()
			}
			p.begin(c.to)
			h.close()
			p.send("Subject: x\r\n\r\nbody\r\n.\r\n")
			p.want("250 2.0.0 queued")
			if e := envelopes(t, g); len(e) != 1 || e[0].Param(0).Unverified != c.want {
				t.Errorf("spooled: %+v", e)
			}
		})
	}
}

func TestParametersAreKeptWithWhatIsQueued(t *testing.T) {
	h, other := newHop(t), newHop(t)
	g := newRig(t, snapshot("one.test", h.addr(), "two.test", other.addr()), nil)
	p := g.hello()
	p.ask("MAIL FROM:<a@sender.test> RET=FULL ENVID=+2B1", "250")
	p.ask("RCPT TO:<x@one.test> NOTIFY=NEVER", "250")
	p.ask("RCPT TO:<y@two.test>", "250")
	p.ask("RCPT TO:<z@two.test> NOTIFY=DELAY,FAILURE ORCPT=rfc822;z+2B@two.test", "250")
	p.ask("DATA", "354")
	p.send("body\r\n.\r\n")
	p.want("250")
	e := envelopes(t, g)
	want := mail.RcptParams{Notify: mail.NotifyDelay | mail.NotifyFailure, Original: "rfc822;z+@two.test"}
	if len(e) != 1 || e[0].Return != mail.ReturnFull || e[0].EnvID != "+1" || e[0].Param(0) != (mail.RcptParams{}) || e[0].Param(1) != want {
		t.Errorf("spooled: %+v", e)
	}
}

// In the client's transaction: a next hop that offers DSN tells by itself, in place of another we do.
func TestSuccessIsToldWhereTheNextHopDoesNotTell(t *testing.T) {
	for _, c := range []struct{ name, ehlo, notify, want string }{
		{"asked for", "250 hop", " NOTIFY=SUCCESS", "relayed"},
		{"asked for, with failure", "250 hop", " NOTIFY=SUCCESS,FAILURE", "relayed"},
		{"not asked for", "250 hop", "", ""},
		{"the next hop offers DSN", "250-hop\r\n250 DSN", " NOTIFY=SUCCESS", ""},
	} {
		t.Run(c.name, func(t *testing.T) {
			h := newHop(t)
			h.set("ehlo", c.ehlo)
			g := newRig(t, snapshot("one.test", h.addr()), nil)
			p := g.hello()
			p.ask("MAIL FROM:<a@sender.test>", "250")
			p.ask("RCPT TO:<x@one.test>"+c.notify, "250")
			p.ask("DATA", "354")
			p.send("Subject: x\r\n\r\nbody\r\n.\r\n")
			p.want("250 2.0.0 taken")
			items := g.queue.List()
			if c.want == "" {
				if len(items) != 0 {
					t.Errorf("queue: %+v", items)
				}
				return
			}
			if _, reported := spooled(t, g); len(items) != 1 || !items[0].ReversePath.IsNull() || reported != "" {
				t.Fatalf("queue: %+v", items)
			}
			there, _, err := spool.Inspect(g.spool)
			if err != nil {
				t.Fatal(err)
			}
			defer there.Close()
			m, err := there.Open(items[0].ID)
			if err != nil {
				t.Fatal(err)
			}
			defer m.Close()
			b := make([]byte, m.Content.Size())
			if _, err := m.Content.ReadAt(b, 0); err != nil && len(b) == 0 {
				t.Fatal(err)
			}
			if text := string(b); !strings.Contains(text, "\r\nAction: "+c.want+"\r\nStatus: 2.0.0\r\n") || strings.Contains(text, "\r\nbody") {
				t.Errorf("DSN:\n%s", text)
			}
		})
	}
}

// What was taken is taken: a notice of it that has no room is no reason to have it come twice.
func TestSuccessThatCannotBeToldIsNoFailure(t *testing.T) {
	h := newHop(t)
	h.holdDot = make(chan struct{})
	g := newRig(t, snapshot("one.test", h.addr()), nil)
	p := g.hello()
	p.ask("MAIL FROM:<a@sender.test>", "250")
	p.ask("RCPT TO:<x@one.test> NOTIFY=SUCCESS", "250")
	p.ask("DATA", "354")
	p.send("body\r\n.\r\n")
	<-h.dotSeen
	if err := g.queue.Close(); err != nil {
		t.Fatal(err)
	}
	close(h.holdDot)
	p.want("250 2.0.0 taken")
	if s := g.server.Stats(); s.Duplicates != 0 || s.Delivered != 1 {
		t.Errorf("%+v", s)
	}
}

// Nobody asked about a failure that is told nobody.
func TestARefusalAtDeliveryIsNotToldWhereThatIsNotWanted(t *testing.T) {
	h := newHop(t)
	g := newRig(t, snapshot("one.test", h.addr()), nil)
	p := g.hello()
	p.ask("MAIL FROM:<a@sender.test>", "250")
	p.ask("RCPT TO:<good@one.test>", "250")
	p.ask("RCPT TO:<bad@one.test> NOTIFY=NEVER", "250")
	h.set("rcpt bad@one.test", "550 5.1.1 no such user")
	p.ask("DATA", "354")
	p.send("body\r\n.\r\n")
	p.want("250 2.0.0 taken")
	if n := len(g.queue.List()); n != 0 || g.queue.Stats().Untold != 1 || g.queue.Stats().DSNs != 0 {
		t.Errorf("%d items, %+v", n, g.queue.Stats())
	}
}

// From outside, who was never verified is not reported: the queue keeps what was refused.
func TestARefusalOfWhoWasNeverVerifiedIsKept(t *testing.T) {
	h := newHop(t)
	g := newRig(t, snapshot("one.test", h.addr()), nil)
	p := g.hello()
	p.begin("x@one.test", "postmaster@one.test")
	h.set("rcpt postmaster@one.test", "550 5.1.1 no such user")
	p.send("body\r\n.\r\n")
	p.want("250 2.0.0 taken")
	e := envelopes(t, g)
	if len(e) != 1 || e[0].ReversePath.IsNull() || joined(e[0].ForwardPaths) != "postmaster@one.test" || !e[0].Param(0).Unverified {
		t.Errorf("spooled: %+v", e)
	}
}
