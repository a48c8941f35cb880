package relay

import (
	"context"
	"errors"
	"slices"
	"sync"
	"time"

	"mailproxy/mail"
)

// maxGroup is how many RCPT go out before their replies are read: more could fill both directions' windows (RFC 2920 §3.1).
const maxGroup = 100

// scratch is what a transaction needs of memory and an idle connection does not.
type scratch struct {
	in      [16 << 10]byte
	out     []byte
	pending []pending
}

// outSize holds a read block stuffed at its worst on top of what is flushed at flushSize.
const (
	flushSize = 32 << 10
	outSize   = flushSize + 2*16<<10 + 16
)

var scratches = sync.Pool{New: func() any { return &scratch{out: make([]byte, 0, outSize)} }}

// pending is a command whose reply has not been read.
type pending struct {
	stage Stage
	path  int // index of the path, for RCPT
}

// A transaction is one MAIL to the end of DATA on a connection:
//
//	offer: [RSET] MAIL RCPT… DATA  ->  body  ->  BeforeDot  ->  dot  ->  answer
//	         | all refused, DATA refused: done
type transaction struct {
	*scratch
	conn    *conn
	a       *Attempt
	results []Result

	stop     func() bool // ends the context's hold on the connection; nil once that was done
	answered bool        // a reply of this transaction came
	mailOK   bool
	over     bool // MAIL refused, or nothing more to be had from this connection
	goAhead  bool // DATA was answered 354
	accepted int  // paths whose RCPT was answered 2xx
}

// unansweredError: the connection ended before any reply of this transaction came.
type unansweredError struct{ err error }

func (e *unansweredError) Error() string { return "nothing was answered: " + e.err.Error() }
func (e *unansweredError) Unwrap() error { return e.err }

func newTransaction(cn *conn, a *Attempt, results []Result) *transaction {
	x := &transaction{scratch: scratches.Get().(*scratch), conn: cn, a: a, results: results}
	x.out, x.pending = x.out[:0], x.pending[:0]
	for i, p := range a.Paths {
		results[i] = Result{Path: p, Hop: cn.hop.addr, Stage: StageRcpt, DSN: cn.caps.dsn}
	}
	return x
}

// end gives the memory back.
func (x *transaction) end() {
	scratches.Put(x.scratch)
	x.scratch = nil
}

// deliver runs the transaction. The error is *unansweredError, ErrNoAnswer, BeforeDot's or the context's; otherwise results
// is filled.
func (x *transaction) deliver(ctx context.Context) (err error) {
	x.stop = context.AfterFunc(ctx, x.conn.abort)
	defer func() {
		if !x.release() {
			x.conn.broken = true
			if err == nil || errors.As(err, new(*unansweredError)) {
				err = ctx.Err()
			}
		}
	}()
	if err := x.offer(); err != nil || x.over {
		return err
	}
	if x.accepted == 0 {
		if x.goAhead {
			x.loneDot()
		}
		return nil
	}
	if !x.goAhead {
		return nil
	}
	if err := x.body(); err != nil {
		x.earlyEnd(err)
		return nil
	}
	if x.a.BeforeDot != nil {
		if err := x.flush(); err != nil {
			x.earlyEnd(err)
			return nil
		}
		if err := x.a.BeforeDot(x.results); err != nil {
			x.conn.broken = true
			return err
		}
	}
	// From here on the context is ignored: either its end comes first and the dot is never sent, or the dot is sent and waited for.
	if !x.release() {
		x.conn.broken = true
		return ctx.Err()
	}
	return x.dot()
}

// release takes the connection out of the context's hands; false when the context has ended and closed it.
func (x *transaction) release() bool {
	if x.stop == nil {
		return true
	}
	stopped := x.stop()
	if stopped {
		x.stop = nil
	}
	return stopped
}

