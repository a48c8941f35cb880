package mail

import (
	"errors"
	"io"
	"testing"
)

func TestReplyAsOneLine(t *testing.T) {
	cases := []struct {
		reply        Reply
		line, status string
	}{
		{Reply{Code: 550, Enhanced: [3]int{5, 1, 1}, Text: "no such user"}, "550 5.1.1 no such user", "5.1.1"},
		{Reply{Code: 250}, "250", "2.0.0"},
		{Reply{Code: 451, Text: "a\nb\r\nc"}, "451 a b  c", "4.0.0"},
		{Reply{Code: 421, Enhanced: [3]int{4, 7, 123}}, "421 4.7.123", "4.7.123"},
	}
	for _, c := range cases {
		if got := c.reply.Error(); got != c.line {
			t.Errorf("got %q, want %q", got, c.line)
		}
		if got := c.reply.Status(); got != c.status {
			t.Errorf("got %q, want %q", got, c.status)
		}
	}
}

func TestReplyKnowsItsClassAndItsCause(t *testing.T) {
	for code, want := range map[int][3]bool{250: {true}, 354: {}, 451: {false, true}, 550: {false, false, true}} {
		r := &Reply{Code: code}
		if got := [3]bool{r.Positive(), r.Temporary(), r.Permanent()}; got != want {
			t.Errorf("%d: %v", code, got)
		}
	}
	if err := error(&Reply{Code: 451, Cause: io.EOF}); !errors.Is(err, io.EOF) {
		t.Error("the cause is lost")
	}
}
