package mail

import (
	"encoding/json"
	"errors"
	"strings"
	"testing"
)

func TestNotify(t *testing.T) {
	for in, want := range map[string]Notify{
		"NEVER": NotifyNever, "success": NotifySuccess, "SUCCESS,FAILURE": NotifySuccess | NotifyFailure,
		"DELAY,FAILURE,SUCCESS": NotifyDelay | NotifyFailure | NotifySuccess,
	} {
		if got, err := ParseNotify(in); err != nil || got != want {
			t.Errorf("%s: %v, %v", in, got, err)
		}
	}
	for _, in := range []string{"", "NEVER,FAILURE", "FAILURE,NEVER", "FAILURE,FAILURE", "FAILURE,", ",", "ALWAYS", "FAILURE DELAY", "NEVER,NEVER"} {
		if got, err := ParseNotify(in); !errors.Is(err, ErrParameter) {
			t.Errorf("%q: %v, %v", in, got, err)
		}
	}
	for n, want := range map[Notify][3]bool{ // success, failure, delay
		0: {false, true, true}, NotifyNever: {}, NotifySuccess: {true}, NotifyFailure: {false, true}, NotifyDelay: {false, false, true},
		NotifySuccess | NotifyFailure | NotifyDelay: {true, true, true},
	} {
		if got := [3]bool{n.Success(), n.Failure(), n.Delay()}; got != want {
			t.Errorf("%q: %v", n, got)
		}
	}
}

func TestReturnAndEnvID(t *testing.T) {
	if r, err := ParseReturn("full"); r != ReturnFull || err != nil {
		t.Error(r, err)
	}
	if r, err := ParseReturn("HDRS"); r != ReturnHeader || err != nil {
		t.Error(r, err)
	}
	if _, err := ParseReturn("BODY"); !errors.Is(err, ErrParameter) {
		t.Error(err)
	}
	for in, want := range map[string]string{
		"QQ314159": "QQ314159", "a+2Bb+3Dc+20d": "a+b=c d", "+41": "A", strings.Repeat("+2B", 100): strings.Repeat("+", 100),
	} {
		got, err := ParseEnvID(in)
		if err != nil || got != want {
			t.Errorf("%s: %q, %v", in, got, err)
		}
		if again, err := ParseEnvID(string(AppendXtext(nil, got))); err != nil || again != got {
			t.Errorf("%q is written as %s", got, AppendXtext(nil, got))
		}
	}
	for name, in := range map[string]string{
		"empty": "", "=": "a=b", "a + alone": "a+", "one digit": "a+4", "small digits": "a+2b", "a line end": "a+0D+0Ab", "DEL": "+7F",
		"8 bit": "+E4", "blank": "a b", "UTF-8": "ä", "101 octets": strings.Repeat("x", 101),
	} {
		if got, err := ParseEnvID(in); !errors.Is(err, ErrParameter) {
			t.Errorf("%s: %q, %v", name, got, err)
		}
	}
}

func TestOriginal(t *testing.T) {
	for _, c := range []struct{ in, want, again string }{
		{"rfc822;a@b.test", "rfc822;a@b.test", "rfc822;a@b.test"},
		{"RFC822;a+2Bb@c.test", "rfc822;a+b@c.test", "rfc822;a+2Bb@c.test"},
		{"rfc822;+22a+20b+22@c.test", `rfc822;"a b"@c.test`, "rfc822;\"a+20b\"@c.test"},
		{"x400;/c=us/", "", ""}, // "=" is not xtext
		{"x400;/c+3Dus/", "x400;/c=us/", "x400;/c+3Dus/"},
		{`utf-8;\x{FC}@b.test`, "utf-8;ü@b.test", `utf-8;\x{FC}@b.test`},
		{`utf-8;a\x{2B}b@\x{1F600}.test`, "utf-8;a+b@😀.test", `utf-8;a\x{2B}b@\x{1F600}.test`},
		{"utf-8;ü@b.test", "utf-8;ü@b.test", `utf-8;\x{FC}@b.test`},
		{`utf-8;a\x{5C}b@c.test`, `utf-8;a\b@c.test`, `utf-8;a\x{5C}b@c.test`},
	} {
		got, err := ParseOriginal(c.in, true)
		if c.want == "" {
			if err == nil {
				t.Errorf("%s: %q", c.in, got)
			}
			continue
		}
		if err != nil || got != c.want || string(AppendOriginal(nil, got)) != c.again {
			t.Errorf("%s: %q, %v, written as %s", c.in, got, err, AppendOriginal(nil, got))
		}
	}
	for name, in := range map[string]string{
		"no type": "a@b.test", "empty type": ";a@b.test", "empty address": "rfc822;", "blank in the type": "rfc 822;a@b", "line end": "rfc822;a+0D+0Ab",
		"8 bit": "rfc822;+FC@b.test", "too long": "rfc822;" + strings.Repeat("x", 494), "control": `utf-8;\x{0A}@b`, "C1 control": `utf-8;\x{85}@b`,
		"surrogate": `utf-8;\x{D800}@b`, "too high": `utf-8;\x{110000}@b`, "open": `utf-8;\x{FC`, "one digit": `utf-8;\x{5}`,
		"small digits": `utf-8;\x{fc}@b`, "backslash": `utf-8;a\b@c`, "plus": "utf-8;a+b@c", "seven digits": `utf-8;\x{00000FC}`,
	} {
		if got, err := ParseOriginal(in, true); !errors.Is(err, ErrParameter) {
			t.Errorf("%s: %q, %v", name, got, err)
		}
	}
	for n, want := range map[int]bool{81: true, 82: false} { // 6 octets each in ASCII, and 13 more
		if got, err := ParseOriginal("utf-8;"+strings.Repeat("ü", n)+"@b.test", true); err != nil || (got != "") != want {
			t.Errorf("%d letters: %q, %v", n, got, err)
		}
	}
	if _, err := ParseOriginal("utf-8;ü@b.test", false); !errors.Is(err, ErrParameter) {
		t.Error("UTF-8 without SMTPUTF8")
	}
}

