package filter

import (
	"errors"
	"fmt"
	"net/netip"
	"strings"
	"testing"
	"time"

	"pgregory.net/rapid"

	"mailproxy/config"
	"mailproxy/mail"
)

func path(t testing.TB, s string) mail.Path {
	t.Helper()
	p, err := mail.ParsePath(s)
	if err != nil {
		t.Fatal(err)
	}
	return p
}

func compile(t testing.TB, s *config.Snapshot) *Ruleset {
	t.Helper()
	r, err := Compile(s)
	if err != nil {
		t.Fatal(err)
	}
	return r
}

func sample() *config.Snapshot {
	return &config.Snapshot{
		Networks:   []config.Network{{Prefix: netip.MustParsePrefix("192.0.2.0/24")}, {Prefix: netip.MustParsePrefix("2001:db8::/32")}},
		Transports: []config.Transport{{Name: "smarthost", Hosts: []string{"smart.test:25"}}, {Name: "inside", Hosts: []string{"10.0.0.1:25"}, TLS: config.TLSNone}},
		Domains: config.NewDomains([]config.Domain{
			{Name: "one.test", Hosts: []string{"10.0.0.2:25"}}, {Name: "two.test", Transport: "inside"},
			{Name: "xn--bcher-kva.test", Hosts: []string{"10.0.0.3:25"}},
		}),
	}
}

func TestRelayForOurDomainsFromAnyoneAndToAnywhereFromOurNetworks(t *testing.T) {
	r := compile(t, sample())
	stranger, own, own6 := netip.MustParseAddr("198.51.100.1"), netip.MustParseAddr("::ffff:192.0.2.9"), netip.MustParseAddr("2001:db8:1::1")
	cases := []struct {
		client netip.Addr
		to     string
		code   int
	}{
		{stranger, "x@one.test", 0}, {stranger, "x@two.test", 0}, {stranger, "x@elsewhere.test", 554}, {stranger, "x@sub.one.test", 554},
		{stranger, "x@[192.0.2.1]", 554}, {stranger, `"x@elsewhere.test"@one.test`, 554},
		{stranger, "x%elsewhere.test@one.test", 554}, {stranger, "elsewhere.test!x@two.test", 554}, {own, "x%elsewhere.test@one.test", 0},
		{stranger, "@elsewhere.test:x@one.test", 0}, {stranger, "@one.test:x@elsewhere.test", 554}, {stranger, "x@bücher.test", 0},
		{stranger, "postmaster", 0}, {stranger, "postmaster@elsewhere.test", 554}, {stranger, "", 501},
		{own, "x@elsewhere.test", 0}, {own6, "x@elsewhere.test", 0}, {netip.Addr{}, "x@elsewhere.test", 554},
	}
	for _, c := range cases {
		to, reply := r.Accepts(c.client, path(t, c.to))
		code := 0
		if reply != nil {
			code = reply.Code
		}
		if code != c.code {
			t.Errorf("%v to %s: %d, want %d", c.client, c.to, code, c.code)
		}
		if c.to == "postmaster" && to.String() != "postmaster@one.test" {
			t.Errorf("postmaster goes to %s", to)
		}
	}
	_, reply := r.Accepts(stranger, path(t, "x@elsewhere.test"))
	if reply.Status() != "5.7.1" {
		t.Error(reply)
	}
}

func TestRoutes(t *testing.T) {
	s := sample()
	cases := []struct{ outbound, to, want string }{
		{"", "x@one.test", "domain:one.test 10.0.0.2:25 may"},
		{"", "x@two.test", "inside 10.0.0.1:25 none"},
		{"", "x@bücher.test", "domain:xn--bcher-kva.test 10.0.0.3:25 may"},
		{"", "x@elsewhere.test", "mx  may"},
		{"smarthost", "x@elsewhere.test", "smarthost smart.test:25 "},
	}
	for _, c := range cases {
		s.Settings = nil
		if c.outbound != "" {
			s.Settings = []config.Setting{{Name: "outbound_transport", Value: c.outbound}}
		}
		tr, reply := compile(t, s).Route(path(t, c.to))
		if got := fmt.Sprintf("%s %s %s", tr.Name, strings.Join(tr.Hosts, ","), tr.TLS); reply != nil || got != c.want {
			t.Errorf("%s: %q, %v, want %q", c.to, got, reply, c.want)
		}
	}
	if _, reply := compile(t, s).Route(path(t, "postmaster")); reply == nil || !reply.Permanent() {
		t.Error("a way for an address without a domain")
	}
}

