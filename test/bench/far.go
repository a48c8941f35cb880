package main

import (
	"context"
	"fmt"
	"net"
	"time"

	"github.com/rs/zerolog"

	"mailproxy/db"
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
		go carryLate(relay, n.local.Tunnel.Listen[0], farRoundTrip/2)
		nodes = append(nodes, n)
	}
	if err := b.join(ctx, nodes); err != nil {
		return err
	}
	d, err := db.Open(db.Options{DSN: dsn(nodes[0].local), Log: zerolog.Nop()})
	if err != nil {
		return err
	}
	defer d.Close()
	var until []float64
	for i := range farCommits + 1 {
		c, err := commitAndWait(ctx, d, nodes[1:], i)
		if err != nil {
			return fmt.Errorf("commit %d: %w", i, err)
		}
		if i > 0 { // the first change finds connections cold
			until = append(until, milliseconds(c.until))
		}
	}
	b.add(result{Name: "cluster.commit_to_slave.rtt100.p50_ms", Value: percentile(until, 50), Unit: "ms"})
	b.add(result{Name: "cluster.commit_to_slave.rtt100.p99_ms", Value: percentile(until, 99), Unit: "ms",
		Goal: below(milliseconds(3*farRoundTrip) + 100)})
	return nil
}

// carryLate passes connections on, each piece of data d later, until the listener is closed. What is open then ends with its two ends.
func carryLate(l net.Listener, to string, d time.Duration) {
	for {
		near, err := l.Accept()
		if err != nil {
			return
		}
		far, err := net.Dial("tcp", to)
		if err != nil {
			_ = near.Close() // it never came to be
			continue
		}
		go copyLate(far, near, d)
		go copyLate(near, far, d)
	}
}

func copyLate(to, from net.Conn, d time.Duration) {
	type piece struct {
		due  time.Time
		data []byte
	}
	way := make(chan piece, 4096)
	go func() {
		for p := range way {
			time.Sleep(time.Until(p.due)) // that is what it is for
			if _, err := to.Write(p.data); err != nil {
				break
			}
		}
		_, _ = to.Close(), from.Close()
		for range way { // what came meanwhile is lost
		}
	}()
	defer close(way)
	buf := make([]byte, 32<<10)
	for {
		n, err := from.Read(buf)
		if n > 0 {
			way <- piece{time.Now().Add(d), append([]byte(nil), buf[:n]...)}
		}
		if err != nil {
			return
		}
	}
}
