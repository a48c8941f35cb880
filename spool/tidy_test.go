package spool

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"mailproxy/mail"
)

// A disk that is too full for a record can be drained all the same.
func TestAFullDiskCanBeDrained(t *testing.T) {
	dir := t.TempDir()
	if err := syscall.Mount("tmpfs", dir, "tmpfs", 0, "size=1m"); err != nil {
		t.Fatalf("mount: %v (the test needs root)", err)
	}
	defer func() { must(t, syscall.Unmount(dir, 0)) }()
	s, err := Open(dir)
	must(t, err)
	var drafts []Draft
	for i := range 200 { // the records of their removals take more than the segment's last page
		drafts = append(drafts, draft(fmt.Sprintf("ID%d", i), []byte("x")))
	}
	must(t, s.Put(drafts, false))
	if err := os.WriteFile(filepath.Join(dir, "fill"), make([]byte, 2<<20), 0o600); !errors.Is(err, syscall.ENOSPC) {
		t.Errorf("fill: %v", err)
	}
	for _, d := range drafts[1:] {
		must(t, s.Remove(d.ID))
	}
	must(t, s.Close())
	s, err = Open(dir)
	must(t, err)
	if found := slices.Sorted(maps.Keys(all(t, s))); !slices.Equal(found, []string{"ID0"}) {
		t.Errorf("found %v", found)
	}
	must(t, s.Close())
}

func TestAMessageThatIsOpenCanBeReadThoughItIsRemovedAndItsSegmentDeleted(t *testing.T) {
	s, err := openSized(t.TempDir(), 8<<10)
	must(t, err)
	defer func() { must(t, s.Close()) }()
	want := random(5000)
	must(t, s.Put([]Draft{draft("A", want)}, false))
	m, err := s.Open("A")
	must(t, err)
	must(t, s.Remove("A"))
	for i := range 10 {
		must(t, s.Put([]Draft{draft(fmt.Sprint("B", i), random(5000))}, false))
	}
	eventually(t, "its segment is deleted", func() bool { _, err := os.Stat(m.seg.path); return err != nil })
	if got, err := io.ReadAll(m.Content); err != nil || !bytes.Equal(got, want) {
		t.Errorf("%d octets, %v", len(got), err)
	}
	m.Close()
	if _, err := m.seg.file.Stat(); !errors.Is(err, os.ErrClosed) {
		t.Errorf("the file of a segment that nobody needs is open: %v", err)
	}
}

// A copy is made of what was there when it was begun; what is said meanwhile must not come to lie before it.
func TestACopyNeverTakesAStateBack(t *testing.T) {
	s := openTest(t, t.TempDir())
	must(t, s.Put([]Draft{draft("A", random(1000))}, false))
	var copies atomic.Int64
	stop := make(chan struct{})
	var copier sync.WaitGroup
	defer copier.Wait()
	defer close(stop)
	copier.Go(func() {
		for {
			select {
			case <-stop:
				return
			default:
			}
			if !s.copy("A") {
				t.Error("no copy")
			}
			copies.Add(1)
		}
	})
	for i := range 300 {
		want := fmt.Sprint("state ", i)
		must(t, s.SetState("A", []byte(want), false))
		under := copies.Load() + 1 // the one that may have been under way
		eventually(t, "it has ended", func() bool { return copies.Load() >= under })
		if f, err := s.look("A"); err != nil || string(f.State) != want {
			t.Fatalf("state %q, want %q, %v", f.State, want, err)
		}
	}
}

// The log has little of a large message, and that outlives its segment too.
func TestWhatTheLogHasOfALargeMessageIsCopied(t *testing.T) {
	dir := t.TempDir()
	s, err := openSized(dir, 8<<10)
	must(t, err)
	must(t, s.Put([]Draft{draft("BIG", random(ownSize))}, true))
	must(t, s.Put([]Draft{draft("LARGE", random(ownSize))}, false))
	must(t, s.Release([]string{"BIG"}))
	must(t, s.SetState("BIG", []byte("state"), false))
	must(t, s.Mark("LARGE", time.Unix(5, 0)))
	first := logPath(dir, 1)
	for i := 0; ; i++ {
		id := fmt.Sprint("S", i)
		must(t, s.Put([]Draft{draft(id, random(4000))}, false))
		must(t, s.Remove(id))
		if _, err := os.Stat(first); err != nil {
			break
		}
		if i == 1000 {
			t.Fatal("the first segment is never deleted")
		}
	}
	must(t, s.Close())
	found := all(t, openTest(t, dir))
	if string(found["BIG"].State) != "state" || found["LARGE"].Tried.IsZero() || found["BIG"].Held || found["LARGE"].Held {
		t.Errorf("found %+v", found)
	}
}

