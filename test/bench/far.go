package main

import (
	"context"
	"fmt"
	"net"
	"time"

	"mailproxy/internal/farlink"
)

const (
	farRoundTrip = 100 * time.Millisecond
	farCommits   = 100
)

// measureFar makes a cluster of two whose tunnels lead over a link with a long round trip, and commits again and again.
func measureFar(ctx context.Context, b *bench) error {
	if _, err := b.startSink(ctx, sinkAddr); err != nil {
		return err
	}
	var nodes []*node
	for i := range 2 {
		// The member list has the address of a relay in front of the tunnel, so that both dial through one.
		n, err := b.startNodeAt(ctx, fmt.Sprintf("node%d", i+1), fmt.Sprintf("127.0.0.%d", 41+i), fmt.Sprintf("127.0.0.%d", 45+i))
		if err != nil {
			return err
		}
		relay, err := net.Listen("tcp", n.local.TunnelAddress())
		if err != nil {
			return err
		}
		defer relay.Close() //nolint:gocritic // until the measurement ends
		go farlink.Serve(relay, n.local.Tunnel.Listen[0], farRoundTrip)
		nodes = append(nodes, n)
	}
	if err := b.join(ctx, nodes); err != nil {
		return err
	}
	d, err := openCommitter(ctx, nodes[0])
	if err != nil {
		return err
	}
	defer d.Close()
	changes, err := commitOften(ctx, d, nodes[1:], 0, farCommits+1)
	if err != nil {
		return err
	}
	var until []float64
	for _, c := range changes[1:] { // the first finds connections cold
		until = append(until, milliseconds(c.until))
	}
	b.add(result{Name: "cluster.commit_to_slave.rtt100.p50_ms", Value: percentile(until, 50), Unit: "ms"})
	b.add(result{Name: "cluster.commit_to_slave.rtt100.p99_ms", Value: percentile(until, 99), Unit: "ms",
		Goal: below(milliseconds(3*farRoundTrip) + 100)})
	return nil
}
