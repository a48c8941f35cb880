package config

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"testing"

	"pgregory.net/rapid"
)

func prefix(s string) Network { return Network{Prefix: netip.MustParsePrefix(s)} }

func sound() *Snapshot {
	return &Snapshot{
		Settings: []Setting{{"outbound_transport", "smart"}},
		Networks: []Network{prefix("10.0.0.0/8")},
		Transports: []Transport{{Name: "smart", Hosts: []string{"10.0.0.9:587"}, TLS: TLSEncrypt}, {Name: "mx"},
			{Name: "all", Hosts: []string{"a.test:25", "b.test:25"}, Order: OrderRoundRobin, TLS: TLSVerify, User: "us@a.test", Password: "secret:smtp",
				Tell: TellXClient}},
		Domains: NewDomains([]Domain{{Name: "a.test", Hosts: []string{"10.0.0.1:25", "[::1]:25"}, Comment: "first"},
			{Name: "b.test", Transport: "mx"}}),
	}
}

// domain breaks one of a snapshot's domains.
func domain(i int, breaks func(*Domain)) func(*Snapshot) {
	return func(s *Snapshot) {
		list := s.Domains.List()
		breaks(&list[i])
		s.Domains = NewDomains(list)
	}
}

func TestValidateTakesWhatIsSound(t *testing.T) {
	if err := Validate(sound()); err != nil {
		t.Fatal(err)
	}
	if err := Validate(new(Snapshot)); err != nil {
		t.Fatal(err)
	}
}