// A removal that the disk did not take is written with what is written next.
func TestARemovalThatFailedIsOwed(t *testing.T) {
	dir := t.TempDir()
	s := openTest(t, dir)
	must(t, s.Put([]Draft{draft("A", []byte("a"))}, false))
	s.mu.Lock()
	must(t, s.active.file.Close()) // whatever is written to it is an error
	s.mu.Unlock()
	if err := s.Remove("A"); err == nil {
		t.Fatal("it was removed")
	}
	if _, err := s.Open("A"); !errors.Is(err, ErrNoSuch) {
		t.Errorf("it is still there: %v", err)
	}
	must(t, s.Put([]Draft{draft("B", []byte("b"))}, false))
	must(t, s.Close())
	if found := slices.Sorted(maps.Keys(all(t, openTest(t, dir)))); !slices.Equal(found, []string{"B"}) {
		t.Errorf("the next start finds %v", found)
	}
}

// A drop that the disk did not take is written with what is written next: it would keep its segment, and all behind it, for as long as
// the daemon runs. Until then no other message has its ID.
func TestADropThatFailedIsOwed(t *testing.T) {
	dir := t.TempDir()
	s := openTest(t, dir)
	must(t, s.Put([]Draft{draft("A", []byte("a"))}, true))
	s.mu.Lock()
	segment := s.active
	must(t, segment.file.Close()) // whatever is written to it is an error
	s.mu.Unlock()
	must(t, s.Drop([]string{"A"}))
	eventually(t, "the disk does not take it", func() bool { s.mu.Lock(); defer s.mu.Unlock(); return s.active != segment })
	if err := s.Put([]Draft{draft("A", []byte("another"))}, false); !errors.As(err, new(*ContentError)) {
		t.Errorf("another of that ID: %v", err)
	}
	must(t, s.Put([]Draft{draft("B", []byte("b"))}, false))
	eventually(t, "the segment is deleted", func() bool { _, err := os.Stat(segment.path); return err != nil })
	must(t, s.Put([]Draft{draft("A", []byte("a later one"))}, false))
	if err := s.Put([]Draft{draft("A", []byte("another"))}, false); !errors.As(err, new(*ContentError)) {
		t.Errorf("another of that ID: %v", err)
	}
	must(t, s.Close())
	if found := slices.Sorted(maps.Keys(all(t, openTest(t, dir)))); !slices.Equal(found, []string{"A", "B"}) {
		t.Errorf("the next start finds %v", found)
	}
}

// What is not synced at the end of a segment would look like damage after a power cut, once another one is begun.
func TestASegmentIsSyncedBeforeTheNextIsBegun(t *testing.T) {
	s, err := openSized(t.TempDir(), 8<<10)
	must(t, err)
	defer func() { must(t, s.Close()) }()
	must(t, s.Put([]Draft{draft("A", random(4000))}, false))
	must(t, s.Mark("A", time.Unix(5, 0)))
	must(t, s.Put([]Draft{draft("B", random(6000))}, false))
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(s.segments) != 1 || s.segments[0].dirty {
		t.Errorf("%d segments are closed, the first not synced", len(s.segments))
	}
}

// A large message that is removed while what the log has of it is being copied leaves nothing that counts as live.
// Whatever makes a count wrong, the mail that it is about stays.
func TestASegmentWhoseCountIsWrongIsNotDeleted(t *testing.T) {
	dir := t.TempDir()
	s, err := openSized(dir, 1) // each batch has a segment of its own
	must(t, err)
	for _, id := range []string{"first", "second"} {
		must(t, s.Put([]Draft{draft(id, []byte("mail"))}, false))
	}
	s.mu.Lock()
	seg := s.segments[0]
	s.mu.Unlock()
	for _, live := range []int{-1, 1} {
		s.mu.Lock()
		seg.live = live
		s.mu.Unlock()
		s.deleteDead()
	}
	must(t, s.Close())
	if found := all(t, openTest(t, dir)); len(found) != 2 {
		t.Errorf("%d messages are left, want 2", len(found))
	}
}

func TestALargeMessageIsRemovedWhileItsStateIsCopied(t *testing.T) {
	s, err := openSized(t.TempDir(), 1) // each batch has a segment of its own
	must(t, err)
	defer func() { must(t, s.Close()) }()
	removed := 0
	for i := range 30 {
		id := fmt.Sprintf("large%d", i)
		must(t, s.Put([]Draft{{ID: id, Envelope: &mail.Envelope{}, Content: bytes.NewReader(make([]byte, ownSize))}}, false))
		must(t, s.SetState(id, []byte("state"), false))
		copied := make(chan struct{})
		go func() { s.copy(id); close(copied) }()
		for done := false; !done; {
			select {
			case <-copied: // before we saw it
				done = true
			default:
			}
			s.mu.Lock()
			if m := s.messages[id]; m != nil && m.pending > 0 {
				s.ownGoneLocked(id, m)
				removed++
				done = true
			}
			s.mu.Unlock()
		}
		<-copied
		must(t, s.Remove(id)) // those that were copied before
	}
	if removed == 0 {
		t.Fatal("none was removed while it was copied")
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, seg := range append(slices.Clone(s.segments), s.active) {
		if seg != nil && seg.live != 0 {
			t.Errorf("%d records of a segment are live", seg.live)
		}
	}
	if s.living != 0 {
		t.Errorf("%d octets are live", s.living)
	}
}