func TestPostmaster(t *testing.T) {
	s := sample()
	s.Settings = []config.Setting{{Name: "postmaster", Value: "ops@two.test"}}
	if to, reply := compile(t, s).Accepts(netip.Addr{}, path(t, "POSTMASTER")); reply != nil || to.String() != "ops@two.test" {
		t.Error(to, reply)
	}
	if _, reply := compile(t, &config.Snapshot{}).Accepts(netip.Addr{}, path(t, "postmaster")); reply == nil || !reply.Temporary() {
		t.Error("without any domain: ", reply)
	}
}

func TestWhatDoesNotCompileIsNamed(t *testing.T) {
	cases := []struct {
		name   string
		change func(*config.Snapshot)
		want   string
	}{
		{"a network that is none", func(s *config.Snapshot) { s.Networks[0].Prefix = netip.Prefix{} }, "is not a network"},
		{"an outbound transport that is not there", func(s *config.Snapshot) {
			s.Settings = []config.Setting{{Name: "outbound_transport", Value: "gone"}}
		}, "setting outbound_transport: no such transport: gone"},
		{"a setting out of bounds", func(s *config.Snapshot) {
			s.Settings = []config.Setting{{Name: "max_recipients", Value: "1"}}
		}, "setting max_recipients: "},
	}
	for _, c := range cases {
		t.Run(c.name, func(t *testing.T) {
			s := sample()
			c.change(s)
			_, err := Compile(s)
			var object *CompileError
			if !errors.Is(err, ErrCompile) || !errors.As(err, &object) || !strings.Contains(err.Error(), c.want) {
				t.Errorf("got %v, want %s", err, c.want)
			}
		})
	}
}

func TestTrustedIsInAnyOfTheNetworks(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		address := func(label string) netip.Addr {
			if rapid.Bool().Draw(t, label+"6") {
				var b [16]byte
				b[0], b[15] = 0x20, byte(rapid.IntRange(0, 255).Draw(t, label))
				return netip.AddrFrom16(b)
			}
			return netip.AddrFrom4([4]byte{10, 0, byte(rapid.IntRange(0, 3).Draw(t, label+"c")), byte(rapid.IntRange(0, 255).Draw(t, label+"d"))})
		}
		s := &config.Snapshot{}
		for range rapid.IntRange(0, 8).Draw(t, "networks") {
			a := address("network")
			p, err := a.Prefix(rapid.IntRange(a.BitLen()-10, a.BitLen()).Draw(t, "bits"))
			if err != nil {
				t.Fatal(err)
			}
			s.Networks = append(s.Networks, config.Network{Prefix: p})
		}
		r, err := Compile(s)
		if err != nil {
			t.Fatal(err)
		}
		client := address("client")
		want := false
		for _, n := range s.Networks {
			want = want || n.Prefix.Contains(client)
		}
		if got := r.Trusted(client); got != want {
			t.Fatalf("%v in %v: %v", client, s.Networks, got)
		}
	})
}

func TestDecideDeliversAndNamesTheRule(t *testing.T) {
	v := compile(t, sample()).Decide(&mail.Envelope{}, strings.NewReader(""))
	if v.Action != ActionDeliver || v.Rule != "default" || v.Reason == "" || v.Action.String() != "deliver" || ActionReject.String() != "reject" {
		t.Errorf("%+v", v)
	}
}

func many(n int) *config.Snapshot {
	list := make([]config.Domain, n)
	hosts := []string{"10.0.0.1:25"}
	for i := range list {
		list[i] = config.Domain{Name: fmt.Sprintf("d%06d.example.test", i), Hosts: hosts}
	}
	return &config.Snapshot{Domains: config.NewDomains(list)}
}

func TestCompileOfManyDomainsIsFast(t *testing.T) {
	s := many(100_000)
	best := time.Hour
	for range 5 {
		start := time.Now()
		r := compile(t, s)
		best = min(best, time.Since(start))
		if !r.Ours(mail.Path{Domain: "d099999.example.test"}) {
			t.Fatal("the last one is not found")
		}
	}
	if best > 100*time.Millisecond {
		t.Errorf("takes %v", best)
	}
}

func BenchmarkCompile(b *testing.B) {
	s := many(100_000)
	for b.Loop() {
		compile(b, s)
	}
}

func BenchmarkRoute(b *testing.B) {
	r := compile(b, many(100_000))
	to := mail.Path{Local: "x", Domain: "d054321.example.test"}
	for b.Loop() {
		r.Route(to)
	}
}
