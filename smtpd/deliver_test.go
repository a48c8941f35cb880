package smtpd

import (
	"io"
	"strings"
	"sync"
	"testing"
	"time"

	"mailproxy/config"
	"mailproxy/mail"
	"mailproxy/queue"
	"mailproxy/relay"
	"mailproxy/spool"
)

func TestClientGoneBeforeTheDotMeansNoDot(t *testing.T) {
	for _, c := range []struct {
		name  string
		hops  int
		leave func(*peer)
	}{
		{"closed", 1, func(p *peer) { p.Close() }},
		{"closed, with another next hop's item held", 2, func(p *peer) { p.Close() }},
		{"closed behind pipelined commands", 1, func(p *peer) { p.send("RSET\r\nNOOP\r\n"); p.Close() }},
	} {
		t.Run(c.name, func(t *testing.T) {
			h, other := newHop(t), newHop(t)
			h.holdData = make(chan struct{})
			g := newRig(t, snapshot("one.test", h.addr(), "two.test", other.addr()), nil)
			p := g.hello()
			p.ask("MAIL FROM:<a@sender.test>", "250")
			p.ask("RCPT TO:<x@one.test>", "250")
			if c.hops == 2 {
				p.ask("RCPT TO:<x@two.test>", "250")
			}
			p.ask("DATA", "354")
			p.send("body\r\n.\r\n")
			<-h.dataSeen
			c.leave(p)
			waitFor(t, "the message is dropped", func() bool { return g.server.Stats().Gone == 1 })
			close(h.holdData)
			waitFor(t, "the next hop sees the end", func() bool { return h.cuts() == 1 })
			if len(h.messages()) != 0 || len(g.queue.List()) != 0 {
				t.Errorf("%d messages taken, queue %v", len(h.messages()), g.queue.List())
			}
		})
	}
}

func TestClientGoneAfterTheDotIsAPossibleDuplicate(t *testing.T) {
	h := newHop(t)
	h.holdDot = make(chan struct{})
	g := newRig(t, snapshot("one.test", h.addr()), nil)
	p := g.hello()
	p.begin("x@one.test")
	p.send("body\r\n.\r\n")
	<-h.dotSeen
	p.Close()
	close(h.holdDot)
	waitFor(t, "it is counted", func() bool { return g.server.Stats().Duplicates == 1 })
	if len(h.messages()) != 1 || !strings.Contains(g.log.String(), "mail.possible_duplicate") {
		t.Errorf("%d messages; log:\n%s", len(h.messages()), g.log.String())
	}
}

func TestItemsForOtherNextHopsAreHeldUntilTheFirstHasAnswered(t *testing.T) {
	for _, c := range []struct {
		name, dot string
		want      int // items left
	}{
		{"taken", "250 2.0.0 taken", 1},
		{"refused", "550 5.7.1 no", 0},
		{"refused for now", "451 4.3.0 no", 0},
		{"no answer", "close", 0},
	} {
		t.Run(c.name, func(t *testing.T) {
			h, other := newHop(t), newHop(t)
			h.holdDot = make(chan struct{})
			h.set("dot", c.dot)
			g := newRig(t, snapshot("one.test", h.addr(), "two.test", other.addr()), nil)
			p := g.hello()
			p.begin("x@one.test", "x@two.test")
			p.send("body\r\n.\r\n")
			<-h.dotSeen
			held := g.queue.List()
			if len(held) != 1 || !held[0].Unanswered || len(held[0].ForwardPaths) != 1 || held[0].ForwardPaths[0].Domain != "two.test" {
				t.Errorf("before the answer: %+v", held)
			}
			close(h.holdDot)
			p.want(strings.Replace(c.dot, "close", "451", 1)[:3])
			items := g.queue.List()
			if len(items) != c.want || c.want == 1 && items[0].Unanswered {
				t.Errorf("after the answer: %+v", items)
			}
		})
	}
}

