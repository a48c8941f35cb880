package tunnel

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"strings"
	"testing"
	"time"

	"mailproxy/config"
)

// packedPair is two members, to whom a link is slow where a block takes so long.
func packedPair(t *testing.T, slow time.Duration, services map[string]Handler) (a, b *node) {
	t.Helper()
	c := quick()
	c.slow = slow
	ca := newCA(t)
	a, b = newNode(t, Options{}), newNode(t, Options{Services: services})
	a.enter(ca, 1)
	b.enter(ca, 2)
	s := snapshot(ca, a, b)
	for _, n := range []*node{a, b} {
		n.setTiming(c)
		n.start()
		n.Reload(s)
	}
	a.waitUp(2)
	b.waitUp(1)
	return a, b
}

// Rows of a configuration become much less, and each write is whole at the other end before the next.
func TestPackerSendsLittleAtOnce(t *testing.T) {
	var way bytes.Buffer
	p, u := newPacker(&way), newUnpacker(&way)
	sent, packed := 0, 0
	for i := range 1000 {
		row := fmt.Sprintf("domain\tu\t{\"name\": \"d%06d.example.test\", \"hosts\": [\"192.0.2.%d:25\"], \"comment\": null}\n", i*7919, i%200)
		text := strings.Repeat(row, 1+i%50)
		if n, err := p.Write([]byte(text)); n != len(text) || err != nil {
			t.Fatalf("write: %d, %v", n, err)
		}
		sent, packed = sent+len(text), packed+way.Len()
		got := make([]byte, len(text))
		if _, err := io.ReadFull(u, got); err != nil || string(got) != text {
			t.Fatalf("write %d: %v", i, err)
		}
	}
	if packed > sent/5 {
		t.Errorf("%d bytes were sent as %d", sent, packed)
	}
}

func TestBulkIsPackedWhereTheLinkIsSlow(t *testing.T) {
	near, _ := packedPair(t, time.Hour, nil)
	if c := near.mustDialBulk(2); c.(*conn).packed {
		t.Error("packed over a fast link")
	}
	far, _ := packedPair(t, time.Nanosecond, nil)
	c := far.mustDialBulk(2).(*conn)
	if !c.packed {
		t.Fatal("not packed over a slow link")
	}
	ping(t, c, "an answer waits for nothing more")
	if got := defaultTiming().slow; got != slowBlock {
		t.Errorf("a block is slow from %v on", got)
	}
}

// A node that knows nothing of packing, or has packed enough, is sent the same as it is.
func TestBulkGoesPlainWherePackingIsRefused(t *testing.T) {
	a, _ := packedPair(t, 0, nil)
	for i := range maxPacked + 2 {
		c := a.mustDialBulk(2).(*conn)
		defer c.Close()
		if c.packed != (i < maxPacked) {
			t.Errorf("stream %d: packed %v", i, c.packed)
		}
		ping(t, c, "all the same")
	}
}

// What is packed is given back as slots when it ends.
func TestPackedStreamsAreCountedWhileTheyLast(t *testing.T) {
	a, b := packedPair(t, 0, nil)
	for range 3 * maxPacked {
		c := a.mustDialBulk(2)
		ping(t, c, "once")
		_ = c.Close()
		eventually(t, "it is free again", 5*time.Second, func() bool {
			b.mu.Lock()
			p := b.peers[1]
			b.mu.Unlock()
			p.packed.mu.Lock()
			defer p.packed.mu.Unlock()
			return p.packed.total == 0
		})
	}
}

// A peer that sends little which unpacks to much has only so much of it unpacked as is read.
func TestUnpackingIsBounded(t *testing.T) {
	seen := make(chan error, 1)
	a, _ := packedPair(t, 0, map[string]Handler{"echo": func(_ context.Context, _ config.CID, c net.Conn) {
		_, err := io.ReadFull(c, make([]byte, 1<<10))
		seen <- err
		_, err = io.Copy(io.Discard, c)
		seen <- err
	}})
	c := a.mustDialBulk(2)
	if _, err := c.Write(make([]byte, 64<<20)); err != nil { // 64 KiB when packed
		t.Fatal(err)
	}
	if err := <-seen; err != nil {
		t.Errorf("read: %v", err)
	}
	_ = c.Close()
	if err := <-seen; err != nil {
		t.Errorf("to the end: %v", err)
	}
}

func TestRubbishIsNoPackedStream(t *testing.T) {
	u := newUnpacker(bytes.NewReader([]byte{0xff, 0xff, 0xff, 0xff}))
	if _, err := io.ReadAll(u); err == nil || errors.Is(err, io.EOF) {
		t.Errorf("read: %v", err)
	}
}
