package main

import (
	"context"
	"fmt"
	"slices"
	"time"
)

// Where the parts of the SMTP measurements listen.
const (
	sinkAddr    = "127.0.0.30:2600"
	haproxyAddr = "127.0.0.31:2525"
	postfixAddr = "127.0.0.32:2525"
	nodeIP      = "127.0.0.33"
	downAddr    = "127.0.0.30:2599" // nobody listens there
)

const (
	liveDomain = "live.bench.test" // its next hop is the sink
	downDomain = "down.bench.test" // its next hop is away
)

const (
	rounds   = 3
	sessions = 20
)

// A row is one way for mail to go to the sink.
type row struct {
	name string
	addr string
	// kept and fresh are how many messages make a round of about two seconds, with connections kept and one for each message; many, of
	// twenty forward-paths each; big, of 1 MB each.
	kept, fresh, many, big int
	// answered holds the messages a second that were answered with 250 in each round; through, those that reached the sink. Only a
	// queue makes a difference.
	answered, through []float64
}

// A lane is the parts of the SMTP measurements.
type lane struct {
	sink    *sink
	postfix *postfix
	node    *node
}

func (b *bench) startLane(ctx context.Context) (*lane, error) {
	var l lane
	var err error
	if l.sink, err = b.startSink(ctx, sinkAddr); err != nil {
		return nil, err
	}
	if err := b.startHAProxy(ctx, haproxyAddr, sinkAddr); err != nil {
		return nil, err
	}
	if l.postfix, err = b.startPostfix(ctx, postfixAddr, sinkAddr, downAddr); err != nil {
		return nil, err
	}
	if l.node, err = b.startNode(ctx, "gateway", nodeIP); err != nil {
		return nil, err
	}
	if err := l.node.unlimited(ctx); err != nil {
		return nil, err
	}
	if err := l.node.relays(ctx, liveDomain, sinkAddr); err != nil {
		return nil, err
	}
	return &l, l.node.relays(ctx, downDomain, downAddr)
}

// rows are what a round consists of.
func (l *lane) rows() []*row {
	return []*row{
		{"direct", sinkAddr, 20000, 12000, 4000, 800, nil, nil},
		{"haproxy", haproxyAddr, 15000, 6000, 3000, 500, nil, nil},
		{"postfix", postfixAddr, 2500, 1600, 1000, 300, nil, nil},
		{"mailproxy", l.node.smtp(), 10000, 6000, 3000, 500, nil, nil},
	}
}

// measureCutThrough sends through all ways in turn, round after round.
func measureCutThrough(ctx context.Context, b *bench) error {
	l, err := b.startLane(ctx)
	if err != nil {
		return err
	}
	for _, r := range l.rows() { // files in the page cache, processes started, connections pooled
		if err := l.round(ctx, b, r, load{messages: 400, kept: true}); err != nil {
			return err
		}
	}
	for _, way := range cutThroughWays() {
		rows := l.rows()
		if err := inRounds(rows, func(r *row) error { return l.round(ctx, b, r, way.load(r)) }); err != nil {
			return err
		}
		b.addCutThrough(rows, way)
	}
	rows := l.rows()[2:] // forward-paths that were never seen before: Postfix and mailproxy cache answers by them
	if err := inRounds(rows, func(r *row) error {
		return l.round(ctx, b, r, load{messages: r.kept, kept: true, distinct: true})
	}); err != nil {
		return err
	}
	for _, r := range rows {
		b.addRounds("smtp.cutthrough.distinct."+r.name+".msgs_per_s", "msg/s", goal{}, r.answered)
	}
	b.addRounds("smtp.cutthrough.distinct.vs_postfix", "x", goal{}, ratios(rows[1].answered, rows[0].answered))
	return nil
}

// A cutThroughWay is one kind of load, and what is wanted of mailproxy beside the others.
type cutThroughWay struct {
	name                 string
	load                 func(*row) load
	vsHAProxy, vsPostfix goal
}

func cutThroughWays() []cutThroughWay {
	return []cutThroughWay{
		{"kept", func(r *row) load { return load{messages: r.kept, kept: true} }, atLeast(0.75), atLeast(3)},
		{"new", func(r *row) load { return load{messages: r.fresh} }, atLeast(1), atLeast(3)},
		{"20rcpt", func(r *row) load { return load{messages: r.many, kept: true, paths: 20} }, atLeast(0.75), goal{}},
		{"1mb", func(r *row) load { return load{messages: r.big, kept: true, size: 1 << 20} }, atLeast(0.7), atLeast(1)},
	}
}

// inRounds does every row in each round, in turning order, so that a slow drift of the machine hits all of them.
func inRounds(rows []*row, do func(*row) error) error {
	order := slices.Clone(rows)
	for range rounds {
		for _, r := range order {
			if err := do(r); err != nil {
				return fmt.Errorf("%s: %w", r.name, err)
			}
		}
		slices.Reverse(order)
	}
	return nil
}

// round sends one load through a row and waits until each message, and none twice, has reached the sink.
func (l *lane) round(ctx context.Context, b *bench, r *row, send load) error {
	before, err := l.sink.received()
	if err != nil {
		return err
	}
	send.addr, send.to, send.sessions = r.addr, "user@"+liveDomain, sessions
	began := time.Now()
	answered, err := b.send(ctx, send)
	if err != nil {
		return err
	}
	if err := l.sink.reaches(ctx, before+send.messages); err != nil {
		return err
	}
	through := time.Since(began)
	r.answered = append(r.answered, rate(send.messages, answered))
	r.through = append(r.through, rate(send.messages, through))
	if r.addr == l.postfix.addr {
		return l.postfix.quiet(ctx) // removing the last of it must not slow the next row
	}
	if late := through - answered; late > time.Second {
		return fmt.Errorf("the last messages came %s after they were answered: some were queued", late.Round(time.Millisecond))
	}
	return nil
}

// addCutThrough adds the figures of one way. Postfix answers before the next hop has the mail; the ratio that counts is
// against that higher rate, vs_postfix_through is against what came out of it.
func (b *bench) addCutThrough(rows []*row, way cutThroughWay) {
	prefix := "smtp.cutthrough." + way.name + "."
	haproxy, postfix, own := rows[1], rows[2], rows[3]
	for _, r := range rows {
		b.addRounds(prefix+r.name+".msgs_per_s", "msg/s", goal{}, r.answered)
	}
	b.addRounds(prefix+"postfix.through.msgs_per_s", "msg/s", goal{}, postfix.through)
	b.addRounds(prefix+"vs_postfix", "x", way.vsPostfix, ratios(own.answered, postfix.answered))
	b.addRounds(prefix+"vs_postfix_through", "x", goal{}, ratios(own.through, postfix.through))
	b.addRounds(prefix+"vs_haproxy", "x", way.vsHAProxy, ratios(own.answered, haproxy.answered))
}
