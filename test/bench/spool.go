package main

import (
	"context"
	"fmt"
)

// spoolMessages make a round of two to three seconds.
const spoolMessages = 2500

// measureSpool sends to a domain whose next hop is away: everything must be on disk before it is answered.
func measureSpool(ctx context.Context, b *bench) error {
	l, err := b.startLane(ctx)
	if err != nil {
		return err
	}
	for _, s := range []struct {
		name     string
		sessions int
		goal     goal
	}{{"smtp.spool.", sessions, atLeast(0.6)}, {"smtp.spool.64.", 64, atLeast(2.5)}} {
		rows := l.rows()[2:]
		if err := inRounds(rows, func(r *row) error { return l.spool(ctx, b, r, s.sessions) }); err != nil {
			return err
		}
		for _, r := range rows {
			b.addRounds(s.name+r.name+".msgs_per_s", "msg/s", goal{}, r.answered)
		}
		b.addRounds(s.name+"vs_postfix", "x", s.goal, ratios(rows[1].answered, rows[0].answered))
	}
	return nil
}

// spool sends one round and counts in the queue that every message that was answered with 250 is there.
func (l *lane) spool(ctx context.Context, b *bench, r *row, sessions int) error {
	count := func() (int, error) { return l.node.queued(ctx) }
	if r.addr == l.postfix.addr {
		count = func() (int, error) { return l.postfix.queued("maildrop", "incoming", "active", "deferred") }
	}
	before, err := count()
	if err != nil {
		return err
	}
	took, err := b.send(ctx, load{addr: r.addr, to: "user@" + downDomain, messages: spoolMessages, sessions: sessions, kept: true})
	if err != nil {
		return err
	}
	r.answered = append(r.answered, rate(spoolMessages, took))
	if r.addr == l.postfix.addr {
		if err := l.postfix.quiet(ctx); err != nil {
			return err
		}
	}
	after, err := count()
	if err == nil && after-before != spoolMessages {
		err = fmt.Errorf("%d messages were answered with 250, %d are in the queue", spoolMessages, after-before)
	}
	return err
}
