package spool

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"maps"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"mailproxy/mail"
)

func openTest(t testing.TB, dir string) *Spool {
	t.Helper()
	s, err := Open(dir)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = s.Close() })
	return s
}

func draft(id string, content []byte) Draft {
	return Draft{ID: id, Content: bytes.NewReader(content), Envelope: &mail.Envelope{
		ReversePath: mail.Path{Local: "from", Domain: "a.test"}, ForwardPaths: []mail.Path{{Local: "to", Domain: "b.test"}},
		Session: id, ReceivedAt: time.Unix(1, 0).UTC(),
	}}
}

// random gives content that does not compress, so that what is cut shows.
func random(size int) []byte {
	b := make([]byte, size+8)
	for i := 0; i < size; i += 8 {
		binary.LittleEndian.PutUint64(b[i:], rand.Uint64())
	}
	return b[:size]
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func content(t testing.TB, s *Spool, id string) []byte {
	t.Helper()
	m, err := s.Open(id)
	if err != nil {
		t.Fatalf("%s: %v", id, err)
	}
	defer m.Close()
	if err := m.Check(); err != nil {
		t.Fatalf("%s: %v", id, err)
	}
	b, err := io.ReadAll(m.Content)
	if err != nil || m.Envelope.Session != id {
		t.Fatalf("%s: %+v, %v", id, m.Envelope, err)
	}
	return b
}

// all gives what the spool has, by ID.
func all(t testing.TB, s *Spool) map[string]Found {
	t.Helper()
	found := map[string]Found{}
	must(t, s.Each(func(f Found) error { found[f.ID] = f; return nil }, func(id string, err error) error { return fmt.Errorf("%s: %w", id, err) }))
	return found
}

func TestMessagesComeBackAsTheyWere(t *testing.T) {
	dir := t.TempDir()
	s := openTest(t, dir)
	want := map[string][]byte{}
	for i, size := range []int{0, 1, 1000, 16<<10 - 1, 16 << 10, 64<<10 + 1, ownSize - 1, ownSize, ownSize + 1, 3 << 20} {
		id := fmt.Sprintf("ID%d", i)
		want[id] = random(size)
		must(t, s.Put([]Draft{draft(id, want[id])}, false))
	}
	many := draft("MANY", []byte("x"))
	for range 5000 {
		many.Envelope.ForwardPaths = append(many.Envelope.ForwardPaths, mail.Path{Local: "ü", Domain: "b.test"})
	}
	want["MANY"] = []byte("x")
	must(t, s.Put([]Draft{many}, false))
	for range 2 {
		for id, w := range want {
			if got := content(t, s, id); !bytes.Equal(got, w) {
				t.Errorf("%s: %d octets, want %d", id, len(got), len(w))
			}
		}
		if found := all(t, s); len(found) != len(want) || len(found["MANY"].Envelope.ForwardPaths) != 5001 || found["ID2"].Size != 1000 {
			t.Errorf("%d found", len(found))
		}
		must(t, s.Close())
		s = openTest(t, dir)
	}
	_, r, err := Inspect(dir)
	if err != nil || r.Messages != len(want) || r.Tail != 0 || len(r.Bad) > 0 {
		t.Errorf("inspected: %+v, %v", r, err)
	}
}

func TestWhatIsHeldIsAcceptedByARelease(t *testing.T) {
	dir := t.TempDir()
	s := openTest(t, dir)
	big := random(ownSize)
	must(t, s.Put([]Draft{draft("A", []byte("a")), draft("B", big)}, true))
	must(t, s.Put([]Draft{draft("C", []byte("c")), draft("D", big)}, true))
	must(t, s.Release([]string{"A", "B"}))
	if err := s.Release([]string{"A"}); !errors.Is(err, ErrNoSuch) {
		t.Errorf("again: %v", err)
	}
	must(t, s.Close())
	s = openTest(t, dir)
	for id, f := range all(t, s) {
		if want := id == "C" || id == "D"; f.Held != want {
			t.Errorf("%s held: %v", id, f.Held)
		}
	}
	must(t, s.Drop([]string{"C", "D"}))
	must(t, s.Close())
	if found := all(t, openTest(t, dir)); len(found) != 2 {
		t.Errorf("found %v", found)
	}
}

// A spool and a plain map get the same random orders, at once from several sides; opened again now and then, both have the same. Segments
// are small, so that there is much to tidy.
func TestRandomOrdersSurviveReopening(t *testing.T) {
	dir := t.TempDir()
	type known struct {
		content []byte
		state   string
		held    bool
		tried   bool
	}
	want := map[string]known{}
	var mu sync.Mutex
	next := 0
	for round := range 10 {
		s, err := openSized(dir, 64<<10)
		must(t, err)
		var all8 sync.WaitGroup
		for side := range 8 {
			r := rand.New(rand.NewPCG(uint64(round), uint64(side)))
			mu.Lock()
			var mine []string
			for id := range want {
				if id[len(id)-1] == byte('0'+side) {
					mine = append(mine, id)
				}
			}
			slices.Sort(mine)
			mu.Unlock()
			set := func(id string, k *known) {
				mu.Lock()
				defer mu.Unlock()
				if k == nil {
					delete(want, id)
					return
				}
				want[id] = *k
			}
			get := func(id string) known { mu.Lock(); defer mu.Unlock(); return want[id] }
			all8.Go(func() {
				for range 60 {
					var id string
					if len(mine) > 0 {
						id = mine[r.IntN(len(mine))]
					}
					k := get(id)
					switch op := r.IntN(10); {
					case op < 4 || id == "":
						mu.Lock()
						next++
						id = fmt.Sprintf("N%d_%d", next, side)
						mu.Unlock()
						size := r.IntN(8 << 10)
						if r.IntN(40) == 0 {
							size = ownSize + r.IntN(1000)
						}
						k := known{content: random(size), held: r.IntN(4) == 0}
						if err := s.Put([]Draft{draft(id, k.content)}, k.held); err != nil {
							t.Error(err)
						}
						set(id, &k)
						mine = append(mine, id)
					case op < 6 && !k.held:
						goesOn := r.IntN(2) == 0
						k.state, k.tried = fmt.Sprintf("state %d", r.IntN(1000)), k.tried && goesOn
						if err := s.SetState(id, []byte(k.state), goesOn); err != nil {
							t.Error(err)
						}
						set(id, &k)
					case op == 6 && k.held:
						if err := s.Release([]string{id}); err != nil {
							t.Error(err)
						}
						k.held, k.tried = false, false
						set(id, &k)
					case op == 7 && !k.held:
						if err := s.Mark(id, time.Unix(5, 0)); err != nil {
							t.Error(err)
						}
						k.tried = true
						if r.IntN(3) == 0 {
							if err := s.Unmark(id); err != nil {
								t.Error(err)
							}
							k.tried = false
						}
						set(id, &k)
					case op > 7:
						var err error
						if k.held {
							err = s.Drop([]string{id})
						} else {
							err = s.Remove(id)
						}
						if err != nil {
							t.Error(err)
						}
						set(id, nil)
						mine = slices.DeleteFunc(mine, func(m string) bool { return m == id })
					default:
						if got := content(t, s, id); !bytes.Equal(got, k.content) {
							t.Errorf("%s: other content", id)
						}
					}
				}
			})
		}
		all8.Wait()
		must(t, s.Close())
		s = openTest(t, dir)
		found := all(t, s)
		if len(found) != len(want) {
			t.Errorf("round %d: %d found, want %d", round, len(found), len(want))
		}
		for id, k := range want {
			f := found[id]
			if string(f.State) != k.state || f.Held != k.held || f.Tried.IsZero() == k.tried || f.Size != int64(len(k.content)) {
				t.Errorf("round %d, %s: %+v, want %q held %v tried %v", round, id, f, k.state, k.held, k.tried)
			}
			if got := content(t, s, id); !bytes.Equal(got, k.content) {
				t.Errorf("round %d, %s: other content", round, id)
			}
		}
		var live int64
		s.mu.Lock()
		for _, m := range s.messages {
			if m.at.seg.number != 0 {
				live += m.at.size
			}
			for _, p := range []place{m.state, m.trying} {
				if p.seg != nil {
					live += p.size
				}
			}
		}
		counted := s.living
		s.mu.Unlock()
		if live != counted || s.Damaged() != 0 {
			t.Errorf("round %d: %d octets are live, counted %d; %d damaged", round, live, counted, s.Damaged())
		}
		must(t, s.Close())
		if t.Failed() {
			t.FailNow()
		}
	}
	// What is dead goes by and by: first as far as may be left lying, and with the last message all of it.
	s, err := openSized(dir, 64<<10)
	must(t, err)
	defer func() { must(t, s.Close()) }()
	eventually(t, "the log is tidy", func() bool { return s.victim() == nil })
	for id, f := range all(t, s) {
		if f.Held {
			must(t, s.Drop([]string{id}))
			continue
		}
		must(t, s.Remove(id))
	}
	eventually(t, "the log is empty", func() bool {
		s.mu.Lock()
		defer s.mu.Unlock()
		return len(s.segments) == 0 && s.living == 0
	})
}

// eventually polls a condition.
func eventually(t testing.TB, what string, cond func() bool) {
	t.Helper()
	for deadline := time.Now().Add(30 * time.Second); !cond(); time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("not within 30 s: %s", what)
		}
	}
}

