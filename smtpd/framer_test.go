package smtpd

import (
	"bytes"
	"errors"
	"io"
	"strings"
	"testing"

	"pgregory.net/rapid"
)

// wide are limits that nothing here reaches.
var wide = limits{maxMessage: 1 << 40, maxHeader: 1 << 40, maxLine: 1 << 40}

// frame feeds a stream in stretches that end at the cuts, and gives the message and what was left behind it.
func frame(l limits, stream string, cuts ...int) (message, rest string, done bool, err error) {
	var out bytes.Buffer
	f := framer{limits: l, out: &out}
	start := 0
	for _, cut := range append(cuts, len(stream)) {
		for part := stream[start:cut]; part != ""; {
			n, done, err := f.feed([]byte(part))
			start += n
			if done || err != nil {
				return out.String(), stream[start:], done, err
			}
			part = part[n:]
		}
	}
	return out.String(), "", false, nil
}

// model is the framer written for the reader: on the whole stream at once.
func model(stream string) (message, rest string, done bool) {
	end := strings.Index("\r\n"+stream, "\r\n.\r\n")
	if end < 0 {
		return "", "", false
	}
	body := stream[:end]
	rest = stream[end+3:]
	body = strings.ReplaceAll("\r\n"+body, "\r\n.", "\r\n")[2:]
	// What is left of CR and LF after CRLF is out of the way is bare.
	lines := strings.Split(body, "\r\n")
	for i, line := range lines {
		lines[i] = strings.ReplaceAll(strings.ReplaceAll(line, "\r", " "), "\n", "\r\n")
	}
	return strings.Join(lines, "\r\n"), rest, true
}

func TestFramerIsTheModelForEveryWayToSplit(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		parts := rapid.SliceOfN(rapid.SampledFrom([]string{"\r", "\n", ".", "\r\n", "\r\n.", "x", "MAIL FROM:<a@b>", "\x00"}), 0, 30).Draw(t, "parts")
		stream := strings.Join(parts, "") + "\r\n.\r\nNEXT"
		var cuts []int
		for i := 1; i < len(stream); i++ {
			if rapid.Bool().Draw(t, "cut") {
				cuts = append(cuts, i)
			}
		}
		message, rest, done, err := frame(wide, stream, cuts...)
		wantMessage, wantRest, wantDone := model(stream)
		if err != nil || done != wantDone || message != wantMessage || rest != wantRest {
			t.Fatalf("%q: got %q, rest %q, %v, %v; want %q, rest %q", stream, message, rest, done, err, wantMessage, wantRest)
		}
	})
}

// notEnds are what has been taken for the end of a message by one server or another.
var notEnds = []string{
	"\n.\n", "\r\n.\n", "\n.\r\n", "\r.\r", "\r.\r\n", "\n.\r", "\r\n.\r", "\r\n.\r\r\n", "\r\n\x00.\r\n", "\r\n.\x00\r\n", "\n\n.\n\n", "\r\r.\r\r",
	"\r\n..\r\n", "\r\n. \r\n", "\r\n .\r\n", "\n\r.\n\r", "\n\r.\r\n",
	"\r\r\n.\r\r\n", "\n\r\n.\n\r\n", "\x00\n.\n", "\r\n.\x00\n", "\r\n.\r\x00\n", "\r\x00\n.\r\x00\n", "\n..\n", "\r\n.\x0b\r\n", "\r\n.\t\r\n",
	"\u2028.\u2028", "\xc2\x85.\xc2\x85", "\r\n.\r \n",
}

func TestOnlyCRLFDotCRLFEndsAMessage(t *testing.T) {
	for _, sequence := range notEnds {
		for _, sign := range []string{"x", ""} {
			stream := "one" + sequence + sign + "MAIL FROM:<evil@test>\r\n.\r\n"
			for cut := 0; cut <= len(stream); cut++ {
				message, rest, done, err := frame(wide, stream, cut)
				if err != nil || !done || rest != "" || !strings.Contains(message, "MAIL FROM:<evil@test>\r\n") {
					t.Fatalf("%q cut at %d: message %q, rest %q, %v, %v", stream, cut, message, rest, done, err)
				}
				wellFormed(t, message)
			}
		}
	}
}

// wellFormed wants CRLF line ends and nothing else of CR and LF.
func wellFormed(t interface{ Fatalf(string, ...any) }, message string) {
	rest := strings.ReplaceAll(message, "\r\n", "")
	if strings.ContainsAny(rest, "\r\n") || message != "" && !strings.HasSuffix(message, "\r\n") {
		t.Fatalf("a message with bare CR or LF, or without a line end: %q", message)
	}
}

func TestMessageThatEndsInCRCRLFEndsThere(t *testing.T) {
	// go-smtp misses this end and swallows the next message.
	message, rest, done, _ := frame(wide, "a\r\r\n.\r\nMAIL FROM:<next@test>\r\n")
	if !done || message != "a \r\n" || rest != "MAIL FROM:<next@test>\r\n" {
		t.Fatalf("message %q, rest %q, %v", message, rest, done)
	}
}

