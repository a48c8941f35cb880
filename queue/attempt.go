package queue

import (
	"context"
	"errors"
	"math/rand/v2"
	"slices"
	"time"

	"mailproxy/mail"
	"mailproxy/relay"
	"mailproxy/spool"
)

// A fate is what an attempt brought for one recipient.
type fate uint8

const (
	fateNone fate = iota // not tried, or cut by our own stop
	fateSent
	fateLater
	fateFailed
	fateExpired
)

// A trial is one run over the groups of an item.
type trial struct {
	*Queue
	n         *entry
	groups    []*group
	fates     map[int]fate // by recipient.index
	answered  []string     // keys of next hops that answered
	transport string

	outOfReach string // key of a next hop that was
	ended      bool   // at least one attempt ended by itself
}

// try makes one attempt for each group and settles the item.
func (q *Queue) try(ctx context.Context, n *entry, groups []*group) {
	t := &trial{Queue: q, n: n, groups: groups, fates: make(map[int]fate)}
	m, err := q.spool.Open(n.id)
	if err == nil {
		defer m.Close()
		err = m.Check()
	}
	if err != nil {
		t.unreadable(err)
		return
	}
	if err := q.spool.Mark(n.id, q.o.Now()); err != nil {
		q.health.note(q.o.Now(), q.log, err) // a mark is for the log only: the attempt is made
	}
	for i, g := range groups {
		if ctx.Err() != nil {
			break
		}
		if t.attempt(ctx, g, m); i < len(groups)-1 {
			t.checkpoint(g)
		}
	}
	t.giveBack(t.settle(m))
}

// unreadable sets a damaged item aside; where the disk does not read, it is tried later.
func (t *trial) unreadable(err error) {
	n := t.n
	event, damaged := "spool.unreadable", errors.Is(err, ErrDamaged)
	if damaged {
		event = "spool.damaged"
		t.health.note(t.o.Now(), t.log, t.spool.SetAside(n.id))
	}
	t.log.Error().Str("item", n.id).AnErr("err", err).Msg(event)
	gone := damaged || errors.Is(err, spool.ErrNoSuch)
	t.mu.Lock()
	if !gone {
		n.attempts++
		n.lastReply = err.Error()
		n.next = t.o.Now().Add(backoff(n.attempts, rand.Float64()))
	}
	t.mu.Unlock()
	t.giveBack(gone)
}

// attempt brings the message to one next hop and notes each recipient's fate.
func (t *trial) attempt(ctx context.Context, g *group, m *spool.Message) {
	start := t.o.Now()
	if g.refused != nil {
		t.ended = true
		for _, r := range g.recipients {
			t.note(g, r, relay.Result{Path: r.path, Reply: g.refused}, start, 0)
		}
		return
	}
	paths := make([]mail.Path, len(g.recipients))
	for i, r := range g.recipients {
		paths[i] = r.path
	}
	t.transport = g.transport.Name
	number := t.n.attempts + 1
	t.log.Info().Str("item", t.n.id).Str("transport", g.transport.Name).Int("attempt", number).
		Array("forward_path", pathArray(paths)).Msg("attempt.start")
	results, err := t.deliver(ctx, relay.Attempt{
		Transport: g.transport, Domain: g.domain, Envelope: m.Envelope, Paths: paths, Content: m.Content,
	})
	took := t.o.Now().Sub(start)
	t.mu.Lock()
	t.counts.Attempts++
	if errors.Is(err, relay.ErrNoAnswer) {
		t.counts.Unsure++
	}
	t.mu.Unlock()
	var out *relay.OutOfReach
	switch {
	case err == nil, errors.Is(err, relay.ErrNoAnswer):
		t.ended = true
		t.answered = append(t.answered, g.key)
		if err != nil {
			t.log.Warn().Str("item", t.n.id).Int("attempt", number).AnErr("err", err).Msg("attempt.unanswered")
		}
		for i, r := range g.recipients {
			t.note(g, r, results[i], start, took)
		}
	case errors.As(err, &out):
		t.ended, t.outOfReach = true, g.key
		reply := outOfReachReply(out)
		for _, r := range g.recipients {
			t.note(g, r, relay.Result{Path: r.path, Reply: reply, Hop: out.Hop, Stage: out.Stage}, start, took)
		}
	default: // our own stop: as if it had not been tried
		t.log.Info().Str("item", t.n.id).Int("attempt", number).AnErr("err", err).Msg("attempt.dropped")
	}
}

// outOfReachReply is what stands for the answer of a next hop that gave none.
func outOfReachReply(err *relay.OutOfReach) *mail.Reply {
	return &mail.Reply{Code: 451, Enhanced: [3]int{4, 4, 1}, Text: "next hop out of reach", Cause: err}
}

