package main

import (
	"slices"
	"testing"
)

func steps(seed uint64, n int) []step {
	p := newPlan(seed, 3)
	var all []step
	for i := range n {
		if i%20 == 19 {
			p.calm()
		}
		all = append(all, p.next())
	}
	return all
}

func TestASeedGivesOneOrderOfFaults(t *testing.T) {
	if a, b := steps(7, 500), steps(7, 500); !slices.Equal(a, b) {
		t.Errorf("the same seed gives\n%v\nand\n%v", a, b)
	}
	if slices.Equal(steps(7, 500), steps(8, 500)) {
		t.Error("another seed gives the same order")
	}
}

func TestAStormDoesNotDependOnHowFarTheLastOneCame(t *testing.T) {
	a, b := newPlan(7, 3), newPlan(7, 3)
	for range 30 {
		a.next()
	}
	a.calm()
	b.calm()
	for range 50 {
		if x, y := a.next(), b.next(); x != y {
			t.Fatalf("%v and %v", x, y)
		}
	}
}

func TestEveryFaultComesAndIsEnded(t *testing.T) {
	seen := map[string]bool{}
	for _, s := range steps(1, 2000) {
		seen[s.what] = true
	}
	for fault, end := range opposite() {
		if !seen[fault] || end != "" && !seen[end] {
			t.Errorf("%s or %q does not come", fault, end)
		}
	}
}

func TestNothingHappensToAHostThatIsDown(t *testing.T) {
	down := map[int]bool{}
	p := newPlan(3, 3)
	for range 2000 {
		s := p.next()
		switch s.what {
		case "start", "resume":
			down[s.host] = false
			continue
		}
		if _, fault := opposite()[s.what]; fault && down[s.host] {
			t.Fatalf("%v, and the host is down", s)
		}
		switch s.what {
		case "kill", "kill-daemon", "pause":
			down[s.host] = true
		}
	}
}