func TestBareNewlinesAreRefusedWhereTheyAreNotNormalised(t *testing.T) {
	strict := wide
	strict.refuseBare = true
	for _, stream := range []string{"a\nb\r\n.\r\n", "a\rb\r\n.\r\n", "\n", "\r\r\n.\r\n", "a\r\n.\n"} {
		if _, _, done, err := frame(strict, stream); done || !errors.Is(err, errBareNewline) {
			t.Errorf("%q: %v, %v", stream, done, err)
		}
	}
	if message, _, done, err := frame(strict, "a\r\n..b\r\n.\r\n"); !done || err != nil || message != "a\r\n.b\r\n" {
		t.Errorf("a message without any: %q, %v, %v", message, done, err)
	}
}

func TestLimitsOfAMessageAreExact(t *testing.T) {
	cases := []struct {
		name   string
		limits limits
		stream string
		want   int // code; 0 for taken
	}{
		{"a message of exactly the limit", limits{maxMessage: 6, maxHeader: 100, maxLine: 100}, "abcd\r\n.\r\n", 0},
		{"one octet more", limits{maxMessage: 6, maxHeader: 100, maxLine: 100}, "abcde\r\n.\r\n", 552},
		{"stuffed dots do not count", limits{maxMessage: 6, maxHeader: 100, maxLine: 100}, "..bcd\r\n.\r\n", 0},
		{"a line of exactly the limit", limits{maxMessage: 100, maxHeader: 100, maxLine: 4}, "abcd\r\n.\r\n", 0},
		{"a line with one octet more", limits{maxMessage: 100, maxHeader: 100, maxLine: 4}, "abcde\r\n.\r\n", 554},
		{"a header of exactly the limit", limits{maxMessage: 100, maxHeader: 8, maxLine: 100}, "a: b\r\n\r\n0123456789\r\n.\r\n", 0},
		{"a header with more", limits{maxMessage: 100, maxHeader: 8, maxLine: 100}, "a: b\r\nc\r\n\r\n.\r\n", 552},
		{"no header at all, and a long body", limits{maxMessage: 100, maxHeader: 8, maxLine: 100}, "\r\n0123456789\r\n.\r\n", 0},
	}
	for _, c := range cases {
		t.Run(c.name, func(t *testing.T) {
			for cut := 0; cut <= len(c.stream); cut++ {
				f := framer{limits: c.limits, out: io.Discard}
				n, done, _ := f.feed([]byte(c.stream[:cut]))
				if !done {
					_, done, _ = f.feed([]byte(c.stream[n:]))
				}
				got := 0
				if f.refused != nil {
					got = f.refused.Code
				}
				if !done || got != c.want {
					t.Fatalf("cut at %d: done %v, code %d", cut, done, got)
				}
			}
		})
	}
}

func TestMessageWithoutEndIsGivenUp(t *testing.T) {
	f := framer{limits: limits{maxMessage: 1000, maxHeader: 1000, maxLine: 1000}, out: io.Discard}
	block := bytes.Repeat([]byte("x"), 64<<10)
	for i := 0; i < drainBytes/len(block)+2; i++ {
		if _, _, err := f.feed(block); err != nil {
			if !errors.Is(err, errEndless) || f.refused == nil {
				t.Fatalf("%v, %v", err, f.refused)
			}
			return
		}
	}
	t.Fatal("reads on for ever")
}

func TestErrorOfTheDiskIs452(t *testing.T) {
	f := framer{limits: wide, out: brokenWriter{}}
	if _, done, err := f.feed([]byte("x\r\n.\r\n")); !done || err != nil || f.refused == nil || f.refused.Code != 452 {
		t.Fatalf("%v, %v, %v", done, err, f.refused)
	}
}

type brokenWriter struct{}

func (brokenWriter) Write([]byte) (int, error) { return 0, errors.New("no space") }

func FuzzFramer(f *testing.F) {
	for _, s := range notEnds {
		f.Add([]byte("a"+s+"b\r\n.\r\nrest"), uint8(3))
	}
	f.Fuzz(func(t *testing.T, stream []byte, step uint8) {
		var cuts []int
		for i := int(step%7) + 1; i < len(stream); i += int(step%7) + 1 {
			cuts = append(cuts, i)
		}
		message, rest, done, err := frame(wide, string(stream), cuts...)
		if err != nil {
			t.Fatal(err)
		}
		wantMessage, wantRest, wantDone := model(string(stream))
		if done != wantDone || done && (message != wantMessage || rest != wantRest) {
			t.Fatalf("%q: got %q, %q, %v; want %q, %q, %v", stream, message, rest, done, wantMessage, wantRest, wantDone)
		}
		if done {
			wellFormed(t, message)
		}
	})
}

func BenchmarkFramer(b *testing.B) {
	stream := []byte(strings.Repeat(strings.Repeat("x", 76)+"\r\n", 800))
	f := framer{limits: wide, out: io.Discard}
	b.SetBytes(int64(len(stream)))
	for b.Loop() {
		if _, _, err := f.feed(stream); err != nil {
			b.Fatal(err)
		}
	}
}
