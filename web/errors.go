package web

import "errors"

var (
	// ErrNotRunning is given by a Client where nobody listens on the control socket.
	ErrNotRunning = errors.New("the daemon does not run")
	// ErrNoSuch is given by a Client for an item that is not in the queue.
	ErrNoSuch = errors.New("no such item")
)