// atHold calls do once, when an item is held: behind the body, before the final dot.
func atHold(do func()) func(*queue.Options) {
	return func(o *queue.Options) {
		dir := o.Dir
		var once sync.Once
		o.Now = func() time.Time {
			if s, r, err := spool.Inspect(dir); err == nil {
				_ = s.Close()
				if r.Held > 0 {
					once.Do(do)
				}
			}
			return time.Now()
		}
	}
}

func TestClientGoneBetweenHoldingAndTheDot(t *testing.T) {
	h, other := newHop(t), newHop(t)
	var g *rig
	var p *peer
	armed := make(chan struct{})
	g = newRigWithQueue(t, snapshot("one.test", h.addr(), "two.test", other.addr()), nil, atHold(func() {
		<-armed
		p.Close()
		waitFor(t, "the session has seen it", func() bool { return strings.Contains(g.log.String(), "session.client_gone") })
	}))
	p = g.hello()
	close(armed)
	p.begin("x@one.test", "x@two.test")
	p.send("body\r\n.\r\n")
	waitFor(t, "the message is dropped", func() bool { return g.server.Stats().Gone == 1 })
	waitFor(t, "the next hop sees no dot", func() bool { return h.cuts() == 1 })
	if items := g.queue.List(); len(items) != 0 || len(h.messages()) != 0 {
		t.Errorf("queue: %+v", items)
	}
}

func TestNextHopLostBetweenHoldingAndTheDot(t *testing.T) {
	h, other := newHop(t), newHop(t)
	g := newRigWithQueue(t, snapshot("one.test", h.addr(), "two.test", other.addr()), nil, atHold(h.reset))
	p := g.hello()
	p.begin("x@one.test", "x@two.test")
	p.send("body\r\n.\r\n")
	p.want("250 2.0.0 taken")
	items := g.queue.List()
	if len(items) != 1 || items[0].Unanswered || items[0].ForwardPaths[0].Domain != "one.test" || len(other.messages()) != 1 || len(h.messages()) != 0 {
		t.Errorf("queue: %+v, %d and %d messages", items, len(h.messages()), len(other.messages()))
	}
}

func TestRecipientsRefusedOnlyAtDelivery(t *testing.T) {
	for _, c := range []struct {
		name, refusal string
		check         func(*testing.T, *rig)
	}{
		{"for good: the sender has a DSN", "550 5.1.1 no such user", func(t *testing.T, g *rig) {
			items := g.queue.List()
			if len(items) != 1 || !items[0].ReversePath.IsNull() || items[0].ForwardPaths[0].String() != "a@sender.test" {
				t.Errorf("queue: %+v", items)
			}
		}},
		{"for now: the queue tries again", "451 4.2.0 busy", func(t *testing.T, g *rig) {
			items := g.queue.List()
			if len(items) != 1 || items[0].Unanswered || items[0].ForwardPaths[0].String() != "bad@one.test" || len(items[0].ForwardPaths) != 1 {
				t.Errorf("queue: %+v", items)
			}
		}},
	} {
		t.Run(c.name, func(t *testing.T) {
			h := newHop(t)
			g := newRig(t, snapshot("one.test", h.addr()), nil)
			p := g.hello()
			p.begin("good@one.test", "bad@one.test")
			h.set("rcpt bad@one.test", c.refusal) // it was asked before, and said yes
			p.send("body\r\n.\r\n")
			p.want("250 2.0.0 taken")
			if m := h.messages(); len(m) != 1 || len(m[0].to) != 1 || m[0].to[0] != "good@one.test" {
				t.Errorf("taken: %+v", m)
			}
			c.check(t, g)
		})
	}
	t.Run("all of them: that answer, and nothing is queued", func(t *testing.T) {
		h := newHop(t)
		g := newRig(t, snapshot("one.test", h.addr()), nil)
		p := g.hello()
		p.begin("one@one.test", "two@one.test")
		h.set("rcpt one@one.test", "550 5.1.1 no such user")
		h.set("rcpt two@one.test", "451 4.2.0 busy")
		p.send("body\r\n.\r\n")
		p.want("451 4.2.0 busy")
		if n := len(g.queue.List()); n != 0 || len(h.messages()) != 0 {
			t.Errorf("%d items, %d messages", n, len(h.messages()))
		}
	})
	t.Run("all of the first next hop's: the second's answer, and a DSN for the first's", func(t *testing.T) {
		h, other := newHop(t), newHop(t)
		g := newRig(t, snapshot("one.test", h.addr(), "two.test", other.addr()), nil)
		p := g.hello()
		p.begin("x@one.test", "x@two.test")
		h.set("rcpt x@one.test", "550 5.1.1 no such user")
		p.send("body\r\n.\r\n")
		p.want("250 2.0.0 taken")
		if items := g.queue.List(); len(items) != 1 || !items[0].ReversePath.IsNull() || len(other.messages()) != 1 || len(h.messages()) != 0 {
			t.Errorf("queue: %+v", items)
		}
	})
}

