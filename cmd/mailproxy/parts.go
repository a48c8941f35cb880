package main

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/rs/zerolog"
)

// A part is one of the things that a daemon runs. run returns when ctx has ended and all that it started has ended too.
type part struct {
	name string
	run  func(ctx context.Context) error
	// bound is how long it may take to end; then it is left behind, and what is stopped after it is stopped.
	bound time.Duration
}

var errEnded = errors.New("ended by itself")

// runParts starts the parts in their order, and stops them in the other one, each after the one before has ended: when ctx ends, or
// when one of them ends by itself, which is an error.
func runParts(ctx context.Context, log zerolog.Logger, parts []part, started func()) error {
	type running struct {
		part
		cancel context.CancelFunc
		done   chan error
	}
	ended := make(chan running, len(parts))
	var up []running
	for _, p := range parts {
		partCtx, cancel := context.WithCancel(context.WithoutCancel(ctx))
		r := running{p, cancel, make(chan error, 1)}
		go func() {
			r.done <- p.run(partCtx)
			ended <- r
		}()
		up = append(up, r)
	}
	started()
	var first error
	select {
	case <-ctx.Done():
	case r := <-ended:
		err := <-r.done
		if err == nil {
			err = errEnded
		}
		first = fmt.Errorf("%s: %w", r.name, err)
		r.done <- err
		log.Error().Str("part", r.name).Err(err).Msg("part.failed")
	}
	for i := len(up) - 1; i >= 0; i-- {
		r, start := up[i], time.Now()
		r.cancel()
		bound := time.NewTimer(r.bound)
		select {
		case err := <-r.done:
			bound.Stop()
			if err != nil && first == nil && !errors.Is(err, context.Canceled) {
				log.Warn().Str("part", r.name).Err(err).Msg("part.stopped")
			} else {
				log.Info().Str("part", r.name).Int64("took_ms", time.Since(start).Milliseconds()).Msg("part.stopped")
			}
		case <-bound.C:
			log.Error().Str("part", r.name).Int64("took_ms", r.bound.Milliseconds()).Msg("part.overdue")
			if first == nil {
				first = fmt.Errorf("%s did not end within %v", r.name, r.bound)
			}
		}
	}
	return first
}
