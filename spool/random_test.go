package spool

import (
	"bytes"
	"fmt"
	"maps"
	"math/rand/v2"
	"slices"
	"sync"
	"testing"
	"time"
)

// A spool and a plain map get the same random orders, at once from several sides; opened again now and then, both have the same. Segments
// are small, so that there is much to tidy.
func TestRandomOrdersSurviveReopening(t *testing.T) {
	const sides = 8
	dir := t.TempDir()
	m := &model{want: map[string]known{}}
	for round := range 10 {
		s, err := openSized(dir, 64<<10)
		must(t, err)
		var all sync.WaitGroup
		for side := range sides {
			all.Go(func() { m.giveOrders(t, s, round, side) })
		}
		all.Wait()
		must(t, s.Close())
		s = openTest(t, dir)
		m.compare(t, s, round)
		wantCounted(t, s, round)
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

// A model is what a spool should have.
type model struct {
	mu   sync.Mutex
	want map[string]known
	next int
}

type known struct {
	content []byte
	state   string
	held    bool
	tried   bool
}

func (m *model) get(id string) known {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.want[id]
}

func (m *model) set(id string, k known) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.want[id] = k
}

func (m *model) forget(id string) {
	m.mu.Lock()
	defer m.mu.Unlock()
	delete(m.want, id)
}

// newID gives an ID of a side's: its last digit.
func (m *model) newID(side int) string {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.next++
	return fmt.Sprintf("N%d_%d", m.next, side)
}

// of gives the messages of a side.
func (m *model) of(side int) []string {
	m.mu.Lock()
	defer m.mu.Unlock()
	return slices.DeleteFunc(slices.Sorted(maps.Keys(m.want)), func(id string) bool { return id[len(id)-1] != byte('0'+side) })
}

// giveOrders gives random orders about the messages of one side.
func (m *model) giveOrders(t *testing.T, s *Spool, round, side int) {
	r, mine := rand.New(rand.NewPCG(uint64(round), uint64(side))), m.of(side)
	for range 60 {
		id := ""
		if len(mine) > 0 {
			id = mine[r.IntN(len(mine))]
		}
		k := m.get(id)
		var err error
		switch op := r.IntN(10); {
		case op < 4 || id == "":
			id = m.newID(side)
			size := r.IntN(8 << 10)
			if r.IntN(40) == 0 {
				size = ownSize + r.IntN(1000)
			}
			k = known{content: random(size), held: r.IntN(4) == 0}
			err = s.Put([]Draft{draft(id, k.content)}, k.held)
			mine = append(mine, id)
		case op < 6 && !k.held:
			goesOn := r.IntN(2) == 0
			k.state, k.tried = fmt.Sprintf("state %d", r.IntN(1000)), k.tried && goesOn
			err = s.SetState(id, []byte(k.state), goesOn)
		case op == 6 && k.held:
			k.held, k.tried = false, false
			err = s.Release([]string{id})
		case op == 7 && !k.held:
			k.tried = true
			err = s.Mark(id, time.Unix(5, 0))
			if err == nil && r.IntN(3) == 0 {
				k.tried = false
				err = s.Unmark(id)
			}
		case op > 7:
			if k.held {
				err = s.Drop([]string{id})
			} else {
				err = s.Remove(id)
			}
			m.forget(id)
			mine = slices.DeleteFunc(mine, func(m string) bool { return m == id })
		default:
			if got := content(t, s, id); !bytes.Equal(got, k.content) {
				t.Errorf("%s: other content", id)
			}
		}
		if err != nil {
			t.Error(err)
		}
		if slices.Contains(mine, id) {
			m.set(id, k)
		}
	}
}

// compare wants in the spool what it should have, and nothing else.
func (m *model) compare(t *testing.T, s *Spool, round int) {
	found := all(t, s)
	if len(found) != len(m.want) {
		t.Errorf("round %d: %d found, want %d", round, len(found), len(m.want))
	}
	for id, k := range m.want {
		f := found[id]
		if string(f.State) != k.state || f.Held != k.held || f.Tried.IsZero() == k.tried || f.Size != int64(len(k.content)) {
			t.Errorf("round %d, %s: %+v, want %q held %v tried %v", round, id, f, k.state, k.held, k.tried)
		}
		if got := content(t, s, id); !bytes.Equal(got, k.content) {
			t.Errorf("round %d, %s: other content", round, id)
		}
	}
}

// wantCounted wants the octets counted that are live.
func wantCounted(t *testing.T, s *Spool, round int) {
	var live int64
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, m := range s.messages {
		for _, p := range []place{m.at, m.state, m.trying} {
			if p.seg != nil && p.seg.number != 0 {
				live += p.size
			}
		}
	}
	if live != s.living || s.damaged != 0 {
		t.Errorf("round %d: %d octets are live, counted %d; %d damaged", round, live, s.living, s.damaged)
	}
}
