package queue

import (
	"context"
	"strings"
	"sync"
	"time"

	"mailproxy/config"
	"mailproxy/mail"
	"mailproxy/relay"
)

// A group is the open forward-paths of an item that share a next hop, and are tried together.
type group struct {
	key        string // transport, and domain where it goes by MX; "" where Route refused
	transport  config.Transport
	domain     string
	refused    *mail.Reply
	unreported bool // they were refused before: what is left to do is to tell
	recipients []*recipient

	away  *relay.OutOfReach // the next hop is dead: put off for this reason, without an attempt
	slot  bool              // it has one of the next hop's
	looks bool              // it looks whether the next hop is still dead

	number  int            // of the attempt, from 1: the most of its recipients
	ended   bool           // the attempt has ended by itself
	results []relay.Result // of one that was answered
	lost    bool           // the next hop was out of reach
}

// A waiter is what waits for room at a next hop: the forward-paths of an item that go there.
type waiter struct {
	n          *entry
	recipients []*recipient
}

// Run makes the attempts as they come due, until ctx ends; it returns when all attempts have ended. An attempt that has sent its
// final dot waits for the answer first.
func (q *Queue) Run(ctx context.Context) error {
	var attempts sync.WaitGroup
	defer attempts.Wait()
	for {
		w, wait := q.take()
		if w != nil {
			if ready, rest := q.reserve(w.n, q.plan(w)); len(ready) > 0 {
				attempts.Go(func() { q.try(ctx, w.n, ready, rest) })
			}
			if ctx.Err() == nil {
				continue
			}
		}
		timer := time.NewTimer(wait)
		select {
		case <-ctx.Done():
			timer.Stop()
			return nil
		case <-q.wake:
			timer.Stop()
		case <-timer.C:
		}
	}
}

// maxWait is how long the runner sleeps at most: a slow look behind the wake-ups.
const maxWait = time.Minute

// mostOfItem is how many attempts are made at once for one item: else one with hundreds of slow next hops would leave no room for others.
// Where half of all room is taken it is one.
const mostOfItem = 20

// tooManyLocked says whether an item has as many attempts as it may have now.
func (q *Queue) tooManyLocked(n *entry) bool {
	return n.trying >= mostOfItem || n.trying > 0 && q.running >= q.o.Concurrency
}

// take gives what is due of an entry, to be given to reserve, or how long to wait for the next.
func (q *Queue) take() (*waiter, time.Duration) {
	now := q.o.Now()
	q.mu.Lock()
	defer q.mu.Unlock()
	if q.running >= 2*q.o.Concurrency {
		return nil, maxWait // the end of an attempt wakes us
	}
	// By turns from what waits for room and from what has become due: neither holds up the other.
	q.dueFirst = !q.dueFirst
	var w *waiter
	wait := maxWait
	if !q.dueFirst {
		w = q.admitLocked()
	}
	if w == nil && len(q.due) > 0 {
		if wait = q.due[0].next.Sub(now); wait <= 0 {
			n := q.due[0]
			w = &waiter{n, n.takeDueLocked(now)}
		}
	}
	if w == nil && q.dueFirst {
		w = q.admitLocked()
	}
	if w == nil {
		return nil, min(wait, maxWait)
	}
	q.startLocked(w.n) // no order may come between this and reserve
	for _, r := range w.recipients {
		q.unstickLocked(r)
	}
	q.scheduleLocked(w.n)
	return w, 0
}

// scheduleLocked puts an entry at the time of the first of its recipients that is in the schedule, or takes it out where it has none, or
// where it is not to be tried for now.
func (q *Queue) scheduleLocked(n *entry) {
	next, ok := n.nextFree()
	if !ok || n.held || n.hold != nil || n.ordered || n.waits || n.trying >= mostOfItem || q.items[n.id] != n {
		q.due.remove(n)
		return
	}
	q.due.set(n, next)
}

// startLocked notes that an attempt is under way for an entry, until endLocked.
func (q *Queue) startLocked(n *entry) {
	n.trying++
	q.running++
}

// endLocked is startLocked's end.
func (q *Queue) endLocked(n *entry) {
	n.trying--
	q.running--
	q.idleLocked(n)
	q.scheduleLocked(n)
}

