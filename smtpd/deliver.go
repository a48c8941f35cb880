package smtpd

import (
	"context"
	"errors"
	"slices"

	"github.com/rs/zerolog"

	"mailproxy/filter"
	"mailproxy/mail"
	"mailproxy/queue"
	"mailproxy/relay"
)

// An outcome is what became of a message.
type outcome struct {
	verdict filter.Verdict
	// reply is for the client; nil where it was gone before the final dot, and the message was dropped.
	reply *mail.Reply
	// item is the queue's ID where the message was spooled and not delivered.
	item string
	// hop is the next hop that answered.
	hop string
	// gone: the client was not there any more when the outcome was known.
	gone bool
}

type pathArray []mail.Path

// MarshalZerologArray is zerolog's.
func (p pathArray) MarshalZerologArray(a *zerolog.Array) {
	for _, x := range p {
		a.Str(x.String())
	}
}

// decide asks the Ruleset and does what it says.
func (c *conn) decide(message mail.Content) outcome {
	tx := c.tx
	if countReceived(message, message.Size()) > maxHops+1 { // ours is among them
		return outcome{reply: replyLoop, verdict: filter.Verdict{Action: filter.ActionReject, Rule: "loop", Reason: "too many hops"}}
	}
	verdict := tx.rules.Decide(&tx.envelope, message)
	var out outcome
	switch verdict.Action {
	case filter.ActionDeliver:
		out = c.deliver(message)
	default:
		out.reply = internal(errors.New("verdict without a way: " + verdict.Rule))
	}
	out.verdict = verdict
	return out
}

// A group is the recipients of one next hop, as indexes of the envelope's forward-paths.
type group struct {
	nextHop
	recipients []int
}

// groups sorts the recipients by next hop; later are those that are only to be queued.
func (tx *transaction) groups() (now []group, later []int) {
	for i := range tx.envelope.ForwardPaths {
		hop := tx.hops[i]
		if !hop.ours || !tx.settings.CutThrough {
			later = append(later, i)
			continue
		}
		j := slices.IndexFunc(now, func(g group) bool { return g.isThat(&hop) })
		if j < 0 {
			now = append(now, group{nextHop: hop})
			j = len(now) - 1
		}
		now[j].recipients = append(now[j].recipients, i)
	}
	return now, later
}

// isThat says whether one transaction can be for both: they are the same hosts, spoken to in the same way.
func (n *nextHop) isThat(other *nextHop) bool {
	t, o := &n.transport, &other.transport
	return t.TLS == o.TLS && t.Order == o.Order && t.User == o.User && t.Password == o.Password && t.Tell == o.Tell &&
		slices.Equal(t.Hosts, o.Hosts) && (len(t.Hosts) > 0 || n.domain == other.domain)
}

// An answer is what a next hop said of one recipient.
type answer struct {
	relay.Result
	recipient int
}

// A delivery is the end of one transaction: cut-through to the first next hop that takes anything, the rest through the queue. The
// table says what each answer of the next hop whose turn it is brings: to its recipients, to all others, and to the client. Rows
// higher up win where two apply.
//
//	next hop says                     its recipients            all others             the client
//	out of reach before any answer    queued                    queued, not asked      250 queued
//	MAIL 4xx/5xx, or all RCPT so,     that answer, remembered   the next hop's turn    the next hop's answer;
//	or DATA so, or lost before the                                                     with none left the worst
//	dot                                                                                answer, 4xx before 5xx
//	RCPT 2xx for some, then the dot
//	  2xx                             taken; those refused      queued, if not         250
//	                                  4xx queued, 5xx reported  refused before (below)
//	  4xx, 5xx                        not taken, forgotten      forgotten              that answer
//	  no answer                       taken or not              forgotten              451: a possible duplicate
//
//	answers remembered, once the client has a 250: 4xx queued, 5xx reported. Where nobody has taken anything, postmaster whose MAIL
//	or RCPT was refused is queued.
//
// "Reported" is one DSN for all of them, spooled before the 250. What is queued behind a next hop's dot was spooled before that dot,
// held: its 2xx releases it, anything else drops it, and so does a start that finds it held. So a kill at any instant leaves either
// everything that a 250 has promised, or a client without an answer, who comes again: then what was taken, or released just before,
// comes twice.
//
// The order is that of the first recipient of each next hop.
type delivery struct {
	*conn
	ctx     context.Context // ends when the client is gone
	message mail.Content
	refused []answer // of next hops that have taken nothing
	held    []string // items
}

