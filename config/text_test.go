package config

import (
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
	"pgregory.net/rapid"
)

var compareParts = cmp.Options{cmpopts.IgnoreUnexported(Parts{}), cmpopts.EquateEmpty(),
	cmp.Comparer(func(a, b netip.Prefix) bool { return a == b }), cmp.Transformer("list", Domains.List)}

const example = `# made by hand
[settings]
max_recipients = 200
cut_through = false
postmaster = "pm@Example.test"

[[network]]
prefix = "10.0.0.0/8"
comment = "office # not a comment"

[[transport]]
name = "smart"
hosts = [
  "[2001:db8::1]", # [[domain]]
  "mail.example:587",
]
tls = "verify"

[[domain]]
name = "Example.test"
transport = "smart"

[[domain]]
name = "a.test"
hosts = ["10.0.0.1"]
recipients = ["Sales", "info"]
`

func TestParseText(t *testing.T) {
	got, err := ParseText([]byte(example))
	if err != nil {
		t.Fatal(err)
	}
	want := &Parts{
		Settings:   []Setting{{"cut_through", "no"}, {"max_recipients", "200"}, {"postmaster", "pm@Example.test"}},
		Networks:   []Network{{netip.MustParsePrefix("10.0.0.0/8"), "office # not a comment"}},
		Transports: []Transport{{Name: "smart", Hosts: []string{"[2001:db8::1]:25", "mail.example:587"}, TLS: TLSVerify}},
		Domains:    []Domain{{Name: "a.test", Hosts: []string{"10.0.0.1:25"}}, {Name: "example.test", Transport: "smart"}},
		Recipients: []RecipientList{{"a.test", []string{"info", "sales"}}},
	}
	if diff := cmp.Diff(want, got, compareParts); diff != "" {
		t.Error(diff)
	}
	for object, line := range map[string]int{"setting max_recipients": 3, "network 10.0.0.0/8": 7, "transport smart": 11,
		"domain example.test": 19, "domain a.test": 23, "domain none.test": 0} {
		if got.Line(object) != line {
			t.Errorf("%s is said to be in line %d, is in %d", object, got.Line(object), line)
		}
	}
}

func TestTextIsReadable(t *testing.T) {
	parts, err := ParseText([]byte(example))
	if err != nil {
		t.Fatal(err)
	}
	s := (&Snapshot{Position: Position{Epoch: Epoch{N: 2, Owner: 3}, Serial: 17}}).With(parts)
	want := `# mailproxy configuration at 2.3/17

[settings]
cut_through = "no"
max_recipients = "200"
postmaster = "pm@Example.test"

[[network]]
prefix = "10.0.0.0/8"
comment = "office # not a comment"

[[transport]]
name = "smart"
hosts = ["[2001:db8::1]:25", "mail.example:587"]
tls = "verify"

[[domain]]
name = "a.test"
hosts = ["10.0.0.1:25"]
recipients = [
  "info",
  "sales",
]

[[domain]]
name = "example.test"
transport = "smart"
`
	if diff := cmp.Diff(want, string(s.Text())); diff != "" {
		t.Error(diff)
	}
}

func TestParseTextNamesLineAndReason(t *testing.T) {
	for _, c := range []struct{ name, text, want string }{
		{"not TOML", "a = 1\nb = = 2\n", "line 2: "},
		{"unknown table", "x = 1\n[colours]\nred = 1\n", "line 1: unknown key \"x\"\nline 2: unknown key \"colours\"\n" +
			"line 3: unknown key \"colours.red\""},
		{"unknown key in the second domain", "[[domain]]\nname = \"a.test\"\nhosts=[\"b\"]\n[[domain]]\nname = \"c.test\"\nhost = \"b\"\n",
			`line 6: unknown key "domain.host"`},
		{"wrong type", "[[domain]]\nname = 5\n", "line 2: "},
		{"setting of a wrong type", "[settings]\nmax_errors = [5]\n", "line 2: setting max_errors: want a text, a whole number, true or false"},
		{"bad network", "\n[[network]]\nprefix = \"10.0.0.1/8\"\n",
			"line 2: network 10.0.0.1/8: 10.0.0.1/8 has bits set behind its length, did you mean 10.0.0.0/8?"},
		{"bad domain", "[[domain]]\nname=\"a b\"\n", `line 1: domain a b: "a b" is not a domain name`},
		{"bad host", "[[domain]]\nname=\"a\"\nhosts=[\"b:x\"]\n", `line 1: domain a: "b:x": port "x" is not a number from 1 to 65535`},
		{"domain twice", "[[domain]]\nname=\"a\"\n[[domain]]\nname=\"A.\"\n", `line 3: domain a: stands there twice, first in line 1`},
	} {
		t.Run(c.name, func(t *testing.T) {
			_, err := ParseText([]byte(c.text))
			if err == nil || !strings.HasPrefix(err.Error(), c.want) {
				t.Errorf("got  %v\nwant %s", err, c.want)
			}
		})
	}
}