func TestValidateNamesObjectAndReason(t *testing.T) {
	for _, c := range []struct {
		name   string
		breaks func(*Snapshot)
		want   string
	}{
		{"unknown setting", func(s *Snapshot) { s.Settings = append(s.Settings, Setting{"colour", "red"}) }, "setting colour: no such setting"},
		{"outbound transport that is not there", func(s *Snapshot) { s.Settings[0].Value = "none" },
			"setting outbound_transport: no such transport: none"},
		{"network of everyone", func(s *Snapshot) { s.Networks[0] = prefix("0.0.0.0/0") },
			"network 0.0.0.0/0: is everyone: all the world could send through this node"},
		{"network with host bits", func(s *Snapshot) { s.Networks[0] = prefix("10.0.0.1/8") },
			"network 10.0.0.1/8: has bits set behind its length, want 10.0.0.0/8"},
		{"IPv4 network as IPv6", func(s *Snapshot) { s.Networks[0] = prefix("::ffff:10.0.0.0/104") },
			"network ::ffff:10.0.0.0/104: write an IPv4 network as IPv4"},
		{"network that is none", func(s *Snapshot) { s.Networks[0] = Network{} }, "network invalid Prefix: not a network"},
		{"transport's name", func(s *Snapshot) { s.Transports = append(s.Transports, Transport{Name: "A b"}) },
			`transport A b: "A b" is no name for a transport: want lower-case letters, digits, dots, - and _`},
		{"tls policy", func(s *Snapshot) { s.Transports[1].TLS = "maybe" }, `transport mx: tls "maybe" is none of none, may, encrypt, verify`},
		{"order", func(s *Snapshot) { s.Transports[1].Order = "any" }, `transport mx: order "any" is none of given, round-robin`},
		{"way of telling", func(s *Snapshot) { s.Transports[1].Tell = "fax" }, `transport mx: tell "fax" is none of xclient, proxy`},
		{"user without a password", func(s *Snapshot) { s.Transports[0].User = "us" }, "transport smart: has a user and no password"},
		{"password without a user", func(s *Snapshot) { s.Transports[0].Password = "secret:x" }, "transport smart: has a password and no user"},
		{"password that is none of the secrets, and is not shown", func(s *Snapshot) { s.Transports[0].User, s.Transports[0].Password = "us", "hunter2" },
			`transport smart: password is not secret:NAME: store it by "mailproxy secret set NAME", and name it here`},
		{"secret's name", func(s *Snapshot) { s.Transports[0].User, s.Transports[0].Password = "us", "secret:A b" },
			`transport smart: "A b" is no name for a secret: want lower-case letters, digits, dots, - and _`},
		{"password in clear", func(s *Snapshot) {
			s.Transports[0].User, s.Transports[0].Password, s.Transports[0].TLS = "us", "secret:x", TLSMay
		}, "transport smart: has a user, and tls is neither verify nor encrypt: a password never goes in clear"},
		{"password for anyone", func(s *Snapshot) {
			s.Transports[1].User, s.Transports[1].Password, s.Transports[1].TLS = "us", "secret:x", TLSVerify
		}, "transport mx: has a user and no hosts: no password is shown to whoever stands in the DNS"},
		{"user with a line end", func(s *Snapshot) { s.Transports[0].User, s.Transports[0].Password = "us\r\nQUIT", "secret:x" },
			"transport smart: user is longer than 255 octets or has control characters in it"},
		{"host without a port", func(s *Snapshot) { s.Transports[0].Hosts[0] = "a.test" },
			"transport smart: host a.test is not in its normal form, want a.test:25"},
		{"host that is none", domain(0, func(d *Domain) { d.Hosts[0] = "a b:25" }),
			`domain a.test: "a b" is neither a host name nor an IP address`},
		{"host twice", domain(0, func(d *Domain) { d.Hosts[1] = d.Hosts[0] }), "domain a.test: host 10.0.0.1:25 stands there twice"},
		{"too many hosts", domain(0, func(d *Domain) { d.Hosts = make([]string, 33) }), "domain a.test: 33 hosts, want at most 32"},
		{"domain in capitals", domain(0, func(d *Domain) { d.Name = "A.test" }), "domain A.test: is not in its normal form, want a.test"},
		{"domain that is an address", domain(0, func(d *Domain) { d.Name = "10.0.0.1" }),
			`domain 10.0.0.1: "10.0.0.1" is an IP address, not a domain name`},
		{"domain to nowhere", domain(0, func(d *Domain) { d.Hosts = nil }), "domain a.test: has neither hosts nor a transport"},
		{"domain to both", domain(0, func(d *Domain) { d.Transport = "mx" }), "domain a.test: has both hosts and a transport"},
		{"domain's transport is not there", domain(1, func(d *Domain) { d.Transport = "none" }), "domain b.test: no such transport: none"},
		{"domain twice", domain(1, func(d *Domain) { d.Name = "a.test" }), "domain a.test: stands there twice"},
		{"recipients of no domain", func(s *Snapshot) { s.Recipients = []RecipientList{{"c.test", []string{"x"}}} }, "recipients c.test: no such domain: c.test"},
		{"recipient in capitals", func(s *Snapshot) { s.Recipients = []RecipientList{{"a.test", []string{"X"}}} }, `recipients a.test: "X" is not in lower case`},
		{"recipient in capitals of another script", func(s *Snapshot) { s.Recipients = []RecipientList{{"a.test", []string{"Ä"}}} },
			`recipients a.test: "Ä" is not UTF-8 in lower case`},
		{"recipient without a local part", func(s *Snapshot) { s.Recipients = []RecipientList{{"a.test", []string{""}}} },
			`recipients a.test: "" is no local part: it has 1 to 64 octets`},
		{"recipient that is too long", func(s *Snapshot) { s.Recipients = []RecipientList{{"a.test", []string{strings.Repeat("x", 65)}}} },
			`recipients a.test: "` + strings.Repeat("x", 65) + `" is no local part: it has 1 to 64 octets`},
		{"recipient with control characters", func(s *Snapshot) { s.Recipients = []RecipientList{{"a.test", []string{"a\n"}}} },
			`recipients a.test: "a\n" has control characters in it`},
		{"recipient twice", func(s *Snapshot) { s.Recipients = []RecipientList{{"a.test", []string{"a", "a"}}} },
			`recipients a.test: "a" stands there twice, or not in order`},
		{"recipients twice", func(s *Snapshot) {
			s.Recipients = []RecipientList{{"a.test", []string{"a"}}, {"a.test", []string{"b"}}}
		}, `recipients a.test: stands there twice, or not in order`},
		{"setting twice", func(s *Snapshot) { s.Settings = append(s.Settings, s.Settings[0]) }, "setting outbound_transport: stands there twice"},
		{"comment of two lines", domain(0, func(d *Domain) { d.Comment = "a\nb" }), "domain a.test: comment has control characters in it"},
		{"endless comment", func(s *Snapshot) { s.Networks[0].Comment = strings.Repeat("ä", 501) },
			"network 10.0.0.0/8: comment is longer than 500 characters"},
	} {
		t.Run(c.name, func(t *testing.T) {
			s := sound()
			c.breaks(s)
			err := Validate(s)
			if err == nil {
				t.Fatal("taken")
			}
			problems := Problems(err)
			if len(problems) != 1 || problems[0].Error() != c.want {
				t.Errorf("got  %v\nwant %s", err, c.want)
			}
		})
	}
}