// offer sends the envelope and DATA and files the replies. Where nothing more can follow, over is set and results are full.
func (x *transaction) offer() error {
	if x.conn.r.Buffered() > 0 {
		x.conn.broken = true
		return &unansweredError{protocolError("reply without a command")}
	}
	e := x.a.Envelope
	reverse, todo, utf8 := x.addresses(e)
	if todo == 0 {
		x.over = true
		return nil
	}
	if x.conn.dirty {
		x.out = append(x.out, "RSET\r\n"...)
		if err := x.sent(StageReset, 0); err != nil || x.over {
			return err
		}
	}
	size := int64(0)
	if x.a.Content != nil {
		size = x.a.Content.Size()
	}
	x.out = x.conn.appendMail(x.out, e, reverse, size, utf8)
	x.conn.mails++
	if err := x.sent(StageMail, 0); err != nil || x.over {
		return err
	}
	for i := range x.a.Paths {
		if x.results[i].Reply != nil {
			continue
		}
		x.out = append(x.out, "RCPT TO:<"...)
		x.out = append(x.out, x.a.Paths[i].String()...)
		x.out = append(x.out, '>')
		if x.conn.caps.dsn && x.a.Params != nil {
			x.out = appendRcptDSN(x.out, x.a.Params[i])
		}
		x.out = append(x.out, "\r\n"...)
		if err := x.sent(StageRcpt, i); err != nil || x.over {
			return err
		}
	}
	return x.finishOffer()
}

// finishOffer sends DATA, or RSET where only the answer to RCPT was wanted, and reads what is still to come.
func (x *transaction) finishOffer() error {
	if x.a.Content == nil {
		x.out = append(x.out, "RSET\r\n"...)
		if err := x.sent(StageReset, 0); err != nil {
			return err
		}
		return x.sync()
	}
	if !x.conn.caps.pipelining && x.accepted == 0 {
		x.conn.dirty = true
		return nil
	}
	x.out = append(x.out, "DATA\r\n"...)
	if err := x.sent(StageData, 0); err != nil {
		return err
	}
	return x.sync()
}

// addresses answers what this hop cannot be given and says how many paths are left and whether SMTPUTF8 is to be asked for.
func (x *transaction) addresses(e *mail.Envelope) (reverse string, todo int, utf8 bool) {
	reverse = e.ReversePath.String()
	needed := !e.ReversePath.IsASCII()
	var domains []string
	for i, p := range x.a.Paths {
		ascii := p.IsASCII()
		switch {
		case !(ascii && e.ReversePath.IsASCII()) && !x.conn.caps.smtputf8:
			x.results[i].Reply = &mail.Reply{Code: 550, Enhanced: [3]int{5, 6, 7}, Text: "next hop does not take internationalized addresses", Cause: errNotAsked}
		case p.IsNull() || hasControl(p.Local) || hasControl(p.Domain) || hasControl(reverse):
			x.results[i].Reply = &mail.Reply{Code: 553, Enhanced: [3]int{5, 1, 3}, Text: "bad address", Cause: errNotAsked}
		case !x.room(todo, p.Domain, &domains):
			x.results[i].Reply = &mail.Reply{Code: 452, Enhanced: [3]int{4, 5, 3}, Text: "too many recipients for the next hop at once", Cause: errTooMany}
		default:
			todo++
			needed = needed || !ascii
		}
	}
	// A client that said SMTPUTF8 with plain addresses only may have it in the header: passed on where it is offered.
	return reverse, todo, x.conn.caps.smtputf8 && (needed || e.SMTPUTF8)
}

// room says whether the hop takes one more recipient behind n others, in those domains (RFC 9422 §4.2, §4.3).
func (x *transaction) room(n int, domain string, domains *[]string) bool {
	if most := x.conn.caps.rcptMax; most > 0 && n >= most {
		return false
	}
	if most := x.conn.caps.rcptDomainMax; most > 0 && !slices.Contains(*domains, domain) {
		if len(*domains) >= most {
			return false
		}
		*domains = append(*domains, domain)
	}
	return true
}

// hasControl: paths made by package mail have none; nothing else may put a line end on the wire either.
func hasControl(s string) bool {
	for i := 0; i < len(s); i++ {
		if s[i] < ' ' || s[i] == 0x7f {
			return true
		}
	}
	return false
}

// sent notes a command that was put in the buffer; it goes out at once where the hop does not pipeline.
func (x *transaction) sent(stage Stage, path int) error {
	x.pending = append(x.pending, pending{stage, path})
	if !x.conn.caps.pipelining || len(x.pending) > maxGroup {
		return x.sync()
	}
	return nil
}

