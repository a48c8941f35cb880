package queue

import (
	"context"
	"errors"
	"math/rand/v2"
	"slices"
	"sync"
	"time"

	"mailproxy/config"
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

// A trial is one run over the groups of an item that are tried at once. Other trials for the item may go on beside it, for others of its
// recipients: one slow next hop holds up nobody who goes by another.
type trial struct {
	*Queue
	n      *entry
	groups []*group
	random float64 // for the back-off: what is put off together stays together, and is told of together

	// Guarded by mu.
	fates map[int]fate // by recipient.index; of those that the trial still has
	rest  []*group     // the last of groups, which are tried as others end: one item may have no more at once

	// Behind entry.saving.
	left  int      // groups whose attempts have not ended
	ended bool     // at least one attempt ended by itself
	dsns  []string // items, not to be tried before what they tell is saved
}

// try makes an attempt for each group, side by side but for the rest, and writes down what they bring.
func (q *Queue) try(ctx context.Context, n *entry, ready, rest []*group) {
	t := &trial{Queue: q, n: n, groups: slices.Concat(ready, rest), rest: rest, random: rand.Float64(), fates: make(map[int]fate)}
	t.left = len(t.groups)
	for _, g := range t.groups {
		for _, r := range g.recipients {
			t.fates[r.index] = fateNone
		}
	}
	m, err := q.spool.Open(n.id)
	if err == nil {
		defer m.Close()
		err = m.Check()
	}
	if err != nil {
		t.unreadable(ready, err)
		return
	}
	t.mark()
	var others sync.WaitGroup
	for _, g := range ready[1:] {
		others.Go(func() { t.run(ctx, g, m) })
	}
	t.run(ctx, ready[0], m)
	others.Wait()
}

// run makes the attempt for one group, and for others of the rest in its place.
func (t *trial) run(ctx context.Context, g *group, m *spool.Message) {
	for g != nil {
		g = t.one(ctx, g, m)
	}
}

// mark notes on disk that an attempt is under way. Not while another one saves what it has brought, as no longer being under way.
func (t *trial) mark() {
	t.n.saving.Lock()
	defer t.n.saving.Unlock()
	if t.isGone() {
		return
	}
	if err := t.spool.Mark(t.n.id, t.o.Now()); err != nil {
		t.health.note(t.o.Now(), t.log, err) // a mark is for the log only: the attempt is made
	}
}

// one makes the attempt for one group, and writes down what it has brought; the last one ends the trial. It gives the group that is tried in
// its place; nil: none.
func (t *trial) one(ctx context.Context, g *group, m *spool.Message) (next *group) {
	if ctx.Err() == nil {
		t.attempt(ctx, g, m)
	}
	t.n.saving.Lock()
	t.tellRelayed(g, m)
	next = t.next()
	if t.left--; t.left > 0 {
		t.part(g)
	} else {
		t.settle(m)
	}
	t.giveBack(g)
	t.n.saving.Unlock()
	t.poke()
	return next
}

// next gives the first of the rest that can be tried, as a group has ended. Those that wait for room leave the trial, and so do all where
// other trials have what the item may have at once, and nothing of this one goes on.
func (t *trial) next() *group {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.items[t.n.id] != t.n {
		return nil
	}
	now := t.o.Now()
	t.running-- // what has ended
	t.n.trying--
	defer t.startLocked(t.n)
	for len(t.rest) > 0 {
		g := t.rest[0]
		switch t.readyLocked(t.n, g, now) {
		case isReady:
			t.rest = t.rest[1:]
			return g
		case isTooMany:
			if t.left-1 > len(t.rest) {
				return nil
			}
			t.waitLocked(&waiter{t.n, g.recipients}, g.key)
		}
		t.rest = t.rest[1:]
		for _, r := range g.recipients {
			delete(t.fates, r.index)
		}
		t.left--
	}
	return nil
}

// unreadable sets a damaged item aside; where the disk does not read, it is tried later.
func (t *trial) unreadable(ready []*group, err error) {
	n := t.n
	n.saving.Lock()
	defer n.saving.Unlock()
	if t.isGone() { // another trial has found that
		t.giveBack(ready...)
		return
	}
	event, damaged := "spool.unreadable", errors.Is(err, ErrDamaged)
	if damaged {
		event = "spool.damaged"
		t.health.note(t.o.Now(), t.log, t.spool.SetAside(n.id))
	}
	t.log.Error().Str("item", n.id).AnErr("err", err).Msg(event)
	t.mu.Lock()
	if damaged || errors.Is(err, spool.ErrNoSuch) {
		delete(t.items, n.id)
		for _, r := range n.open {
			t.unstickLocked(r)
		}
	} else {
		for _, g := range t.groups {
			for _, r := range g.recipients {
				t.fates[r.index] = fateLater
			}
			t.freeLocked(g, t.o.Now(), func(*recipient) bool { return true })
		}
		n.lastReply, n.class = err.Error(), "" // newer than what a next hop has said
	}
	t.mu.Unlock()
	t.giveBack(ready...)
	t.poke()
}

// isGone says whether the item was set aside meanwhile.
func (t *trial) isGone() bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.items[t.n.id] != t.n
}

