package relay

import (
	"context"
	"crypto/x509"
	"errors"
	"net"
	"net/netip"
	"time"

	"github.com/rs/zerolog"

	"mailproxy/config"
	"mailproxy/mail"
)

// Timeouts bound every wait; a zero one is its default. Those of RFC 5321 §4.5.3.2 are its minimums.
type Timeouts struct {
	Lookup   time.Duration // DNS, for one host or domain: 30 s
	Connect  time.Duration // TCP, for one address: 15 s
	Greeting time.Duration // RFC 5321 §4.5.3.2.1: 5 min
	Ehlo     time.Duration // 5 min
	TLS      time.Duration // the handshake: 1 min
	Mail     time.Duration // RFC 5321 §4.5.3.2.2: 5 min
	Rcpt     time.Duration // RFC 5321 §4.5.3.2.3: 5 min
	Data     time.Duration // RFC 5321 §4.5.3.2.4: 2 min
	Block    time.Duration // one write, RFC 5321 §4.5.3.2.5: 3 min
	// Dot is 5 min where RFC 5321 §4.5.3.2.6 has 10: a client of ours waits the same 10 min for our answer, and would be
	// gone by the time we had one.
	Dot time.Duration
	// Ask bounds a whole Ask: a client that waits for its answer to RCPT is on the line (1 min).
	Ask time.Duration
}

func (t *Timeouts) setDefaults() {
	for _, d := range []struct {
		field *time.Duration
		value time.Duration
	}{
		{&t.Lookup, 30 * time.Second}, {&t.Connect, 15 * time.Second}, {&t.Greeting, 5 * time.Minute},
		{&t.Ehlo, 5 * time.Minute}, {&t.TLS, time.Minute}, {&t.Mail, 5 * time.Minute}, {&t.Rcpt, 5 * time.Minute},
		{&t.Data, 2 * time.Minute}, {&t.Block, 3 * time.Minute}, {&t.Dot, 5 * time.Minute}, {&t.Ask, time.Minute},
	} {
		if *d.field <= 0 {
			*d.field = d.value
		}
	}
}

// Options are what a Client is made from.
type Options struct {
	// Hostname is how we name ourselves in EHLO.
	Hostname string
	// Resolver asks the DNS; nil is Go's own with the host's resolv.conf.
	Resolver *net.Resolver
	// MXPort is the port of hosts found by MX lookup; "" is 25.
	MXPort string
	// RootCAs are whom the TLS policy verify trusts; nil is the host's.
	RootCAs *x509.CertPool
	// Secret opens the secret of that name, for logins; nil: there are none.
	Secret func(name string) ([]byte, error)
	// Own says whether this node takes mail at an address: nothing is relayed there. Nil: only its name is known.
	Own func(netip.AddrPort) bool
	// Timeouts bound every wait.
	Timeouts Timeouts
	Log      zerolog.Logger
}

// A Client delivers messages to next hops and keeps connections to them. Its methods may be called by many at once.
type Client struct {
	hostname string
	mxPort   string
	roots    *x509.CertPool
	t        Timeouts
	log      zerolog.Logger
	lookup   lookup
	secret   func(string) ([]byte, error)
	own      func(netip.AddrPort) bool
	pool     pool
	down     downList
	reach    reach
	turns    turns
	self     selfCache
	answers  answerCache
	clear    repeats // of tls.fallback in the log
}

// New makes a Client. It starts nothing; Run keeps it tidy.
func New(o Options) *Client {
	o.Timeouts.setDefaults()
	if o.Resolver == nil {
		o.Resolver = &net.Resolver{PreferGo: true}
	}
	if o.MXPort == "" {
		o.MXPort = "25"
	}
	if o.Hostname == "" {
		o.Hostname = "localhost"
	}
	return &Client{
		hostname: o.Hostname, mxPort: o.MXPort, roots: o.RootCAs, t: o.Timeouts, log: o.Log,
		lookup: lookup{resolver: o.Resolver, timeout: o.Timeouts.Lookup}, secret: o.Secret, own: o.Own,
	}
}

// Run closes kept connections that were idle for too long, and forgets hosts that are not tried any more, until ctx ends; then it closes
// all connections that are kept.
func (c *Client) Run(ctx context.Context) error {
	tick := time.NewTicker(poolIdle / 4)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			c.pool.closeIdle()
			return nil
		case now := <-tick.C:
			c.pool.sweep(now)
			c.reach.tidy(now)
		}
	}
}

// Close closes the kept connections; later attempts keep none. Attempts under way go on.
func (c *Client) Close() { c.pool.close() }

// Forget forgets which hosts were out of reach a moment ago: the next attempt tries them again.
func (c *Client) Forget() {
	c.down.forget()
	c.reach.forget()
}

// An Attempt is one message for one next hop.
type Attempt struct {
	Transport config.Transport
	// Domain is whose MX records are looked up, for a transport without hosts.
	Domain string
	// Envelope gives the reverse-path and how the message came; its ForwardPaths are not used.
	Envelope *mail.Envelope
	// Paths are the forward-paths of this attempt.
	Paths []mail.Path
	// Params is what their sender wants to hear of them, in their order, for a hop that offers DSN; nil: nothing.
	Params  []mail.RcptParams
	Content mail.Content
	// BeforeDot, where given, is called once, after the body and before the final dot, with the answers to RCPT. Its error
	// drops the connection without the dot, and Deliver gives it back. It is not called where no path was accepted.
	BeforeDot func([]Result) error
}

