package smtpd

import (
	"cmp"
	"errors"
	"io"
	"strconv"
	"time"

	"github.com/emersion/go-smtp"

	"mailproxy/config"
	"mailproxy/filter"
	"mailproxy/mail"
	"mailproxy/relay"
)

// ruleLimits is the rule of a verdict that refuses a message before it is looked at.
const ruleLimits = "limits"

// A transaction is one MAIL to the end of its DATA. It keeps the Ruleset that was in force at MAIL.
type transaction struct {
	rules    *filter.Ruleset
	settings config.Values
	id       string
	trusted  bool // the client is in one of our networks
	envelope mail.Envelope
	hops     []nextHop // one for each forward-path
}

// A nextHop is the way of one forward-path.
type nextHop struct {
	transport config.Transport
	domain    string
	ours      bool // we relay for the domain: delivered at once; otherwise queued

	// postmaster: mail for it is taken whatever the next hop thinks (RFC 5321 §4.5.1).
	postmaster bool
	// unverified: nobody said that the recipient exists.
	unverified bool
}

// session is what go-smtp calls; everything is in its conn.
type session struct{ *conn }

func newSession(c *smtp.Conn) (smtp.Session, error) {
	ours, ok := c.Conn().(*conn)
	if !ok {
		return nil, errors.New("smtpd: not a connection of ours")
	}
	return session{ours}, nil
}

// Reset ends the transaction.
func (s session) Reset() { s.tx = nil }

// Logout does nothing: conn ends by itself.
func (s session) Logout() error { return nil }

// Mail begins a transaction by what the client wrote, which is in conn; go-smtp was handed fixed text.
func (s session) Mail(string, *smtp.MailOptions) error {
	c := s.conn
	rules := c.server.o.Rules()
	if rules == nil {
		return c.door(replyInternal, nil)
	}
	v := rules.Settings()
	switch {
	case c.harvest:
		c.server.limited(limitUnknown, c.client)
		c.end(replyHarvest)
		return c.door(replyHarvest, nil)
	case c.tls == nil && (c.side == inside && v.InternalRequireTLS || rules.RequiresTLS(c.next.path)):
		return c.door(replyTLSFirst, nil)
	case c.next.size > v.MaxMessageSize:
		return c.door(replyTooBig, nil)
	case !c.take(rateMessages, limitsOf(&v, c.side).MaxMessagesPerMinute):
		c.server.limited(limitMessages, c.client)
		return c.door(replyTooManyMessages, nil)
	}
	c.count++
	now := time.Now()
	c.tx = &transaction{
		rules: rules, settings: v, id: c.id + "." + strconv.Itoa(c.count), trusted: rules.Trusted(c.client),
		envelope: mail.Envelope{
			Session: c.id, ReversePath: c.next.path, Client: c.client, Port: c.port, Helo: c.helo, SMTPUTF8: c.next.utf8,
			EightBit: c.next.eightBit, Return: c.next.ret, EnvID: c.next.envID, ReceivedAt: now,
		},
	}
	return c.door(replyMailOK, nil)
}

// Rcpt takes a recipient, or passes on why not.
func (s session) Rcpt(string, *smtp.RcptOptions) error {
	c := s.conn
	v := &c.tx.settings
	switch {
	case len(c.tx.envelope.ForwardPaths) >= v.MaxRecipients:
		return c.door(replyTooManyRcpt, nil)
	case c.harvest:
		return c.harvested(v)
	case !c.take(rateRecipients, limitsOf(v, c.side).MaxRecipientsPerMinute):
		c.server.limited(limitRecipients, c.client)
		return c.door(replyTooManyRecipients, nil)
	}
	to, hop, refused := c.recipient(c.next.path)
	if refused != nil {
		c.server.count.recipientsRefused.Add(1)
		if refused.Permanent() {
			c.countUnknown(v)
		}
		c.log.Info().Stringer("client", c.client).Stringer("reverse_path", c.tx.envelope.ReversePath).
			Stringer("forward_path", to).Int("code", refused.Code).Str("reason", refused.Text).AnErr("err", refused.Cause).
			Msg("recipient.refused")
		return c.door(refused, nil)
	}
	params := c.next.params
	params.Unverified = hop.unverified && !c.tx.trusted
	c.tx.envelope.Add(to, params)
	c.tx.hops = append(c.tx.hops, hop)
	return c.door(replyRcptOK, nil)
}

// nameClient waits, for a bounded time, until the client's name is known, and notes it.
func (c *conn) nameClient() { c.tx.envelope.Name = c.name.by(c.named) }

// accepts says whether the listener takes mail of this client for a recipient, and gives the path that it goes to.
func (c *conn) accepts(path mail.Path) (mail.Path, *mail.Reply) {
	switch c.kind.Purpose {
	case MX:
		return c.tx.rules.AcceptsOurs(path)
	case Internal:
		if !c.tx.trusted {
			return path, replyNotOurs
		}
	}
	return c.tx.rules.Accepts(c.client, path)
}

