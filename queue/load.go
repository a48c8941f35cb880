package queue

import (
	"container/heap"
	"path/filepath"
	"slices"

	"mailproxy/mail"
	"mailproxy/spool"
)

// load reads the spool at start. Only the small view of each item stays in memory.
func (q *Queue) load() error {
	var held, cut []string
	var moving []*entry
	var told []*mail.About
	err := q.spool.Each(func(f spool.Found) error {
		if f.Held {
			held = append(held, f.ID)
			return nil
		}
		s, err := decodeState(f.State)
		if err != nil {
			return q.loadDamaged(f.ID, err)
		}
		n := newEntry(f.ID, f.Size, f.Envelope, s)
		q.items[f.ID] = n
		if n.hold == nil {
			n.next, n.position = n.first(), len(q.due)
			q.due = append(q.due, n)
		}
		if s.Moving != 0 { // that node may have it, too
			moving = append(moving, n)
			q.log.Warn().Str("item", f.ID).Int("to", int(s.Moving)).Msg("move.cut")
		}
		if f.Envelope.About != nil {
			told = append(told, f.Envelope.About)
		}
		if !f.Tried.IsZero() { // what it had sent may arrive a second time
			cut = append(cut, f.ID)
			q.counts.Cut++
			q.log.Warn().Str("item", f.ID).Time("since", f.Tried).Int("attempt", n.attempts+1).Msg("attempt.cut")
		}
		return nil
	}, q.loadDamaged)
	if err != nil {
		return err
	}
	for _, id := range held {
		q.log.Info().Str("item", id).Str("reason", "held and never answered").Msg("item.done")
	}
	if err := q.spool.Drop(held); err != nil {
		return err
	}
	for _, id := range cut { // it is said once
		if err := q.spool.Unmark(id); err != nil {
			return err
		}
	}
	for _, n := range moving {
		if err := q.saveState(n.id, n.state(), false); err != nil {
			return err
		}
	}
	heap.Init(&q.due)
	for _, about := range told {
		if err := q.loadTold(about); err != nil {
			return err
		}
	}
	for _, name := range q.spool.Aside() {
		q.log.Error().Str("file", filepath.Join(q.o.Dir, "damaged", name)).Msg("spool.damaged")
	}
	return nil
}

// loadTold settles an item by a DSN that tells of it: a kill may have come between the two.
func (q *Queue) loadTold(about *mail.About) error {
	n := q.items[about.Item]
	if n == nil {
		return nil
	}
	changed := false
	open := n.open[:0]
	for _, r := range n.open {
		switch told := slices.Contains(about.Recipients, r.index); {
		case told && about.Delayed:
			changed = changed || !r.delayTold
			r.delayTold = true
		case told:
			changed = true
			n.done = append(n.done, r.index)
			continue
		}
		open = append(open, r)
	}
	if n.open = open; len(open) == 0 {
		delete(q.items, n.id)
		q.due.remove(n)
		q.log.Info().Str("item", n.id).Str("reason", "told before the stop").Msg("item.done")
		return q.spool.Remove(n.id)
	}
	if !changed {
		return nil
	}
	q.scheduleLocked(n) // nobody else is there yet
	return q.saveState(n.id, n.state(), false)
}

func (q *Queue) loadDamaged(id string, err error) error {
	q.log.Error().Str("item", id).AnErr("err", err).Msg("spool.unreadable")
	return q.spool.SetAside(id)
}
