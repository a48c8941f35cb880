package cluster

import (
	"fmt"
	"os"
	"slices"
	"strings"
	"testing"
)

// The model is a cluster of two or three nodes as a state machine: every step that a node, its database, an operator or a fault
// takes is one transition, and every order of them is tried, up to a number of commits and rounds. What is decided is decided by the
// functions of decide.go themselves; what the database does is in model_world_test.go, as db/migrations have it, what round.go,
// master.go, probe.go and sync.go do is in model_steps_test.go. The rules are in model_rules_test.go, the mutants, each of which must
// break one, in model_mutants_test.go.

// visited is a world that was reached, and how.
type visited struct {
	world world
	from  int32
	by    modelStep
}

// explore tries everything, nearest first, and gives the shortest way to a broken rule, or how many worlds there are.
func (m *model) explore() (worlds int, found finding, way way) {
	m.healed = map[world]finding{}
	if m.mayCommit == nil {
		m.decisions = ours()
	}
	start := born(m)
	seen := map[world]struct{}{start: {}}
	all := []visited{{world: start, from: -1}}
	for at := 0; at < len(all); at++ {
		w := all[at].world
		m.next(&w, func(by modelStep, after world) {
			if found.rule != "" {
				return
			}
			if _, ok := seen[after]; ok && !m.checksSteps(&w, &after) {
				return
			}
			found = m.check(&w, &after)
			if _, ok := seen[after]; !ok {
				seen[after] = struct{}{}
				all = append(all, visited{after, int32(at), by})
			}
			if found.rule != "" {
				all = append(all, visited{after, int32(at), by})
			}
		})
		if found.rule != "" {
			return len(all), found, wayTo(all, len(all)-1)
		}
	}
	return len(all), finding{}, nil
}

// checksSteps says whether the step itself, not only where it leads, may break a rule.
func (m *model) checksSteps(before, after *world) bool { return m.wentBack(before, after) != "" }

// A way is how a world was reached, from the first.
type way []visited

func wayTo(all []visited, at int) way {
	var w way
	for ; at >= 0; at = int(all[at].from) {
		w = append(w, all[at])
	}
	slices.Reverse(w)
	return w
}

// String gives a step a line, and with each what the nodes then are where that changed.
func (w way) String() string {
	var b strings.Builder
	last := ""
	for n, v := range w {
		if n == 0 {
			b.WriteString("   at first\n")
		} else {
			fmt.Fprintf(&b, "%4d %v\n", n, v.by)
		}
		if now := v.world.String(); now != last {
			b.WriteString(now)
			last = now
		}
	}
	return b.String()
}

// deep says that the larger bounds are explored, too: make test does so without the race detector, which would take minutes.
func deep() bool { return os.Getenv("MODEL") == "deep" }

// bounds are the clusters that are explored, each to its end.
func bounds() map[string]model {
	b := map[string]model{
		"two nodes":                     {nodes: 2, budget: budget{changes: 1, rounds: 1, forced: 1, recovers: 1}},
		"two nodes, two forces":         {nodes: 2, budget: budget{changes: 2, forced: 2}},
		"two nodes, a sync":             {nodes: 2, budget: budget{changes: 2, forced: 1, syncs: 1}},
		"two nodes, one joining":        {nodes: 2, joining: 1, budget: budget{changes: 1, rounds: 1, forced: 1}},
		"three nodes, a promote":        {nodes: 3, budget: budget{changes: 2, rounds: 1}},
		"three nodes, a force":          {nodes: 3, budget: budget{changes: 2, forced: 1}},
		"three nodes, a refused master": {nodes: 3, budget: budget{rounds: 1, recovers: 1}},
		"three nodes, a sync":           {nodes: 3, budget: budget{changes: 1, rounds: 1, syncs: 1}},
		"three nodes, a lease":          {nodes: 3, lease: true, budget: budget{changes: 1, rounds: 1}},
		"three nodes, two promotes":     {nodes: 3, budget: budget{rounds: 2}},
	}
	if deep() {
		for name, m := range map[string]model{
			"two nodes, two changes":             {nodes: 2, budget: budget{changes: 2, rounds: 1, forced: 1, recovers: 1}},
			"three nodes, two promotes, changes": {nodes: 3, budget: budget{changes: 1, rounds: 2}},
			"three nodes, a promote and a force": {nodes: 3, budget: budget{changes: 1, rounds: 1, forced: 1}},
			"three nodes, one joining":           {nodes: 3, joining: 1, budget: budget{changes: 1, rounds: 1, forced: 1}},
			"three nodes, one refused":           {nodes: 3, budget: budget{changes: 1, rounds: 1, recovers: 1}},
			"three nodes, a lease and a force":   {nodes: 3, lease: true, budget: budget{rounds: 1, forced: 1}},
		} {
			b[name] = m
		}
	}
	return b
}

func TestModelHolds(t *testing.T) {
	for name, m := range bounds() {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			worlds, found, way := m.explore()
			if found.rule != "" {
				t.Fatalf("%s: %s\n%s", found.rule, found.text, way)
			}
			t.Logf("%d worlds, %d of them at rest", worlds, len(m.healed))
		})
	}
}