// replyTLSFirst is RFC 3207 §4.
var replyTLSFirst = r(530, 570, "must issue a STARTTLS command first")

var replyNoSuchUser = r(550, 511, "no such recipient here")

// recipient decides about one recipient: by the Ruleset, and by its domain's list of recipients or its next hop, where that can be asked.
func (c *conn) recipient(path mail.Path) (mail.Path, nextHop, *mail.Reply) {
	tx := c.tx
	to, refused := c.accepts(path)
	if refused != nil {
		return to, nextHop{}, refused
	}
	transport, refused := tx.rules.Route(to)
	if refused != nil {
		return to, nextHop{}, refused
	}
	hop := nextHop{transport: transport, domain: config.ASCIIDomain(to.Domain), ours: tx.rules.Ours(to), postmaster: path.IsPostmaster()}
	if hop.unverified = hop.postmaster; !hop.ours || hop.postmaster {
		return to, hop, nil
	}
	if listed, known, named := tx.rules.Listed(to); listed {
		if !known {
			return to, hop, replyNoSuchUser
		}
		hop.unverified = !named
		return to, hop, nil
	}
	if transport.Tell == config.TellXClient {
		c.nameClient()
	}
	reply, err := c.server.o.Relay.Ask(c.ctx, transport, hop.domain, &tx.envelope, to)
	var away *relay.OutOfReach
	switch {
	case errors.As(err, &away):
		hop.unverified = true
		return to, hop, nil // it will be queued
	case err != nil:
		return to, hop, internal(err)
	case reply.Positive():
		return to, hop, nil
	}
	return to, hop, reply
}

// Data reads the message and decides about it. go-smtp's reader is not used: conn has the wire.
func (s session) Data(io.Reader) error {
	c := s.conn
	start := time.Now()
	message, refused, ok := c.readMessage()
	if message != nil {
		defer message.release()
	}
	if !ok {
		return c.door(replyInternal, nil) // the session has ended; nothing is written any more
	}
	c.server.count.messages.Add(1)
	var out outcome
	if refused != nil {
		out = outcome{reply: refused, verdict: filter.Verdict{Action: filter.ActionReject, Rule: ruleLimits, Reason: "not taken"}}
	} else {
		out = c.decide(message)
	}
	return c.finish(out, message.Size(), start)
}

// finish counts and logs a message's outcome and passes it to the door. After it go-smtp is given its final dot.
func (c *conn) finish(out outcome, size int64, start time.Time) error {
	tx, n := c.tx, &c.server.count
	if out.reply == nil {
		n.gone.Add(1)
		c.log.Info().Str("transaction", tx.id).Str("reason", "client gone before the final dot").Msg("mail.dropped")
		c.end(replyGone) // one that has only closed its own direction reads it
		return c.door(replyGone, nil)
	}
	switch {
	case !out.reply.Positive():
		n.rejected.Add(1)
	case out.item != "":
		n.queued.Add(1)
	default:
		n.delivered.Add(1)
	}
	c.logVerdict(out, size, start)
	reply := withID(out.reply, cmp.Or(out.item, tx.id))
	if out.reply.Positive() {
		c.faults = tx.settings.MaxErrors
		reply.Code = 250 // what a client and go-smtp expect; a next hop's 251 is as good
	}
	c.phase = phaseDot
	if out.verdict.Rule == ruleLimits && reply.Permanent() {
		c.abort(reply) // a client that does not keep to sizes is in doubt about the rest, too
	}
	if out.gone {
		if out.reply.Positive() {
			n.duplicates.Add(1)
			c.log.Warn().Str("transaction", tx.id).Str("hop", out.hop).Str("reason", "client gone after the final dot").
				Msg("mail.possible_duplicate")
		}
		c.end(reply)
	}
	return c.door(reply, nil)
}

func (c *conn) logVerdict(out outcome, size int64, start time.Time) {
	e := c.log.Info().Str("transaction", c.tx.id)
	if out.item != "" {
		e.Str("item", out.item)
	}
	if out.hop != "" {
		e.Str("hop", out.hop)
	}
	e.Stringer("client", c.client).Stringer("reverse_path", c.tx.envelope.ReversePath).
		Array("forward_path", pathArray(c.tx.envelope.ForwardPaths)).Stringer("verdict", out.verdict.Action).
		Str("rule", out.verdict.Rule).Str("reason", out.verdict.Reason).Int("code", out.reply.Code).Str("reply", out.reply.Text).
		Int64("bytes", size).Int64("took_ms", time.Since(start).Milliseconds()).AnErr("err", out.reply.Cause).Msg("mail.verdict")
}
