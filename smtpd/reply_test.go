package smtpd

import (
	"errors"
	"strings"
	"testing"

	"mailproxy/mail"
)

func TestReplyOnTheWire(t *testing.T) {
	cases := []struct {
		name  string
		reply *mail.Reply
		want  string
	}{
		{"one line", r(250, 200, "OK"), "250 2.0.0 OK\r\n"},
		{"codes on every line", r(550, 511, "no such user\nask postmaster"), "550-5.1.1 no such user\r\n550 5.1.1 ask postmaster\r\n"},
		{"without a status code", &mail.Reply{Code: 354, Text: "go on"}, "354 go on\r\n"},
		{"nothing but printable ASCII", r(550, 500, "a\rb\x00\u00e9"), "550 5.0.0 a?b???\r\n"},
		{"long text", r(550, 500, strings.Repeat("x", 600)), "550 5.0.0 " + strings.Repeat("x", maxReplyText) + "\r\n"},
		{"no text", &mail.Reply{Code: 250}, "250 \r\n"},
	}
	for _, c := range cases {
		t.Run(c.name, func(t *testing.T) {
			if got := string(appendReply(nil, c.reply)); got != c.want {
				t.Errorf("got %q, want %q", got, c.want)
			}
		})
	}
	many := string(appendReply(nil, r(550, 500, strings.Repeat("x\n", 1000))))
	if n := strings.Count(many, "\r\n"); n != maxReplyLines || !strings.Contains(many, "\r\n550 5.0.0 ") {
		t.Errorf("%d lines", n)
	}
}

func TestFinalRepliesCarryTheirIDWhole(t *testing.T) {
	for _, text := range []string{"taken", "a\nb", "", strings.Repeat("x", 600), "a\n" + strings.Repeat("x", 600), strings.Repeat("x", 5000)} {
		cause := errors.New("why")
		got := withID(&mail.Reply{Code: 250, Text: text, Cause: cause}, "ID")
		wire := string(appendReply(nil, got))
		if !strings.HasSuffix(wire, "(ID)\r\n") || !errors.Is(got, cause) {
			t.Errorf("%.20q: %q", text, wire)
		}
	}
}

func TestNothingOfGoSMTPsOwnIsEverPositive(t *testing.T) {
	for code := 200; code < 600; code++ {
		if got := fallback(code); got.Code < 400 {
			t.Errorf("%d becomes %v", code, got)
		}
	}
}
