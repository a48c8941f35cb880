package config

import (
	"fmt"
	"slices"
	"testing"
)

func TestParseRecipient(t *testing.T) {
	for _, c := range []struct{ in, local, domain, err string }{
		{"Info@Example.TEST", "info", "example.test", ""},
		{" *@b\u00fccher.test ", "*", "xn--bcher-kva.test", ""},
		{`"a B"@x.test`, "a b", "x.test", ""},
		{"\u00c4@x.test", "\u00e4", "x.test", ""},
		{"x", "", "", `"x" is not an address: bad address`},
		{"", "", "", `"" is not an address: it has no domain`},
		{"postmaster", "", "", `"postmaster" is not an address: it has no domain`},
		{"x@[192.0.2.1]", "x", "", `"[192.0.2.1]" is not a domain name`},
		{"*@a b", "*", "", `"a b" is not a domain name`},
	} {
		local, domain, err := ParseRecipient(c.in)
		if c.err == "" && err != nil || c.err != "" && (err == nil || len(c.err) > len(err.Error()) && err.Error() != c.err) {
			t.Errorf("%q: %v, want %s", c.in, err, c.err)
		}
		if c.err == "" && (local != c.local || domain != c.domain) {
			t.Errorf("%q: %s at %s", c.in, local, domain)
		}
	}
}

func TestListsOfRecipientsAreReplacedAndTheOldOnesStay(t *testing.T) {
	old := []RecipientList{{"b.test", []string{"x"}}, {"d.test", []string{"y"}}}
	before := fmt.Sprint(old)
	for _, c := range []struct {
		domain string
		locals []string
		want   string
	}{
		{"a.test", []string{"n"}, "[{a.test [n]} {b.test [x]} {d.test [y]}]"},
		{"c.test", []string{"n"}, "[{b.test [x]} {c.test [n]} {d.test [y]}]"},
		{"d.test", []string{"n"}, "[{b.test [x]} {d.test [n]}]"},
		{"b.test", nil, "[{d.test [y]}]"},
		{"c.test", nil, before},
	} {
		got := PutRecipients(old, c.domain, c.locals)
		if fmt.Sprint(got) != c.want || fmt.Sprint(old) != before {
			t.Errorf("%s %v: %v; the old ones are %v", c.domain, c.locals, got, old)
		}
		if l := RecipientsOf(got, c.domain); !slices.Equal(l, c.locals) {
			t.Errorf("%s: %v", c.domain, l)
		}
	}
}
