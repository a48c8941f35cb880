package queue

import (
	"container/heap"
	"context"
	"strings"
	"sync"
	"time"

	"mailproxy/config"
	"mailproxy/mail"
)

// A group is the open forward-paths of an item that share a next hop.
type group struct {
	key        string // transport, and domain where it goes by MX; "" where Route refused
	transport  config.Transport
	domain     string
	refused    *mail.Reply
	unreported bool         // they were refused before: what is left to do is to tell
	recipients []*recipient // into entry.open
}

// Run makes the attempts as they come due, until ctx ends; it returns when all attempts have ended. An attempt that has sent its
// final dot waits for the answer first.
func (q *Queue) Run(ctx context.Context) error {
	var attempts sync.WaitGroup
	defer attempts.Wait()
	for {
		n, wait := q.take()
		if n != nil {
			if groups := q.plan(n); q.reserve(n, groups) {
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
	if q.running >= q.o.Concurrency {
		return nil, maxWait // the end of an attempt wakes us
	}
	if len(q.due) == 0 || q.due[0].next.After(now) {
		q.admitLocked()
	}
	if len(q.due) == 0 {
		return nil, maxWait
	}
	if wait := q.due[0].next.Sub(now); wait > 0 {
		return nil, min(wait, maxWait)
	}
	n := heap.Pop(&q.due).(*entry)
	n.busy = true
	q.running++
	return n, 0
}

// plan groups an entry's open paths by next hop, as the configuration of this moment has it.
func (q *Queue) plan(n *entry) []*group {
	var groups []*group
	byKey := make(map[string]*group, 1)
	for i := range n.open {
		r := &n.open[i]
		if r.unreported {
			groups = append(groups, &group{unreported: true, recipients: []*recipient{r}})
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

// reserve takes a slot for each group, or none: then the entry waits for a slot of the first that has none left.
func (q *Queue) reserve(n *entry, groups []*group) bool {
	q.mu.Lock()
	defer q.mu.Unlock()
	for _, g := range groups {
		if g.key != "" && q.slots[g.key] >= q.o.PerHop {
			q.idleLocked(n)
			q.running--
			q.waiting[g.key] = append(q.waiting[g.key], n)
			return false
		}
	}
	for _, g := range groups {
		if g.key != "" {
			q.slots[g.key]++
		}
	}
	return true
}

func (q *Queue) giveBackLocked(g *group) {
	if g.key == "" {
		return
	}
	if q.slots[g.key]--; q.slots[g.key] == 0 {
		delete(q.slots, g.key)
	}
}

// admitLocked puts back into the schedule as many of those that wait for slots as have become free.
func (q *Queue) admitLocked() {
	for key, list := range q.waiting {
		free := min(q.o.PerHop-q.slots[key], len(list))
		if free <= 0 {
			continue
		}
		for _, n := range list[:free] {
			q.due.set(n, n.next)
		}
		if list = list[free:]; len(list) == 0 {
			delete(q.waiting, key)
		} else {
			q.waiting[key] = list
		}
	}
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
	q.anyStuck.Add(-int64(len(q.stuck[key])))
	for n := range q.stuck[key] {
		n.stuck = ""
		if n.position >= 0 {
			q.due.set(n, now)
		}
	}
	delete(q.stuck, key)
}
