package relay

import (
	"context"
	"errors"
	"net"
	"net/netip"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"mailproxy/config"
)

func hopsNamed(names string) (hops []hop) {
	for _, n := range strings.Fields(names) {
		hops = append(hops, hop{addr: n})
	}
	return hops
}

func addrs(hops []hop) string {
	var names []string
	for _, h := range hops {
		names = append(names, h.addr)
	}
	return strings.Join(names, " ")
}

func TestAHostOutOfReachIsTriedLastAndLookedAtNowAndThen(t *testing.T) {
	var r reach
	at := time.Now()
	out := &OutOfReach{Hop: "a", Stage: StageConnect, Err: errors.New("refused")}
	want := func(after time.Duration, names string) {
		t.Helper()
		if got := addrs(r.order(hopsNamed("a b c"), at.Add(after))); got != names {
			t.Errorf("after %v: %s, want %s", after, got, names)
		}
	}
	want(0, "a b c")
	r.failed(hop{addr: "a"}, out, at)
	want(0, "b c a")
	want(lookFirst-1, "b c a")
	want(lookFirst, "a b c") // one looks
	want(lookFirst, "b c a") // the others do not wait for it
	r.failed(hop{addr: "a"}, out, at.Add(lookFirst))
	want(2*lookFirst, "a b c")
	r.answered(hop{addr: "a"})
	want(2*lookFirst, "a b c")
	want(2*lookFirst, "a b c")
	for _, name := range []string{"a", "b", "c"} {
		r.failed(hop{addr: name}, out, at)
	}
	want(0, "a b c") // all are away: as they stand
	r.failed(hop{addr: "a", client: netip.MustParseAddrPort("192.0.2.1:0")}, out, at)
	if len(r.away) != 3 {
		t.Errorf("a host is remembered for each client: %d", len(r.away))
	}
	for i := range 3 * awayMaximum {
		r.failed(hop{addr: strings.Repeat("x", i%7) + time.Duration(i).String()}, out, at)
	}
	if len(r.away) > awayMaximum {
		t.Errorf("%d remembered", len(r.away))
	}
	r.forget()
	want(0, "a b c")
}

func TestTheWaitUntilALookGrowsToABound(t *testing.T) {
	var r reach
	at := time.Now()
	h := hop{addr: "a"}
	for range 20 {
		r.failed(h, &OutOfReach{Err: errNoHost}, at)
		at = at.Add(time.Hour)
	}
	if a := r.away[h]; a.wait != lookMost || !a.since.Before(at.Add(-19*time.Hour)) {
		t.Errorf("%+v", a)
	}
}

// A host that was taken out of its transport, or that no mail goes to any more, is not shown as out of reach for ever.
func TestAHostThatNobodyTriesIsForgotten(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := New(Options{})
		ctx, stop := context.WithCancel(t.Context())
		var running sync.WaitGroup
		running.Go(func() { _ = c.Run(ctx) })
		defer running.Wait()
		defer stop()
		out := &OutOfReach{Hop: "a", Stage: StageConnect, Err: errors.New("refused")}
		c.reach.failed(hop{addr: "a"}, out, time.Now())
		c.reach.failed(hop{addr: "tried"}, out, time.Now())
		for range 4 { // as the queue does
			time.Sleep(72 * time.Minute)
			if len(c.Hops()) == 0 {
				t.Fatal("all are forgotten")
			}
			c.reach.failed(hop{addr: "tried"}, out, time.Now())
		}
		if h := c.Hops(); len(h) != 1 || h[0].Hop != "tried" || time.Since(h[0].Since) != 288*time.Minute {
			t.Errorf("%+v", h)
		}
	})
}

func TestRoundRobin(t *testing.T) {
	one, two := newScript(t, hello+one+one), newScript(t, hello+one+one)
	c := testClient(t, nil)
	a := attempt(one.addr(), "hello\r\n", "x@b.test")
	a.Transport.Hosts = append(a.Transport.Hosts, two.addr())
	a.Transport.Order = config.OrderRoundRobin
	var got []string
	for range 4 {
		r, err := c.Deliver(bg(), a)
		if err != nil {
			t.Fatal(err)
		}
		got = append(got, r[0].Hop)
	}
	if got[0] != one.addr() || got[1] != two.addr() || got[2] != got[0] || got[3] != got[1] {
		t.Errorf("got %v", got)
	}
}

func TestHopsAreShown(t *testing.T) {
	gone, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	gone.Close()
	s := newScript(t, hello+one+one)
	c := testClient(t, nil)
	a := attempt(gone.Addr().String(), "hello\r\n", "x@b.test")
	a.Transport.Hosts = append(a.Transport.Hosts, s.addr())
	for range 2 {
		if _, err := c.Deliver(bg(), a); err != nil {
			t.Fatal(err)
		}
	}
	byName := map[string]HopState{}
	for _, h := range c.Hops() {
		byName[h.Hop] = h
	}
	if h := byName[gone.Addr().String()]; h.Since.IsZero() || h.Look.IsZero() || h.Reason != "connect" || !strings.Contains(h.Error, "refused") || h.Kept != 0 {
		t.Errorf("out of reach: %+v", h)
	}
	if h := byName[s.addr()]; !h.Since.IsZero() || h.Reason != "" || h.Kept != 1 || h.TLS != config.TLSNone {
		t.Errorf("in reach: %+v", h)
	}
	if len(byName) != 2 {
		t.Errorf("%+v", byName)
	}
}

