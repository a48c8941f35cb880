package main

import (
	"context"
	"strconv"
)

const (
	bodySessions = 200
	bodyBytes    = 10 << 20
)

// measureBodies sends a large message over each of many sessions at once, and takes the most memory that the daemon had meanwhile.
func measureBodies(ctx context.Context, b *bench) error {
	sink, err := b.startSink(ctx, sinkAddr)
	if err != nil {
		return err
	}
	n, err := b.startNode(ctx, "bodies", memoryIP)
	if err != nil {
		return err
	}
	for _, limit := range []string{"max_sessions_per_address", "max_sessions_per_network"} {
		if _, err := n.mailproxy(ctx, "setting", "set", limit, strconv.Itoa(2*bodySessions)); err != nil {
			return err
		}
	}
	if err := n.relays(ctx, liveDomain, sinkAddr); err != nil { // and so the limits are in force
		return err
	}
	took, err := b.send(ctx, load{addr: n.smtp(), to: "user@" + liveDomain, messages: bodySessions, sessions: bodySessions, size: bodyBytes})
	if err != nil {
		return err
	}
	if err := sink.reaches(ctx, bodySessions); err != nil {
		return err
	}
	most, err := memoryOf(n.pid(), "VmHWM:")
	if err != nil {
		return err
	}
	b.add(result{Name: "memory.bodies_200x10mb_mb", Value: most, Unit: "MB", Goal: below(300)})
	b.add(result{Name: "memory.bodies_200x10mb.mb_per_s", Value: float64(bodySessions) * bodyBytes / (1 << 20) / took.Seconds(), Unit: "MB/s"})
	return nil
}
