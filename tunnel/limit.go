package tunnel

import (
	"sync"
	"time"

	"github.com/rs/zerolog"
)

// maxRemembered bounds what is remembered of strangers' addresses.
const maxRemembered = 4096

// repeats lets the same event through at most once in a time, and then says how often it happened.
type repeats struct {
	every time.Duration
	mu    sync.Mutex
	seen  map[string]*repeat
}

type repeat struct {
	at    time.Time
	count int
}

// log writes the event unless the same key was written less than a while ago. more may add fields.
func (r *repeats) log(e *zerolog.Event, event, key string, more func(*zerolog.Event)) {
	count, ok := r.take(event+" "+key, time.Now())
	if !ok {
		e.Discard().Send()
		return
	}
	more(e)
	if count > 1 {
		e.Int("count", count)
	}
	e.Msg(event)
}

func (r *repeats) take(key string, now time.Time) (count int, ok bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	last := r.seen[key]
	if last != nil && now.Sub(last.at) < r.every {
		last.count++
		return 0, false
	}
	count = 1
	if last != nil {
		count += last.count
	}
	if last == nil && len(r.seen) >= maxRemembered {
		for k, old := range r.seen {
			if now.Sub(old.at) >= r.every {
				delete(r.seen, k)
			}
		}
		if len(r.seen) >= maxRemembered {
			return 0, false // a flood of ever new keys is no reason to fill the disk
		}
	}
	if r.seen == nil {
		r.seen = map[string]*repeat{}
	}
	r.seen[key] = &repeat{at: now}
	return count, true
}

// buckets limits how often something may happen per key: burst at once, then one each interval.
type buckets struct {
	burst int
	every time.Duration
	mu    sync.Mutex
	full  map[string]time.Time // when the key's bucket is full again
}

// take says whether it may happen now, and counts it.
func (b *buckets) take(key string, now time.Time) bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	if len(b.full) >= maxRemembered {
		for k, at := range b.full {
			if !at.After(now) {
				delete(b.full, k)
			}
		}
		if _, known := b.full[key]; !known && len(b.full) >= maxRemembered {
			return false
		}
	}
	at := b.full[key]
	if at.Before(now) {
		at = now
	}
	at = at.Add(b.every)
	if at.Sub(now) > time.Duration(b.burst)*b.every {
		return false
	}
	if b.full == nil {
		b.full = map[string]time.Time{}
	}
	b.full[key] = at
	return true
}

// slots counts what is held at once, in all and per key.
type slots struct {
	all, each int
	mu        sync.Mutex
	total     int
	held      map[string]int
}

func (s *slots) take(key string) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.total >= s.all || s.held[key] >= s.each {
		return false
	}
	if s.held == nil {
		s.held = map[string]int{}
	}
	s.total++
	s.held[key]++
	return true
}

func (s *slots) give(key string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.total--
	if s.held[key]--; s.held[key] == 0 {
		delete(s.held, key)
	}
}