// deliver passes the message on, or spools it.
func (c *conn) deliver(message mail.Content) (out outcome) {
	now, later := c.tx.groups()
	d := &delivery{conn: c, message: message}
	if len(now) == 0 {
		return d.spool(later, nil)
	}
	ctx, cancel := context.WithCancel(c.ctx)
	defer cancel()
	d.ctx = ctx
	stop := c.watch(cancel)
	defer func() { out.gone = stop() }() // also when what follows panics: the input is the session's again
	return d.inTurn(now, later)
}

// inTurn tries the next hops until one has taken something.
func (d *delivery) inTurn(now []group, later []int) outcome {
	for i, g := range now {
		rest := slices.Clone(later)
		for _, other := range now[i+1:] {
			rest = append(rest, other.recipients...)
		}
		answers, err := d.attempt(g, rest)
		reply := dotReply(answers)
		if err != nil || reply == nil {
			d.drop() // what was held before a dot that was not sent, or not answered
		}
		var away *relay.OutOfReach
		var ours *mail.Reply
		switch {
		case errors.As(err, &away):
			if len(rest) > 0 {
				away = nil // the others have not been tried
			}
			return d.settle(d.spool(append(rest, g.recipients...), away))
		case errors.Is(err, relay.ErrNoAnswer):
			out := outcome{reply: reply, hop: hopOf(answers)}
			d.mayComeTwice(out, err, "the next hop may have taken it")
			return out
		case errors.As(err, &ours):
			return outcome{reply: ours}
		case err != nil && d.ctx.Err() != nil:
			return outcome{}
		case err != nil:
			return outcome{reply: internal(err)}
		case reply != nil:
			return d.answered(reply, answers)
		}
		d.refused = append(d.refused, answers...)
	}
	if later = append(later, d.postmaster()...); len(later) > 0 {
		return d.settle(d.spool(later, nil))
	}
	return outcome{reply: worst(d.refused), hop: hopOf(d.refused)}
}

// postmaster takes those out of the refused that we said yes to whatever their next hop thinks: the queue asks it again, and where it
// stays with its no, a sender in our networks has a DSN. What a next hop says of the message itself stands.
func (d *delivery) postmaster() (recipients []int) {
	d.refused = slices.DeleteFunc(d.refused, func(a answer) bool {
		kept := a.Stage <= relay.StageRcpt && d.tx.hops[a.recipient].postmaster
		if kept {
			recipients = append(recipients, a.recipient)
		}
		return kept
	})
	return recipients
}

// attempt delivers to one next hop; what others are to have is spooled before its dot.
func (d *delivery) attempt(g group, rest []int) ([]answer, error) {
	e := d.tx.envelope.For(g.recipients)
	a := relay.Attempt{
		Transport: g.transport, Domain: g.domain, Envelope: &e, Paths: e.ForwardPaths, Params: e.Params, Content: d.message,
	}
	if len(rest) > 0 || len(g.recipients) > 1 || len(d.refused) > 0 {
		a.BeforeDot = func(results []relay.Result) error { return d.hold(rest, answersOf(g, results)) }
	}
	results, err := d.server.o.Relay.Deliver(d.ctx, a)
	if err == nil {
		d.server.o.Queue.HopAnswered(g.transport, e.ForwardPaths[0])
	}
	return answersOf(g, results), err
}

// answersOf says whose each result is: they come in the order of the group's recipients.
func answersOf(g group, results []relay.Result) []answer {
	answers := make([]answer, len(results))
	for i, r := range results {
		answers[i] = answer{r, g.recipients[i]}
	}
	return answers
}

// hold spools what the queue is to have if the dot that follows is answered with 2xx: for the rest, and for those that were refused
// for now, taken by us in place of a next hop that may take them later. Who was refused for good is to be reported behind that dot: a
// spool that is known to take no report stops it, or each time that the client comes again the others would have the message once more.
func (d *delivery) hold(rest []int, answers []answer) (err error) {
	all := slices.Concat(d.refused, answers)
	if i := slices.IndexFunc(all, func(a answer) bool { return a.Reply.Permanent() }); i >= 0 && d.server.o.Queue.Healthy() != nil {
		if err := d.probe(all[i].recipient); err != nil {
			return err
		}
	}
	recipients := appendTemporary(slices.Clone(rest), all)
	if len(recipients) == 0 {
		return nil
	}
	d.held, err = d.server.o.Queue.Put(d.ctx, []queue.Draft{d.draft(recipients)}, true)
	return err
}

