package queue

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"sync"
	"sync/atomic"
	"time"

	"mailproxy/config"
)

// A Hold says since when an operator has an item wait, and who it was. That is on the disk, and the item's life stands still meanwhile.
type Hold struct {
	Since time.Time `json:"since"`
	By    string    `json:"by"`
}

// A Deed is what an operator can order.
type Deed string

// The deeds. All but Retry are durable once they are done.
const (
	// PutOnHold: not tried until Free.
	PutOnHold Deed = "hold"
	// Free ends that: due now.
	Free Deed = "release"
	// Retry makes due now.
	Retry Deed = "retry"
	// Delete removes for good, without a DSN.
	Delete Deed = "delete"
	// Reroute has it go by another transport from now on, due now.
	Reroute Deed = "route"
	// Move gives it to another node's queue, due there now. Queue.Move does it.
	Move Deed = "move"
)

// An Order is an operator's.
type Order struct {
	Deed      Deed      `json:"deed"`
	Selection Selection `json:"selection"`
	// Transport is Reroute's; empty: the usual one again.
	Transport string `json:"transport,omitempty"`
	// To is the node that Move gives to.
	To config.CID `json:"to,omitempty"`
	// Who orders it, and on which node, for the log; node 0 is this one.
	Who  string     `json:"who"`
	Node config.CID `json:"-"`
}

// busyPatience is how long an order waits for items that are being tried just now.
const busyPatience = 2 * time.Second

// atOnce is how many records of an order are on their way to the disk together: they share its syncs.
const atOnce = 128

// Do carries out an order, and calls said, one call at a time, for each item that is meant, with nil where it is done, else with ErrBusy,
// ErrUnanswered, ErrOnHold (a retry of what is on hold), ErrNoSuch (of an ID) or the disk's error. What is so already is done where its ID was
// given, and else not meant. The order ends early with ctx, or the error of said. The error may wrap ErrSelection or ErrNoTransport.
func (q *Queue) Do(ctx context.Context, o Order, said func(id string, err error) error) error {
	if err := q.CanDo(o); err != nil {
		return err
	}
	if o.Deed == Retry || o.Deed == Free || o.Deed == Reroute {
		q.forgetTheDead()
	}
	r := &orderRun{Queue: q, o: o, said: said}
	return r.run(ctx, r.carryOut)
}

// CanDo says what is wrong with an order; it wraps ErrSelection, ErrDeed or ErrNoTransport.
func (q *Queue) CanDo(o Order) error {
	switch o.Deed {
	case PutOnHold, Free, Retry, Delete, Move:
	case Reroute:
		if _, ok := q.transport(o.Transport); !ok && o.Transport != "" {
			return fmt.Errorf("%w: %s", ErrNoTransport, o.Transport)
		}
	default:
		return fmt.Errorf("%w: %s", ErrDeed, o.Deed)
	}
	return o.Selection.Check()
}

func (r *orderRun) run(ctx context.Context, f func(context.Context, []*entry) error) error {
	err := r.each(ctx, r.o.Selection, f)
	e := r.log.Info().Str("order", string(r.o.Deed)).Str("who", r.o.Who).Int("node", int(r.o.Node))
	if r.o.Deed == Reroute {
		e.Str("transport", r.o.Transport)
	}
	if r.o.Deed == Move {
		e.Int("to", int(r.o.To))
	}
	e.Int("items", r.done).Int("refused", r.refused).AnErr("err", err).Msg("queue.ordered")
	r.poke()
	return err
}

// An orderRun is one order under way.
type orderRun struct {
	*Queue
	o             Order
	said          func(id string, err error) error
	done, refused int
	id            string                // of a Move
	lost          atomic.Pointer[error] // why the node that items are moved to is lost
}

