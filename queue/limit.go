package queue

import (
	"errors"
	"sync"
	"time"

	"mailproxy/mail"
)

// How many DSNs go out in an hour, to one reverse-path and in all: a reverse-path may be forged, and whose it is must not drown in
// what others did in its name.
const (
	limitWindow  = time.Hour
	limitPerPath = 100
	limitAll     = 10_000

	// limitPatience is how long, behind the end of its life, an item waits for its DSN's turn.
	limitPatience = 24 * time.Hour
)

var errTooMany = errors.New("too many DSNs in this hour")

// A dsnLimit counts DSNs by the hour. It remembers at most limitAll reverse-paths. The zero dsnLimit is ready.
type dsnLimit struct {
	mu     sync.Mutex
	since  time.Time
	all    int
	byPath map[mail.Path]int
}

// take counts one DSN to a reverse-path; errTooMany.
func (l *dsnLimit) take(to mail.Path, now time.Time) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	if age := now.Sub(l.since); age >= limitWindow || age < 0 || l.byPath == nil {
		l.since, l.all, l.byPath = now, 0, make(map[mail.Path]int)
	}
	if l.all >= limitAll || l.byPath[to] >= limitPerPath {
		return errTooMany
	}
	l.all++
	l.byPath[to]++
	return nil
}
