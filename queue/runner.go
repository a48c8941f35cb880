package queue

import (
	"container/heap"
	"context"
	"slices"
	"strings"
	"sync"
	"time"

	"mailproxy/config"
	"mailproxy/mail"
	"mailproxy/relay"
)

// A group is the open forward-paths of an item that share a next hop.
type group struct {
	key        string // transport, and domain where it goes by MX; "" where Route refused
	transport  config.Transport
	domain     string
	refused    *mail.Reply
	unreported bool         // they were refused before: what is left to do is to tell
	recipients []*recipient // into entry.open

	away  *relay.OutOfReach // the next hop is dead: put off for this reason, without an attempt
	slot  bool              // it has one of the next hop's
	looks bool              // it looks whether the next hop is still dead
}

// Run makes the attempts as they come due, until ctx ends; it returns when all attempts have ended. An attempt that has sent its
// final dot waits for the answer first.
func (q *Queue) Run(ctx context.Context) error {
	var attempts sync.WaitGroup
	defer attempts.Wait()
	for {
		n, wait := q.take()
		if n != nil {
			if groups := q.reserve(n, q.plan(n)); len(groups) > 0 {
				attempts.Go(func() {
					q.try(ctx, n, groups)
					q.poke()
				})
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

// take gives an entry that is due, marked busy, or how long to wait for the next.
func (q *Queue) take() (*entry, time.Duration) {
	now := q.o.Now()
	q.mu.Lock()
	defer q.mu.Unlock()
	if q.running >= 2*q.o.Concurrency {
		return nil, maxWait // the end of an attempt wakes us
	}
	// By turns from what waits for room and from what has become due: neither holds up the other.
	q.dueFirst = !q.dueFirst
	var n *entry
	wait := maxWait
	if !q.dueFirst {
		n = q.admitLocked()
	}
	if n == nil && len(q.due) > 0 {
		if wait = q.due[0].next.Sub(now); wait <= 0 {
			n = heap.Pop(&q.due).(*entry)
		}
	}
	if n == nil && q.dueFirst {
		n = q.admitLocked()
	}
	if n == nil {
		return nil, min(wait, maxWait)
	}
	n.busy = true
	q.running++
	return n, 0
}

// plan groups an entry's open paths by next hop, as the configuration of this moment has it.
func (q *Queue) plan(n *entry) []*group {
	if !n.round.IsZero() && !slices.ContainsFunc(n.open, n.isLeft) {
		n.round = time.Time{}
	}
	var groups []*group
	byKey := make(map[string]*group, 1)
	for i := range n.open {
		r := &n.open[i]
		if r.unreported {
			t, _ := q.wayOf(n.via, r.path) // it has its life by that
			groups = append(groups, &group{unreported: true, transport: t, recipients: []*recipient{r}})
			continue
		}
		if !n.round.IsZero() && !n.isLeft(*r) {
			continue
		}
		t, refused := q.wayOf(n.via, r.path)
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

// reserve takes a slot for each group that can be tried now; the others wait for another time (entry.left). Where there is none to be
// tried the entry waits for room. A next hop that is dead needs no room: what is for it is put off at once.
func (q *Queue) reserve(n *entry, groups []*group) (ready []*group) {
	now := q.o.Now()
	q.mu.Lock()
	defer q.mu.Unlock()
	n.left = ""
	for _, g := range groups {
		switch {
		case g.key == "":
			ready = append(ready, g)
		case q.takeSlotLocked(g, n, now):
			ready = append(ready, g)
		case n.left == "":
			n.left = g.key
		}
	}
	switch {
	case len(ready) == 0:
		q.idleLocked(n)
		q.running--
		q.waitLocked(n, n.left)
	case n.left == "":
		n.round = time.Time{}
	case n.round.IsZero():
		n.round = now
	}
	for _, g := range ready[min(1, len(ready)):] { // its turn comes behind others, which may be slow
		q.giveBackLocked(g)
	}
	return ready
}

// again takes a slot for a group whose turn has come behind others'. Where there is no room any more it waits for another time.
func (t *trial) again(g *group) bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	if g.key == "" || g.slot || t.takeSlotLocked(g, t.n, t.o.Now()) {
		return true
	}
	if t.n.left == "" {
		t.n.left = g.key
	}
	if t.n.round.IsZero() {
		t.n.round = t.start
	}
	return false
}

// takeSlotLocked says whether a group can be tried now, or is put off at once. At the end of its life it is tried once more.
func (q *Queue) takeSlotLocked(g *group, n *entry, now time.Time) bool {
	s := q.siteLocked(g.key)
	if g.away = s.left(now); g.away != nil && now.Sub(n.bornAt()) < q.lifeBy(g.transport) {
		return true
	}
	g.away = nil
	if !q.roomLocked(g.key, q.running) {
		return false
	}
	if s.left(now) == nil && s.out != nil {
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
	q.anyStuck.Add(-int64(len(q.stuck[key])))
	for n := range q.stuck[key] {
		n.stuck = ""
		if n.position >= 0 {
			q.due.set(n, now)
		}
	}
	delete(q.stuck, key)
}