// each takes what is meant out of the schedule, part by part, and calls f for each part; f gives it back.
func (r *orderRun) each(ctx context.Context, s Selection, f func(context.Context, []*entry) error) error {
	m, err := s.matcher(r.Queue.o.Now())
	if err != nil {
		return err
	}
	entries, _ := r.entries(s.IDs)
	if err := r.missing(s.IDs, entries); err != nil {
		return err
	}
	var busy []*entry
	for part := range slices.Chunk(entries, chunk) {
		if err := ctx.Err(); err != nil {
			return err
		}
		claimed, later, err := r.claim(part, &m, len(s.IDs) > 0)
		if err != nil {
			return err
		}
		busy = append(busy, later...)
		if err := f(ctx, claimed); err != nil {
			return err
		}
	}
	patience := time.NewTimer(busyPatience)
	defer patience.Stop()
	for len(busy) > 0 {
		r.mu.Lock()
		if r.idle == nil {
			r.idle = make(chan struct{})
		}
		idle := r.idle
		r.mu.Unlock()
		claimed, later, err := r.claim(busy, &m, len(s.IDs) > 0)
		if err == nil {
			err = f(ctx, claimed)
		}
		if err != nil {
			return err
		}
		if busy = later; len(busy) == 0 {
			return nil
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-idle:
		case <-patience.C:
			for _, n := range busy {
				if err := r.say(n.id, ErrBusy); err != nil {
					return err
				}
			}
			return nil
		}
	}
	return nil
}

// missing names the IDs that there are no items of.
func (r *orderRun) missing(ids []string, entries []*entry) error {
	for i, id := range ids {
		if slices.Contains(ids[:i], id) || slices.ContainsFunc(entries, func(n *entry) bool { return n.id == id }) {
			continue
		}
		if err := r.say(id, ErrNoSuch); err != nil {
			return err
		}
	}
	return nil
}

// say tells what became of one item, and logs it.
func (r *orderRun) say(id string, err error) error {
	if err == nil {
		r.done++
	} else {
		r.refused++
	}
	r.log.Info().Str("item", id).Str("order", string(r.o.Deed)).Str("who", r.o.Who).Int("node", int(r.o.Node)).AnErr("err", err).
		Msg("item.ordered")
	return r.said(id, err)
}

// claim takes those of entries that are meant out of the schedule and marks them busy. Those that an attempt has are given as busy. What is
// as ordered already is left out, and said to be done where it was named.
func (r *orderRun) claim(entries []*entry, m *matcher, named bool) (claimed, busy []*entry, err error) {
	answers := make(map[string]error)
	r.mu.Lock()
	for _, n := range entries {
		match, _ := m.matchLocked(n)
		switch {
		case r.items[n.id] != n || !match:
		case n.held:
			if named {
				answers[n.id] = ErrUnanswered
			}
		case r.isSoLocked(n):
			if named {
				answers[n.id] = nil
			}
		case r.o.Deed == Retry && n.hold != nil:
			if named {
				answers[n.id] = ErrOnHold
			}
		case r.o.Deed == Retry && (n.trying > 0 || n.ordered):
			n.tryAllLocked(r.Queue.o.Now()) // what is not being tried just now
			r.scheduleLocked(n)
			if named {
				answers[n.id] = nil
			}
		case n.trying > 0 || n.ordered:
			busy = append(busy, n)
		default:
			n.ordered = true
			claimed = append(claimed, n)
		}
	}
	r.unscheduleLocked(claimed)
	r.mu.Unlock()
	for _, n := range entries {
		if err, answered := answers[n.id]; answered {
			if err := r.say(n.id, err); err != nil {
				r.giveBack(claimed)
				return nil, nil, err
			}
		}
	}
	return claimed, busy, nil
}

// isSoLocked says whether an entry is as it is ordered already.
func (r *orderRun) isSoLocked(n *entry) bool {
	switch r.o.Deed {
	case PutOnHold:
		return n.hold != nil
	case Free:
		return n.hold == nil
	case Reroute:
		return n.via == r.o.Transport
	}
	return false
}

// giveBack puts claimed entries back into the schedule, as they are.
func (r *orderRun) giveBack(claimed []*entry) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, n := range claimed {
		n.ordered = false
		r.idleLocked(n)
		r.scheduleLocked(n)
	}
}

// carryOut does what is ordered to claimed entries, each durably, and gives them back.
func (r *orderRun) carryOut(_ context.Context, claimed []*entry) error {
	errs := make([]error, len(claimed))
	parallel(len(claimed), atOnce, func(i int) { errs[i] = r.change(claimed[i]) })
	r.giveBack(claimed)
	r.poke()
	for i, n := range claimed {
		if err := r.say(n.id, errs[i]); err != nil {
			return err
		}
	}
	return nil
}