// checkpoint closes on disk what one of several groups has brought: the next may take minutes, and be cut.
func (t *trial) checkpoint(g *group) {
	t.mu.Lock()
	s := t.n.state()
	t.mu.Unlock()
	s.Done = slices.Clone(s.Done)
	sent := false
	for i, f := range t.fates {
		if f == fateSent {
			s.Done = append(s.Done, i)
			delete(s.Last, i)
		}
	}
	for _, r := range g.recipients {
		sent = sent || t.fates[r.index] == fateSent
	}
	if sent {
		t.health.note(t.o.Now(), t.log, t.saveState(t.n.id, s, true))
	}
}

func (q *Queue) saveState(id string, s *state, trying bool) error {
	b, err := s.encode()
	if err != nil {
		return err
	}
	return q.spool.SetState(id, b, trying)
}

// note notes and logs what became of one recipient.
func (t *trial) note(g *group, r *recipient, res relay.Result, start time.Time, took time.Duration) {
	f := fateLater
	switch {
	case res.Reply.Positive():
		f = fateSent
	case res.Reply.Permanent():
		f = fateFailed
	}
	r.last = outcomeOf(res, start)
	if g.refused != nil {
		r.last.Class = classRoute
	}
	t.fates[r.index] = f
	e := t.log.Info()
	if f == fateLater {
		e = t.log.Warn()
	}
	e.Str("item", t.n.id).Stringer("forward_path", r.path).Str("transport", g.transport.Name).Str("hop", res.Hop).
		Stringer("stage", res.Stage).Int("code", res.Reply.Code).Str("reply", res.Reply.String()).Int("attempt", t.n.attempts+1).
		Int64("took_ms", took.Milliseconds()).AnErr("err", res.Reply.Cause).Msg("attempt.done")
}

// settle makes durable what the attempts brought; gone says that the item is no more.
func (t *trial) settle(m *spool.Message) (gone bool) {
	n, now := t.n, t.o.Now()
	var failed []failure
	expired := now.Sub(n.bornAt()) >= t.o.Life()
	for _, r := range n.open {
		if t.fates[r.index] == fateLater && expired {
			t.fates[r.index] = fateExpired
		}
		switch t.fates[r.index] {
		case fateFailed:
			failed = append(failed, failure{path: r.path, outcome: *r.last})
		case fateExpired:
			failed = append(failed, failure{path: r.path, outcome: *r.last, expired: true})
		}
	}
	if len(failed) > 0 && !t.report(m, failed) {
		// They stay open: what is refused for good will be so again.
		for i, f := range t.fates {
			if f == fateFailed || f == fateExpired {
				t.fates[i] = fateLater
			}
		}
	}
	open, closed := t.close()
	t.mu.Lock()
	n.open = open
	if t.ended {
		n.attempts++
		n.next = now.Add(backoff(n.attempts, rand.Float64()))
		if end := n.bornAt().Add(t.o.Life()); n.next.After(end) && end.After(now) {
			n.next = end // the last attempt is at the end of its life
		}
		n.transport = t.transport
	} // else it was not tried: it is due as before
	for _, r := range open {
		if r.last != nil {
			n.lastReply, n.class = r.last.reply().String(), r.last.Class
		}
	}
	saved := n.state()
	t.mu.Unlock()
	var err error
	switch {
	case len(open) == 0:
		err = t.spool.Remove(n.id)
		t.log.Info().Str("item", n.id).Int("attempt", n.attempts).AnErr("err", err).Msg("item.done")
	case t.ended || closed > 0:
		err = t.saveState(n.id, saved, false)
		t.log.Info().Str("item", n.id).Int("open", len(open)).Time("next_at", n.next).AnErr("err", err).Msg("item.later")
	default:
		err = t.spool.Unmark(n.id)
	}
	t.health.note(now, t.log, err) // what could not be saved leaves the mark, which names what a restart delivers again
	return len(open) == 0
}

// close gives the recipients that stay, and counts and notes those that do not.
func (t *trial) close() (open []recipient, closed int) {
	t.mu.Lock()
	defer t.mu.Unlock()
	open = slices.Clone(t.n.open)[:0]
	for _, r := range t.n.open {
		switch t.fates[r.index] {
		case fateSent:
			t.counts.Sent++
		case fateFailed:
			t.counts.Failed++
		case fateExpired:
			t.counts.Expired++
		default:
			open = append(open, r)
			continue
		}
		closed++
		t.n.done = append(t.n.done, r.index)
	}
	return open, closed
}

// giveBack returns the item and its slots to the schedule.
func (t *trial) giveBack(gone bool) {
	now := t.o.Now()
	t.mu.Lock()
	defer t.mu.Unlock()
	n := t.n
	t.running--
	t.idleLocked(n)
	for _, g := range t.groups {
		t.giveBackLocked(g)
	}
	t.unstickLocked(n)
	if gone {
		delete(t.items, n.id)
	} else {
		t.due.set(n, n.next)
		if t.outOfReach != "" {
			t.stickLocked(n, t.outOfReach)
		}
	}
	for _, key := range t.answered {
		t.unstickAllLocked(key, now)
	}
}
