package web

import (
	"errors"
	"net/http"
)

var (
	// ErrNotRunning is given by a Client where nobody listens on the control socket.
	ErrNotRunning = errors.New("the daemon does not run")
	// ErrSilent is given by a Client where the daemon takes the question and does not answer.
	ErrSilent = errors.New("the daemon does not answer")
	// ErrNoSuch is given by a Client for an item that is not in the queue.
	ErrNoSuch = errors.New("no such item")
	// ErrCut is given by a Client where an answer ends before its end: what was ordered and not answered may have been done.
	ErrCut = errors.New("the answer was lost on its way")
)

// A ProblemError is what a daemon says instead of an answer.
type ProblemError struct {
	code int
	text string
}

func (e *ProblemError) Error() string { return e.text }

// Usage says whether the question was wrong.
func (e *ProblemError) Usage() bool { return e.code == http.StatusBadRequest }