// parallel calls f with 0 to n-1, at most so many at once.
func parallel(n, most int, f func(int)) {
	var all sync.WaitGroup
	slots := make(chan struct{}, most)
	for i := range n {
		slots <- struct{}{}
		all.Go(func() {
			f(i)
			<-slots
		})
	}
	all.Wait()
}

// change does what is ordered to one entry. Where that is not durable it is as before.
func (r *orderRun) change(n *entry) error {
	now := r.Queue.o.Now()
	r.mu.Lock()
	undo := n.undoLocked()
	switch r.o.Deed {
	case Delete:
		r.mu.Unlock()
		return r.remove(n, "deleted")
	case PutOnHold:
		n.hold = &Hold{now, r.by()}
	case Free:
		n.paused += now.Sub(n.hold.Since)
		n.hold = nil
		n.tryAllLocked(now)
	case Reroute:
		n.via = r.o.Transport
		n.tryAllLocked(now)
	case Retry:
		n.tryAllLocked(now)
		r.mu.Unlock()
		return nil
	}
	s := n.state()
	r.mu.Unlock()
	err := r.saveState(n.id, s, false)
	r.health.note(now, r.log, err)
	if err != nil {
		r.mu.Lock()
		undo()
		r.mu.Unlock()
	}
	return err
}

// undoLocked gives what puts an entry back to how it is now: what an order changes of it.
func (n *entry) undoLocked() func() {
	hold, paused, via := n.hold, n.paused, n.via
	open := make([]recipient, len(n.open))
	for i, r := range n.open {
		open[i] = *r
	}
	return func() {
		n.hold, n.paused, n.via = hold, paused, via
		for i, r := range n.open {
			*r = open[i]
		}
	}
}

// by is who orders it, as a Hold shows it.
func (r *orderRun) by() string {
	if r.o.Node == 0 {
		return r.o.Who
	}
	return r.o.Who + " at node " + strconv.Itoa(int(r.o.Node))
}

// remove removes a claimed entry for good. On an error the spool has it no more for this process, and removes it when it can.
func (r *orderRun) remove(n *entry, reason string) error {
	r.mu.Lock()
	delete(r.items, n.id)
	r.mu.Unlock()
	err := r.spool.Remove(n.id)
	r.health.note(r.Queue.o.Now(), r.log, err)
	r.log.Info().Str("item", n.id).Str("reason", reason).AnErr("err", err).Msg("item.done")
	return err
}

// idleLocked wakes the orders that wait for an entry, where nothing is under way with it any more.
func (q *Queue) idleLocked(n *entry) {
	if q.idle != nil && n.trying == 0 && !n.ordered {
		close(q.idle)
		q.idle = nil
	}
}

// unscheduleLocked takes entries that are marked as ordered out of all that would have them tried.
func (q *Queue) unscheduleLocked(entries []*entry) {
	if len(entries) == 0 {
		return
	}
	for _, n := range entries {
		q.due.remove(n)
		for _, r := range n.open {
			r.busy = false // it waited
			q.unstickLocked(r)
		}
	}
	for key, list := range q.waiting {
		if list = slices.DeleteFunc(list, func(w *waiter) bool { return w.n.ordered }); len(list) == 0 {
			delete(q.waiting, key)
		} else {
			q.waiting[key] = list
		}
	}
}

// Flush makes all items due now, and gives their number without those on hold, being tried, or whose client has no answer yet.
func (q *Queue) Flush() (count int) {
	_ = q.Do(context.Background(), Order{Deed: Retry}, func(_ string, err error) error { // nothing of it can fail
		if err == nil {
			count++
		}
		return nil
	})
	return count
}

// Delete removes an item for good, without a DSN. The error is ErrNoSuch, ErrBusy while it is being tried, ErrUnanswered, or the disk's.
func (q *Queue) Delete(id string) (err error) {
	return errors.Join(q.Do(context.Background(), Order{Deed: Delete, Selection: Selection{IDs: []string{id}}}, func(_ string, e error) error {
		err = e
		return nil
	}), err)
}
