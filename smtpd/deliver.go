package smtpd

import (
	"context"
	"errors"
	"slices"
	"strings"

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

// A group is the forward-paths of one next hop.
type group struct {
	key string
	nextHop
	paths []mail.Path
}

// groups sorts the forward-paths by next hop; later are those that are only to be queued.
func (tx *transaction) groups() (now []group, later []mail.Path) {
	for i, p := range tx.envelope.ForwardPaths {
		hop := tx.hops[i]
		if !hop.ours || !tx.settings.CutThrough {
			later = append(later, p)
			continue
		}
		key := string(hop.transport.TLS) + " " + strings.Join(hop.transport.Hosts, " ")
		if len(hop.transport.Hosts) == 0 {
			key += "mx " + hop.domain
		}
		j := slices.IndexFunc(now, func(g group) bool { return g.key == key })
		if j < 0 {
			now = append(now, group{key: key, nextHop: hop})
			j = len(now) - 1
		}
		now[j].paths = append(now[j].paths, p)
	}
	return now, later
}

// A delivery is the end of one transaction: cut-through to the first next hop that takes anything, the rest through the queue.
//
//	for each next hop in turn:
//	  all its recipients refused      -> remembered; the next one's turn
//	  out of reach                    -> all that is left is queued
//	  before its dot                  -> what is left for others is spooled, held
//	  its 2xx                         -> held items released, refused recipients reported by DSN: its answer
//	  its 4xx or 5xx, or no answer    -> held items dropped: its answer
//	all have refused all              -> what is for postmaster is queued; without any, the worst answer
type delivery struct {
	*conn
	ctx     context.Context // ends when the client is gone
	message mail.Content
	refused []relay.Result // of next hops that have taken nothing
	held    []string       // items
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
func (d *delivery) inTurn(now []group, later []mail.Path) outcome {
	for i, g := range now {
		rest := slices.Clone(later)
		for _, other := range now[i+1:] {
			rest = append(rest, other.paths...)
		}
		results, err := d.attempt(g, rest)
		reply := dotReply(results)
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
			return d.settle(d.spool(append(rest, g.paths...), away))
		case errors.Is(err, relay.ErrNoAnswer):
			out := outcome{reply: reply, hop: hopOf(results)}
			d.mayComeTwice(out, err, "the next hop may have taken it")
			return out
		case errors.As(err, &ours):
			return outcome{reply: ours}
		case err != nil && d.ctx.Err() != nil:
			return outcome{}
		case err != nil:
			return outcome{reply: internal(err)}
		case reply != nil:
			return d.answered(reply, results)
		}
		d.refused = append(d.refused, results...)
	}
	if later = append(later, d.postmaster()...); len(later) > 0 {
		return d.settle(d.spool(later, nil))
	}
	return outcome{reply: worst(d.refused), hop: hopOf(d.refused)}
}

// postmaster takes those out of the refused that we said yes to whatever their next hop thinks: the queue asks it again, and the
// sender has a DSN where it stays with its no. What a next hop says of the message itself stands.
func (d *delivery) postmaster() (paths []mail.Path) {
	d.refused = slices.DeleteFunc(d.refused, func(r relay.Result) bool {
		kept := r.Stage <= relay.StageRcpt && d.tx.forPostmaster(r.Path)
		if kept {
			paths = append(paths, r.Path)
		}
		return kept
	})
	return paths
}

// attempt delivers to one next hop; what others are to have is spooled before its dot.
func (d *delivery) attempt(g group, rest []mail.Path) ([]relay.Result, error) {
	a := relay.Attempt{Transport: g.transport, Domain: g.domain, Envelope: &d.tx.envelope, Paths: g.paths, Content: d.message}
	if len(rest) > 0 || len(g.paths) > 1 || len(d.refused) > 0 {
		a.BeforeDot = func(results []relay.Result) error {
			paths := slices.Clone(rest)
			for _, r := range append(slices.Clone(d.refused), results...) {
				if r.Reply.Temporary() {
					paths = append(paths, r.Path) // taken by us in place of a next hop that may take it later
				}
			}
			if len(paths) == 0 {
				return nil
			}
			ids, err := d.server.o.Queue.Put(d.ctx, []queue.Draft{d.draft(paths)}, true)
			d.held = ids
			return err
		}
	}
	results, err := d.server.o.Relay.Deliver(d.ctx, a)
	if err == nil {
		d.server.o.Queue.HopAnswered(g.transport, g.paths[0])
	}
	return results, err
}

func (d *delivery) draft(paths []mail.Path) queue.Draft {
	e := d.tx.envelope
	e.ForwardPaths = paths
	return queue.Draft{Envelope: e, Content: d.message}
}

// answered ends the delivery with a next hop's answer to the final dot.
func (d *delivery) answered(reply *mail.Reply, results []relay.Result) outcome {
	out := outcome{reply: reply, hop: hopOf(results)}
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
	d.refused = append(d.refused, results...)
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

// report sends a DSN for recipients that were refused for good, while others were taken.
func (d *delivery) report() error {
	failed := slices.DeleteFunc(slices.Clone(d.refused), func(r relay.Result) bool { return !r.Reply.Permanent() })
	if len(failed) == 0 {
		return nil
	}
	_, err := d.server.o.Queue.DSN(context.WithoutCancel(d.ctx), &d.tx.envelope, failed, d.message)
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

// spool puts the message in the queue for these paths, and for those that were refused for now. tried is the attempt that all of
// the former have just had.
func (d *delivery) spool(paths []mail.Path, tried *relay.OutOfReach) outcome {
	for _, r := range d.refused {
		if r.Reply.Temporary() {
			paths, tried = append(paths, r.Path), nil
		}
	}
	draft := d.draft(paths)
	draft.Tried = tried
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
func dotReply(results []relay.Result) *mail.Reply {
	for i := range results {
		if s := results[i].Stage; s == relay.StageDot {
			return results[i].Reply
		}
	}
	return nil
}

// worst is the answer for recipients that were all refused: a temporary one, if there is one, since then trying again makes sense.
func worst(results []relay.Result) *mail.Reply {
	for i := range results {
		if results[i].Reply.Temporary() {
			return results[i].Reply
		}
	}
	return results[0].Reply
}

func hopOf(results []relay.Result) string {
	if len(results) == 0 {
		return ""
	}
	return results[0].Hop
}
