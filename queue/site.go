package queue

import (
	"errors"
	"time"

	"mailproxy/mail"
	"mailproxy/relay"
)

// Bounds on what is asked of one next hop at once.
const (
	firstWindow = 5  // attempts at once at the beginning
	mostNeed    = 64 // cohorts of good attempts for one more at once, where that was too much again and again

	rounding = 0.001 // N times 1/N may be less than 1
)

// How long a next hop that seems dead is left alone; doubled with each look in vain.
const (
	deadFirst = 30 * time.Second
	deadMost  = 10 * time.Minute

	fewest = 3 // bad attempts in a row that make a hop dead, at least
)

// A site is what is known of one next hop (group.key): how many attempts at once it bears, and whether it is dead. As in Postfix's
// qmgr(8) each attempt moves the window of N by 1/N: N good ones for one more, N bad ones for one less; N bad ones with no good one
// among them, and it is dead. Where one more was too many it takes twice as many good ones the next time, or a hop that bears one would
// be asked for two every other time.
//
//	alive ── N bad in a row ──> dead, for 30 s, 1 min … 10 min ── one attempt that looks ── bad ──> dead
//	  ^                                                              │ good
//	  └── the hop answered anybody, or an operator wants it ─────────┘
type site struct {
	window  int
	good    float64 // cohorts of good attempts since the window changed
	bad     float64 // the same of bad ones
	inARow  int     // bad attempts since the last good one
	need    float64 // cohorts of good attempts for one more at once
	dead    time.Time
	wait    time.Duration
	out     *relay.OutOfReach // why it is dead
	looking bool              // an attempt is under way that looks
}

func newSite(most int) *site { return &site{window: min(firstWindow, most), need: 1} }

// left says that the hop is dead and why, until it is time to look.
func (s *site) left(now time.Time) *relay.OutOfReach {
	if s.looking || now.Before(s.dead) {
		return s.out
	}
	return nil
}

// revive makes the hop one that is not known to be dead.
func (s *site) revive() { s.out, s.looking, s.wait, s.inARow = nil, false, 0, 0 }

// succeeded notes a good attempt, with inUse under way at once.
func (s *site) succeeded(inUse, most int) {
	s.revive()
	if inUse+firstWindow <= s.window { // nothing is learned about more
		return
	}
	s.good += 1 / float64(s.window)
	if s.good > s.need-rounding && s.window < most {
		s.window, s.good, s.bad = s.window+1, 0, 0
	}
}

// failed notes a bad attempt; out is nil where the hop answered and then had enough (421).
func (s *site) failed(out *relay.OutOfReach, now time.Time) {
	s.bad += 1 / float64(s.window)
	s.inARow++
	dead := s.inARow >= max(s.window, fewest)
	if s.bad > 1-rounding {
		s.window, s.good, s.bad, s.need = max(1, s.window-1), 0, 0, min(2*s.need, mostNeed)
	}
	if out != nil && (s.looking || s.out == nil && dead) {
		s.wait = min(max(2*s.wait, deadFirst), deadMost)
		s.out, s.dead, s.looking = out, now.Add(s.wait), false
	}
}

// manySites is from how many on those are looked for that are not needed.
const manySites = 4096

// siteLocked gives the site of a key.
func (q *Queue) siteLocked(key string) *site {
	s := q.sites[key]
	if s == nil {
		if len(q.sites) >= max(manySites, 2*q.sitesLeft) {
			q.tidySitesLocked()
		}
		s = newSite(q.o.PerHop)
		q.sites[key] = s
	}
	return s
}

// tidySitesLocked forgets those that nothing is for.
func (q *Queue) tidySitesLocked() {
	for key := range q.sites {
		if q.slots[key] == 0 && len(q.waiting[key]) == 0 && len(q.stuck[key]) == 0 {
			delete(q.sites, key)
		}
	}
	q.sitesLeft = len(q.sites)
}

// roomLocked says whether one more attempt may be made at a next hop: it bears one more, and there is enough for others. One that none is
// made at has room in any case, up to the bound of take: no number of slow ones holds it up.
func (q *Queue) roomLocked(key string) bool {
	used := q.slots[key]
	return q.running < 2*q.o.Concurrency && (used == 0 || q.running < q.o.Concurrency && used < q.siteLocked(key).window)
}

// feedback notes what an attempt says about its next hop, and gives its slot back.
func (q *Queue) feedback(g *group, results []relay.Result, err error) {
	var out *relay.OutOfReach
	now := q.o.Now()
	q.mu.Lock()
	defer q.mu.Unlock()
	s := q.siteLocked(g.key)
	switch {
	case errors.As(err, &out):
		s.failed(out, now)
	case err == nil && !hadEnough(results), errors.Is(err, relay.ErrNoAnswer):
		s.succeeded(q.slots[g.key], q.o.PerHop)
	case err == nil:
		s.failed(nil, now)
	} // our own stop says nothing
	q.giveBackLocked(g)
}

// forgetTheDead lets every next hop that is dead be tried again: an operator knows better than a memory of a while ago.
func (q *Queue) forgetTheDead() {
	if q.o.Relay != nil {
		q.o.Relay.Forget()
	}
	q.mu.Lock()
	defer q.mu.Unlock()
	for _, s := range q.sites {
		s.revive()
	}
}

// hadEnough says whether the hop ended the connection with 421, which comes as 451 with that as its cause.
func hadEnough(results []relay.Result) bool {
	for i := range results {
		var said *mail.Reply
		if errors.As(results[i].Reply.Cause, &said) && said.Code == 421 {
			return true
		}
	}
	return false
}

// giveBackLocked gives a group's slot back, once.
func (q *Queue) giveBackLocked(g *group) {
	if !g.slot {
		return
	}
	g.slot = false
	if g.looks {
		g.looks, q.siteLocked(g.key).looking = false, false
	}
	if q.slots[g.key]--; q.slots[g.key] == 0 {
		delete(q.slots, g.key)
	}
}

// waitLocked has recipients wait until there is room for their next hop.
func (q *Queue) waitLocked(w *waiter, key string) {
	if _, there := q.inRing[key]; !there {
		q.ring, q.inRing[key] = append(q.ring, key), struct{}{}
	}
	q.waiting[key] = append(q.waiting[key], w)
}

// admitLocked gives the next of those that wait and may be tried now; next hops take turns.
func (q *Queue) admitLocked() *waiter {
	for range q.ring {
		key := q.ring[0]
		q.ring = q.ring[1:]
		list := q.waiting[key]
		if len(list) == 0 { // they were taken away
			delete(q.waiting, key)
			delete(q.inRing, key)
			continue
		}
		if !q.roomLocked(key) {
			q.ring = append(q.ring, key)
			continue
		}
		for i := 0; i < min(len(list), mostOfItem) && q.tooManyLocked(list[0].n); i++ { // the others do not wait for that item
			list = append(list[1:], list[0])
			q.waiting[key] = list
		}
		w := list[0]
		if q.tooManyLocked(w.n) {
			q.ring = append(q.ring, key)
			continue
		}
		list[0] = nil
		if list = list[1:]; len(list) == 0 {
			delete(q.waiting, key)
			delete(q.inRing, key)
		} else {
			q.waiting[key] = list
			q.ring = append(q.ring, key)
		}
		return w
	}
	return nil
}
