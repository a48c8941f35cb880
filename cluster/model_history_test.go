package cluster

import (
	"crypto/sha256"
	"fmt"
	"math/bits"
	"math/rand/v2"
	"testing"
	"time"

	"mailproxy/config"
	"mailproxy/test/history"
)

// seenFromOutside are the rules of the model that test/history judges, too. The others are about what nodes would do if they were left
// alone, or what a command says.
func seenFromOutside() []rule {
	return []rule{oneCommitter, goesBack, nothingLost, majorityKept, whole}
}

// factsOf gives what an observer of a way sees: after each step every node's state, what was acknowledged, what began.
func factsOf(m *model, w way) []history.Fact {
	now := time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)
	r := history.NewRecorder(nil)
	note := func(f history.Fact) {
		f.At = now
		if err := r.Note(f); err != nil {
			panic(err)
		}
	}
	told := map[string]bool{}
	for _, v := range w {
		now = now.Add(time.Second)
		for k, c := range v.world.commits[:v.world.made] {
			at := spot{c.epoch, c.serial, c.before | 1<<k}
			for _, majority := range []bool{false, true} {
				key := fmt.Sprint(c.epoch, c.serial, c.by, majority)
				if told[key] || majority && !m.had(c) {
					continue
				}
				told[key] = true
				if c.begins && !majority {
					note(history.Fact{Node: config.CID(c.by), Promote: &history.Promote{Forced: c.forced, Epoch: c.epoch.epoch()}})
				}
				note(history.Fact{Node: config.CID(c.by), Ack: &history.Ack{Position: v.world.told(at), Majority: majority}})
			}
		}
		now = now.Add(time.Second)
		for i := range m.nodes {
			note(history.Fact{Node: config.CID(i + 1), State: v.world.observed(i, now)})
		}
	}
	return r.Facts()
}

// told is a position with a digest that stays the same when commits are counted otherwise.
func (w *world) told(at spot) config.Position {
	p := at.position()
	p.Digest = sha256.Sum256([]byte(w.names(at.hist)))
	return p
}

func (w *world) observed(i int, now time.Time) *history.State {
	h := &w.hosts[i]
	p := w.told(h.at)
	return &history.State{
		Position: p, Promised: h.promised.epoch(), Rows: &p.Digest, Began: now,
		Log: &history.Log{History: w.rows(h.at.hist), Journal: w.rows(h.journal)},
	}
}

func (w *world) rows(s set) []history.Commit {
	var out []history.Commit
	for k, c := range w.commits[:w.made] {
		if s.has(k) {
			out = append(out, history.Commit{Epoch: c.epoch.epoch(), Serial: int64(c.serial), Node: config.CID(c.by)})
		}
	}
	return out
}

// wander takes steps as choose says, until there are none or enough.
func (m *model) wander(steps int, choose func(n int) int) way {
	at := visited{world: born(m), from: -1}
	w := way{at}
	for range steps {
		var next way
		m.next(&at.world, func(by modelStep, after world) { next = append(next, visited{world: after, by: by}) })
		if len(next) == 0 {
			break
		}
		at = next[choose(len(next))]
		w = append(w, at)
	}
	return w
}

// wanderers are larger than what can be explored.
func wanderers() []model {
	return []model{
		{nodes: 2, budget: budget{changes: 3, rounds: 2, forced: 2, recovers: 1, syncs: 2}, decisions: ours()},
		{nodes: 3, budget: budget{changes: 4, rounds: 2, forced: 1, recovers: 1, syncs: 1}, decisions: ours()},
		{nodes: 3, joining: 1, lease: true, budget: budget{changes: 3, rounds: 2, forced: 1, recovers: 1}, decisions: ours()},
	}
}

func TestHistoriesOfTheModelHold(t *testing.T) {
	var begun, aside int
	for n, m := range wanderers() {
		for seed := range uint64(200) {
			random := rand.New(rand.NewPCG(seed, uint64(n)))
			w := m.wander(60, random.IntN)
			if v := history.Check(factsOf(&m, w)); len(v) > 0 {
				t.Fatalf("seed %d, model %d: %v\n%s", seed, n, v, w)
			}
			last := &w[len(w)-1].world
			for _, h := range last.hosts[:m.nodes] {
				begun += boolInt(h.at.epoch > pack(config.Epoch{N: 2}))
				aside += bits.OnesCount16(uint16(h.journal))
			}
		}
	}
	if begun < 100 || aside < 100 {
		t.Errorf("only %d nodes saw another epoch, and %d commits were set aside: these runs show little", begun, aside)
	}
}

func FuzzHistoriesOfTheModel(f *testing.F) {
	f.Add(uint8(0), []byte("to be cut off"))
	f.Add(uint8(1), []byte{9, 3, 250, 4, 4, 17, 30, 2, 99, 1, 5, 5, 61, 12, 8, 33, 27, 3, 0, 7, 18, 44})
	f.Fuzz(func(t *testing.T, which uint8, choices []byte) {
		m := wanderers()[int(which)%len(wanderers())]
		w := m.wander(len(choices), func(n int) int {
			c := int(choices[0])
			choices = choices[1:]
			return c % n
		})
		if v := history.Check(factsOf(&m, w)); len(v) > 0 {
			t.Fatalf("%v\n%s", v, w)
		}
	})
}