// sync writes the commands in the buffer and reads their replies.
func (x *transaction) sync() error {
	if len(x.pending) == 0 {
		return nil
	}
	if err := x.flush(); err != nil {
		return x.gone(err)
	}
	for _, p := range x.pending {
		reply, err := x.conn.read(p.stage, x.wait(p.stage))
		switch {
		case errors.Is(err, ErrProtocol):
			x.conn.broken = true
			x.fail(p.stage, nonsense(err))
			return nil
		case err != nil:
			return x.gone(err)
		case reply.Code == 421:
			if x.conn.kept && !x.answered {
				// Said before our MAIL came: it has closed an idle connection.
				return x.gone(reply)
			}
			x.conn.broken = true
			x.fail(p.stage, passedOn(reply))
			return nil
		case reply.Code == 530 && p.stage == StageMail:
			// TLS (RFC 3207 §4) or a login (RFC 4954 §6) is wanted: that is about us, and not for the sender to hear.
			x.conn.broken = true
			return &OutOfReach{Hop: x.conn.hop.addr, Stage: StageMail, Err: reply}
		}
		x.got(p, reply)
		if x.conn.broken {
			return nil
		}
	}
	if last := x.pending[len(x.pending)-1].stage; x.answered && !x.mailOK && last != StageData {
		x.over = true // no use in further recipients
	}
	x.pending = x.pending[:0]
	return nil
}

func (x *transaction) wait(s Stage) time.Duration {
	switch s {
	case StageRcpt:
		return x.conn.t.Rcpt
	case StageData:
		return x.conn.t.Data
	}
	return x.conn.t.Mail
}

// gone ends the transaction on a connection that ended before the dot.
func (x *transaction) gone(err error) error {
	x.conn.broken = true
	if !x.answered {
		return &unansweredError{err}
	}
	stage := StageMail
	if x.mailOK {
		stage = StageRcpt
	}
	x.fail(stage, lost(err))
	return nil
}

// fail gives reply to every path that has no final answer, and ends the transaction.
func (x *transaction) fail(stage Stage, reply *mail.Reply) {
	x.over = true
	x.answer(stage, reply)
}

// outOfStep ends the transaction with a hop whose replies belong to other commands: what it seemed to say of single paths may be
// of others, so none is refused for good by it.
func (x *transaction) outOfStep(stage Stage, reply *mail.Reply) {
	x.conn.broken, x.over = true, true
	for i := range x.results {
		x.results[i].Reply, x.results[i].Stage = reply, stage
	}
}

// answer gives reply to every path that has none or was only accepted so far.
func (x *transaction) answer(stage Stage, reply *mail.Reply) {
	for i := range x.results {
		if r := &x.results[i]; r.Reply == nil || r.Reply.Positive() {
			r.Reply, r.Stage = reply, stage
		}
	}
}

// got files one reply.
func (x *transaction) got(p pending, reply *mail.Reply) {
	if p.stage == StageReset {
		if reply.Positive() {
			x.conn.dirty = false
		} else {
			x.conn.broken = true
			if !x.answered { // the one in front of MAIL, not the one that ends an Ask
				x.fail(StageMail, nonsense(protocolError("RSET refused: "+reply.String())))
			}
		}
		return
	}
	x.answered = true
	// 2xx at MAIL and RCPT, 354 at DATA, or a refusal: anything else cannot be told from being out of step.
	if ok := reply.Positive() && p.stage != StageData || reply.Code == 354 && p.stage == StageData; !ok && reply.Code < 400 {
		x.outOfStep(p.stage, nonsense(refusal(reply)))
		return
	}
	switch p.stage {
	case StageMail:
		x.mailOK = reply.Positive()
		if !x.mailOK {
			x.answer(StageMail, reply)
		}
	case StageRcpt:
		r := &x.results[p.path]
		if r.Reply == nil {
			r.Reply = reply
			if reply.Positive() {
				x.accepted++
			}
		}
	case StageData:
		x.goAhead = reply.Code == 354
		if !x.goAhead {
			x.answer(StageData, reply)
			x.conn.dirty = x.mailOK
		}
	}
}