// The log has one segment; these are its octets.
func logOctets(t testing.TB, dir string) (string, []byte) {
	t.Helper()
	numbers, err := logNames(dir)
	if err != nil || len(numbers) != 1 {
		t.Fatalf("segments %v, %v", numbers, err)
	}
	b, err := os.ReadFile(logPath(dir, numbers[0]))
	must(t, err)
	return logPath(dir, numbers[0]), b
}

func TestEveryFlippedBitIsSeenAndCostsOneMessage(t *testing.T) {
	dir := t.TempDir()
	s := openTest(t, dir)
	must(t, s.Put([]Draft{draft("A", []byte("first"))}, false))
	must(t, s.Put([]Draft{draft("B", []byte("second"))}, false))
	start, size := s.messages["B"].at.off, s.messages["B"].at.size
	must(t, s.Put([]Draft{draft("C", []byte("third"))}, false))
	must(t, s.Close())
	file, good := logOctets(t, dir)
	for i := range size * 8 {
		if i/8 == offDead || i > 8*headSize && i%5 != 0 {
			continue // says nothing but for one value; a sample of the rest will do
		}
		bad := bytes.Clone(good)
		bad[start+i/8] ^= 1 << (i % 8)
		must(t, os.WriteFile(file, bad, 0o600))
		must(t, os.RemoveAll(filepath.Join(dir, "damaged")))
		s, err := Open(dir)
		must(t, err)
		found := all(t, s)
		if _, there := found["B"]; there || len(found) != 2 || s.Damaged() != 1 || len(s.Aside()) != 1 {
			t.Fatalf("bit %d: found %v, %d damaged", i, slices.Sorted(maps.Keys(found)), s.Damaged())
		}
		must(t, s.Close())
		if s, err = Open(dir); err != nil || len(s.Aside()) != 0 || s.Damaged() != 1 {
			t.Fatalf("bit %d: set aside twice, %v", i, err)
		}
		must(t, s.Close())
		must(t, os.RemoveAll(filepath.Join(dir, "damaged"))) // by an operator who has dealt with it
		if s, err = Open(dir); err != nil || s.Damaged() != 0 {
			t.Fatalf("bit %d: set aside again, %v", i, err)
		}
		must(t, s.Close())
	}
}