// plan groups open paths by next hop, as the configuration of this moment has it.
func (q *Queue) plan(w *waiter) []*group {
	var groups []*group
	byKey := make(map[string]*group, 1)
	for _, r := range w.recipients {
		t, refused := q.wayOf(w.n.via, r.path)
		if r.unreported { // it has its life by that way
			groups = append(groups, &group{unreported: true, transport: t, recipients: []*recipient{r}})
			continue
		}
		if refused != nil {
			groups = append(groups, &group{refused: refused, recipients: []*recipient{r}})
			continue
		}
		key, domain := groupKey(t, r.path)
		g := byKey[key]
		if g == nil {
			g = &group{key: key, transport: t, domain: domain}
			byKey[key] = g
			groups = append(groups, g)
		}
		g.recipients = append(g.recipients, r)
	}
	return groups
}

func groupKey(t config.Transport, p mail.Path) (key, domain string) {
	if len(t.Hosts) == 0 {
		domain = config.ASCIIDomain(p.Domain)
		return t.Name + " mx " + domain, domain
	}
	return t.Name + " " + strings.Join(t.Hosts, " "), ""
}

// reserve gives the groups that can be tried now, each with a slot, and those that are when others of them have ended, as one item may have
// no more at once; each of the others waits until there is room for it, as those do where other trials have what the item may have.
func (q *Queue) reserve(n *entry, groups []*group) (ready, rest []*group) {
	now := q.o.Now()
	q.mu.Lock()
	defer q.mu.Unlock()
	q.running-- // what take has added
	n.trying--
	for _, g := range groups {
		for _, r := range g.recipients {
			g.number = max(g.number, r.attempts+1)
		}
		switch q.readyLocked(n, g, now) {
		case isReady:
			ready = append(ready, g)
		case isTooMany:
			rest = append(rest, g)
		}
	}
	if len(ready) == 0 {
		for _, g := range rest {
			q.waitLocked(&waiter{n, g.recipients}, g.key)
		}
	}
	q.idleLocked(n)
	q.scheduleLocked(n)
	return ready, rest
}

// What readyLocked says.
type readiness int

const (
	isReady   readiness = iota // to be tried, and counted as that
	isWaiting                  // there was no room: it waits for that
	isTooMany                  // the item has as many attempts as it may
)

// readyLocked starts what can be tried now. A next hop that is dead needs no room: what is for it is put off at once.
func (q *Queue) readyLocked(n *entry, g *group, now time.Time) readiness {
	switch {
	case g.key == "" || q.putOffLocked(g, n, now):
	case q.tooManyLocked(n):
		return isTooMany
	case !q.takeSlotLocked(g, now):
		q.waitLocked(&waiter{n, g.recipients}, g.key)
		return isWaiting
	}
	q.startLocked(n)
	return isReady
}

// putOffLocked says whether a group is put off, since its next hop is dead. At the end of its life it is tried once more.
func (q *Queue) putOffLocked(g *group, n *entry, now time.Time) bool {
	if left := q.siteLocked(g.key).left(now); left != nil && now.Sub(n.bornAt()) < q.lifeBy(g.transport) {
		g.away = left
	}
	return g.away != nil
}

// takeSlotLocked says whether there is room for a group at its next hop; then it has it.
func (q *Queue) takeSlotLocked(g *group, now time.Time) bool {
	if !q.roomLocked(g.key) {
		return false
	}
	if s := q.siteLocked(g.key); s.left(now) == nil && s.out != nil {
		g.looks, s.looking = true, true
	}
	g.slot = true
	q.slots[g.key]++
	return true
}

// HopAnswered tells the queue that the next hop for this path has answered an attempt of someone else's (cut-through): what
// waits only because that hop was out of reach becomes due. It costs next to nothing where nothing waits.
func (q *Queue) HopAnswered(t config.Transport, to mail.Path) {
	if q.anyStuck.Load() == 0 {
		return
	}
	key, _ := groupKey(t, to)
	q.mu.Lock()
	found := len(q.stuck[key]) > 0
	q.unstickAllLocked(key, q.o.Now())
	q.mu.Unlock()
	if found {
		q.poke()
	}
}

// unstickAllLocked makes due what waits for a next hop that has just answered.
func (q *Queue) unstickAllLocked(key string, now time.Time) {
	if s := q.sites[key]; s != nil {
		s.revive()
	}
	for r, n := range q.stuck[key] {
		q.unstickLocked(r)
		if !r.busy {
			r.next = now
			q.scheduleLocked(n)
		}
	}
}