func TestLocateFillsInLines(t *testing.T) {
	parts, err := ParseText([]byte("[[domain]]\nname=\"z.test\"\ntransport=\"none\"\n\n[settings]\nmax_errors = 0\n[[domain]]\nname='a.test'\n"))
	if err != nil {
		t.Fatal(err)
	}
	err = parts.Locate(Validate(new(Snapshot).With(parts)))
	want := "line 1: domain z.test: no such transport: none\nline 6: setting max_errors: 0 is out of bounds, want 1 to 10000\n" +
		"line 7: domain a.test: has neither hosts nor a transport"
	if err == nil || err.Error() != want {
		t.Errorf("got  %v\nwant %s", err, want)
	}
	if parts.Locate(nil) != nil {
		t.Error("no error became one")
	}
}

// drawParts makes parts that are in their normal forms, with text of any kind where text may stand.
func drawParts(t *rapid.T) *Parts {
	host := rapid.Custom(func(t *rapid.T) string {
		h, err := NormalizeHost(rapid.StringMatching(`[a-z]{1,8}(\.[a-z]{2,4})?(:[1-9][0-9]{0,3})?`).Draw(t, "host"), "25")
		if err != nil {
			t.Fatal(err)
		}
		return h
	})
	hosts := rapid.SliceOfNDistinct(host, 0, 4, rapid.ID[string])
	text := rapid.String()
	p := &Parts{
		Settings: rapid.SliceOfDistinct(rapid.Custom(func(t *rapid.T) Setting {
			return Setting{Name: rapid.StringMatching(`[a-z_]{1,10}|[ -~]{1,4}`).Draw(t, "setting"), Value: text.Draw(t, "value")}
		}), func(s Setting) string { return s.Name }).Draw(t, "settings"),
		Networks: rapid.SliceOfDistinct(rapid.Custom(func(t *rapid.T) Network {
			var b [4]byte
			copy(b[:], rapid.SliceOfN(rapid.Byte(), 4, 4).Draw(t, "address"))
			p, _ := netip.AddrFrom4(b).Prefix(rapid.IntRange(0, 32).Draw(t, "bits"))
			return Network{Prefix: p, Comment: text.Draw(t, "comment")}
		}), func(n Network) netip.Prefix { return n.Prefix }).Draw(t, "networks"),
		Transports: rapid.SliceOfDistinct(rapid.Custom(func(t *rapid.T) Transport {
			return Transport{Name: rapid.StringMatching(`[a-z0-9._-]{1,9}`).Draw(t, "name"), Hosts: hosts.Draw(t, "hosts"),
				TLS: rapid.SampledFrom([]TLS{"", TLSNone, TLSVerify}).Draw(t, "tls"), Order: rapid.SampledFrom([]Order{"", OrderRoundRobin}).Draw(t, "order"),
				User: text.Draw(t, "user"), Password: text.Draw(t, "password"), Tell: rapid.SampledFrom([]Tell{"", TellProxy}).Draw(t, "tell"),
				QueueLife: Duration(time.Second * time.Duration(rapid.IntRange(0, 2_000_000).Draw(t, "life")))}
		}), func(x Transport) string { return x.Name }).Draw(t, "transports"),
		Domains: rapid.SliceOfDistinct(rapid.Custom(func(t *rapid.T) Domain {
			return Domain{Name: rapid.StringMatching(`[a-z0-9]{1,9}\.[a-z]{2,4}`).Draw(t, "name"), Hosts: hosts.Draw(t, "hosts"),
				Transport: rapid.StringMatching(`[a-z]{0,3}`).Draw(t, "transport"), Comment: text.Draw(t, "comment")}
		}), func(d Domain) string { return d.Name }).Draw(t, "domains"),
	}
	for _, d := range p.Domains {
		local := rapid.Custom(func(t *rapid.T) string { return strings.ToLower(text.Draw(t, "local")) })
		if locals := rapid.SliceOfNDistinct(local, 0, 4, rapid.ID[string]).Draw(t, "locals"); len(locals) > 0 {
			slices.Sort(locals)
			p.Recipients = append(p.Recipients, RecipientList{d.Name, locals})
		}
	}
	name := rapid.StringMatching(`[a-z0-9]{1,9}\.[a-z]{2,4}`)
	for _, n := range rapid.SliceOfNDistinct(name, 0, 3, rapid.ID[string]).Draw(t, "certificates") {
		pem := rapid.StringMatching("-----BEGIN X-----\n([A-Za-z0-9+/=]{0,64}\n){0,3}")
		p.Certificates = append(p.Certificates, Certificate{Name: rapid.SampledFrom([]string{"", "*."}).Draw(t, "wild") + n,
			Chain: rapid.OneOf(pem, text).Draw(t, "chain"), Key: text.Draw(t, "key")})
	}
	for _, n := range rapid.SliceOfNDistinct(name, 0, 3, rapid.ID[string]).Draw(t, "senders") {
		p.TLSSenders = append(p.TLSSenders, TLSSender{Domain: n, Comment: text.Draw(t, "comment")})
	}
	p.sort()
	return p
}

