package history

import (
	"bytes"
	"errors"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"

	"mailproxy/config"
)

// start is when every history of these tests begins.
var start = time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)

func epoch(n int64, owner config.CID) config.Epoch { return config.Epoch{N: n, Owner: owner} }

// at is a position; its digest follows from it.
func at(n int64, owner config.CID, serial int64) config.Position {
	p := config.Position{Epoch: epoch(n, owner), Serial: serial}
	p.Digest = config.Digest{byte(n), byte(owner), byte(serial)}
	return p
}

// line is a history: each position a commit by the owner of its epoch.
func line(ps ...config.Position) []Commit {
	var out []Commit
	for _, p := range ps {
		out = append(out, Commit{Epoch: p.Epoch, Serial: p.Serial, Node: p.Epoch.Owner, At: start.Add(time.Duration(p.Serial) * time.Minute), Who: "root", Command: "domain add"})
	}
	return out
}

// state is a node at a position, with what it has promised, its history and its journal.
func state(node config.CID, p config.Position, promised config.Epoch, history, journal []Commit) Fact {
	rows := p.Digest
	return Fact{Node: node, State: &State{Position: p, Promised: promised, Rows: &rows, Log: &Log{History: history, Journal: journal}}}
}

func ack(node config.CID, p config.Position, majority bool) Fact {
	return Fact{Node: node, Ack: &Ack{Position: p, Majority: majority}}
}

func with(f Fact, change func(*Fact)) Fact { change(&f); return f }

func after(d time.Duration, f Fact) Fact { f.At = start.Add(d); return f }

// timed gives facts without a time one, a second after the last.
func timed(facts []Fact) []Fact {
	now := start
	out := slices.Clone(facts)
	for i := range out {
		if out[i].At.IsZero() {
			out[i].At = now.Add(time.Second)
		}
		now = out[i].At
		if s := out[i].State; s != nil && s.Began.IsZero() {
			s.Began = now.Add(-time.Millisecond)
		}
	}
	return out
}

