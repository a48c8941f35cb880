package cluster

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"syscall"
	"time"
)

// Waiting is the mail that waits on this node.
type Waiting struct {
	Items int
	// Kept counts those of Items that were refused, while their sender may not be told, and that wait for an operator.
	Kept int
	// Oldest is how long the oldest has waited, by this host's clock.
	Oldest time.Duration
}

// maxSummaryBytes bounds what is read of a queue's summary: it has a thousand next hops at most.
const maxSummaryBytes = 16 << 20

// Waiting asks the daemon for its queue. ErrNoDaemon.
func (o *Operator) Waiting(ctx context.Context) (Waiting, error) {
	ctx, cancel := context.WithTimeout(ctx, 5*statusTimeout)
	defer cancel()
	var summary struct {
		Total  int       `json:"total"`
		Kept   int       `json:"kept"`
		Oldest time.Time `json:"oldest"`
	}
	err := getJSON(ctx, o.Local.ControlSocket(), "/queue/summary", maxSummaryBytes, &summary)
	switch {
	case errors.Is(err, fs.ErrNotExist), errors.Is(err, syscall.ECONNREFUSED):
		return Waiting{}, daemonError(err)
	case err != nil:
		return Waiting{}, fmt.Errorf("read queue: %w", err)
	}
	w := Waiting{Items: summary.Total, Kept: summary.Kept}
	if !summary.Oldest.IsZero() {
		w.Oldest = max(0, time.Since(summary.Oldest))
	}
	return w, nil
}