func TestATailThatIsTornIsCutOff(t *testing.T) {
	dir := t.TempDir()
	s := openTest(t, dir)
	must(t, s.Put([]Draft{draft("A", []byte("first"))}, false))
	start := s.messages["A"].at.off + s.messages["A"].at.size
	must(t, s.Put([]Draft{draft("B", random(200))}, false))
	must(t, s.Close())
	file, good := logOctets(t, dir)
	for n := range int64(len(good)) {
		must(t, os.WriteFile(file, good[:n], 0o600))
		// What a file system may leave where octets were not written.
		padded := append(bytes.Clone(good[:n]), make([]byte, rand.IntN(50))...)
		if n > start && n%2 == 0 {
			must(t, os.WriteFile(file, padded, 0o600))
		}
		s, err := Open(dir)
		must(t, err)
		want := 0
		if n >= start {
			want = 1
		}
		if found := all(t, s); len(found) != want || s.Damaged() != 0 {
			t.Fatalf("cut at %d of %d: found %d, %d damaged", n, len(good), len(found), s.Damaged())
		}
		must(t, s.Put([]Draft{draft("C", []byte("next"))}, false))
		must(t, s.Close())
		if s, err = Open(dir); err != nil || len(all(t, s)) != want+1 {
			t.Fatalf("cut at %d: %v", n, err)
		}
		must(t, s.Close())
		for _, number := range []int64{2, 3, 4} {
			_ = os.Remove(logPath(dir, number))
		}
	}
}

// Whoever sends mail can write what looks like a record, but for the mark; behind damage nothing of it is taken for one.
func TestAForgedRecordInAMessageIsNeverTakenForOne(t *testing.T) {
	dir := t.TempDir()
	s := openTest(t, dir)
	e := []byte(`{"forward_paths":["victim@b.test"]}`)
	var guess mark
	forged := appendTail(append(appendHead(nil, guess, kindMessage, 0, "FORGED", e, 4), "evil"...), crc32.Checksum([]byte("evil"), castagnoli))
	must(t, s.Put([]Draft{draft("A", append([]byte("x"), forged...))}, false))
	at := s.messages["A"].at.off
	must(t, s.Put([]Draft{draft("B", []byte("b"))}, false))
	must(t, s.Close())
	file, b := logOctets(t, dir)
	b[at] ^= 1
	must(t, os.WriteFile(file, b, 0o600))
	s = openTest(t, dir)
	if found := slices.Sorted(maps.Keys(all(t, s))); !slices.Equal(found, []string{"B"}) {
		t.Errorf("found %v", found)
	}
	if s.mark == guess {
		t.Error("the mark is no secret")
	}
}

