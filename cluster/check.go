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
	// Oldest is how long the oldest of those shown has waited, by this host's clock.
	Oldest time.Duration
}

// maxQueueBytes bounds what is read of a queue: the daemon lists at most 10,000 items.
const maxQueueBytes = 64 << 20

// Waiting asks the daemon for its queue. ErrNoDaemon.
func (o *Operator) Waiting(ctx context.Context) (Waiting, error) {
	ctx, cancel := context.WithTimeout(ctx, 5*statusTimeout)
	defer cancel()
	var list struct {
		Total int `json:"total"`
		Items []struct {
			Created time.Time `json:"created"`
		} `json:"items"`
	}
	err := getJSON(ctx, o.Local.ControlSocket(), "/queue", maxQueueBytes, &list)
	switch {
	case errors.Is(err, fs.ErrNotExist), errors.Is(err, syscall.ECONNREFUSED):
		return Waiting{}, daemonError(err)
	case err != nil:
		return Waiting{}, fmt.Errorf("read queue: %w", err)
	}
	w := Waiting{Items: list.Total}
	for _, i := range list.Items {
		w.Oldest = max(w.Oldest, time.Since(i.Created))
	}
	return w, nil
}