func TestCheck(t *testing.T) {
	a, b, c := at(1, 1, 1), at(1, 1, 2), at(2, 2, 2)
	first, second := a.Epoch, c.Epoch
	other := line(b)
	other[0].Who = "somebody else"
	foreign := line(b)
	foreign[0].Node = 2
	mark := &Mark{}
	for _, tc := range []struct {
		name  string
		facts []Fact
		want  []Rule // none: all rules hold
	}{
		{"a change, pushed", []Fact{
			state(1, a, first, line(a), nil), ack(1, b, false), state(1, b, first, line(a, b), nil), state(2, a, first, line(a), nil), state(2, b, first, line(a, b), nil),
		}, nil},
		{"a promote that adopts what a majority had", []Fact{
			ack(1, b, true), state(2, b, second, line(a, b), nil), {Node: 2, Promote: &Promote{Epoch: second}}, state(2, at(2, 2, 3), second, line(a, b, at(2, 2, 3)), nil),
		}, nil},
		{"a master by force, and the old one's journal", []Fact{
			ack(1, b, true), state(1, b, first, line(a, b), nil), {Node: 2, Promote: &Promote{Forced: true}}, state(2, c, second, line(a, c), nil),
			state(1, c, second, line(a, c), line(b)), {Node: 1, Dealt: &Dealt{Epoch: first, Serial: 2}}, state(1, c, second, line(a, c), nil),
		}, nil},
		{"a history that was trimmed", []Fact{
			state(1, b, first, line(a, b), nil), with(state(1, b, first, line(b), nil), func(f *Fact) { f.State.Log.Above = 1 }),
		}, nil},
		{"a pull", []Fact{
			state(2, b, first, line(a, b), nil), {Node: 2, Pull: mark}, state(2, a, first, line(a), line(b)),
		}, nil},
		{"a node that was rolled back", []Fact{state(2, b, first, line(a, b), nil), {Node: 2, Reset: mark}, state(2, a, first, line(a), nil)}, nil},
		{"a state that was read while a change was acknowledged", []Fact{
			state(1, a, first, line(a), nil), after(5*time.Second, ack(1, b, false)),
			after(6*time.Second, with(state(1, a, first, line(a), nil), func(f *Fact) { f.State.Began = start.Add(4 * time.Second) })), state(1, b, first, line(a, b), nil),
		}, nil},

		{"a node commits in another's epoch", []Fact{state(1, b, first, append(line(a), foreign...), nil)}, []Rule{OneCommitter}},
		{"a node acknowledges in another's epoch", []Fact{ack(2, b, false)}, []Rule{OneCommitter}},
		{"two commits in one place", []Fact{state(1, b, first, line(a, b), nil), state(2, b, first, append(line(a), other...), nil)}, []Rule{OneCommitter}},
		{"a promise that was forgotten", []Fact{state(2, a, second, line(a), nil), state(2, a, first, line(a), nil)}, []Rule{NoWayBack}},
		{"an epoch that fell", []Fact{state(2, c, second, line(a, c), nil), state(2, b, second, line(a, b), line(c))}, []Rule{NoWayBack}},
		{"a serial that fell", []Fact{state(2, b, first, line(a, b), nil), state(2, a, first, line(a), line(b))}, []Rule{NoWayBack}},
		{"a promise that a pull took back", []Fact{state(2, a, second, line(a), nil), {Node: 2, Pull: mark}, state(2, a, first, line(a), nil)}, []Rule{NoWayBack}},
		{"a commit that was pushed over and not set aside", []Fact{state(1, b, first, line(a, b), nil), state(1, c, second, line(a, c), nil)}, []Rule{NothingLost}},
		{"an acknowledged change that was never seen again", []Fact{ack(1, b, false), state(1, a, first, line(a), nil)}, []Rule{NothingLost}},
		{"a journal that was emptied", []Fact{state(1, c, second, line(a, c), line(b)), state(1, c, second, line(a, c), nil)}, []Rule{NothingLost}},
		{"a promote that began without what a majority had", []Fact{
			ack(1, b, true), {Node: 2, Promote: &Promote{Epoch: second}}, state(2, c, second, line(a, c), nil),
		}, []Rule{MajorityKept}},
		{"a promote by force that is not on the line", []Fact{
			ack(1, b, true), {Node: 3, Promote: &Promote{Forced: true, Epoch: epoch(2, 3)}}, state(2, c, second, line(a, c), nil),
		}, []Rule{MajorityKept}},
		{"rows without their position", []Fact{
			state(1, b, first, line(a, b), nil), state(2, a, first, line(a), nil), with(state(2, a, first, line(a), nil), func(f *Fact) { f.State.Rows = &b.Digest }),
		}, []Rule{OneDigest}},
		{"acknowledged with other rows", []Fact{state(1, b, first, line(a, b), nil), with(ack(1, b, false), func(f *Fact) { f.Ack.Position.Digest[9]++ })}, []Rule{OneDigest}},
		{"rows changed by hand, and seen", []Fact{
			state(1, a, first, line(a), nil), {Node: 2, Tamper: mark}, with(state(2, a, first, line(a), nil), func(f *Fact) { f.State.Rows = &b.Digest }),
		}, nil},
		{"rows changed by hand, and shown in sync", []Fact{
			state(1, a, first, line(a), nil), {Node: 2, Tamper: mark},
			with(state(2, a, first, line(a), nil), func(f *Fact) { f.State.Rows, f.State.InSync = &b.Digest, true }),
		}, []Rule{ShownInSync}},
		{"rows that were repaired and then differ again", []Fact{
			state(1, a, first, line(a), nil), {Node: 2, Tamper: mark}, state(2, a, first, line(a), nil), with(state(2, a, first, line(a), nil), func(f *Fact) { f.State.Rows = &b.Digest }),
		}, []Rule{OneDigest}},
		{"a deleted node that is let in nowhere", []Fact{
			after(0, Fact{Node: 3, Deleted: mark}), after(time.Minute, Fact{Node: 3, Tunnel: &Tunnel{To: 1}}),
			after(time.Minute, Fact{Node: 2, Tunnel: &Tunnel{To: 1, Opened: true}}),
		}, nil},
		{"a deleted node that reads on for less than a second", []Fact{
			after(0, Fact{Node: 3, Deleted: mark}), after(900*time.Millisecond, Fact{Node: 3, Tunnel: &Tunnel{To: 1, Read: true}}),
		}, nil},
		{"a deleted node that is let in by one who was out of reach", []Fact{
			after(0, Fact{Node: 3, Deleted: mark}), after(time.Minute, Fact{Node: 3, Tunnel: &Tunnel{To: 1, Opened: true, Since: start.Add(time.Minute)}}),
		}, nil},
		{"a deleted node that opens a tunnel: nobody revoked it", []Fact{
			after(0, Fact{Node: 3, Deleted: mark}), after(2*time.Second, Fact{Node: 3, Tunnel: &Tunnel{To: 1, Opened: true}}),
		}, []Rule{ShutOut}},
		{"a deleted node that reads by a tunnel it had", []Fact{
			after(0, Fact{Node: 3, Deleted: mark}), after(2*time.Second, Fact{Node: 3, Tunnel: &Tunnel{To: 1, Read: true}}),
		}, []Rule{ShutOut}},
		{"a command that was killed and run again", []Fact{
			{Node: 2, Command: &Command{Line: "pmgcm promote", Outcome: Killed}}, {Calm: mark}, {Node: 2, Command: &Command{Line: "pmgcm promote", Outcome: Done}}, ack(1, a, false),
		}, nil},
		{"a command that fails while nodes are cut off", []Fact{
			{Node: 2, Command: &Command{Line: "pmgcm promote", Outcome: Killed}}, {Node: 2, Command: &Command{Line: "pmgcm promote", Outcome: Failed}},
		}, nil},
		{"a command that was killed and cannot be run again", []Fact{
			{Node: 2, Command: &Command{Line: "pmgcm promote", Outcome: Killed}}, {Calm: mark}, ack(1, a, false),
			{Node: 2, Command: &Command{Line: "pmgcm promote", Outcome: Failed, Error: "duplicate key"}},
		}, []Rule{RunAgain}},
		{"calm, and a change is taken", []Fact{after(0, Fact{Calm: mark}), after(5*time.Second, ack(1, a, false)), after(time.Hour, Fact{Storm: mark})}, nil},
		{"a storm before anybody must have recovered", []Fact{after(0, Fact{Calm: mark}), after(5*time.Second, Fact{Storm: mark}), after(time.Hour, Fact{Node: 1, Reader: &Reader{}})}, nil},
		{"calm, and nobody takes configuration", []Fact{after(0, Fact{Calm: mark}), after(31*time.Second, Fact{Node: 1, Reader: &Reader{}})}, []Rule{NotWedged}},
		{"a reader that waits for a push", []Fact{{Node: 1, Reader: &Reader{What: "config show", Took: 51 * time.Millisecond}}}, []Rule{ReadersFree}},
		{"a reader that does not", []Fact{{Node: 1, Reader: &Reader{What: "config show", Took: 50 * time.Millisecond}}}, nil},
	} {
		t.Run(tc.name, func(t *testing.T) {
			facts := timed(tc.facts)
			var got []Rule
			for _, v := range Check(facts) {
				got = append(got, v.Rule)
				if v.Text == "" || len(v.Facts) == 0 {
					t.Errorf("no facts: %v", v)
				}
			}
			if !slices.Equal(got, tc.want) {
				t.Errorf("found %v, want %v", Check(facts), tc.want)
			}
			var stored bytes.Buffer
			r := NewRecorder(&stored)
			for _, f := range facts {
				if err := r.Note(f); err != nil {
					t.Fatal(err)
				}
			}
			again, err := Read(&stored)
			if err != nil || !reflect.DeepEqual(Check(again), Check(facts)) || len(again) != len(r.Facts()) {
				t.Errorf("after storing: %v, %v", Check(again), err)
			}
		})
	}
}

func TestReadNamesTheLineThatIsNoFact(t *testing.T) {
	for _, c := range []struct{ name, in string }{
		{"not JSON", "{\"calm\":{}}\nx\n"},
		{"nothing said", "{\"calm\":{}}\n{\"node\":1}\n"},
		{"two things said", "{\"calm\":{}}\n{\"calm\":{},\"storm\":{}}\n"},
	} {
		t.Run(c.name, func(t *testing.T) {
			facts, err := Read(strings.NewReader(c.in))
			if err == nil || !strings.HasPrefix(err.Error(), "line 2: ") || len(facts) != 1 {
				t.Errorf("read %d facts, %v", len(facts), err)
			}
		})
	}
	if err := NewRecorder(nil).Note(Fact{}); !errors.Is(err, ErrFact) {
		t.Errorf("nothing said: %v", err)
	}
}
