package smtpd

import (
	"bytes"
	"io"
	"math/rand/v2"
	"os"
	"strings"
	"testing"
)

func TestContentIsReadAsItWasWritten(t *testing.T) {
	dir := t.TempDir()
	for _, size := range []int{0, 1, memoryBound - 1, memoryBound, memoryBound + 1, 3*memoryBound + 7} {
		want := make([]byte, size)
		for i := range want {
			want[i] = byte(rand.IntN(256))
		}
		c := newContent(dir, 0)
		for rest := want; len(rest) > 0; {
			n := min(len(rest), 1+rand.IntN(50000))
			if m, err := c.Write(rest[:n]); m != n || err != nil {
				t.Fatal(m, err)
			}
			rest = rest[n:]
		}
		if err := c.finish(); err != nil {
			t.Fatal(err)
		}
		got, err := io.ReadAll(io.NewSectionReader(c, 0, c.Size()))
		if err != nil || !bytes.Equal(got, want) {
			t.Errorf("%d octets: %d read, %v", size, len(got), err)
		}
		for range 100 {
			off, n := rand.IntN(size+1), rand.IntN(1000)
			b := make([]byte, n)
			m, err := c.ReadAt(b, int64(off))
			if !bytes.Equal(b[:m], want[off:min(off+n, size)]) || (m < n) != (err == io.EOF) {
				t.Fatalf("ReadAt(%d at %d of %d): %d, %v", n, off, size, m, err)
			}
		}
		if names, _ := os.ReadDir(dir); len(names) != 0 {
			t.Errorf("files have names: %v", names)
		}
		c.release()
	}
}

func TestContentWithoutADirectoryIsAnError(t *testing.T) {
	c := newContent("/nonexistent", 0)
	defer c.release()
	if n, err := c.Write(make([]byte, memoryBound+1)); err == nil || n != memoryBound {
		t.Fatal(n, err)
	}
}

func TestReceivedFieldsOfTheHeaderAreCounted(t *testing.T) {
	for _, c := range []struct {
		name, text string
		want       int
	}{
		{"none", "Subject: x\r\n\r\nReceived: y\r\n", 0},
		{"in any case, with folded lines", "Received: a\r\n b\r\nRECEIVED: c\r\nX-Received: d\r\nreceived: e\r\n\r\nbody\r\n", 3},
		{"folded text that looks like one", "Subject: x\r\n Received: y\r\n", 0},
		{"over a block's end", strings.Repeat("A: "+strings.Repeat("x", 100)+"\r\n", 39) + "Received: a\r\nReceived: b\r\n", 2},
		{"nothing", "", 0},
	} {
		if got := countReceived(strings.NewReader(c.text), int64(len(c.text))); got != c.want {
			t.Errorf("%s: %d, want %d", c.name, got, c.want)
		}
	}
}