func TestTextIsReadBackAsItWasWritten(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		want := drawParts(t)
		s := new(Snapshot).With(want)
		got, err := ParseText(s.Text())
		if err != nil {
			t.Fatalf("%v\n%s", err, s.Text())
		}
		if diff := cmp.Diff(want, got, compareParts); diff != "" {
			t.Fatal(diff)
		}
		lines := strings.Split(string(s.Text()), "\n")
		for i, line := range lines {
			for _, d := range want.Domains {
				if line == `name = "`+d.Name+`"` && lines[i-1] == "[[domain]]" && got.Line("domain "+d.Name) != i {
					t.Fatalf("domain %s is said to start in line %d, does in %d", d.Name, got.Line("domain "+d.Name), i)
				}
			}
		}
		if d := Diff(s, new(Snapshot).With(got)); len(d) != 0 {
			t.Fatalf("differs: %v", d)
		}
	})
}

func TestDiff(t *testing.T) {
	a, b := sound(), sound()
	b.Settings = []Setting{{"max_errors", ""}}
	b.Transports = b.Transports[:1]
	b.Transports[0].Order, b.Transports[0].Tell = OrderRoundRobin, TellProxy
	b.Transports[0].User, b.Transports[0].Password = "us", "secret:x"
	b.Networks = append(b.Networks, prefix("192.0.2.0/24"))
	b.Domains = NewDomains([]Domain{{Name: "a.test", Hosts: []string{"10.0.0.2:25"}, Comment: "first"}})
	a.Recipients = []RecipientList{{"a.test", []string{"a", "b", "c"}}, {"b.test", []string{"*"}}, {"d.test", []string{"x"}}}
	b.Recipients = []RecipientList{{"a.test", []string{"b", "d", "e", "f"}}, {"c.test", []string{"a", "b"}}, {"d.test", []string{"x"}}}
	var got []string
	for _, d := range Diff(a, b) {
		got = append(got, d.String())
	}
	want := []string{`+ setting max_errors: ""`, "- setting outbound_transport: smart", "+ network 192.0.2.0/24: no comment",
		"- transport all: to a.test:25 b.test:25, tls verify, order round-robin, user us@a.test, password secret:smtp, tell xclient",
		"- transport mx: to MX", "~ transport smart: to 10.0.0.9:587, tls encrypt -> to 10.0.0.9:587, tls encrypt, order round-robin, " +
			"user us, password secret:x, tell proxy", `~ domain a.test: to 10.0.0.1:25 [::1]:25, comment "first" -> to 10.0.0.2:25, comment "first"`,
		"- domain b.test: transport mx", "~ recipients a.test: 3 addresses -> 4 addresses, 3 added, 2 removed",
		"- recipients b.test: 1 address", "+ recipients c.test: 2 addresses"}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Error(diff)
	}
}

func FuzzParseText(f *testing.F) {
	f.Add([]byte(example))
	f.Add([]byte("[settings]\n\"a.b\" = '''x\n[[domain]]'''\n"))
	f.Add([]byte("domain = [{name='a'}]\nsettings.x = 1\n"))
	f.Fuzz(func(t *testing.T, text []byte) {
		parts, err := ParseText(text)
		if err != nil {
			return
		}
		s := new(Snapshot).With(parts)
		again, err := ParseText(s.Text())
		if err != nil {
			t.Fatalf("own text is refused: %v\n%s", err, s.Text())
		}
		if diff := cmp.Diff(parts, again, compareParts); diff != "" {
			t.Fatal(diff)
		}
		if s.values(new(Values), new(collector)); Validate(s) == nil && len(Diff(s, new(Snapshot).With(again))) != 0 {
			t.Fatal("differs from itself")
		}
	})
}
