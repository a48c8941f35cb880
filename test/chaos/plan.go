package main

import (
	"fmt"
	"math/rand/v2"
	"time"
)

// A step is one thing that happens to a host.
type step struct {
	wait time.Duration // before it
	what string
	host int // from 0
	with int // another host, for a cut; -1: all
	much int // milliseconds or seconds, for slow and skew
}

func (s step) String() string {
	switch s.what {
	case "cut", "join":
		if s.with < 0 {
			return fmt.Sprintf("%s n%d from all", s.what, s.host+1)
		}
		return fmt.Sprintf("%s n%d n%d", s.what, s.host+1, s.with+1)
	case "slow":
		return fmt.Sprintf("slow n%d %dms", s.host+1, s.much)
	case "skew":
		return fmt.Sprintf("skew n%d %+d", s.host+1, s.much)
	}
	return fmt.Sprintf("%s n%d", s.what, s.host+1)
}

// opposite ends a fault.
func opposite() map[string]string {
	return map[string]string{
		"cut": "join", "slow": "fast", "kill": "start", "pause": "resume", "disk-full": "disk-free", "skew": "clock-right",
		"kill-daemon": "start", "kill-postgres": "", "rollback": "",
	}
}

// weights say how often each fault comes. A rollback takes promises back, which no rule survives twice in one storm.
func weights() []struct {
	what string
	of   int
} {
	return []struct {
		what string
		of   int
	}{
		{"cut", 6}, {"kill", 4}, {"kill-daemon", 3}, {"kill-postgres", 3}, {"pause", 4}, {"slow", 3}, {"skew", 3}, {"disk-full", 2},
		{"rollback", 1},
	}
}

// A plan is an order of steps in each storm. It follows from the seed and the storm's number alone, not from how far the last one came.
type plan struct {
	seed   uint64
	storms uint64 // so far
	random *rand.Rand
	nodes  int
	open   []step // faults that are not ended
	rolled bool   // in this storm
}

func newPlan(seed uint64, nodes int) *plan {
	return &plan{seed: seed, random: rand.New(rand.NewPCG(seed, 0)), nodes: nodes}
}

// next gives the next step of a storm: a new fault, or the end of one.
func (p *plan) next() step {
	wait := time.Duration(200+p.random.IntN(1800)) * time.Millisecond
	if len(p.open) > 0 && p.random.IntN(4) < len(p.open) {
		return p.end(wait)
	}
	for range 50 {
		s := p.fault()
		if !p.fits(s) {
			continue
		}
		s.wait = wait
		if opposite()[s.what] != "" {
			p.open = append(p.open, s)
		}
		p.rolled = p.rolled || s.what == "rollback"
		return s
	}
	return p.end(wait) // all hosts are down, or nearly so
}

// end ends one of the faults.
func (p *plan) end(wait time.Duration) step {
	i := p.random.IntN(len(p.open))
	s := p.open[i]
	p.open = append(p.open[:i:i], p.open[i+1:]...)
	s.wait, s.what = wait, opposite()[s.what]
	return s
}

// fault draws one.
func (p *plan) fault() step {
	sum := 0
	for _, w := range weights() {
		sum += w.of
	}
	n := p.random.IntN(sum)
	s := step{host: p.random.IntN(p.nodes), with: -1}
	for _, w := range weights() {
		if n -= w.of; n < 0 {
			s.what = w.what
			break
		}
	}
	switch other := p.random.IntN(p.nodes + 1); {
	case s.what == "slow":
		s.much = 50 + p.random.IntN(350)
	case s.what == "skew":
		s.much = (p.random.IntN(2)*2 - 1) * (1 + p.random.IntN(40*24*3600))
	case s.what == "cut" && other < p.nodes && other != s.host:
		s.with = other
	}
	return s
}

// fits says whether a fault can come now: one of a kind for a host, nothing to a host that is down or frozen, and one rollback a storm.
func (p *plan) fits(s step) bool {
	if s.what == "rollback" && p.rolled {
		return false
	}
	for _, o := range p.open {
		still := o.what == "kill" || o.what == "kill-daemon" || o.what == "pause"
		if o.host == s.host && (still || o.what == s.what) {
			return false
		}
		if s.what == "rollback" && o.host == s.host && o.what == "disk-full" {
			return false
		}
	}
	return true
}

// calm ends all faults of a storm, and begins the plan of the next.
func (p *plan) calm() {
	p.storms++
	p.open, p.rolled, p.random = nil, false, rand.New(rand.NewPCG(p.seed, p.storms))
}
