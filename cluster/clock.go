package cluster

import (
	"context"
	"fmt"
	"time"

	"mailproxy/config"
	"mailproxy/tunnel"
)

// clockTolerance is how far clocks may be apart before a person is told. Nothing here depends on them: epochs and serials order what
// happened, leases and ages are measured by one node's own clock. Logs and history are easier to read where clocks agree.
const clockTolerance = time.Second

// clocks logs a peer whose clock differs, each time that it is measured; Run's log keeps that to once in 30 s.
func (n *Node) clocks(ctx context.Context, peers []tunnel.PeerState) {
	for _, p := range peers {
		if ahead := differs(p.Clock); ahead != 0 {
			n.clockDiffers(ctx, p.CID, ahead)
		}
	}
}

// differs gives the measured difference where it is above the tolerance for certain; else 0.
func differs(c tunnel.Clock) time.Duration {
	if c.Ahead.Abs()-c.Within > clockTolerance {
		return c.Ahead
	}
	return 0
}

// clockDiffers logs one peer at most once in 30 s, whatever the difference is meanwhile.
func (n *Node) clockDiffers(ctx context.Context, cid config.CID, ahead time.Duration) {
	if ctx.Err() != nil {
		return
	}
	now := time.Now()
	n.mu.Lock()
	said := n.clockSaid[cid]
	due := said.IsZero() || now.Sub(said) >= repeatEvery
	if due {
		n.clockSaid[cid] = now
	}
	n.mu.Unlock()
	if due {
		n.o.Log.Warn().Int("node", int(cid)).Int64("ahead_ms", ahead.Milliseconds()).Msg("clock.differs")
	}
}

// clockMS is a measured difference as Peer has it.
func clockMS(c tunnel.Clock) (ahead *int64, within int64) {
	if c.At.IsZero() {
		return nil, 0
	}
	ms := c.Ahead.Milliseconds()
	return &ms, c.Within.Milliseconds()
}

// clockProblems names the peers whose clocks differ.
func clockProblems(peers []Peer) []Problem {
	var out []Problem
	for _, p := range peers {
		if p.ClockMS == nil {
			continue
		}
		ahead := time.Duration(*p.ClockMS) * time.Millisecond
		if differs(tunnel.Clock{Ahead: ahead, Within: time.Duration(p.ClockWithinMS) * time.Millisecond}) == 0 {
			continue
		}
		word := "ahead of"
		if ahead < 0 {
			word = "behind"
		}
		out = append(out, Problem{
			fmt.Sprintf("the clock of %s(%d) is %v %s this node's; mail and configuration do not depend on it, times in logs do", p.Name, p.CID, ahead.Abs().Round(100*time.Millisecond), word),
			"let both hosts keep time, by chrony or systemd-timesyncd; `date -u` on each shows which is wrong",
		})
	}
	return out
}