func TestAHostThatIsLeftAloneKeepsItsReason(t *testing.T) {
	slow := newScript(t, "hang")
	c := testClient(t, func(o *Options) { o.Timeouts.Greeting = downCost + 100*time.Millisecond })
	for _, want := range []string{"greeting: read", "greeting: " + errRecentlyDown.Error() + ": read"} {
		if _, err := c.Deliver(bg(), attempt(slow.addr(), "hello\r\n", "x@b.test")); !isOutOfReach(err) || !strings.Contains(err.Error(), want) {
			t.Errorf("got %v, want %s", err, want)
		}
	}
	if h := c.Hops(); len(h) != 1 || h[0].Reason != "greeting" || !strings.Contains(h[0].Error, "timeout") {
		t.Errorf("%+v", h)
	}
}

func TestConnectionsInClientsNamesLeaveRoomForOthers(t *testing.T) {
	var p pool
	put := func(h hop) {
		here, there := net.Pipe()
		there.Close() // a goodbye ends at once
		cn := newConn(h, h.addr, here, &Timeouts{})
		p.put(cn)
	}
	client := func(i int) hop {
		return hop{addr: "a", client: netip.AddrPortFrom(netip.AddrFrom4([4]byte{10, 0, byte(i >> 8), byte(i)}), 0)}
	}
	for range poolPerClient + 3 {
		put(client(0))
	}
	if p.n != poolPerClient {
		t.Errorf("%d for one client", p.n)
	}
	for i := range poolTotal {
		put(client(i))
	}
	if p.n != poolTotal/2 {
		t.Errorf("%d for all clients", p.n)
	}
	put(hop{addr: "b"})
	if len(p.idle[hop{addr: "b"}]) != 1 {
		t.Error("there is no room for another hop's")
	}
}

func TestReasonsOfStages(t *testing.T) {
	for stage := range stages {
		if stage.Reason() == "" || stage.String() == "" {
			t.Errorf("stage %d: %q, %q", stage, stage, stage.Reason())
		}
	}
	if StageLookup.Reason() != "dns" || StageDot.Reason() != "final" || StageStartTLS.Reason() != "tls" || StageReset.Reason() != "mail" {
		t.Error("the reasons are not those of their stages")
	}
}

func TestThisNodeIsNotRelayedTo(t *testing.T) {
	s := newScript(t, hello+one, hello+one)
	_, port, _ := net.SplitHostPort(s.addr())
	self := netip.MustParseAddrPort(s.addr())
	c := testClient(t, func(o *Options) {
		o.MXPort = port
		o.Own = func(a netip.AddrPort) bool {
			return a.Addr() == netip.MustParseAddr("127.0.0.2") && a.Port() == self.Port()
		}
		o.Resolver = dnsServer(t, "mx.test. A 127.0.0.1", "me.test. A 127.0.0.2", "both.test. A 127.0.0.2",
			"better.test. MX 10 mx.test.", "better.test. MX 20 me.test.", "better.test. MX 30 worse.test.", "worse.test. A 127.0.0.1",
			"same.test. MX 10 mx.test.", "same.test. MX 10 me.test.", "only.test. MX 10 both.test.", "implicit.test. A 127.0.0.2",
			"away.test. MX 10 nowhere.test.", "away.test. MX 20 me.test.", "nowhere.test. A 127.0.0.3")
	})
	for domain, want := range map[string]string{
		"better.test":   "dot 250 taken",
		"same.test":     "lookup 554 5.4.6 mail for same.test loops back to this host",
		"only.test":     "lookup 554 5.4.6 mail for only.test loops back to this host",
		"implicit.test": "lookup 554 5.4.6 mail for implicit.test loops back to this host",
		"[127.0.0.2]":   "lookup 554 5.4.6 mail for [127.0.0.2] loops back to this host",
	} {
		for range 2 { // the second by what is remembered
			a := attempt("", "hello\r\n", "x@b.test")
			a.Transport, a.Domain = config.Transport{Name: "mx", TLS: config.TLSNone}, domain
			got, err := c.Deliver(bg(), a)
			if err != nil || summary(got) != want || want[0] == 'd' && got[0].Hop != "mx.test:"+port {
				t.Errorf("%s: got %+v, %v", domain, got, err)
			}
			if want[0] == 'd' {
				break
			}
		}
	}
	a := attempt("", "hello\r\n", "x@b.test")
	a.Transport, a.Domain = config.Transport{Name: "mx"}, "away.test"
	if _, err := c.Deliver(bg(), a); !isOutOfReach(err) || errors.Is(err, errSelf) {
		t.Errorf("better ones out of reach: got %v", err)
	}
	a = attempt("127.0.0.2:"+port, "hello\r\n", "x@b.test")
	if _, err := c.Deliver(bg(), a); !errors.Is(err, errSelf) { // a mistake in the configuration, which is no reason to lose mail
		t.Errorf("a fixed host: got %v", err)
	}
	s.l.Close()
}
