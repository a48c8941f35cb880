package relay

import (
	"context"
	"errors"
	"net"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/miekg/dns"

	"mailproxy/config"
)

// dnsServer is a real DNS server on loopback with the records given, and a resolver that asks it. Names under broken.test
// get SERVFAIL, those under mute.test no answer.
func dnsServer(t *testing.T, records ...string) *net.Resolver {
	t.Helper()
	zone := map[dns.Question][]dns.RR{}
	names := map[string]bool{}
	for _, r := range records {
		rr, err := dns.NewRR(r)
		if err != nil {
			t.Fatal(err)
		}
		h := rr.Header()
		q := dns.Question{Name: h.Name, Qtype: h.Rrtype, Qclass: dns.ClassINET}
		zone[q] = append(zone[q], rr)
		names[h.Name] = true
	}
	pc, err := net.ListenPacket("udp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	ready := make(chan struct{})
	srv := &dns.Server{PacketConn: pc, NotifyStartedFunc: func() { close(ready) }}
	srv.Handler = dns.HandlerFunc(func(w dns.ResponseWriter, m *dns.Msg) {
		r := new(dns.Msg)
		r.SetReply(m)
		r.RecursionAvailable = true
		q := m.Question[0]
		q.Name = strings.ToLower(q.Name)
		switch {
		case strings.HasSuffix(q.Name, "mute.test."):
			return
		case strings.HasSuffix(q.Name, "broken.test."):
			r.Rcode = dns.RcodeServerFailure
		case !names[q.Name]:
			r.Rcode = dns.RcodeNameError
		default:
			r.Answer = zone[q]
		}
		_ = w.WriteMsg(r)
	})
	done := make(chan error)
	go func() { done <- srv.ActivateAndServe() }()
	<-ready
	t.Cleanup(func() {
		_ = srv.Shutdown()
		<-done
	})
	return &net.Resolver{PreferGo: true, Dial: func(ctx context.Context, _, _ string) (net.Conn, error) {
		var d net.Dialer
		return d.DialContext(ctx, "udp", pc.LocalAddr().String())
	}}
}

func hostNames(hosts []mxHost) (names []string) {
	for _, h := range hosts {
		names = append(names, h.name)
	}
	return names
}

func TestMXLookup(t *testing.T) {
	l := lookup{timeout: 10 * time.Second, resolver: dnsServer(t,
		"pref.test. MX 20 c.test.", "pref.test. MX 10 b.test.", "pref.test. MX 10 a.test.",
		"plain.test. A 127.0.0.1",
		"null.test. MX 0 .",
		"self.test. MX 10 first.test.", "self.test. MX 20 own.test.", "self.test. MX 20 same.test.", "self.test. MX 30 worse.test.",
		"only.test. MX 10 OWN.test.",
		"xn--bcher-kva.test. MX 10 a.test.",
		"txt.test. TXT x",
	)}
	first := map[string]bool{}
	for range 50 {
		found, reply, err := l.mx(bg(), "pref.test", "own.test")
		hosts := hostNames(found)
		if err != nil || reply != nil || len(hosts) != 3 || hosts[2] != "c.test" {
			t.Fatalf("got %v, %v, %v", hosts, reply, err)
		}
		first[hosts[0]] = true
	}
	if len(first) != 2 {
		t.Errorf("not at random inside a preference: %v", first)
	}
	for _, tt := range []struct {
		domain string
		hosts  []string
		reply  string
	}{
		{"plain.test", []string{"plain.test"}, ""},
		{"null.test", nil, "556 5.1.10 null.test does not take mail"},
		{"self.test", []string{"first.test"}, ""},
		{"only.test", nil, "554 5.4.6 mail for only.test loops back to this host"},
		{"gone.test", nil, "550 5.1.2 no such domain: gone.test"},
		{"txt.test", nil, "550 5.1.2 no such domain: txt.test"},
		{"bücher.test", []string{"a.test"}, ""},
		{"[192.0.2.1]", []string{"192.0.2.1"}, ""},
		{"[ipv6:2001:db8::1]", []string{"2001:db8::1"}, ""},
		{"[nonsense]", nil, "550 5.1.2 address literal is not understood"},
	} {
		found, reply, err := l.mx(bg(), tt.domain, "own.test")
		hosts := hostNames(found)
		text := ""
		if reply != nil {
			text = reply.String()
		}
		if err != nil || text != tt.reply || !slices.Equal(hosts, tt.hosts) {
			t.Errorf("%s: got %v, %q, %v", tt.domain, hosts, text, err)
		}
	}
	if hosts, reply, err := l.mx(bg(), "broken.test", "own.test"); err == nil || reply != nil || hosts != nil {
		t.Errorf("a server failure is temporary: got %v, %v, %v", hosts, reply, err)
	}
}

func TestDeliverByMX(t *testing.T) {
	s := newScript(t, hello+one)
	_, port, _ := net.SplitHostPort(s.addr())
	c := testClient(t, func(o *Options) {
		o.MXPort = port
		o.Resolver = dnsServer(t, "b.test. MX 10 dead.test.", "b.test. MX 20 mx.test.", "mx.test. A 127.0.0.1", "null.test. MX 0 .")
	})
	a := attempt("", "hello\r\n", "x@b.test")
	a.Transport, a.Domain = config.Transport{Name: "mx"}, "b.test"
	got, err := c.Deliver(bg(), a)
	if err != nil || summary(got) != "dot 250 taken" || got[0].Hop != "mx.test:"+port {
		t.Errorf("got %+v, %v", got, err)
	}
	a.Domain = "null.test"
	if got, err = c.Deliver(bg(), a); err != nil || summary(got) != "lookup 556 5.1.10 null.test does not take mail" {
		t.Errorf("got %+v, %v", got, err)
	}
	a.Domain = "broken.test"
	var out *OutOfReach
	if got, err = c.Deliver(bg(), a); !errors.As(err, &out) || out.Stage != StageLookup || got != nil {
		t.Errorf("got %+v, %v", got, err)
	}
	if r, err := c.Ask(bg(), a.Transport, "null.test", env("a@b.test"), path("x@null.test")); err != nil || r.Code != 556 {
		t.Errorf("Ask: %v, %v", r, err)
	}
}

func TestAddressFamiliesTakeTurns(t *testing.T) {
	var in []netip.Addr
	for _, s := range []string{"2001:db8::1", "2001:db8::2", "2001:db8::3", "192.0.2.1", "192.0.2.2", "192.0.2.3", "192.0.2.4"} {
		in = append(in, netip.MustParseAddr(s))
	}
	var got []string
	for _, a := range takeTurns(in) {
		got = append(got, a.String())
	}
	want := "2001:db8::1 192.0.2.1 2001:db8::2 192.0.2.2 2001:db8::3 192.0.2.3"
	if strings.Join(got, " ") != want {
		t.Errorf("got %v", got)
	}
}