func TestNextHopThatGoesAwayAfterRCPTIsQueuedFor(t *testing.T) {
	h, other := newHop(t), newHop(t)
	g := newRig(t, snapshot("one.test", h.addr(), "two.test", other.addr()), nil)
	p := g.hello()
	p.begin("x@one.test", "x@two.test")
	h.close()
	p.send("body\r\n.\r\n")
	p.want("250 2.0.0 queued as")
	if items := g.queue.List(); len(items) != 1 || len(items[0].ForwardPaths) != 2 || len(other.messages()) != 0 {
		t.Errorf("queue: %+v", items)
	}
}

// The 250 for what was queued answers for those too that the next hop before has refused.
func TestRecipientsRefusedBeforeANextHopThatIsAwayAreNotLost(t *testing.T) {
	for _, c := range []struct {
		name, refusal string
		item          string // forward-paths
		dsn           bool
	}{
		{"for good: the sender has a DSN", "550 5.1.1 no such user", "x@two.test", true},
		{"for now: the queue tries them too", "451 4.2.0 busy", "x@two.test x@one.test", false},
	} {
		t.Run(c.name, func(t *testing.T) {
			h, other := newHop(t), newHop(t)
			g := newRig(t, snapshot("one.test", h.addr(), "two.test", other.addr()), nil)
			p := g.hello()
			p.begin("x@one.test", "x@two.test")
			h.set("rcpt x@one.test", c.refusal) // it was asked before, and said yes
			other.close()
			p.send("body\r\n.\r\n")
			p.want("250 2.0.0 queued as")
			var item, dsn string
			for _, i := range g.queue.List() {
				if i.ReversePath.IsNull() {
					dsn += joined(i.ForwardPaths)
				} else {
					item += joined(i.ForwardPaths)
				}
			}
			if item != c.item || (dsn == "a@sender.test") != c.dsn {
				t.Errorf("queued for %q, DSN to %q", item, dsn)
			}
		})
	}
}

func joined(paths []mail.Path) string {
	var all []string
	for _, p := range paths {
		all = append(all, p.String())
	}
	return strings.Join(all, " ")
}

func TestPostmasterIsQueuedAndTheOthersThatWereRefusedAreReported(t *testing.T) {
	h := newHop(t)
	s := snapshot("one.test", h.addr())
	s.Settings = []config.Setting{{Name: "postmaster", Value: "ops@one.test"}}
	g := newRig(t, s, nil)
	p := g.hello()
	p.begin("x@one.test", "postmaster") // goes to ops@one.test, which was not asked about
	h.set("rcpt x@one.test", "550 5.1.1 no such user")
	h.set("rcpt ops@one.test", "550 5.1.1 no such user")
	p.send("body\r\n.\r\n")
	p.want("250 2.0.0 queued as")
	items := g.queue.List()
	if len(items) != 2 || joined(items[0].ForwardPaths) != "ops@one.test" || joined(items[1].ForwardPaths) != "a@sender.test" {
		t.Fatalf("queue: %+v", items)
	}
	there, _, err := spool.Inspect(g.spool)
	if err != nil {
		t.Fatal(err)
	}
	defer there.Close()
	m, err := there.Open(items[1].ID)
	if err != nil {
		t.Fatal(err)
	}
	dsn, err := io.ReadAll(m.Content)
	if err != nil || !strings.Contains(string(dsn), "rfc822; x@one.test") || strings.Contains(string(dsn), "rfc822; ops@one.test") {
		t.Errorf("%v, DSN:\n%s", err, dsn)
	}
}

