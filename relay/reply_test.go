package relay

import (
	"bufio"
	"bytes"
	"errors"
	"io"
	"net/textproto"
	"strings"
	"testing"
	"testing/iotest"
)

func TestReplies(t *testing.T) {
	for _, tt := range []struct{ in, want string }{
		{"250 ok\r\n", "250 ok"},
		{"250 ok\n", "250 ok"},
		{"250\r\n", "250"},
		{"250 \r\n", "250"},
		{"250-a\r\n250-b\r\n250\r\n", "250 a b "},
		{"550 5.1.1 no\r\n", "550 5.1.1 no"},
		{"550 4.1.1 other class\r\n", "550 4.1.1 other class"},
		{"250 2.0\r\n", "250 2.0"},
		{"250 2.0.0\r\n", "250 2.0.0"},
		{"250 2.0.0x\r\n", "250 2.0.0x"},
		{"550 5.1.1234 no\r\n", "550 5.1.1234 no"},
		{"250 a\tb\x00\x1b\xff\r\n", "250 a b???"},
		{"", "EOF"},
		{"250 half", "unexpected EOF"},
		{"250-half\r\n", "unexpected EOF"},
		{"25\r\n", "protocol error"},
		{"\r\n", "protocol error"},
		{"150 no\r\n", "protocol error"},
		{"650 no\r\n", "protocol error"},
		{"25a no\r\n", "protocol error"},
		{"250_no\r\n", "protocol error"},
		{"250-a\r\n251 b\r\n", "protocol error"},
		{"250 " + strings.Repeat("x", maxReplyLine-6) + "\r\n", "250 " + strings.Repeat("x", maxReplyLine-6)},
		{"250 " + strings.Repeat("x", maxReplyLine-5) + "\r\n", "protocol error"},
		{strings.Repeat("250-x\r\n", maxReplyLines-1) + "250 x\r\n", "250 " + strings.Repeat("x ", maxReplyLines-1) + "x"},
		{strings.Repeat("250-x\r\n", maxReplyLines) + "250 x\r\n", "protocol error"},
	} {
		got, err := readReply(bufio.NewReaderSize(iotest.OneByteReader(strings.NewReader(tt.in)), 4096))
		text := ""
		switch {
		case errors.Is(err, ErrProtocol):
			text = "protocol error"
		case err != nil:
			text = err.Error()
		default:
			text = got.String()
		}
		if text != tt.want {
			t.Errorf("%.40q: got %.80q, want %.80q", tt.in, text, tt.want)
		}
	}
	if e, _ := splitEnhanced(550, []byte("5.1.1 no")); e != [3]int{5, 1, 1} {
		t.Errorf("enhanced %v", e)
	}
	if e, _ := splitEnhanced(550, []byte("4.1.1 no")); e != [3]int{} {
		t.Errorf("enhanced %v of the wrong class", e)
	}
}

func FuzzReply(f *testing.F) {
	for _, s := range []string{"250 ok\r\n", "250-a\r\n250 b\r\n", "550 5.1.1 no\n", "2", "250-", "999 x\r\n", "421 \xff\x00\r\n"} {
		f.Add([]byte(s))
	}
	f.Fuzz(func(t *testing.T, in []byte) {
		r := bufio.NewReaderSize(bytes.NewReader(in), 4096)
		got, err := readReply(r)
		if (got == nil) == (err == nil) {
			t.Fatalf("reply %v and error %v", got, err)
		}
		if err != nil {
			return
		}
		if got.Code < 200 || got.Code > 599 || len(got.Text) > maxReplyText || strings.Count(got.Text, "\n") >= maxReplyLines {
			t.Fatalf("out of bounds: %+v", got)
		}
		for _, c := range []byte(got.Text) {
			if c != '\n' && (c < ' ' || c > '~') {
				t.Fatalf("not printable: %q", got.Text)
			}
		}
		if e := got.Enhanced; e != [3]int{} && e[0] != got.Code/100 {
			t.Fatalf("status of another class: %+v", got)
		}
	})
}

// unstuff reads as a receiving server does (RFC 5321 §4.5.2), and gives what follows the final dot.
func unstuff(t *testing.T, wire []byte) (body, rest []byte) {
	t.Helper()
	for len(wire) > 0 {
		line, after, ok := bytes.Cut(wire, []byte("\r\n"))
		if !ok {
			t.Fatalf("no final dot: ends with %q", wire)
		}
		if wire = after; bytes.Equal(line, []byte(".")) {
			return body, wire
		}
		body = append(append(body, bytes.TrimPrefix(line, []byte("."))...), '\r', '\n')
	}
	t.Fatal("no final dot")
	return nil, nil
}

func FuzzDotStuffing(f *testing.F) {
	for _, s := range []string{"", ".", ".\r\n", "a\r\n.b\r\n", "..\r\n...\r\n", "a\r\n.\r\nMAIL FROM:<>\r\n", "a\n.\nb"} {
		f.Add([]byte(s), 3)
	}
	f.Fuzz(func(t *testing.T, in []byte, split int) {
		// Contents have CRLF line ends only.
		in = bytes.ReplaceAll(bytes.ReplaceAll(in, []byte("\r"), nil), []byte("\n"), []byte("\r\n"))
		if split < 1 {
			split = 1
		}
		var out []byte
		start := true
		for rest := in; len(rest) > 0; {
			n := min(split, len(rest))
			out, start = appendStuffed(out, rest[:n], start)
			rest = rest[n:]
		}
		if start != (len(in) == 0 || in[len(in)-1] == '\n') {
			t.Fatalf("start %v behind %q", start, in)
		}
		if !start {
			if in[len(in)-1] == '\r' {
				return // half a line end: body() completes it
			}
			out = append(out, "\r\n"...)
			in = append(in, "\r\n"...)
		}
		got, rest := unstuff(t, append(out, ".\r\n"...))
		if !bytes.Equal(got, in) || len(rest) > 0 {
			t.Fatalf("in pieces of %d: sent %q, got %q and %q", split, in, got, rest)
		}
		if !bytes.Contains(in, []byte("\r.")) { // the standard library's reader agrees
			if std, err := io.ReadAll(textproto.NewReader(bufio.NewReader(bytes.NewReader(append(out, ".\r\n"...)))).DotReader()); err != nil ||
				!bytes.Equal(std, bytes.ReplaceAll(in, []byte("\r\n"), []byte("\n"))) {
				t.Fatalf("textproto got %q, %v", std, err)
			}
		}
	})
}
