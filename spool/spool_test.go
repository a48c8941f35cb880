package spool

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"sync"
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

// eventually polls a condition.
func eventually(t testing.TB, what string, cond func() bool) {
	t.Helper()
	for deadline := time.Now().Add(30 * time.Second); !cond(); time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("not within 30 s: %s", what)
		}
	}
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