// probe looks whether a spool that was out of order takes anything now.
func (d *delivery) probe(recipient int) error {
	ids, err := d.server.o.Queue.Put(d.ctx, []queue.Draft{d.draft([]int{recipient})}, true)
	if err != nil {
		return err
	}
	return d.server.o.Queue.Drop(ids)
}

func appendTemporary(recipients []int, answers []answer) []int {
	for i := range answers {
		if answers[i].Reply.Temporary() {
			recipients = append(recipients, answers[i].recipient)
		}
	}
	return recipients
}

func (d *delivery) draft(recipients []int) queue.Draft {
	return queue.Draft{Envelope: d.tx.envelope.For(recipients), Content: d.message}
}

// answered ends the delivery with a next hop's answer to the final dot.
func (d *delivery) answered(reply *mail.Reply, answers []answer) outcome {
	out := outcome{reply: reply, hop: hopOf(answers)}
	if !reply.Positive() {
		d.drop()
		return out
	}
	if len(d.held) > 0 {
		if err := d.server.o.Queue.Release(d.held); err != nil {
			d.drop()
			return d.torn(out, err)
		}
	}
	d.refused = append(d.refused, answers...)
	if err := d.report(); err != nil {
		return d.torn(out, err)
	}
	return out
}

// settle ends a delivery whose rest was spooled: recipients that next hops refused for good are reported.
func (d *delivery) settle(out outcome) outcome {
	if out.reply.Positive() {
		if err := d.report(); err != nil {
			return d.torn(out, err)
		}
	}
	return out
}

// torn: some recipients have the message and for others nothing is durable. The client must come again, and the first get it
// twice.
func (d *delivery) torn(out outcome, err error) outcome {
	d.mayComeTwice(out, err, "taken by one next hop, not spooled for the others")
	out.reply, out.item = internal(err), ""
	return out
}

// mayComeTwice counts and names a message that was perhaps taken, and whose client is told to come again.
func (d *delivery) mayComeTwice(out outcome, err error, reason string) {
	d.server.count.duplicates.Add(1)
	d.log.Warn().Str("transaction", d.tx.id).Str("hop", out.hop).Err(err).Str("reason", reason).Msg("mail.possible_duplicate")
}

// report tells the sender, by DSN, of recipients that were refused for good while others were taken, and of what it wants to hear
// besides.
func (d *delivery) report() error {
	if d.tx.envelope.Params == nil && !slices.ContainsFunc(d.refused, func(a answer) bool { return a.Reply.Permanent() }) {
		return nil
	}
	recipients, results := make([]int, len(d.refused)), make([]relay.Result, len(d.refused))
	for i, a := range d.refused {
		recipients[i], results[i] = a.recipient, a.Result
	}
	e := d.tx.envelope.For(recipients)
	_, err := d.server.o.Queue.DSN(context.WithoutCancel(d.ctx), &e, results, d.message)
	return err
}

func (d *delivery) drop() {
	if len(d.held) == 0 {
		return
	}
	if err := d.server.o.Queue.Drop(d.held); err != nil {
		// Held items are never tried, and are dropped at the next start.
		d.log.Warn().Str("transaction", d.tx.id).Err(err).Msg("mail.drop")
	}
	d.held = nil
}

// spool puts the message in the queue for these recipients, and for those that were refused for now. tried is the attempt that all
// of the former have just had.
func (d *delivery) spool(recipients []int, tried *relay.OutOfReach) outcome {
	all := appendTemporary(recipients, d.refused)
	draft := d.draft(all)
	if len(all) == len(recipients) {
		draft.Tried = tried
	}
	ids, err := d.server.o.Queue.Put(d.conn.ctx, []queue.Draft{draft}, false)
	if err != nil {
		var reply *mail.Reply
		if !errors.As(err, &reply) {
			reply = internal(err)
		}
		return outcome{reply: reply}
	}
	return outcome{reply: &mail.Reply{Code: 250, Enhanced: [3]int{2, 0, 0}, Text: "queued as " + ids[0]}, item: ids[0]}
}

// dotReply is the answer to the final dot; nil where no recipient came that far.
func dotReply(answers []answer) *mail.Reply {
	for i := range answers {
		if answers[i].Stage == relay.StageDot {
			return answers[i].Reply
		}
	}
	return nil
}

// worst is the answer for recipients that were all refused: a temporary one, if there is one, since then trying again makes sense.
func worst(answers []answer) *mail.Reply {
	for i := range answers {
		if answers[i].Reply.Temporary() {
			return answers[i].Reply
		}
	}
	return answers[0].Reply
}

func hopOf(answers []answer) string {
	if len(answers) == 0 {
		return ""
	}
	return answers[0].Hop
}