func noRoomLeft(o *queue.Options) { o.MinFree = 1 << 62 }

func TestFullSpoolIs452AndNothingIsTaken(t *testing.T) {
	h := newHop(t)
	g := newRigWithQueue(t, snapshot("one.test", h.addr()), nil, noRoomLeft)
	h.close()
	p := g.hello()
	p.begin("x@one.test")
	p.send("body\r\n.\r\n")
	p.want("452 4.3.1")
}

func TestFullSpoolStopsTheDotWhereItemsWouldBeHeld(t *testing.T) {
	h, other := newHop(t), newHop(t)
	g := newRigWithQueue(t, snapshot("one.test", h.addr(), "two.test", other.addr()), nil, noRoomLeft)
	p := g.hello()
	p.begin("x@one.test", "x@two.test")
	p.send("body\r\n.\r\n")
	p.want("452 4.3.1")
	waitFor(t, "the first next hop sees no dot", func() bool { return h.cuts() == 1 })
}

// While no DSN can be spooled, who comes again and again does not have his message delivered again and again to those who can have it.
func TestASpoolThatTakesNoDSNStopsTheNextDot(t *testing.T) {
	h := newHop(t)
	g := newRig(t, snapshot("one.test", h.addr()), nil)
	if err := g.queue.Close(); err != nil {
		t.Fatal(err)
	}
	for range 3 {
		h.set("rcpt bad@one.test", "250 2.1.5 OK")
		p := g.hello()
		p.begin("x@one.test", "bad@one.test")
		h.set("rcpt bad@one.test", "550 5.1.1 no such user")
		p.send("body\r\n.\r\n")
		p.want("451 4.3.0")
	}
	waitFor(t, "the dot is not sent", func() bool { return h.cuts() == 3 })
	if n := len(h.messages()); n != 0 {
		t.Errorf("the first recipient has it %d times", n)
	}
}

func TestSpoolLostBehindTheFirstDotIs451(t *testing.T) {
	for _, c := range []struct {
		name  string
		to    []string
		spoil func(*hop)
	}{
		{"items held for another next hop", []string{"x@one.test", "x@two.test"}, func(*hop) {}},
		{"a DSN for a recipient refused at delivery", []string{"x@one.test", "bad@one.test"}, func(h *hop) {
			h.set("rcpt bad@one.test", "550 5.1.1 no such user")
		}},
	} {
		t.Run(c.name, func(t *testing.T) {
			h, other := newHop(t), newHop(t)
			h.holdDot = make(chan struct{})
			g := newRig(t, snapshot("one.test", h.addr(), "two.test", other.addr()), nil)
			p := g.hello()
			p.begin(c.to...)
			c.spoil(h)
			p.send("body\r\n.\r\n")
			<-h.dotSeen
			if err := g.queue.Close(); err != nil {
				t.Fatal(err)
			}
			close(h.holdDot)
			p.want("451 4.3.0")
			if s := g.server.Stats(); s.Duplicates != 1 || s.Delivered != 0 {
				t.Errorf("%+v", s)
			}
		})
	}
}

