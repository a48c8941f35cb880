package main

import (
	"bytes"
	"fmt"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"mailproxy/config"
)

// A screen is what a terminal shows of what was written to it, in so far as progress makes use of one.
type screen struct {
	lines []string
	row   int
}

func (s *screen) Write(b []byte) (int, error) {
	text := string(b)
	for text != "" {
		for s.row >= len(s.lines) {
			s.lines = append(s.lines, "")
		}
		var up int
		switch {
		case strings.HasPrefix(text, "\x1b[K"): // ours stands at the end of what it wrote
			text = text[3:]
		case strings.HasPrefix(text, "\x1b[J"):
			s.lines, text = s.lines[:s.row], text[3:]
		case strings.HasPrefix(text, "\x1b["):
			if _, err := fmt.Sscanf(text, "\x1b[%dA", &up); err != nil || up > s.row {
				return 0, fmt.Errorf("%q at line %d", text, s.row)
			}
			s.row, text = s.row-up, text[strings.Index(text, "A")+1:]
		case text[0] == '\r':
			s.lines[s.row], text = "", text[1:]
		case text[0] == '\n':
			s.row, text = s.row+1, text[1:]
		default:
			end := strings.IndexAny(text+"\n", "\x1b\r\n")
			s.lines[s.row] += text[:end]
			text = text[end:]
		}
	}
	return len(b), nil
}

func (s *screen) String() string { return strings.TrimRight(strings.Join(s.lines, "\n"), "\n") }

func progressNodes() (a, b config.Node) {
	return config.Node{CID: 2, Name: "mx2.test"}, config.Node{CID: 3, Name: "mx3.test"}
}

func TestBarsAreDrawnInPlace(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var s screen
		_, _ = s.Write([]byte("$ pmgcm sync\n"))
		width := 80
		p := &progress{w: &s, width: func() int { return width }}
		a, b := progressNodes()
		want := func(lines ...string) {
			t.Helper()
			if got, want := s.String(), strings.Join(append([]string{"$ pmgcm sync"}, lines...), "\n"); got != want {
				t.Errorf("it shows\n%s\nwant\n%s", got, want)
			}
		}
		half := "mx2.test(2) [###############---------------]  50%, 500 of 1000 rows"
		p.note(a, 500, 1000)
		want(half)
		p.note(b, 1, 1000) // too soon after the last
		want(half)
		time.Sleep(2 * redrawEvery)
		p.note(b, 10, 1000)
		want(half, "mx3.test(3) [------------------------------]   1%, 10 of 1000 rows")
		p.note(a, 1000, 1000) // the last is never too soon
		done := "mx2.test(2) [##############################] 100%, 1000 of 1000 rows, applying"
		want(done, "mx3.test(3) [------------------------------]   1%, 10 of 1000 rows")
		time.Sleep(2 * redrawEvery)
		width = 20
		p.note(b, 990, 1000)
		want(done[:19], "mx3.test(3) [######")
		p.end()
		want()
		p.note(b, 1000, 1000) // a push that has not heard of the end
		want()
		_, _ = s.Write([]byte("mx2.test(2): in sync\n"))
		want("mx2.test(2): in sync")
	})
}

func TestProgressWithoutATerminalIsLines(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var out bytes.Buffer
		p := newProgress(&out)
		a, b := progressNodes()
		for i := range int64(25) { // 2.4 s
			p.note(a, i, 100)
			if i < 8 {
				p.note(b, 100, 100)
			}
			time.Sleep(100 * time.Millisecond)
		}
		p.end()
		if want := "mx2.test(2): sent 11 of 100 rows\nmx2.test(2): sent 22 of 100 rows\n"; out.String() != want {
			t.Errorf("%q, want %q", out.String(), want)
		}
	})
}

func TestAPushOfNothingHasABarToo(t *testing.T) {
	a, _ := progressNodes()
	if got, want := (&pushed{node: a}).bar(), "mx2.test(2) [------------------------------]   0%, 0 of 0 rows, applying"; got != want {
		t.Errorf("%q, want %q", got, want)
	}
}
