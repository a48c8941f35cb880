package queue

import (
	"cmp"
	"context"
	"errors"
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"time"

	"github.com/rs/zerolog"

	"mailproxy/config"
	"mailproxy/mail"
	"mailproxy/relay"
	"mailproxy/spool"
)

// Defaults of Options.
const (
	defaultLife        = 5 * 24 * time.Hour  // RFC 5321 §4.5.4.1: 4-5 days at least
	maxLife            = 30 * 24 * time.Hour // more than any life
	defaultDelayNotice = 4 * time.Hour
	defaultConcurrency = 100
	defaultPerHop      = 20
	maxShownHeader     = 64 << 10 // octets
)

// Options are what a Queue is made from.
type Options struct {
	// Dir is the spool's directory; it is made where it is missing.
	Dir string
	// Relay makes the attempts.
	Relay *relay.Client
	// Route gives the transport for a forward-path by the configuration of this moment; a reply instead refuses it, for now
	// (4xx) or for good (5xx).
	Route func(mail.Path) (config.Transport, *mail.Reply)
	// Transport gives the transport of a name, for what an operator orders; nil: there is none.
	Transport func(name string) (config.Transport, bool)
	// Hostname is how DSNs name us.
	Hostname string
	// Life is how long an item is tried by a transport that has no QueueLife of its own; nil is 5 days.
	Life func() time.Duration
	// DelayNotice is after how long the sender is told that an item is late; 0 is never, nil is 4 hours.
	DelayNotice func() time.Duration
	// MinFree is how many octets stay free on the spool's file system.
	MinFree int64
	// Concurrency is how many attempts are made at once, and as many again for next hops that nothing else is tried for; 0 is 100.
	Concurrency int
	// PerHop is how many of them may be for the same next hop (transport, and domain where it goes by MX), if it bears so many; 0 is 20.
	PerHop int
	Log    zerolog.Logger
	// Now is the clock; nil is time.Now.
	Now func() time.Time
}

// A Queue is the spool and the schedule over it. Its methods may be called by many at once.
type Queue struct {
	o       Options
	spool   *spool.Spool
	log     zerolog.Logger
	deliver func(context.Context, relay.Attempt) ([]relay.Result, error)
	health  health
	limit   dsnLimit
	wake    chan struct{} // capacity 1: the schedule changed

	anyStuck atomic.Int64 // recipients in stuck, to be looked at without mu

	mu        sync.Mutex
	items     map[string]*entry
	due       schedule                         // those with a recipient that is neither being tried nor waiting
	running   int                              // attempts under way
	dueFirst  bool                             // whose turn it was
	sitesLeft int                              // how many sites tidying has left
	slots     map[string]int                   // attempts under way by group.key
	waiting   map[string][]*waiter             // due, and there is no room for that key
	sites     map[string]*site                 // by group.key; what is not there is as new
	ring      []string                         // keys of waiting in the order of their turns, and some that are no more
	inRing    map[string]struct{}              // those in ring
	stuck     map[string]map[*recipient]*entry // whose last attempt found that next hop (group.key) out of reach
	counts    Stats
	lastOrder string              // of the newest item that another node gave us
	coming    map[string]struct{} // IDs of items that another node is giving us
	idle      chan struct{}       // closed when an item is not busy any more; nil where nobody waits for that
}

// Open reads the spool: items are there to be tried at their time, held ones are dropped, damaged ones set aside. Nothing is
// tried before Run.
func Open(o Options) (*Queue, error) {
	if o.Now == nil {
		o.Now = time.Now
	}
	if o.Life == nil {
		o.Life = func() time.Duration { return defaultLife }
	}
	if o.DelayNotice == nil {
		o.DelayNotice = func() time.Duration { return defaultDelayNotice }
	}
	o.Concurrency = cmp.Or(o.Concurrency, defaultConcurrency)
	o.PerHop = cmp.Or(o.PerHop, defaultPerHop)
	sp, err := spool.Open(o.Dir)
	if err != nil {
		return nil, err
	}
	q := &Queue{
		o: o, spool: sp, log: o.Log, wake: make(chan struct{}, 1),
		items: make(map[string]*entry), slots: make(map[string]int), waiting: make(map[string][]*waiter),
		sites: make(map[string]*site), inRing: make(map[string]struct{}),
		stuck: make(map[string]map[*recipient]*entry), coming: make(map[string]struct{}),
	}
	if o.Relay != nil {
		q.deliver = o.Relay.Deliver
	}
	if err := q.load(); err != nil {
		_ = sp.Close() // the first error counts
		return nil, err
	}
	return q, nil
}

// Close lets go of the spool's directory. Run must have returned.
func (q *Queue) Close() error { return q.spool.Close() }

// A Draft is a message to be spooled.
type Draft struct {
	// Envelope has the forward-paths of this item only.
	Envelope mail.Envelope
	Content  mail.Content
	// Tried is the attempt that was just made in the client's transaction, and for which the message is spooled: the next one
	// waits for its time, or for that next hop to answer anyone. Nil: it is due at once.
	Tried *relay.OutOfReach

	waits bool // it is as if it were being tried, until the trial that made it has saved what it tells
}

