package queue

import (
	"bytes"
	"errors"
	"io"
	"reflect"
	"strings"
	"testing"
	"time"

	"mailproxy/mail"
	"mailproxy/relay"
)

func TestItemFileRoundTrip(t *testing.T) {
	for _, size := range []int{0, 1, 1000, 64<<10 - 500, 64 << 10, 64<<10 + 1, 200000} {
		for _, to := range []int{1, 5000} {
			e := mail.Envelope{ReversePath: path(`"a b"@a.test`), Helo: "x", SMTPUTF8: true, ReceivedAt: time.Unix(1, 0).UTC()}
			for range to {
				e.ForwardPaths = append(e.ForwardPaths, path("ü@b.test"))
			}
			content := bytes.Repeat([]byte("0123456789"), size/10+1)[:size]
			var b bytes.Buffer
			if err := writeItem(&b, &e, bytes.NewReader(content)); err != nil {
				t.Fatal(err)
			}
			r := bytes.NewReader(b.Bytes())
			got, off, length, err := readHead(r, r.Size())
			if err != nil || !reflect.DeepEqual(*got, e) {
				t.Fatalf("%d octets to %d: %v", size, to, err)
			}
			if err := checkContent(r, off, length); err != nil {
				t.Fatalf("%d octets to %d: %v", size, to, err)
			}
			if back, err := io.ReadAll(io.NewSectionReader(r, off, length)); err != nil || !bytes.Equal(back, content) {
				t.Fatalf("%d octets came back as %d, %v", size, len(back), err)
			}
		}
	}
}

func TestEveryFlippedBitIsSeen(t *testing.T) {
	e := mail.Envelope{ForwardPaths: paths("x@b.test")}
	var b bytes.Buffer
	if err := writeItem(&b, &e, strings.NewReader(body)); err != nil {
		t.Fatal(err)
	}
	good := b.Bytes()
	for i := range len(good) * 8 {
		bad := bytes.Clone(good)
		bad[i/8] ^= 1 << (i % 8)
		r := bytes.NewReader(bad)
		_, off, length, err := readHead(r, r.Size())
		if err == nil {
			err = checkContent(r, off, length)
		}
		if !errors.Is(err, ErrDamaged) {
			t.Fatalf("bit %d: %v", i, err)
		}
	}
	for n := range len(good) {
		r := bytes.NewReader(good[:n])
		if _, _, _, err := readHead(r, r.Size()); !errors.Is(err, ErrDamaged) {
			t.Fatalf("cut to %d: %v", n, err)
		}
	}
}

func TestAnOutcomeSaysWhoseWordsItHas(t *testing.T) {
	said := &mail.Reply{Code: 421, Text: "going down"}
	for _, tt := range []struct {
		name  string
		cause error
		want  source
	}{
		{"the hop's answer", nil, fromHop},
		{"its 421, which comes as 451", said, fromHop},
		{"made here", relay.ErrLost, fromHere},
		{"out of reach", &relay.OutOfReach{Hop: "hop.test:25", Err: errors.New("connection refused")}, fromNobody},
		{"its greeting, which is no answer", &relay.OutOfReach{Hop: "hop.test:25", Stage: relay.StageGreeting, Err: said}, fromNobody},
	} {
		o := outcomeOf(relay.Result{Reply: &mail.Reply{Code: 451, Text: "text", Cause: tt.cause}, Hop: "hop.test:25"}, time.Unix(1, 0).UTC())
		b, err := (&state{Last: map[int]*outcome{0: o}}).encode()
		if err != nil {
			t.Fatal(err)
		}
		back, err := decodeState(b)
		if err != nil || o.Source != tt.want || *back.Last[0] != *o {
			t.Errorf("%s: %+v, %v; came back from disk as %+v", tt.name, o, err, back)
		}
	}
}

func FuzzItemFile(f *testing.F) {
	e := mail.Envelope{ReversePath: path("a@a.test"), ForwardPaths: paths("x@b.test")}
	var b bytes.Buffer
	if err := writeItem(&b, &e, strings.NewReader(body)); err != nil {
		f.Fatal(err)
	}
	f.Add(b.Bytes())
	f.Add([]byte(magic))
	f.Fuzz(func(t *testing.T, in []byte) {
		r := bytes.NewReader(in)
		e, off, length, err := readHead(r, r.Size())
		if err != nil {
			if !errors.Is(err, ErrDamaged) {
				t.Fatalf("neither good nor damaged: %v", err)
			}
			return
		}
		if err := checkContent(r, off, length); err != nil && !errors.Is(err, ErrDamaged) {
			t.Fatalf("neither good nor damaged: %v", err)
		}
		if len(newEntry("ID", length, e, new(state)).open) != len(e.ForwardPaths) {
			t.Fatal("paths are missing")
		}
	})
}

func FuzzState(f *testing.F) {
	s := state{Attempts: 3, Next: time.Unix(5, 0), Done: []int{1}, Last: map[int]*outcome{0: {Code: 450, Text: "x"}}}
	b, err := s.encode()
	if err != nil {
		f.Fatal(err)
	}
	f.Add(b)
	f.Add([]byte("00000000 {}"))
	f.Fuzz(func(t *testing.T, in []byte) {
		s, err := decodeState(in)
		if err != nil {
			if !errors.Is(err, ErrDamaged) {
				t.Fatalf("neither good nor damaged: %v", err)
			}
			return
		}
		e := &mail.Envelope{ForwardPaths: paths("x@b.test", "y@b.test")}
		again, err := newEntry("ID", 0, e, s).state().encode()
		if err != nil {
			t.Fatal(err)
		}
		if _, err := decodeState(again); err != nil {
			t.Fatal(err)
		}
	})
}

func BenchmarkPut(b *testing.B) {
	q := openTest(b, b.TempDir(), nil)
	content := bytes.Repeat([]byte("0123456789012345678901234567890123456789012345678901234567890123456789012345678\r\n"), 50)
	b.SetParallelism(10)
	b.RunParallel(func(pb *testing.PB) {
		for pb.Next() {
			d := draft("from@a.test", "x@b.test")
			d.Content = bytes.NewReader(content)
			if _, err := q.Put(b.Context(), []Draft{d}, false); err != nil {
				b.Error(err)
			}
		}
	})
}
