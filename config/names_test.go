package config

import (
	"strings"
	"testing"
)

func TestNormalizeDomain(t *testing.T) {
	long := strings.Repeat("a", 63)
	for given, want := range map[string]string{
		"example.test":   "example.test",
		"Example.TEST.":  "example.test",
		" a.b ":          "a.b",
		"Bücher.example": "xn--bcher-kva.example",
		"faß.example":    "xn--fa-hia.example",
		"_x.example":     "_x.example",
		"localhost":      "localhost",
		long + ".test":   long + ".test",
	} {
		if got, err := NormalizeDomain(given); err != nil || got != want {
			t.Errorf("%q: %q, %v; want %q", given, got, err, want)
		}
	}
	for _, given := range []string{"", ".", "a..b", "-a.b", "a-.b", "a b.c", "a@b", "[1.2.3.4]", "1.2.3.4", "::1", "a/b", long + "a.test",
		"*.example.test", "a\x00b", "\xff", strings.Repeat("a.", 127) + "b" + "c"} {
		if got, err := NormalizeDomain(given); err == nil {
			t.Errorf("%q: %q, want an error", given, got)
		}
	}
}

func TestNormalizeHost(t *testing.T) {
	for given, want := range map[string]string{
		"10.0.0.1":        "10.0.0.1:25",
		"10.0.0.1:2525":   "10.0.0.1:2525",
		"::1":             "[::1]:25",
		"[::1]":           "[::1]:25",
		"[::1]:26":        "[::1]:26",
		"::ffff:10.0.0.1": "10.0.0.1:25",
		"MX.Example.test": "mx.example.test:25",
		"mx.test:587":     "mx.test:587",
	} {
		got, err := NormalizeHost(given, "25")
		if err != nil || got != want {
			t.Errorf("%q: %q, %v; want %q", given, got, err, want)
		}
		if again, err := NormalizeHost(got, "99"); err != nil || again != got {
			t.Errorf("%q is not stable: %q, %v", got, again, err)
		}
	}
	for _, given := range []string{"", ":25", "a:", "a:0", "a:65536", "a:025", "a:x", "a:b:c", "fe80::1%eth0", "a b:25", "[::1", "a:+5"} {
		if got, err := NormalizeHost(given, "25"); err == nil {
			t.Errorf("%q: %q, want an error", given, got)
		}
	}
}

func TestBothFormsOfADomainAreEqual(t *testing.T) {
	for _, form := range []string{
		"bücher.example", "BÜCHER.example", "bücher.example", "bücher。example", "ｂücher.example", "xn--bcher-kva.example",
	} {
		if got := ASCIIDomain(form); got != "xn--bcher-kva.example" {
			t.Errorf("%q becomes %q", form, got)
		}
	}
	for _, other := range []string{"[192.0.2.1]", "a_b.example", "", "xn--a.example", "ü..example"} {
		if got := ASCIIDomain(other); got != other {
			t.Errorf("%q becomes %q", other, got)
		}
	}
}