// Put spools the drafts, all or none, and returns when they are durable. Held ones are not tried before Release. The error is a
// *mail.Reply: 452 4.3.1 where there is no room (it wraps ErrFull), else 451 4.3.0; nothing is left behind then.
func (q *Queue) Put(ctx context.Context, drafts []Draft, held bool) (ids []string, err error) {
	if err := ctx.Err(); err != nil {
		return nil, refusal(err)
	}
	now := q.o.Now()
	ids = make([]string, len(drafts))
	size := int64(0)
	for i := range drafts {
		if len(drafts[i].Envelope.ForwardPaths) == 0 {
			return nil, refusal(errors.New("draft without forward-paths"))
		}
		ids[i] = mail.NewID(now)
		size += drafts[i].Content.Size()
	}
	if err := q.put(ids, drafts, held, size, q.o.MinFree); err != nil {
		return nil, refusal(err)
	}
	return ids, nil
}

// put spools under given IDs.
func (q *Queue) put(ids []string, drafts []Draft, held bool, size, minFree int64) error {
	if err := q.spool.Room(size, minFree); err != nil {
		q.health.full(q.o.Now(), q.log, err)
		return err
	}
	done, err := q.health.begin(q.o.Now())
	if err != nil {
		return err
	}
	put := make([]spool.Draft, len(drafts))
	for i := range drafts {
		put[i] = spool.Draft{ID: ids[i], Envelope: &drafts[i].Envelope, Content: drafts[i].Content}
	}
	err = q.spool.Put(put, held)
	done(q.o.Now(), q.log, err)
	if err != nil {
		return err
	}
	now := q.o.Now()
	q.mu.Lock()
	for i, id := range ids {
		e := &drafts[i].Envelope
		n := newEntry(id, drafts[i].Content.Size(), e, &state{Next: now})
		if n.created.IsZero() {
			n.created = now
		}
		n.held = held
		q.items[id] = n
		if drafts[i].waits {
			n.waits = true
			q.startLocked(n)
		}
		if !held && !drafts[i].waits {
			q.triedLocked(n, drafts[i].Tried, now)
			q.scheduleLocked(n)
		}
	}
	q.mu.Unlock()
	for i, id := range ids {
		e := &drafts[i].Envelope
		q.log.Info().Str("session", e.Session).Str("item", id).Stringer("reverse_path", e.ReversePath).
			Array("forward_path", pathArray(e.ForwardPaths)).Int64("bytes", drafts[i].Content.Size()).Bool("unanswered", held).
			Msg("mail.queued")
	}
	if !held {
		q.poke()
	}
	return nil
}

// triedLocked counts the attempt that a new entry has behind it. It is not saved: after a restart the item is due at once.
func (q *Queue) triedLocked(n *entry, tried *relay.OutOfReach, now time.Time) {
	if tried == nil {
		return
	}
	n.attempts = 1
	n.heard(outcomeOf(relay.Result{Reply: outOfReachReply(tried), Hop: tried.Hop, Stage: tried.Stage}, now))
	next := now.Add(backoff(n.attempts, rand.Float64()))
	to := n.open[0].path // the others share its next hop
	t, refused := q.o.Route(to)
	key, _ := groupKey(t, to)
	for _, r := range n.open {
		r.attempts, r.next = n.attempts, next
		if refused == nil {
			q.stickLocked(n, r, key)
		}
	}
	n.transport = t.Name
}

type pathArray []mail.Path

// MarshalZerologArray is zerolog's.
func (p pathArray) MarshalZerologArray(a *zerolog.Array) {
	for _, x := range p {
		a.Str(x.String())
	}
}

// poke tells the runner to look at the schedule.
func (q *Queue) poke() {
	select {
	case q.wake <- struct{}{}:
	default:
	}
}

// Release lets held items be tried; they are accepted durably when it returns. On an error nothing may be relied on but that
// they are not tried: answer 4xx and Drop them.
func (q *Queue) Release(ids []string) error {
	q.mu.Lock()
	for _, id := range ids {
		if n := q.items[id]; n == nil || !n.held {
			q.mu.Unlock()
			return ErrNoSuch
		}
	}
	q.mu.Unlock()
	err := q.spool.Release(ids)
	q.health.note(q.o.Now(), q.log, err)
	if err != nil {
		return refusal(err)
	}
	q.mu.Lock()
	for _, id := range ids {
		if n := q.items[id]; n != nil && n.held {
			n.held = false
			q.scheduleLocked(n)
		}
	}
	q.mu.Unlock()
	q.poke()
	return nil
}

// Drop removes held items that were not accepted after all.
func (q *Queue) Drop(ids []string) error {
	q.mu.Lock()
	for _, id := range ids {
		if n := q.items[id]; n == nil || !n.held {
			q.mu.Unlock()
			return ErrNoSuch
		}
	}
	for _, id := range ids {
		delete(q.items, id)
	}
	q.mu.Unlock()
	return q.spool.Drop(ids)
}

// stickLocked notes that a recipient waits for a next hop that was out of reach.
func (q *Queue) stickLocked(n *entry, r *recipient, key string) {
	if q.stuck[key] == nil {
		q.stuck[key] = make(map[*recipient]*entry)
	}
	r.stuck = key
	q.stuck[key][r] = n
	q.anyStuck.Add(1)
}

func (q *Queue) unstickLocked(r *recipient) {
	if r.stuck == "" {
		return
	}
	delete(q.stuck[r.stuck], r)
	q.anyStuck.Add(-1)
	if len(q.stuck[r.stuck]) == 0 {
		delete(q.stuck, r.stuck)
	}
	r.stuck = ""
}
