package spool

import (
	"os"
	"sync"
)

// A dirSync makes the names in a directory durable. Those who call while a sync is under way share the next one.
type dirSync struct {
	dir *os.File

	run     sync.Mutex // held by who syncs
	mu      sync.Mutex
	waiting *dirBatch // who joined since the last sync began
}

// A dirBatch is a sync that several wait for; its fields are guarded by run.
type dirBatch struct {
	done bool
	err  error
}

// sync returns once a sync that began after the call has ended, with its error.
func (s *dirSync) sync() error {
	s.mu.Lock()
	if s.waiting == nil {
		s.waiting = new(dirBatch)
	}
	b := s.waiting
	s.mu.Unlock()

	s.run.Lock()
	defer s.run.Unlock()
	if !b.done {
		s.mu.Lock()
		s.waiting = nil // from here on others join the next
		s.mu.Unlock()
		b.err = s.dir.Sync()
		b.done = true
	}
	return b.err
}