// Whatever is changed in a sound snapshot: what is wrong then is found as if all of it were looked at.
func TestValidateAfterFindsWhatValidateFinds(t *testing.T) {
	const domains = 4 * pieceSize
	name := func(i int) string { return fmt.Sprintf("d%06d.example.test", i) }
	before := sound()
	before.Domains = manyDomains(domains).Patch(map[string]*Domain{name(9): {Name: name(9), Transport: "mx"}})
	for i := 0; i < domains; i += 20 {
		before.Recipients = append(before.Recipients, RecipientList{name(i), []string{"info", "sales"}})
	}
	if err := Validate(before); err != nil {
		t.Fatal(err)
	}
	rapid.Check(t, func(t *rapid.T) {
		some := func(label string) []int { return rapid.SliceOfN(rapid.IntRange(0, domains), 0, 3).Draw(t, label) }
		after := *before
		changes := map[string]*Domain{}
		for _, i := range some("gone") {
			changes[name(i)] = nil
		}
		for _, i := range some("changed") {
			changes[name(i)] = &Domain{Name: name(i), Transport: rapid.SampledFrom([]string{"", "mx", "none"}).Draw(t, "transport")}
		}
		for _, i := range some("in capitals") {
			d := &Domain{Name: strings.ToUpper(name(i)), Transport: "mx"}
			changes[d.Name] = d
		}
		after.Domains = before.Domains.Patch(changes)
		for _, i := range some("twice") { // where a piece begins or ends that is the same as before
			pieces := slices.Clone(after.Domains.pieces)
			i %= len(pieces)
			first, last := pieces[i][0], pieces[i][len(pieces[i])-1]
			if rapid.Bool().Draw(t, "first") {
				pieces = slices.Insert(pieces, i, []Domain{first})
			} else {
				pieces = slices.Insert(pieces, i+1, []Domain{last})
			}
			after.Domains = Domains{pieces, after.Domains.count + 1}
		}
		for _, i := range some("recipients") {
			locals := rapid.SampledFrom([][]string{nil, {"info"}, {"B"}, {"b", "a"}}).Draw(t, "locals")
			after.Recipients = PutRecipients(after.Recipients, name(i), locals)
		}
		if rapid.IntRange(0, 9).Draw(t, "lists twice") == 0 {
			after.Recipients = append(slices.Clone(after.Recipients), after.Recipients[1])
		}
		if rapid.IntRange(0, 9).Draw(t, "transport gone") == 0 {
			after.Transports = after.Transports[:1]
		}
		want, got := Validate(&after), ValidateAfter(before, &after)
		if fmt.Sprint(want) != fmt.Sprint(got) {
			t.Fatalf("got  %v\nwant %v", got, want)
		}
	})
}

// What is said to be sound is not looked at: it costs nothing.
func TestValidateAfterPassesOverWhatIsKnown(t *testing.T) {
	s := &Snapshot{Domains: manyDomains(2 * pieceSize).Patch(map[string]*Domain{"wrong.test": {Name: "wrong.test"}}),
		Recipients: []RecipientList{{"wrong.test", []string{"Wrong"}}}}
	if n := len(Problems(Validate(s))); n != 2 {
		t.Fatalf("%d problems, want 2", n)
	}
	after := *s
	after.Domains = s.Domains.Patch(map[string]*Domain{"a.test": {Name: "a.test", Hosts: []string{"a:25"}}})
	if err := ValidateAfter(s, &after); err != nil {
		t.Error(err)
	}
	after.Transports = []Transport{{Name: "mx"}}
	if n := len(Problems(ValidateAfter(s, &after))); n != 2 {
		t.Errorf("%d problems with other transports, want 2", n)
	}
}
