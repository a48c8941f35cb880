package smtpd

import (
	"context"
	"net"
	"net/netip"
	"strconv"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/miekg/dns"
)

// dnsServer is a real DNS server on loopback with the records given, and a resolver that asks it. Another name is none.
func dnsServer(t *testing.T, records ...string) *net.Resolver {
	t.Helper()
	zone := map[dns.Question][]dns.RR{}
	for _, text := range records {
		rr, err := dns.NewRR(text)
		if err != nil {
			t.Fatal(err)
		}
		h := rr.Header()
		q := dns.Question{Name: h.Name, Qtype: h.Rrtype, Qclass: dns.ClassINET}
		zone[q] = append(zone[q], rr)
	}
	return dnsAnswers(t, func(w dns.ResponseWriter, m *dns.Msg) {
		r := new(dns.Msg)
		r.SetReply(m)
		r.RecursionAvailable = true
		if r.Answer = zone[m.Question[0]]; r.Answer == nil {
			r.Rcode = dns.RcodeNameError
		}
		_ = w.WriteMsg(r)
	})
}

// dnsAnswers is a resolver whose server does what answer does.
func dnsAnswers(t *testing.T, answer dns.HandlerFunc) *net.Resolver {
	t.Helper()
	pc, err := net.ListenPacket("udp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	ready := make(chan struct{})
	srv := &dns.Server{PacketConn: pc, Handler: answer, NotifyStartedFunc: func() { close(ready) }}
	done := make(chan error)
	go func() { done <- srv.ActivateAndServe() }() // waited for below
	<-ready
	t.Cleanup(func() {
		_ = srv.Shutdown()
		<-done
	})
	addr := pc.LocalAddr().String()
	return &net.Resolver{PreferGo: true, Dial: func(ctx context.Context, _, _ string) (net.Conn, error) {
		var d net.Dialer
		return d.DialContext(ctx, "udp", addr)
	}}
}

func ptr(last int, name string) string {
	return strconv.Itoa(last) + ".2.0.192.in-addr.arpa. PTR " + name
}

func TestReceivedHasTheNameThatTheDNSConfirms(t *testing.T) {
	h := newHop(t)
	var many []string
	for n := range maxConfirmed {
		many = append(many, ptr(5, "no"+strconv.Itoa(n)+".test."))
	}
	many = append(many, ptr(5, "yes.test."), "yes.test. A 192.0.2.5")
	resolver := dnsServer(t, append(many,
		ptr(1, "Mail.Client.test."), "Mail.Client.test. A 192.0.2.9", "Mail.Client.test. A 192.0.2.1",
		ptr(2, "liar.test."), "liar.test. A 192.0.2.9",
		ptr(3, `a\041b.test.`), `a\041b.test. A 192.0.2.3`,
		"1.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.8.b.d.0.1.0.0.2.ip6.arpa. PTR six.test.", "six.test. AAAA 2001:db8::1")...)
	g := behind(t, snapshot("one.test", h.addr()), func(o *Options) { o.Resolver = resolver })
	for client, want := range map[string]string{
		"192.0.2.1": "(mail.client.test [192.0.2.1])", "192.0.2.2": "(unknown [192.0.2.2])", "192.0.2.3": "(unknown [192.0.2.3])",
		"192.0.2.4": "(unknown [192.0.2.4])", "192.0.2.5": "(unknown [192.0.2.5])",
	} {
		t.Run(client, func(t *testing.T) {
			before := len(h.messages())
			p := g.dialFor(client)
			p.want("220")
			p.ask("EHLO client.test", "250")
			p.begin("x@one.test")
			p.send("x\r\n.\r\n")
			p.want("250")
			if line, _, _ := strings.Cut(h.messages()[before].wire, "\r\n"); line != "Received: from client.test "+want {
				t.Errorf("%s, want %s", line, want)
			}
		})
	}
	if got := g.server.names.of(netip.MustParseAddr("2001:db8::1"), time.Now()).by(time.Now().Add(patience)); got != "six.test" {
		t.Errorf("IPv6: %q", got)
	}
}

func TestAClientDoesNotWaitForADNSThatHangs(t *testing.T) {
	h := newHop(t)
	g := behind(t, snapshot("one.test", h.addr()), func(o *Options) { o.Resolver = dnsAnswers(t, func(dns.ResponseWriter, *dns.Msg) {}) })
	start := time.Now()
	p := g.dialFor("192.0.2.1")
	p.want("220")
	p.ask("EHLO client.test", "250")
	p.begin("x@one.test")
	p.send("x\r\n.\r\n")
	p.want("250")
	if d := time.Since(start); d >= nameTime {
		t.Errorf("it took %v", d)
	}
	p.begin("x@one.test")
	p.send("x\r\n.\r\n")
	p.want("250")
	for _, m := range h.messages() {
		if !strings.Contains(m.wire, "(unknown [192.0.2.1])") {
			t.Errorf("Received: %q", m.wire)
		}
	}
}

func TestNamesAreAskedForOnceAndWithinBounds(t *testing.T) {
	var asked atomic.Int32
	hold := make(chan struct{})
	n := &names{ended: t.Context(), resolver: dnsAnswers(t, func(w dns.ResponseWriter, m *dns.Msg) {
		asked.Add(1)
		<-hold
		r := new(dns.Msg)
		_ = w.WriteMsg(r.SetRcode(m, dns.RcodeNameError))
	})}
	now := time.Now()
	first := n.of(netip.MustParseAddr("192.0.2.1"), now)
	if again := n.of(netip.MustParseAddr("192.0.2.1"), now); again != first {
		t.Error("asked twice at once")
	}
	for i := 2; i <= maxLookups; i++ {
		n.of(netip.AddrFrom4([4]byte{192, 0, 2, byte(i)}), now)
	}
	if over := n.of(netip.MustParseAddr("198.51.100.1"), now); over.by(now) != "" || over.done == nil {
		t.Error("one more than may be asked for at once")
	}
	select {
	case <-n.of(netip.MustParseAddr("198.51.100.1"), now).done:
	default:
		t.Error("one more than may be asked for at once is asked for")
	}
	close(hold)
	n.stop()
	before := asked.Load()
	n.of(netip.MustParseAddr("192.0.2.1"), now.Add(noNameLife/2))
	n.stop()
	if asked.Load() != before {
		t.Error("asked again at once")
	}
	n.of(netip.MustParseAddr("192.0.2.1"), now.Add(noNameLife))
	n.stop()
	if asked.Load() == before {
		t.Error("never asked again")
	}
	n.resolver = &net.Resolver{PreferGo: true, Dial: func(context.Context, string, string) (net.Conn, error) { return nil, net.ErrClosed }}
	for i := range maxNames {
		n.of(netip.AddrFrom4([4]byte{10, 0, byte(i >> 8), byte(i)}), now)
		if i%maxLookups == 0 {
			n.stop()
		}
	}
	n.stop()
	if len(n.young) > maxNames/2 || len(n.old) > maxNames/2 {
		t.Errorf("%d and %d are kept", len(n.young), len(n.old))
	}
}
