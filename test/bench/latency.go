package main

import (
	"context"
	"fmt"
	"strings"
	"time"
)

// latencyMessages are sent by each way, one after the other.
const latencyMessages = 1000

// measureLatency sends small messages one by one, in turn to the sink and through an idle node, and compares the medians of what a whole
// transaction takes its client.
func measureLatency(ctx context.Context, b *bench) error {
	sink, err := b.startSink(ctx, sinkAddr)
	if err != nil {
		return err
	}
	n, err := b.startNode(ctx, "latency", nodeIP)
	if err != nil {
		return err
	}
	if err := n.relays(ctx, liveDomain, sinkAddr); err != nil {
		return err
	}
	direct, through := newProbe(sink.addr), newProbe(n.smtp())
	defer direct.close()
	defer through.close()
	var ways [2][]float64
	for i := range latencyMessages + 10 {
		for w, p := range []*probe{direct, through} {
			took, err := p.delivers(liveDomain)
			if err != nil {
				return err
			}
			if i >= 10 { // connections are made and answers cached
				ways[w] = append(ways[w], milliseconds(took))
			}
		}
	}
	if err := sink.reaches(ctx, 2*(latencyMessages+10)); err != nil {
		return err
	}
	b.add(result{Name: "smtp.latency.direct.p50_ms", Value: percentile(ways[0], 50), Unit: "ms"})
	b.add(result{Name: "smtp.latency.mailproxy.p50_ms", Value: percentile(ways[1], 50), Unit: "ms"})
	b.add(result{Name: "smtp.latency.mailproxy.p99_ms", Value: percentile(ways[1], 99), Unit: "ms"})
	b.add(result{Name: "smtp.latency.added.p50_ms", Value: percentile(ways[1], 50) - percentile(ways[0], 50), Unit: "ms", Goal: below(1)})
	return nil
}

// delivers sends one small message, command by command, and gives how long that took.
func (p *probe) delivers(domain string) (time.Duration, error) {
	if p.conn == nil {
		if err := p.open(); err != nil {
			return 0, err
		}
	}
	began := time.Now()
	_ = p.conn.SetDeadline(began.Add(probeTimeout)) // an error shows in what follows
	for _, step := range [][2]string{
		{"MAIL FROM:<probe@client.bench.test>", "250"}, {"RCPT TO:<user@" + domain + ">", "250"}, {"DATA", "354"},
		{"Subject: x\r\n\r\n" + strings.Repeat("0123456789abcdef\r\n", 56) + ".", "250"},
	} {
		if _, err := fmt.Fprintf(p.conn, "%s\r\n", step[0]); err != nil {
			return 0, err
		}
		if err := p.wants(step[1]); err != nil {
			return 0, err
		}
	}
	return time.Since(began), nil
}