// A Result says what became of one forward-path.
type Result struct {
	Path mail.Path
	// Reply is the hop's answer; 421 comes as 451. In BeforeDot it is the answer to RCPT. One that was made here has a Cause that
	// is no Reply.
	Reply *mail.Reply
	// Hop is host:port; empty where none was asked.
	Hop string
	// Stage is the command that Reply answers.
	Stage Stage
	// DSN says that the hop offers DSN: it was told what the sender wants to hear, and tells it in our place where it took the message.
	DSN bool
}

// Deliver makes one attempt and gives one Result for each path, in their order. The error is
//
//   - *OutOfReach: no hop answered anything of the transaction; no results;
//   - ErrNoAnswer: the dot was sent and not answered; the results are there, those of accepted paths with a temporary reply;
//   - ctx.Err() or BeforeDot's error: the connection was dropped and the dot never sent; no results.
func (c *Client) Deliver(ctx context.Context, a Attempt) ([]Result, error) {
	if len(a.Paths) == 0 {
		return nil, nil
	}
	results := make([]Result, len(a.Paths))
	reply, err := c.eachHop(ctx, &a, func(h hop) error { return c.transactAll(ctx, h, &a, results) })
	switch {
	case reply != nil:
		for i, p := range a.Paths {
			results[i] = Result{Path: p, Reply: reply, Stage: StageLookup}
		}
		return results, nil
	case err == nil, errors.Is(err, ErrNoAnswer):
		return results, err
	}
	return nil, err
}

func isOutOfReach(err error) bool {
	var out *OutOfReach
	return errors.As(err, &out)
}

// ended gives the context's error in place of an OutOfReach that the context's end brought about.
func ended(ctx context.Context, err error) error {
	if err != nil && ctx.Err() != nil && isOutOfReach(err) {
		return ctx.Err()
	}
	return err
}

// transactAll runs the attempt on one hop, in further transactions for recipients that were too many for the one before. With BeforeDot,
// which is called for one transaction, they keep their reply.
func (c *Client) transactAll(ctx context.Context, h hop, a *Attempt, results []Result) error {
	err := c.transact(ctx, h, a, results)
	if err != nil || a.BeforeDot != nil {
		return err
	}
	for rest := tooMany(results); len(rest) > 0; {
		further := *a
		further.Paths, further.Params = make([]mail.Path, len(rest)), nil
		for i, r := range rest {
			further.Paths[i] = results[r].Path
			if a.Params != nil {
				further.Params = append(further.Params, a.Params[r])
			}
		}
		answers := make([]Result, len(rest))
		err := c.transact(ctx, h, &further, answers)
		if err != nil && !errors.Is(err, ErrNoAnswer) {
			return nil // they keep their reply: the others have the message, and that must be known
		}
		for i, r := range rest {
			results[r] = answers[i]
		}
		if err != nil {
			return err
		}
		left := tooMany(answers)
		for i, l := range left {
			left[i] = rest[l]
		}
		rest = left
	}
	return nil
}

// tooMany gives the results of those that were too many for a transaction in which others got the message (RFC 5321 §4.5.3.1.10).
func tooMany(results []Result) (rest []int) {
	taken := false
	for i := range results {
		r := &results[i]
		switch {
		case r.Stage == StageDot && r.Reply.Positive():
			taken = true
		case r.Stage == StageRcpt && r.Reply.Code == 452 && (r.Reply.Enhanced == [3]int{} || r.Reply.Enhanced == [3]int{4, 5, 3}):
			rest = append(rest, i)
		}
	}
	if !taken {
		return nil
	}
	return rest
}

// transact runs the attempt on one hop. A kept connection that turns out dead is replaced by a fresh one, once.
func (c *Client) transact(ctx context.Context, h hop, a *Attempt, results []Result) error {
	for _, fresh := range [...]bool{false, true} {
		cn, err := c.acquire(ctx, h, fresh)
		if err != nil {
			return err
		}
		kept, start := cn.kept, time.Now()
		x := newTransaction(cn, a, results)
		err = x.deliver(ctx)
		x.end()
		c.pool.put(cn)
		if errors.Is(err, context.DeadlineExceeded) { // as in connect: who leaves early says nothing of the hop
			c.hung(cn, start)
		}
		var un *unansweredError
		if !errors.As(err, &un) {
			return err
		}
		if !kept {
			return &OutOfReach{Hop: h.addr, Stage: StageMail, Err: un.err}
		}
	}
	return &OutOfReach{Hop: h.addr, Stage: StageMail, Err: ErrLost} // not reached: the second connection is never a kept one
}

// hung leaves an address alone that has connected and then let us wait. What is kept to that hop is closed: the next transaction
// would wait on it as long.
func (c *Client) hung(cn *conn, start time.Time) {
	if c.down.failed(cn.addr, start, time.Now()) {
		c.pool.drop(cn.hop)
	}
}

// acquire gives a connection that is ready for MAIL: a kept one unless fresh is wanted, else a new one.
func (c *Client) acquire(ctx context.Context, h hop, fresh bool) (*conn, error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	if !fresh {
		if cn := c.pool.get(h, time.Now()); cn != nil {
			return cn, nil
		}
	}
	return c.connect(ctx, h)
}
