package smtpd

import (
	"sync"
	"time"
)

// maxTallies bounds the clients that are remembered, of each side.
const maxTallies = 50_000

// rate is what clients are counted by over time.
type rate uint8

const (
	rateConnections rate = iota
	rateMessages
	rateRecipients
	rateUnknown // recipients that were refused for good
	rateCount
)

// A tally is when each rate of a client is at rest again, in Unix nanoseconds.
type tally [rateCount]int64

// rates counts clients over time. Each rate is a bucket that holds as many as may come in its time, and fills up evenly. Tallies are
// kept in two generations: where the young one is half of the bound, it becomes the old one, and what was old is forgotten. The
// zero rates is ready.
type rates struct {
	mu         sync.Mutex
	young, old map[clientKey]*tally
}

// take counts one more where so many may come in that time, and says whether it may. No limit is 0.
func (r *rates) take(key clientKey, which rate, limit int, in time.Duration, now time.Time) bool {
	if limit == 0 {
		return true
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	t := r.tallyLocked(key)
	if t == nil {
		t = new(tally)
		r.young[key] = t
	}
	next, ok := t.next(which, limit, in, now)
	if ok {
		t[which] = next
	}
	return ok
}

// next gives when a rate is at rest again behind one more, and whether that one may come.
func (t *tally) next(which rate, limit int, in time.Duration, now time.Time) (next int64, ok bool) {
	most := now.Add(in).UnixNano()
	t[which] = min(t[which], most) // later only where the clock was set back: nobody is refused until it is there again
	next = max(t[which], now.UnixNano()) + int64(in)/int64(limit)
	return next, next <= most
}

// isSpent says whether take would refuse, and counts nothing.
func (r *rates) isSpent(key clientKey, which rate, limit int, in time.Duration, now time.Time) bool {
	if limit == 0 {
		return false
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	t := r.tallyLocked(key)
	if t == nil {
		return false
	}
	_, ok := t.next(which, limit, in, now)
	return !ok
}

// tallyLocked gives the tally of a client, as a young one, or nil.
func (r *rates) tallyLocked(key clientKey) *tally {
	if t := r.young[key]; t != nil {
		return t
	}
	t := r.old[key]
	if r.young == nil || len(r.young) >= maxTallies/2 {
		r.old, r.young = r.young, make(map[clientKey]*tally)
	}
	if t != nil {
		r.young[key] = t
	}
	return t
}
