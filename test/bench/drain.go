package main

import (
	"context"
	"fmt"
	"time"
)

// backlog is how many messages wait when their next hop comes back.
const backlog = 10_000

// measureDrain lets a backlog build up for a next hop that is away, and takes the time from the operator's order to try all, with the
// next hop back, until the last message has reached it.
func measureDrain(ctx context.Context, b *bench) error {
	l, err := b.startLane(ctx)
	if err != nil {
		return err
	}
	postfix, own := l.rows()[2], l.rows()[3]
	for _, d := range []struct {
		*row
		waits func() error // until everything waits
		flush func() error
	}{
		{postfix, func() error { return l.postfix.waits(ctx, backlog) }, func() error { return l.postfix.flush(ctx) }},
		{own, func() error { return l.node.waits(ctx, backlog) }, func() error { _, err := l.node.mailproxy(ctx, "queue", "flush"); return err }},
	} {
		if _, err := b.send(ctx, load{addr: d.addr, to: "user@" + downDomain, messages: backlog, sessions: sessions, kept: true}); err != nil {
			return err
		}
		if err := d.waits(); err != nil {
			return err
		}
		sink, err := b.startSink(ctx, downAddr)
		if err != nil {
			return err
		}
		began := time.Now()
		if err := d.flush(); err != nil {
			return err
		}
		if err := sink.reaches(ctx, backlog); err != nil {
			return fmt.Errorf("%s: %w", d.name, err)
		}
		d.answered = append(d.answered, rate(backlog, time.Since(began)))
		if err := sink.stop(); err != nil {
			return err
		}
		b.addRounds("smtp.drain."+d.name+".msgs_per_s", "msg/s", goal{}, d.answered)
	}
	b.addRounds("smtp.drain.vs_postfix", "x", atLeast(3), ratios(own.answered, postfix.answered))
	return nil
}

// waits waits until so many messages are in the node's queue, and none is being tried.
func (n *node) waits(ctx context.Context, count int) error {
	return poll(ctx, drainTimeout, 100*time.Millisecond, func() error {
		queued, err := n.queued(ctx)
		if err == nil && queued != count {
			err = fmt.Errorf("%d of %d messages wait", queued, count)
		}
		return err
	})
}

// waits waits until Postfix has tried so many messages and put them off.
func (p *postfix) waits(ctx context.Context, count int) error {
	if err := p.quiet(ctx); err != nil {
		return err
	}
	return poll(ctx, drainTimeout, 100*time.Millisecond, func() error {
		queued, err := p.queued("deferred")
		if err == nil && queued != count {
			err = fmt.Errorf("postfix: %d of %d messages wait", queued, count)
		}
		return err
	})
}

// flush has Postfix try all that it has put off.
func (p *postfix) flush(ctx context.Context) error {
	_, err := p.bin.output(ctx, nil, "postqueue", "-c", p.etc(), "-f")
	return err
}
