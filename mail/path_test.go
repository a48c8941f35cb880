package mail

import (
	"errors"
	"strings"
	"testing"

	"pgregory.net/rapid"
)

func TestPathsAsOnTheWire(t *testing.T) {
	long := strings.Repeat("x", 64)
	cases := []struct {
		name, in string
		want     Path
	}{
		{"plain", "a@b.test", Path{"a", "b.test"}},
		{"the domain in lower case, the local part as it is", "A.B@C.TEST", Path{"A.B", "c.test"}},
		{"null reverse-path", "", Path{}},
		{"postmaster alone", "PostMaster", Path{"postmaster", ""}},
		{"quoted", `"a b"@c.test`, Path{"a b", "c.test"}},
		{"quoted without need", `"a.b"@c.test`, Path{"a.b", "c.test"}},
		{"quoted pair", `"a\"\\b"@c.test`, Path{`a"\b`, "c.test"}},
		{"brackets and parameters inside quotes", `"a> NOTIFY=NEVER <b"@d.test`, Path{"a> NOTIFY=NEVER <b", "d.test"}},
		{"an @ inside quotes", `"a@b"@c.test`, Path{"a@b", "c.test"}},
		{"source route", "@r.test,@s.test:a@b.test", Path{"a", "b.test"}},
		{"address literal", "a@[192.0.2.1]", Path{"a", "[192.0.2.1]"}},
		{"IPv6 literal", "a@[IPv6:2001:db8::1]", Path{"a", "[ipv6:2001:db8::1]"}},
		{"UTF-8", "bücher@bücher.test", Path{"bücher", "bücher.test"}},
		{"UTF-8 keeps its octets", "Ä@\u212aELVIN.BÜCHER.test", Path{"Ä", "\u212aelvin.bÜcher.test"}},
		{"a U-label of more than 63 octets", "a@" + strings.Repeat("日", 30) + ".test", Path{"a", strings.Repeat("日", 30) + ".test"}},
		{"underscore", "a@_dmarc.b.test", Path{"a", "_dmarc.b.test"}},
		{"the longest local part", long + "@b.test", Path{long, "b.test"}},
	}
	for _, c := range cases {
		t.Run(c.name, func(t *testing.T) {
			got, err := ParsePath(c.in)
			if err != nil || got != c.want {
				t.Fatalf("got %+v, %v; want %+v", got, err, c.want)
			}
			again, err := ParsePath(got.String())
			if err != nil || again != got {
				t.Errorf("written as %q, read as %+v, %v", got.String(), again, err)
			}
		})
	}
}

func TestWhatIsNoPathIsRefused(t *testing.T) {
	for name, in := range map[string]string{
		"no domain": "a@", "no local part": "@b.test", "no @": "a", "two @": "a@b@c.test", "dot in front": ".a@b.test", "dot behind": "a.@b.test",
		"two dots": "a..b@c.test", "blank": "a b@c.test", "angle bracket": "a>b@c.test", "comment": "a(b)@c.test", "open quote": `"a@b.test`,
		"text behind the quote": `"a"b@c.test`, "empty quote": `""@b.test`, "backslash at the end": `"a\`, "CR in quotes": "\"a\rb\"@c.test",
		"LF in a quoted pair": "\"a\\\nb\"@c.test", "NUL": "\"a\x00\"@b.test", "DEL": "\"a\x7f\"@b.test", "TAB": "\"a\tb\"@c.test",
		"a terminal's escape above ASCII": "a\u009bb@c.test", "a line separator": "a\u2028b@c.test", "writing turned round": "a\u202eb@c.test",
		"controls in the domain": "a@b\u0085c.test", "writing turned round in the domain": "a@b\u2067c.test",
		"a blank that is none of ASCII's": "a@b\u00a0c.test", "not UTF-8": "\xff@b.test", "not UTF-8 domain": "a@\xff.test",
		"empty label": "a@b..test", "hyphen in front": "a@-b.test", "hyphen behind": "a@b-.test", "blank in the domain": "a@b c.test",
		"domain ends in a dot": "a@b.test.", "open literal": "a@[192.0.2.1", "empty literal": "a@[]", "literal with a bracket": "a@[x>y]",
		"local part of 65": strings.Repeat("x", 65) + "@b.test", "label of 64": "a@" + strings.Repeat("x", 64) + ".test",
		"domain of 256": "a@" + strings.Repeat("x.", 126) + "test", "route without address": "@r.test", "path of 255": strings.Repeat("x", 64) + "@" + strings.Repeat("x.", 93) + "test",
	} {
		if p, err := ParsePath(in); !errors.Is(err, ErrPath) {
			t.Errorf("%s: %q gives %+v, %v", name, in, p, err)
		}
	}
}

// TestEveryPathIsReadAsItIsWritten: whatever octets a local part stands for, quoting makes one word of it that reads back.
func TestEveryPathIsReadAsItIsWritten(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		local := rapid.StringOfN(rapid.RuneFrom([]rune(` "\@<>.,;:()[]=abZ09+é`)), 1, 12, 40).Draw(t, "local")
		p, err := newPath(local, "b.test")
		if err != nil {
			return // too long in octets
		}
		s := p.String()
		again, err := ParsePath(s)
		if strings.EqualFold(local, "postmaster") {
			return
		}
		if err != nil || again != p {
			t.Fatalf("%+v is written %q, read as %+v, %v", p, s, again, err)
		}
	})
}

func FuzzParsePath(f *testing.F) {
	for _, s := range []string{"a@b.test", `"a b"@c.test`, "@r:a@b", "postmaster", "", `"\"@x`, "a@[IPv6:::1]", "ü@ü"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		p, err := ParsePath(s)
		if err != nil {
			if !errors.Is(err, ErrPath) {
				t.Fatal(err)
			}
			return
		}
		written := p.String()
		if strings.ContainsAny(written, "\r\n\x00") || len(written) > maxPath {
			t.Fatalf("%q is written %q", s, written)
		}
		again, err := ParsePath(written)
		if err != nil || again != p {
			t.Fatalf("%q: %+v is written %q, read as %+v, %v", s, p, written, again, err)
		}
	})
}

func TestPathsInJSONAreStrings(t *testing.T) {
	for _, s := range []string{"a@b.test", "", `"a b"@c.test`, "postmaster"} {
		var p Path
		if err := p.UnmarshalText([]byte(s)); err != nil {
			t.Fatal(err)
		}
		if b, err := p.MarshalText(); err != nil || string(b) != s {
			t.Errorf("%q became %q, %v", s, b, err)
		}
	}
	var p Path
	if err := p.UnmarshalText([]byte("a@@")); err == nil {
		t.Error("a bad path is read")
	}
}

func TestWhatAPathIs(t *testing.T) {
	if p := (Path{}); !p.IsNull() || p.IsPostmaster() || !p.IsASCII() {
		t.Error("null reverse-path")
	}
	if p := (Path{"PostMaster", "b.test"}); !p.IsPostmaster() || p.IsNull() {
		t.Error("postmaster")
	}
	if (Path{"ü", "b.test"}).IsASCII() || (Path{"a", "ü.test"}).IsASCII() {
		t.Error("UTF-8")
	}
}
