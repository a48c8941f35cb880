package relay

import (
	"fmt"
	"net"
	"net/netip"
	"testing"
	"time"

	"github.com/emersion/go-smtp"

	"mailproxy/config"
)

// mxHosts runs SMTP servers on loopback addresses at one port, and gives that port and what each has taken.
func mxHosts(t *testing.T, addresses ...string) (port string, taken map[string]*backend) {
	t.Helper()
	taken = map[string]*backend{}
	first, err := net.Listen("tcp", addresses[0]+":0")
	if err != nil {
		t.Fatal(err)
	}
	_, port, _ = net.SplitHostPort(first.Addr().String())
	for i, a := range addresses {
		l := first
		if i > 0 {
			if l, err = net.Listen("tcp", net.JoinHostPort(a, port)); err != nil {
				t.Fatal(err)
			}
		}
		b := &backend{}
		srv := smtp.NewServer(b)
		srv.Domain = a
		done := make(chan struct{})
		go func() { _ = srv.Serve(l); close(done) }()
		t.Cleanup(func() { srv.Close(); <-done })
		taken[a] = b
	}
	return port, taken
}

// With one of a domain's hosts dead every message is delivered, and the others share them as their records say.
func TestMailIsDeliveredWithOneOfTheHostsDead(t *testing.T) {
	const count = 40
	for _, tt := range []struct {
		name    string
		records []string
		all     []string // who has something in the end
		none    []string // who has nothing
	}{
		{"equal preferences", []string{"b.test. MX 10 one.test.", "b.test. MX 10 two.test.", "b.test. MX 10 dead.test.", "b.test. MX 20 three.test."},
			[]string{"127.0.0.2", "127.0.0.3"}, []string{"127.0.0.4"}},
		{"a backup", []string{"b.test. MX 10 dead.test.", "b.test. MX 20 one.test."}, []string{"127.0.0.2"}, []string{"127.0.0.3", "127.0.0.4"}},
		{"a backup that is not needed", []string{"b.test. MX 10 one.test.", "b.test. MX 20 two.test."}, []string{"127.0.0.2"}, []string{"127.0.0.3"}},
		{"a better one that has no address", []string{"b.test. MX 10 nowhere.test.", "b.test. MX 20 one.test."}, []string{"127.0.0.2"}, nil},
		{"a better one that the DNS does not answer for", []string{"b.test. MX 10 x.broken.test.", "b.test. MX 20 one.test."}, []string{"127.0.0.2"}, nil},
		{"a better one that nobody knows an address of", []string{"b.test. MX 10 x.mute.test.", "b.test. MX 20 one.test."}, []string{"127.0.0.2"}, nil},
		{"a backup that nobody knows an address of", []string{"b.test. MX 10 one.test.", "b.test. MX 20 x.mute.test.", "b.test. MX 30 y.mute.test."}, []string{"127.0.0.2"}, nil},
		{"one host, several addresses", []string{"b.test. MX 10 several.test."}, []string{"127.0.0.2"}, nil},
		{"no MX, several addresses", []string{"b.test. A 127.0.0.9", "b.test. A 127.0.0.2"}, []string{"127.0.0.2"}, nil},
		{"one that says nothing", []string{"b.test. MX 10 silent.test.", "b.test. MX 20 one.test."}, []string{"127.0.0.2"}, nil},
	} {
		t.Run(tt.name, func(t *testing.T) {
			port, taken := mxHosts(t, "127.0.0.2", "127.0.0.3", "127.0.0.4")
			silent, err := net.Listen("tcp", net.JoinHostPort("127.0.0.5", port))
			if err != nil {
				t.Fatal(err)
			}
			defer silent.Close()
			records := append([]string{"one.test. A 127.0.0.2", "two.test. A 127.0.0.3", "three.test. A 127.0.0.4", "silent.test. A 127.0.0.5",
				"dead.test. A 127.0.0.9", "several.test. A 127.0.0.9", "several.test. A 127.0.0.2"}, tt.records...)
			c := testClient(t, func(o *Options) {
				o.MXPort, o.Resolver, o.Timeouts.Greeting = port, dnsServer(t, records...), downCost+100*time.Millisecond
				o.Timeouts.Lookup, o.Own = time.Second, func(netip.AddrPort) bool { return false }
			})
			start := time.Now()
			for i := range count {
				a := attempt("", fmt.Sprintf("Subject: %d\r\n", i), "x@b.test")
				a.Transport, a.Domain = config.Transport{Name: "mx", TLS: config.TLSNone}, "b.test"
				if got, err := c.Deliver(bg(), a); err != nil || got[0].Reply.Code != 250 {
					t.Fatalf("message %d: %s, %v", i, summary(got), err)
				}
			}
			if took := time.Since(start); took > 5*time.Second { // who lets us wait does so once
				t.Errorf("took %v", took)
			}
			sum := 0
			for _, b := range taken {
				sum += len(b.messages())
			}
			for _, a := range tt.all {
				if len(taken[a].messages()) == 0 {
					t.Errorf("%s has none", a)
				}
			}
			for _, a := range tt.none {
				if n := len(taken[a].messages()); n != 0 {
					t.Errorf("%s has %d", a, n)
				}
			}
			if sum != count {
				t.Errorf("%d of %d are there", sum, count)
			}
		})
	}
}