// Files of another spool in this one's place are not its messages.
func TestASegmentOfAnotherSpoolIsSetAside(t *testing.T) {
	dir, other := t.TempDir(), t.TempDir()
	s, foreign := openTest(t, dir), openTest(t, other)
	must(t, s.Put([]Draft{draft("OWN", []byte("x"))}, false))
	must(t, foreign.Put([]Draft{draft("FOREIGN", []byte("x"))}, false))
	must(t, s.Close())
	must(t, foreign.Close())
	must(t, os.Rename(logPath(other, 1), logPath(dir, 2)))
	must(t, os.WriteFile(logPath(dir, 3), appendHeader(nil, s.mark), 0o600)) // so that it is no tail that is torn
	s = openTest(t, dir)
	if found := slices.Sorted(maps.Keys(all(t, s))); !slices.Equal(found, []string{"OWN"}) || s.Damaged() != 1 {
		t.Errorf("found %v, %d set aside", found, s.Damaged())
	}
}

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

func FuzzSegment(f *testing.F) {
	m := mark{1, 2, 3, 4, 5, 6, 7, 8}
	b := appendHeader(nil, m)
	e := []byte(`{"forward_paths":[{"local":"x","domain":"b.test"}]}`)
	b = appendTail(append(appendHead(b, m, kindMessage, flagHeld, "A", e, 3), "abc"...), crc32.Checksum([]byte("abc"), castagnoli))
	b = appendSmall(b, m, kindState, 0, "A", []byte("state"))
	b = appendSmall(b, m, kindTrying, 0, "A", appendTime(time.Unix(1, 0)))
	b = appendSmall(b, m, kindRemoved, 0, "B", nil)
	f.Add(b)
	f.Add(b[:len(b)-3])
	long := bytes.Clone(b)
	binary.BigEndian.PutUint64(long[headerSize+offSize:], 1<<62)
	f.Add(long)
	f.Fuzz(func(t *testing.T, in []byte) {
		dir := t.TempDir()
		must(t, os.MkdirAll(filepath.Join(dir, "log"), 0o700))
		must(t, os.WriteFile(logPath(dir, 1), append(appendHeader(nil, m), in...), 0o600))
		must(t, os.WriteFile(logPath(dir, 2), appendHeader(nil, m), 0o600))
		s, err := Open(dir)
		must(t, err)
		before := len(s.messages)
		_ = s.Each(func(Found) error { return nil }, func(id string, _ error) error { return s.SetAside(id) })
		for id := range s.messages {
			if open, err := s.Open(id); err == nil {
				_ = open.Check()
				open.Close()
			}
		}
		if before > len(in)/headSize {
			t.Fatalf("%d messages of %d octets", before, len(in))
		}
		must(t, s.Close())
	})
}

func TestASpoolOfAnEarlierVersionIsNotPassedOver(t *testing.T) {
	dir := t.TempDir()
	must(t, os.MkdirAll(filepath.Join(dir, "item"), 0o700))
	must(t, os.WriteFile(filepath.Join(dir, "item", "X"), nil, 0o600))
	if _, err := Open(dir); err == nil || !strings.Contains(err.Error(), "of an earlier version") {
		t.Errorf("error %v", err)
	}
}

func BenchmarkPut(b *testing.B) {
	for _, sides := range []int{1, 16, 64} {
		b.Run(fmt.Sprint(sides), func(b *testing.B) {
			dir, err := os.MkdirTemp("/var/tmp", "spool")
			must(b, err)
			defer os.RemoveAll(dir)
			s := openTest(b, dir)
			message := random(4000)
			ids := make(chan string)
			go func() {
				for i := range b.N {
					ids <- fmt.Sprintf("ID%d", i)
				}
				close(ids)
			}()
			b.ResetTimer()
			var all sync.WaitGroup
			for range sides {
				all.Go(func() {
					for id := range ids {
						if err := s.Put([]Draft{draft(id, message)}, false); err != nil {
							b.Error(err)
						}
					}
				})
			}
			all.Wait()
			b.ReportMetric(float64(b.N)/b.Elapsed().Seconds(), "msg/s")
		})
	}
}

// A large message that is removed while what the log has of it is being copied leaves nothing that counts as live.
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
