package relay

import (
	"context"
	"errors"
	"net/netip"
	"strings"
	"sync"
	"time"

	"mailproxy/config"
	"mailproxy/mail"
)

// How long answers to RCPT are believed, and how many are kept.
const (
	positiveTTL = 5 * time.Minute
	negativeTTL = time.Minute
	maxAnswers  = 20000
)

// Ask asks the next hop about one recipient, with MAIL, RCPT and RSET, and gives its answer to RCPT, or to MAIL where that was
// refused. 421 comes as 451. Answers 2xx are believed for 5 minutes whoever the sender is (another sender may still be refused at
// delivery), answers 5xx for 1 minute: for any sender where they say that there is no such recipient, else for the same one only; 4xx
// are not kept. Who asks about a recipient that is being asked about already waits for that answer first. The error is *OutOfReach, also where there is no answer within Timeouts.Ask, or the context's. A host that gave
// none is left alone for 10 seconds: the next recipient does not wait for it again.
func (c *Client) Ask(ctx context.Context, t config.Transport, domain string, e *mail.Envelope, to mail.Path) (*mail.Reply, error) {
	key := question{to: to, by: hopOf(&t, "", e), reverse: e.ReversePath, utf8: e.SMTPUTF8}
	key.by.client = netip.AddrPortFrom(key.by.client.Addr(), 0) // of the same client, whichever connection it comes by
	if len(t.Hosts) > 0 {
		key.by.addr = strings.Join(t.Hosts, " ")
	} else {
		key.by.addr = "mx " + domain
	}
	for shared := key.anySender(); ; shared = key {
		reply, f := c.answers.get(key, shared, time.Now())
		if reply != nil {
			return reply, nil
		}
		if f.mine {
			return c.askNow(ctx, t, domain, e, key, f.flight)
		}
		select {
		case <-f.done:
		case <-ctx.Done():
			return nil, ctx.Err()
		}
		if isOutOfReach(f.err) || f.reply != nil && (f.by == key || isForAnyone(f.reply)) {
			return f.reply, f.err
		}
		// The one who asked went away, or was answered for what it is; that is no answer to us.
	}
}

// askNow asks, and tells the others who wait.
func (c *Client) askNow(ctx context.Context, t config.Transport, domain string, e *mail.Envelope, key question, f *flight) (
	reply *mail.Reply, err error) {
	defer func() { c.answers.finish(key, f, reply, err, time.Now()) }()
	bound, cancel := context.WithTimeout(ctx, c.t.Ask)
	defer cancel()
	a := Attempt{Transport: t, Domain: domain, Envelope: e, Paths: []mail.Path{key.to}}
	var results [1]Result
	hopTried := domain
	reply, err = c.eachHop(bound, &a, func(h hop) error {
		hopTried = h.addr
		return c.transact(bound, h, &a, results[:])
	})
	if err != nil && ctx.Err() == nil && bound.Err() != nil {
		return nil, &OutOfReach{Hop: hopTried, Stage: StageRcpt, Err: errAskTimeout}
	}
	if reply == nil && err == nil {
		reply = results[0].Reply
	}
	return reply, err
}

var errAskTimeout = errors.New("no answer to RCPT in time")

// A question is what an answer is kept under. The key of one that is for anyone says so in reverse and utf8.
type question struct {
	by      hop // its addr is all hosts, or the domain: which one was asked does not matter
	to      mail.Path
	reverse mail.Path
	utf8    bool
}

// isForAnyone says whether an answer holds whoever the sender is: yes, or that there is no such recipient (RFC 3463 §3.2, §3.3).
func isForAnyone(reply *mail.Reply) bool {
	if !reply.Permanent() {
		return reply.Positive()
	}
	switch reply.Enhanced {
	case [3]int{5, 1, 1}, [3]int{5, 1, 2}, [3]int{5, 1, 3}, [3]int{5, 1, 6}, [3]int{5, 1, 10}, [3]int{5, 2, 1}:
		return true
	}
	return false
}

func (q question) anySender() question {
	q.reverse, q.utf8 = mail.Path{Local: "any"}, false
	return q
}

// A flight is a question being asked. reply and err may be read once done is closed.
type flight struct {
	by, shared question // what is asked, and what others find it under
	done       chan struct{}
	reply      *mail.Reply
	err        error
}

// ticket is a flight and whether the holder is the one to ask.
type ticket struct {
	*flight
	mine bool
}

type answer struct {
	reply *mail.Reply
	until time.Time
}

// An answerCache keeps answers in two generations: where the young one is half of the bound, it becomes the old one, and what
// was old is dropped. The zero answerCache is ready.
type answerCache struct {
	mu         sync.Mutex
	young, old map[question]answer
	flights    map[question]*flight
}

// get gives a kept answer, or else the flight to wait for or to make, which is shared under a key: that of the question, or that of
// any sender.
func (c *answerCache) get(key, shared question, now time.Time) (*mail.Reply, ticket) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, k := range [...]question{key.anySender(), key} {
		a, ok := c.young[k]
		if !ok {
			a, ok = c.old[k]
		}
		if ok && now.Before(a.until) {
			return a.reply, ticket{}
		}
	}
	if f := c.flights[shared]; f != nil {
		return nil, ticket{flight: f}
	}
	f := &flight{by: key, shared: shared, done: make(chan struct{})}
	if c.flights == nil {
		c.flights = make(map[question]*flight)
	}
	c.flights[shared] = f
	return nil, ticket{flight: f, mine: true}
}

// finish ends a flight and keeps its answer where it is one to keep.
func (c *answerCache) finish(key question, f *flight, reply *mail.Reply, err error, now time.Time) {
	f.reply, f.err = reply, err
	c.mu.Lock()
	defer c.mu.Unlock()
	delete(c.flights, f.shared)
	close(f.done)
	switch {
	case reply == nil || reply.Temporary():
		return
	case reply.Positive():
		c.keepLocked(key.anySender(), answer{reply, now.Add(positiveTTL)})
	case isForAnyone(reply):
		c.keepLocked(key.anySender(), answer{reply, now.Add(negativeTTL)})
	default:
		c.keepLocked(key, answer{reply, now.Add(negativeTTL)})
	}
}

func (c *answerCache) keepLocked(key question, a answer) {
	if c.young == nil || len(c.young) >= maxAnswers/2 {
		c.old, c.young = c.young, make(map[question]answer)
	}
	c.young[key] = a
}
