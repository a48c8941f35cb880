package queue

import (
	"errors"
	"testing"
	"time"

	"mailproxy/mail"
	"mailproxy/relay"
)

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

func FuzzState(f *testing.F) {
	s := state{Attempts: 3, Next: time.Unix(5, 0), Done: []int{1}, Last: map[int]*outcome{0: {Code: 450, Text: "x"}}}
	b, err := s.encode()
	if err != nil {
		f.Fatal(err)
	}
	f.Add(b)
	f.Add([]byte("{}"))
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