func TestTheWorstAnswerIsATemporaryOne(t *testing.T) {
	permanent, temporary := &mail.Reply{Code: 550}, &mail.Reply{Code: 450}
	said := func(r *mail.Reply) answer { return answer{Result: relay.Result{Reply: r}} }
	if got := worst([]answer{said(permanent), said(temporary)}); got != temporary {
		t.Error(got)
	}
	if got := worst([]answer{said(permanent), said(permanent)}); got != permanent {
		t.Error(got)
	}
}

func TestNoAnswerToTheDotIsAPossibleDuplicate(t *testing.T) {
	for _, dot := range []string{"close", "nonsense"} {
		h := newHop(t)
		h.set("dot", dot)
		g := newRig(t, snapshot("one.test", h.addr()), nil)
		p := g.hello()
		p.begin("x@one.test")
		p.send("body\r\n.\r\n")
		p.want("451")
		if n := g.server.Stats().Duplicates; n != 1 || !strings.Contains(g.log.String(), "mail.possible_duplicate") {
			t.Errorf("%s: counted %d; log:\n%s", dot, n, g.log.String())
		}
	}
}

func TestWhateverANextHopSaysWith2xxIsA250(t *testing.T) {
	h := newHop(t)
	h.set("dot", "252 2.5.0 taken, I think")
	g := newRig(t, snapshot("one.test", h.addr()), nil)
	p := g.hello()
	p.begin("x@one.test")
	p.send("body\r\n.\r\n")
	p.want("250 2.5.0 taken, I think")
	if n := len(h.messages()); n != 1 {
		t.Errorf("%d messages", n)
	}
}

func TestASessionThatCloseLeavesBehindTheDotIsNamed(t *testing.T) {
	h := newHop(t)
	h.holdDot = make(chan struct{})
	g := newRig(t, snapshot("one.test", h.addr()), nil)
	p := g.hello()
	p.begin("x@one.test")
	p.send("body\r\n.\r\n")
	<-h.dotSeen
	g.server.Close()
	if log := g.log.String(); !strings.Contains(log, "mail.possible_duplicate") || g.server.Stats().Duplicates != 1 {
		t.Errorf("the next hop may take it, the client was not answered, and nothing says so:\n%s", log)
	}
	close(h.holdDot)
	waitFor(t, "the session has ended", func() bool { return g.server.Stats().Open == 0 })
}

// One transaction is for those recipients alone who go the same way in everything: another login, or none, is another way.
func TestOneTransactionIsForOneWay(t *testing.T) {
	base := nextHop{domain: "a.test", ours: true, transport: config.Transport{Name: "one", Hosts: []string{"192.0.2.1:25"}, TLS: config.TLSMay}}
	for name, c := range map[string]struct {
		change func(*nextHop)
		want   bool
	}{
		"another domain and name, the same hosts": {func(n *nextHop) { n.domain, n.transport.Name = "b.test", "two" }, true},
		"other hosts":                {func(n *nextHop) { n.transport.Hosts = []string{"192.0.2.2:25"} }, false},
		"another policy":             {func(n *nextHop) { n.transport.TLS = config.TLSEncrypt }, false},
		"another order":              {func(n *nextHop) { n.transport.Order = config.OrderRoundRobin }, false},
		"a login":                    {func(n *nextHop) { n.transport.User = "u" }, false},
		"another password":           {func(n *nextHop) { n.transport.Password = "secret:p" }, false},
		"told who the client is":     {func(n *nextHop) { n.transport.Tell = config.TellXClient }, false},
		"MX records, another domain": {func(n *nextHop) { n.domain, n.transport.Hosts = "b.test", nil }, false},
	} {
		other := base
		c.change(&other)
		if got := base.isThat(&other); got != c.want {
			t.Errorf("%s: one transaction for both: %v", name, got)
		}
	}
	mx := nextHop{domain: "a.test", transport: config.Transport{Name: "mx"}}
	if other := (nextHop{domain: "b.test", transport: mx.transport}); mx.isThat(&other) {
		t.Error("two domains by their MX records are one")
	}
}
