package web

import "errors"

var (
	// ErrNotRunning is given by a Client where nobody listens on the control socket.
	ErrNotRunning = errors.New("the daemon does not run")
	// ErrSilent is given by a Client where the daemon takes the question and does not answer.
	ErrSilent = errors.New("the daemon does not answer")
	// ErrNoSuch is given by a Client for an item that is not in the queue.
	ErrNoSuch = errors.New("no such item")
)