// attempt brings the message to one next hop and notes each recipient's fate.
func (t *trial) attempt(ctx context.Context, g *group, m *spool.Message) {
	start, life := t.o.Now(), t.lifeBy(g.transport)
	for _, r := range g.recipients {
		r.life = life
	}
	switch {
	case g.unreported:
		g.ended = true
		t.mu.Lock()
		for _, r := range g.recipients {
			t.fates[r.index] = fateFailed
		}
		t.mu.Unlock()
		return
	case g.refused != nil:
		t.noteAll(g, relay.Result{Reply: g.refused}, start, 0)
		return
	}
	paths, params := make([]mail.Path, len(g.recipients)), []mail.RcptParams(nil)
	for i, r := range g.recipients {
		paths[i] = r.path
		if m.Envelope.Params != nil {
			params = append(params, m.Envelope.Param(r.index))
		}
	}
	t.log.Info().Str("item", t.n.id).Str("transport", g.transport.Name).Int("attempt", g.number).
		Array("forward_path", pathArray(paths)).Msg("attempt.start")
	results, err := t.bring(ctx, g, relay.Attempt{
		Transport: g.transport, Domain: g.domain, Envelope: m.Envelope, Paths: paths, Params: params, Content: m.Content,
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
		g.results = results
		if err != nil {
			t.log.Warn().Str("item", t.n.id).Int("attempt", g.number).AnErr("err", err).Msg("attempt.unanswered")
		}
		for i, r := range g.recipients {
			t.note(g, r, results[i], start, took)
		}
	case errors.As(err, &out):
		g.lost = true
		t.noteAll(g, relay.Result{Reply: outOfReachReply(out), Hop: out.Hop, Stage: out.Stage}, start, took)
	default: // our own stop: as if it had not been tried
		t.log.Info().Str("item", t.n.id).Int("attempt", g.number).AnErr("err", err).Msg("attempt.dropped")
	}
}

// noteAll is note for all recipients of a group.
func (t *trial) noteAll(g *group, res relay.Result, start time.Time, took time.Duration) {
	for _, r := range g.recipients {
		res.Path = r.path
		t.note(g, r, res, start, took)
	}
}

// bring makes the attempt, unless the next hop is known to be dead.
func (t *trial) bring(ctx context.Context, g *group, a relay.Attempt) ([]relay.Result, error) {
	if g.away != nil {
		return nil, g.away
	}
	results, err := t.deliver(ctx, a)
	t.feedback(g, results, err)
	return results, err
}

// outOfReachReply is what stands for the answer of a next hop that gave none.
func outOfReachReply(err *relay.OutOfReach) *mail.Reply {
	return &mail.Reply{Code: 451, Enhanced: [3]int{4, 4, 1}, Text: "next hop out of reach", Cause: err}
}

// lifeBy is how long an item is tried by a transport.
func (q *Queue) lifeBy(t config.Transport) time.Duration {
	if t.QueueLife > 0 {
		return time.Duration(t.QueueLife)
	}
	return q.o.Life()
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
	last := outcomeOf(res, start)
	if g.refused != nil {
		last.Class = classRoute
	}
	g.ended = true
	t.mu.Lock()
	r.last = last
	t.fates[r.index] = f
	t.mu.Unlock()
	e := t.log.Info()
	if f == fateLater {
		e = t.log.Warn()
	}
	e.Str("item", t.n.id).Stringer("forward_path", r.path).Str("transport", g.transport.Name).Str("hop", res.Hop).
		Stringer("stage", res.Stage).Str("reason", last.Class).Int("code", res.Reply.Code).Str("reply", res.Reply.String()).Int("attempt", g.number).
		Int64("took_ms", took.Milliseconds()).AnErr("err", res.Reply.Cause).Msg("attempt.done")
}

// news is what there is to tell about a recipient.
func (t *trial) news(r *recipient, m *spool.Message) news {
	return news{
		index: r.index, path: r.path, params: m.Envelope.Param(r.index), outcome: *r.last, life: r.life, until: t.n.bornAt().Add(r.life),
	}
}

// tellRelayed tells a sender that asked for it of what a hop took that does not offer DSN.
func (t *trial) tellRelayed(g *group, m *spool.Message) {
	var relayed []news
	for i := range g.results {
		if r := g.recipients[i]; g.results[i].Reply.Positive() && !g.results[i].DSN && m.Envelope.Param(r.index).Notify.Success() {
			relayed = append(relayed, t.news(r, m))
		}
	}
	relayed, _ = t.wanted(t.n.id, m.Envelope, actionRelayed, relayed)
	_ = t.report(m, actionRelayed, relayed) // what was taken is taken
}

// report spools a DSN.
func (t *trial) report(m *spool.Message, a action, told []news) error {
	if len(told) == 0 {
		return nil
	}
	id, err := t.tell(t.n.id, m.Envelope, a, told, m.Content)
	if err == nil {
		t.dsns = append(t.dsns, id)
	}
	return err
}

// part writes down what one group has brought while others of the trial are still being tried: what was delivered is closed, and what was
// put off goes on by its own schedule. Of whom there is something to tell waits for the end of the trial, so that one DSN tells it.
func (t *trial) part(g *group) {
	if t.isGone() {
		return
	}
	now := t.o.Now()
	t.mu.Lock()
	closed := t.closeLocked(func(r *recipient) bool { return t.fates[r.index] == fateSent && slices.Contains(g.recipients, r) })
	t.freeLocked(g, now, func(r *recipient) bool {
		return t.fates[r.index] <= fateLater && !t.isOver(r, now) && !t.isLate(r, now)
	})
	t.mu.Unlock()
	t.ended = t.ended || g.ended
	if closed > 0 {
		t.save(now)
	}
}

// isOver says whether a recipient is given up that is put off.
func (t *trial) isOver(r *recipient, now time.Time) bool { return now.Sub(t.n.bornAt()) >= r.life }

// isLate says whether a recipient that is put off is late, and its sender was not told.
func (t *trial) isLate(r *recipient, now time.Time) bool {
	after := t.o.DelayNotice()
	return after > 0 && now.Sub(t.n.bornAt()) >= after && !r.delayTold && !r.unreported
}

// settle ends a trial: what the sender is to be told is told, and what the attempts brought is made durable.
//
//	a recipient was            and the sender is told     so it is
//	taken                      where it asked for that    closed
//	refused for good           it                         closed
//	                           not yet                    open, not tried again: told later
//	                           never: never verified      the same, and closed when its life is over
//	put off, its life over     it                         closed
//	                           not yet                    open
//	put off, for 4 hours       once                       open
//	put off, or not tried                                 open
//
// The DSN is spooled first, with what it tells, and not tried before the item's own state is saved: so a start after a kill finds
// both, or neither, or the DSN alone and closes by it what it tells (load).
func (t *trial) settle(m *spool.Message) {
	if t.isGone() {
		return
	}
	now := t.o.Now()
	t.tellFailed(m, now)
	t.tellDelayed(m, now)
	t.mu.Lock()
	closed := t.closeLocked(func(r *recipient) bool { f := t.fates[r.index]; return f != fateNone && f != fateLater })
	for _, g := range t.groups {
		t.ended = t.ended || g.ended
		t.freeLocked(g, now, func(*recipient) bool { return true })
	}
	alone := t.n.trying == 1
	t.mu.Unlock()
	switch {
	case t.ended || closed > 0:
		t.save(now)
	case alone:
		t.health.note(now, t.log, t.spool.Unmark(t.n.id))
	}
}

// save makes durable what became of the item so far, and removes it where nothing of it is open.
func (t *trial) save(now time.Time) {
	n := t.n
	t.mu.Lock()
	open, others, s := len(n.open), n.trying > 1, n.state()
	if open == 0 {
		delete(t.items, n.id)
	}
	t.mu.Unlock()
	var err error
	if open == 0 {
		err = t.spool.Remove(n.id)
		t.log.Info().Str("item", n.id).Int("attempt", s.Attempts).AnErr("err", err).Msg("item.done")
	} else {
		err = t.saveState(n.id, s, others)
		t.log.Info().Str("item", n.id).Int("open", open).Time("next_at", s.Next).AnErr("err", err).Msg("item.later")
	}
	t.health.note(now, t.log, err) // what could not be saved leaves the mark, which names what a restart delivers again
}

// tellFailed reports who is given up. Where that is not possible they stay open.
func (t *trial) tellFailed(m *spool.Message, now time.Time) {
	var failed []news
	for _, r := range t.n.open {
		f, ours := t.fates[r.index]
		if ours && f == fateLater && t.isOver(r, now) {
			f = fateExpired
			t.fates[r.index] = f
		}
		if ours && (f == fateFailed || f == fateExpired) {
			one := t.news(r, m)
			one.expired = f == fateExpired
			failed = append(failed, one)
		}
	}
	told, kept := t.wanted(t.n.id, m.Envelope, actionFailed, failed)
	t.keep(m, kept, now)
	err := t.report(m, actionFailed, told)
	switch {
	case err == nil:
	case errors.Is(err, errTooMany) && now.Sub(t.n.bornAt()) >= told[0].life+limitPatience:
		for i := range told {
			t.untold(t.n.id, m.Envelope, &told[i], err.Error())
		}
	default:
		t.leaveOpen(told)
	}
}

// keep leaves those open that nobody may be told of, untried, to the end of their life: the next hop may have refused them by mistake,
// and an operator can have them tried again. Then they are given up.
func (t *trial) keep(m *spool.Message, kept []news, now time.Time) {
	for i := range kept {
		n := &kept[i]
		if now.Sub(t.n.bornAt()) >= n.life {
			t.untold(t.n.id, m.Envelope, n, reasonUnverified)
			continue
		}
		if t.leaveOpen(kept[i : i+1]) {
			t.log.Warn().Str("item", t.n.id).Stringer("client", m.Envelope.Client).Stringer("reverse_path", m.Envelope.ReversePath).
				Stringer("forward_path", n.path).Str("reply", n.outcome.reply().String()).Str("reason", reasonUnverified).Msg("dsn.kept")
		}
		t.mu.Lock()
		for _, r := range t.n.open {
			r.kept = r.kept || r.index == n.index
		}
		t.mu.Unlock()
	}
}

// leaveOpen has recipients that failed stay; those refused for good are not tried again. It says whether that is new.
func (t *trial) leaveOpen(some []news) (fresh bool) {
	t.mu.Lock()
	defer t.mu.Unlock()
	for _, r := range t.n.open {
		if !slices.ContainsFunc(some, func(n news) bool { return n.index == r.index }) {
			continue
		}
		before := r.unreported
		r.unreported = t.fates[r.index] == fateFailed
		fresh = fresh || r.unreported && !before
		t.fates[r.index] = fateLater
	}
	return fresh
}

// tellDelayed tells once of each recipient that has been waiting for long.
func (t *trial) tellDelayed(m *spool.Message, now time.Time) {
	var delayed []news
	for _, r := range t.n.open {
		if f, ours := t.fates[r.index]; ours && f == fateLater && t.isLate(r, now) && !t.isOver(r, now) {
			r.delayTold = true
			delayed = append(delayed, t.news(r, m))
		}
	}
	delayed, _ = t.wanted(t.n.id, m.Envelope, actionDelayed, delayed)
	_ = t.report(m, actionDelayed, delayed) // a courtesy: not tried again
}

// closeLocked closes those that may be, counts them by their fates, and gives their number.
func (t *trial) closeLocked(may func(*recipient) bool) (closed int) {
	t.n.open = slices.DeleteFunc(t.n.open, func(r *recipient) bool {
		if !may(r) {
			return false
		}
		switch t.fates[r.index] {
		case fateSent:
			t.counts.Sent++
		case fateFailed:
			t.counts.Failed++
		case fateExpired:
			t.counts.Expired++
		}
		closed++
		t.n.done = append(t.n.done, r.index)
		delete(t.fates, r.index)
		return true
	})
	return closed
}

// freeLocked gives those of a group back to the schedule that are open, and that may.
func (t *trial) freeLocked(g *group, now time.Time, may func(*recipient) bool) {
	n := t.n
	next := now.Add(backoff(g.number, t.random))
	for _, r := range g.recipients {
		f, ours := t.fates[r.index]
		if !ours || !may(r) {
			continue
		}
		delete(t.fates, r.index)
		r.busy = false
		if f == fateNone { // it is due as before
			continue
		}
		r.attempts, r.next = g.number, next
		n.attempts = max(n.attempts, g.number)
		end := n.bornAt().Add(r.life)
		if end.After(now) && (r.kept || next.After(end)) { // the last attempt is at the end of a life
			r.next = end
		}
		n.heard(r.last)
		if g.key != "" {
			n.transport = g.transport.Name
		}
		if g.lost {
			t.stickLocked(n, r, g.key)
		}
	}
}

// giveBack ends the attempts for groups: their slots are free, and what they have told and saved can go.
func (t *trial) giveBack(groups ...*group) {
	now := t.o.Now()
	t.mu.Lock()
	defer t.mu.Unlock()
	for _, g := range groups {
		t.giveBackLocked(g)
		t.endLocked(t.n)
		if g.results != nil {
			t.unstickAllLocked(g.key, now)
		}
	}
	for _, id := range t.dsns {
		n := t.items[id]
		n.waits = false
		t.endLocked(n)
	}
	t.dsns = nil
}
