package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"sync"
	"time"

	"mailproxy/config"
	"mailproxy/test/history"
	"mailproxy/test/lab"
)

// mailDomain is what mail is sent to; it is in the configuration from the start.
const mailDomain = "mail.test"

// A node is a host with what is known of it from outside.
type node struct {
	*lab.Host
	number int

	// database is held for reading by whoever notes what the node said, and for writing while the database is put back, so that
	// facts stand in the order in which they came about.
	database sync.RWMutex

	mu   sync.Mutex // guards the rest
	cid  config.CID
	last string // what its database said last, to note it once
}

// CID gives the node's number in the cluster as it was last seen.
func (n *node) CID() config.CID {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.cid
}

// A command is one that was killed and is to be run again.
type command struct {
	node *node
	args []string
}

// run is one run of chaos.
type run struct {
	settings
	began time.Time
	lab   *lab.Lab
	nodes []*node
	sink  *lab.Sink
	plan  *plan
	file  *os.File
	facts *history.Recorder

	mu       sync.Mutex // guards the rest
	errs     []error    // of the lab or of the notes: none is the cluster's
	ran      map[string]int
	accepted map[string]bool     // subjects that were answered with 250
	pending  map[string]*command // killed, by CID and line
	acks     []history.Fact      // not known of a majority yet
	where    map[config.CID]config.Position
	noted    int
	rounds   int
	// rollbacks counts them; settled is how many there were before this storm.
	rollbacks, settled int
}

// count counts something that was done.
func (r *run) count(what string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.ran[what]++
}

// broken keeps an error of the test's own.
func (r *run) broken(err error) {
	if err == nil {
		return
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	r.errs = append(r.errs, err)
}

// note keeps a fact.
func (r *run) note(f history.Fact) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.noteLocked(f)
}

func (r *run) noteLocked(f history.Fact) {
	r.noted++
	if err := r.facts.Note(f); err != nil {
		r.errs = append(r.errs, err)
	}
}

// counts is the last line.
func (r *run) counts() string {
	r.mu.Lock()
	defer r.mu.Unlock()
	return fmt.Sprintf("chaos: seed %d, %.0f s, %d rounds, %d faults, %d commits acknowledged, %d commands of which %d were killed, %d promotes, "+
		"%d nodes deleted, %d messages accepted and %d of them arrived, %d facts",
		r.seed, time.Since(r.began).Seconds(), r.rounds, r.ran["fault"], r.ran["commit"], r.ran["command"], r.ran["killed"], r.ran["promote"],
		r.ran["delete"], len(r.accepted), len(r.accepted)-len(r.missing()), r.noted)
}

// missing are the messages that were accepted and have not arrived.
func (r *run) missing() []string {
	var out []string
	for subject := range r.accepted {
		if r.sink.Count(subject) == 0 {
			out = append(out, subject)
		}
	}
	return out
}

// together runs workers until all have ended.
func together(ctx context.Context, workers []func(context.Context)) {
	var all sync.WaitGroup
	for _, w := range workers {
		all.Go(func() { w(ctx) })
	}
	all.Wait()
}

// pause waits; false when ctx has ended.
func pause(ctx context.Context, d time.Duration) bool {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-ctx.Done():
		return false
	case <-t.C:
		return true
	}
}

// beginFacts begins the facts of a round, in a file that is kept where a rule does not hold.
func (r *run) beginFacts() error {
	if r.file == nil {
		f, err := os.CreateTemp("/tmp", fmt.Sprintf("chaos-%d-*.facts", r.seed))
		if err != nil {
			return err
		}
		r.file = f
	}
	if _, err := r.file.Seek(0, 0); err != nil {
		return err
	}
	if err := r.file.Truncate(0); err != nil {
		return err
	}
	r.facts = history.NewRecorder(r.file)
	r.mu.Lock()
	defer r.mu.Unlock()
	r.acks, r.where, r.settled = nil, map[config.CID]config.Position{}, r.rollbacks
	for _, n := range r.nodes {
		n.mu.Lock()
		n.last = ""
		n.mu.Unlock()
	}
	return nil
}

// judge checks the round; calmed is what the calm has found wrong. The facts of a good round give way to those of the next.
func (r *run) judge(calmed error) error {
	r.mu.Lock()
	errs := append(r.errs, calmed)
	r.errs = nil
	r.mu.Unlock()
	for _, v := range history.Check(r.facts.Facts()) {
		errs = append(errs, errors.New(v.String()))
	}
	if err := errors.Join(errs...); err != nil {
		return fmt.Errorf("facts in %s: %w", r.file.Name(), err)
	}
	r.say("%d facts, all rules hold", len(r.facts.Facts()))
	if err := r.beginFacts(); err != nil {
		return err
	}
	for _, n := range r.nodes {
		r.look(n)
	}
	return nil
}
