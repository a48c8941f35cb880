package queue

import (
	"bytes"
	"context"
	"errors"
	"io"
	"time"

	"mailproxy/mail"
	"mailproxy/relay"
)

// An action is what a DSN says has happened (RFC 3464 §2.3.3).
type action string

const (
	actionFailed  action = "failed"
	actionDelayed action = "delayed"
	actionRelayed action = "relayed" // RFC 3461 §5.2.2: taken by a hop that will not tell
)

// News is what a DSN has to tell about one recipient.
type news struct {
	index   int // in the envelope
	path    mail.Path
	params  mail.RcptParams
	outcome outcome
	life    time.Duration // how long it is tried
	expired bool          // given up, after temporary outcomes only
	until   time.Time     // of what is delayed: when it is given up
}

// reasonUnverified: what a next hop refuses that we took while it was out of reach. The reverse-path may be forged, and nobody knows.
const reasonUnverified = "recipient never verified"

// unwanted says why nobody is told; "" where the sender is.
func unwanted(e *mail.Envelope, a action, n *news) (reason string) {
	switch {
	case e.ReversePath.IsNull():
		return "null reverse-path" // RFC 5321 §4.5.5: a DSN, or what does not want one
	case a == actionFailed && !n.params.Notify.Failure(), a == actionDelayed && !n.params.Notify.Delay():
		return "not asked for"
	case a != actionRelayed && n.params.Unverified && !n.expired:
		return reasonUnverified
	}
	return ""
}

// wanted gives the news that the sender is told, and of what failed those that are kept untold. What is neither, though it has failed,
// is in the log.
func (q *Queue) wanted(id string, e *mail.Envelope, a action, all []news) (told, kept []news) {
	for i := range all {
		n := &all[i]
		switch reason := unwanted(e, a, n); {
		case reason == "":
			told = append(told, *n)
		case a != actionFailed:
		case reason == reasonUnverified:
			kept = append(kept, *n)
		default:
			q.untold(id, e, n, reason)
		}
	}
	return told, kept
}

// untold logs and counts a recipient that is given up without a DSN.
func (q *Queue) untold(id string, e *mail.Envelope, n *news, reason string) {
	q.mu.Lock()
	q.counts.Untold++
	q.mu.Unlock()
	q.log.Warn().Str("session", e.Session).Str("item", id).Stringer("client", e.Client).Stringer("reverse_path", e.ReversePath).
		Stringer("forward_path", n.path).Str("reply", n.outcome.reply().String()).Str("reason", reason).Msg("dsn.none")
}

// DSN tells the sender what an attempt in the client's transaction has brought for the envelope's forward-paths, as far as it wants to
// hear it: one DSN for those that were refused for good, one for those taken by a hop that does not offer DSN. results are in the
// order of the forward-paths; what is temporary is not told. It gives the items that were made; nil where there is nothing to tell.
// Refused ones that were never verified are an item to be tried again, and so are all where too many DSNs have gone out already. The
// error is Put's, of what was refused: that a DSN of success could not be spooled is in the log.
func (q *Queue) DSN(ctx context.Context, e *mail.Envelope, results []relay.Result, c mail.Content) (ids []string, err error) {
	if err := ctx.Err(); err != nil {
		return nil, refusal(err)
	}
	var failed, relayed []news
	now := q.o.Now()
	for i, r := range results {
		n := news{index: i, path: r.Path, params: e.Param(i)}
		switch {
		case r.Reply.Permanent():
			n.outcome = *outcomeOf(r, now)
			failed = append(failed, n)
		case r.Reply.Positive() && !r.DSN && n.params.Notify.Success():
			n.outcome = *outcomeOf(r, now)
			relayed = append(relayed, n)
		}
	}
	failed, kept := q.wanted("", e, actionFailed, failed)
	if len(failed) > 0 {
		switch id, err := q.tell("", e, actionFailed, failed, c); {
		case errors.Is(err, errTooMany):
			kept = append(kept, failed...)
		case err != nil:
			return nil, refusal(err)
		default:
			ids = append(ids, id)
		}
	}
	if len(kept) > 0 {
		recipients := make([]int, len(kept))
		for i := range kept {
			recipients[i] = kept[i].index
		}
		more, err := q.Put(ctx, []Draft{{Envelope: e.For(recipients), Content: c}}, false)
		if err != nil {
			return nil, err
		}
		ids = append(ids, more...)
	}
	if relayed, _ = q.wanted("", e, actionRelayed, relayed); len(relayed) > 0 {
		if id, err := q.tell("", e, actionRelayed, relayed, c); err == nil {
			ids = append(ids, id)
		}
	}
	return ids, nil
}

// tell spools one DSN and gives its item. Of an item of the queue, it is not tried before that item is settled. The error is errTooMany,
// or says why it could not be spooled; all are in the log.
func (q *Queue) tell(item string, e *mail.Envelope, a action, told []news, c mail.Content) (id string, err error) {
	now := q.o.Now()
	if err = q.limit.take(e.ReversePath, now); err == nil {
		id = mail.NewID(now)
		err = q.spoolDSN(id, item, e, a, told, c)
	}
	if err != nil {
		q.log.Error().Str("session", e.Session).Str("item", item).Stringer("forward_path", e.ReversePath).Str("action", string(a)).
			AnErr("err", err).Msg("dsn.refused")
		return "", err
	}
	q.mu.Lock()
	q.counts.DSNs++
	q.mu.Unlock()
	q.log.Info().Str("session", e.Session).Str("item", id).Str("about", item).Stringer("forward_path", e.ReversePath).
		Str("action", string(a)).Msg("dsn.queued")
	return id, nil
}

func (q *Queue) spoolDSN(id, item string, e *mail.Envelope, a action, told []news, c mail.Content) error {
	header, err := readHeader(c)
	if err != nil {
		return err
	}
	d := &dsn{
		id: id, hostname: q.o.Hostname, now: q.o.Now(), envelope: e, action: a, told: told, header: header, utf8: !e.ReversePath.IsASCII(),
	}
	if a == actionFailed && e.Return == mail.ReturnFull && c.Size() <= maxReturned {
		d.whole = make([]byte, c.Size())
		if _, err := io.ReadFull(io.NewSectionReader(c, 0, c.Size()), d.whole); err != nil {
			return err
		}
	}
	b := d.bytes()
	draft := Draft{
		Envelope: mail.Envelope{
			Session: e.Session, ForwardPaths: []mail.Path{e.ReversePath}, SMTPUTF8: d.utf8, EightBit: d.eightBit, ReceivedAt: d.now,
		},
		Content: bytes.NewReader(b),
	}
	if item != "" {
		draft.waits = true
		draft.Envelope.About = &mail.About{Item: item, Delayed: a == actionDelayed}
		for i := range told {
			draft.Envelope.About.Recipients = append(draft.Envelope.About.Recipients, told[i].index)
		}
	}
	// No MinFree: the room is there so that what was accepted can be ended.
	return q.put([]string{id}, []Draft{draft}, false, int64(len(b)), 0)
}
