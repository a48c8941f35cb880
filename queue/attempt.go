package queue

import (
	"context"
	"errors"
	"math/rand/v2"
	"slices"
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

// A trial is one run over the groups of an item.
type trial struct {
	*Queue
	n         *entry
	start     time.Time
	groups    []*group
	fates     map[int]fate // by recipient.index
	answered  []string     // keys of next hops that answered
	transport string
	dsns      []string // items, not to be tried before this one is settled
	kept      int      // recipients that wait, untried, for the end of their life

	outOfReach string // key of a next hop that was
	ended      bool   // at least one attempt ended by itself
}

// try makes one attempt for each group and settles the item.
func (q *Queue) try(ctx context.Context, n *entry, groups []*group) {
	t := &trial{Queue: q, n: n, start: q.o.Now(), groups: groups, fates: make(map[int]fate)}
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
		if !t.again(g) {
			continue
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
	start, life := t.o.Now(), t.lifeBy(g.transport)
	for _, r := range g.recipients {
		r.life = life
	}
	if g.unreported {
		t.ended = true
		for _, r := range g.recipients {
			t.fates[r.index] = fateFailed
		}
		return
	}
	if g.refused != nil {
		t.ended = true
		for _, r := range g.recipients {
			t.note(g, r, relay.Result{Path: r.path, Reply: g.refused}, start, 0)
		}
		return
	}
	paths, params := make([]mail.Path, len(g.recipients)), []mail.RcptParams(nil)
	for i, r := range g.recipients {
		paths[i] = r.path
		if m.Envelope.Params != nil {
			params = append(params, m.Envelope.Param(r.index))
		}
	}
	t.transport = g.transport.Name
	number := t.n.attempts + 1
	t.log.Info().Str("item", t.n.id).Str("transport", g.transport.Name).Int("attempt", number).
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
		t.ended = true
		t.answered = append(t.answered, g.key)
		if err != nil {
			t.log.Warn().Str("item", t.n.id).Int("attempt", number).AnErr("err", err).Msg("attempt.unanswered")
		}
		for i, r := range g.recipients {
			t.note(g, r, results[i], start, took)
		}
		t.tellRelayed(g, results, m)
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
		Stringer("stage", res.Stage).Str("reason", r.last.Class).Int("code", res.Reply.Code).Str("reply", res.Reply.String()).Int("attempt", t.n.attempts+1).
		Int64("took_ms", took.Milliseconds()).AnErr("err", res.Reply.Cause).Msg("attempt.done")
}

// news is what there is to tell about a recipient.
func (t *trial) news(r *recipient, m *spool.Message) news {
	return news{
		index: r.index, path: r.path, params: m.Envelope.Param(r.index), outcome: *r.last, life: r.life, until: t.n.bornAt().Add(r.life),
		expired: t.fates[r.index] == fateExpired,
	}
}

// tellRelayed tells a sender that asked for it of what a hop took that does not offer DSN.
func (t *trial) tellRelayed(g *group, results []relay.Result, m *spool.Message) {
	var relayed []news
	for i, r := range g.recipients {
		if t.fates[r.index] == fateSent && !results[i].DSN && m.Envelope.Param(r.index).Notify.Success() {
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

// settle makes durable what the attempts brought; gone says that the item is no more.
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
func (t *trial) settle(m *spool.Message) (gone bool) {
	n, now := t.n, t.o.Now()
	t.tellFailed(m, now)
	t.tellDelayed(m, now)
	open, closed := t.close()
	t.mu.Lock()
	n.open = open
	if t.ended && n.left == "" {
		n.attempts++
		n.next = now.Add(backoff(n.attempts, rand.Float64()))
		if n.kept = t.kept == len(open); n.kept {
			n.next = now.Add(maxLife) // and see below
		}
		n.transport = t.transport
	} // else not all of it was tried: it is due as before
	for i := range open {
		if open[i].last != nil {
			n.lastReply, n.class = open[i].last.reply().String(), open[i].last.Class
		}
		// The last attempt is at the end of a life.
		if end := n.bornAt().Add(open[i].life); t.ended && n.next.After(end) && end.After(now) {
			n.next = end
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

// tellFailed reports who is given up. Where that is not possible they stay open.
func (t *trial) tellFailed(m *spool.Message, now time.Time) {
	var failed []news
	for i := range t.n.open {
		r := &t.n.open[i]
		if t.fates[r.index] == fateLater && now.Sub(t.n.bornAt()) >= r.life {
			t.fates[r.index] = fateExpired
		}
		if f := t.fates[r.index]; f == fateFailed || f == fateExpired {
			failed = append(failed, t.news(r, m))
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
		t.kept++
		if t.leaveOpen(kept[i : i+1]) {
			t.log.Warn().Str("item", t.n.id).Stringer("client", m.Envelope.Client).Stringer("reverse_path", m.Envelope.ReversePath).
				Stringer("forward_path", n.path).Str("reply", n.outcome.reply().String()).Str("reason", reasonUnverified).Msg("dsn.kept")
		}
	}
}

// leaveOpen has recipients that failed stay; those refused for good are not tried again. It says whether that is new.
func (t *trial) leaveOpen(some []news) (fresh bool) {
	for i := range t.n.open {
		r := &t.n.open[i]
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
	after := t.o.DelayNotice()
	if after <= 0 || now.Sub(t.n.bornAt()) < after {
		return
	}
	var delayed []news
	for i := range t.n.open {
		if r := &t.n.open[i]; t.fates[r.index] == fateLater && !r.delayTold && !r.unreported && now.Sub(t.n.bornAt()) < r.life {
			r.delayTold = true
			delayed = append(delayed, t.news(r, m))
		}
	}
	delayed, _ = t.wanted(t.n.id, m.Envelope, actionDelayed, delayed)
	_ = t.report(m, actionDelayed, delayed) // a courtesy: not tried again
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
		if n.left != "" {
			t.waitLocked(n, n.left)
		} else {
			t.due.set(n, n.next)
		}
		if t.outOfReach != "" {
			t.stickLocked(n, t.outOfReach)
		}
	}
	for _, key := range t.answered {
		t.unstickAllLocked(key, now)
	}
	for _, id := range t.dsns {
		d := t.items[id]
		t.idleLocked(d)
		t.due.set(d, now)
	}
}