func FuzzParseOriginal(f *testing.F) {
	for _, s := range []string{"rfc822;a+2Bb@c.test", `utf-8;\x{FC}@b.test`, "utf-8;ü", "x400;/c+3Dus/", "rfc822;+22", ";"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		got, err := ParseOriginal(s, true)
		if err != nil {
			if !errors.Is(err, ErrParameter) {
				t.Fatal(err)
			}
			return
		}
		if strings.ContainsAny(got, "\r\n\x00") {
			t.Fatalf("%q gives %q", s, got)
		}
		written := string(AppendOriginal(nil, got))
		if !isASCII(written) || strings.ContainsAny(written, " =\r\n") {
			t.Fatalf("%q is written %q", got, written)
		}
		if got == "" { // too long in ASCII
			return
		}
		if len(written) > maxOriginal {
			t.Fatalf("%q is written in %d octets", got, len(written))
		}
		if again, err := ParseOriginal(written, false); err != nil || again != got {
			t.Fatalf("%q is written %q, read as %q, %v", got, written, again, err)
		}
	})
}

func FuzzParseEnvID(f *testing.F) {
	for _, s := range []string{"QQ", "a+2Bb", "+", "+0D"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		id, err := ParseEnvID(s)
		if err != nil {
			return
		}
		if again, err := ParseEnvID(string(AppendXtext(nil, id))); err != nil || again != id || !isPrintable(id) {
			t.Fatalf("%q is read as %q, %v", id, again, err)
		}
	})
}

func TestEnvelopeForSomeRecipients(t *testing.T) {
	p := func(s string) Path { return Path{Local: s, Domain: "b.test"} }
	e := Envelope{ForwardPaths: []Path{p("a"), p("b"), p("c")}}
	if got := e.For([]int{2, 0}); len(got.ForwardPaths) != 2 || got.ForwardPaths[0] != p("c") || got.Params != nil || got.Param(1) != (RcptParams{}) {
		t.Errorf("%+v", got)
	}
	e.Params = []RcptParams{{}, {Notify: NotifyNever}, {Original: "rfc822;x"}}
	if got := e.For([]int{2, 1}); got.Param(0).Original != "rfc822;x" || got.Param(1).Notify != NotifyNever || len(e.Params) != 3 {
		t.Errorf("%+v", got)
	}
}

func TestEnvelopeKeepsParametersWithTheirRecipients(t *testing.T) {
	var e Envelope
	e.Add(Path{Local: "a", Domain: "b.test"}, RcptParams{})
	if e.Params != nil {
		t.Error("there is nothing to keep")
	}
	e.Add(Path{Local: "b", Domain: "b.test"}, RcptParams{Notify: NotifyNever})
	e.Add(Path{Local: "c", Domain: "b.test"}, RcptParams{})
	if len(e.ForwardPaths) != 3 || e.Param(0) != (RcptParams{}) || e.Param(1).Notify != NotifyNever || e.Param(2) != (RcptParams{}) {
		t.Errorf("%+v", e)
	}
}

// What was spooled before there were parameters is read, and what has none is written as it was.
func TestEnvelopeWithoutParametersIsAsBefore(t *testing.T) {
	const before = `{"session":"S","reverse_path":"a@b.test","forward_paths":["c@d.test"],"client":"192.0.2.1","helo":"h","received_at":"2026-11-26T19:00:00Z"}`
	var e Envelope
	if err := json.Unmarshal([]byte(before), &e); err != nil || e.Param(0) != (RcptParams{}) {
		t.Fatal(e, err)
	}
	if b, err := json.Marshal(e); err != nil || string(b) != before {
		t.Errorf("%s, %v", b, err)
	}
	e.Params = []RcptParams{{Notify: NotifySuccess | NotifyDelay, Original: "rfc822;x", Unverified: true}}
	e.Return, e.EnvID = ReturnFull, "id"
	b, err := json.Marshal(e)
	var again Envelope
	if err := errors.Join(err, json.Unmarshal(b, &again)); err != nil || again.Param(0) != e.Params[0] || again.Return != ReturnFull || again.EnvID != "id" {
		t.Errorf("%s read as %+v, %v", b, again, err)
	}
}
