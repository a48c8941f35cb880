package web

import (
	"context"
	"errors"
	"net"
	"strconv"
	"sync"
	"time"

	"golang.org/x/net/netutil"
)

const (
	// agentConns bounds who asks at an agent listener at once: some balancers, each of which asks once a second.
	agentConns = 32
	// acceptPause is waited where the system lets nobody in.
	acceptPause = time.Second
)

// ServeAgent answers HAProxy's agent-check at l until ctx ends, and closes l. Who connects gets one line, and is hung up on; what it sends
// is not read. It may be called for several listeners.
func (s *Server) ServeAgent(ctx context.Context, l net.Listener) error {
	l = netutil.LimitListener(l, agentConns)
	stop := context.AfterFunc(ctx, func() { _ = l.Close() })
	defer stop()
	var all sync.WaitGroup
	defer all.Wait()
	for {
		c, err := l.Accept()
		switch {
		case ctx.Err() != nil:
			if err == nil {
				_ = c.Close()
			}
			return nil
		case errors.Is(err, net.ErrClosed):
			return err
		case err != nil: // no descriptor left, or the client has gone: there will be others
			pause := time.NewTimer(acceptPause)
			select {
			case <-ctx.Done():
			case <-pause.C:
			}
			pause.Stop()
			continue
		}
		all.Go(func() {
			defer c.Close()
			_, _ = c.Write(s.agentLine()) // a fresh socket has room for it; who has gone does not want it
		})
	}
}

// agentLine is the node's answer, one line with an LF: "ready up 87%", "drain up", or "ready down #spool" with the name of the check that
// failed. Each has both of HAProxy's states, the operator's (ready, drain) and the node's own (up, down), so that none of an earlier
// answer stays. Source: HAProxy's configuration manual, agent-check.
func (s *Server) agentLine() []byte {
	line := []byte("ready ")
	draining := s.opts.Drain.On() // of this moment, as in health
	if draining {
		line = []byte("drain ")
	}
	for _, r := range s.agent.run() {
		if !r.OK {
			return append(line, "down #"+r.Name+"\n"...)
		}
	}
	line = append(line, "up"...)
	if !draining {
		line = strconv.AppendInt(append(line, ' '), int64(min(max(s.opts.Weight(), 1), 100)), 10)
		line = append(line, '%')
	}
	return append(line, '\n')
}

// critical are the checks without which no mail should be sent here. The others, of the database above all, are not waited for.
func critical(checks []Check) (some []Check) {
	for _, c := range checks {
		if c.Critical {
			some = append(some, c)
		}
	}
	return some
}
