package spool

import (
	"bytes"
	"encoding/binary"
	"hash/crc32"
	"maps"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"testing"
	"time"
)

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
