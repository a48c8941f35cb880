package cluster

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"time"

	"mailproxy/config"
	"mailproxy/db"
)

// Bounds of a promote round. Five attempts, since each one that fails for a changed answer has learned of a higher epoch or a
// newer position; a promise waits for a push that is being applied.
const (
	roundAttempts  = 5
	promiseTimeout = 10 * time.Second
)

// errAgain ends an attempt whose answers have changed under it; the next starts from new ones.
var errAgain = errors.New("positions changed meanwhile")

// errInForce ends the round of a refused master: somebody has made the promise good.
var errInForce = errors.New("a higher epoch is in force")

// A round makes this node the master: durable promises of the next epoch from every member, adoption of the newest position
// among the promisers, and the epoch written as a new commit. An orderly hand-over is the same round with the master among the
// promisers: its promise takes the configuration away from it, and so its position is the last.
//
// Nothing but promises is written until the last step, so a round can die anywhere.
type round struct {
	db     *db.DB
	open   func(ctx context.Context, cid config.CID) (*db.Peer, error)
	bound  func(cid config.CID) time.Duration // of one question
	author db.Author
	say    func(format string, args ...any)
	// notLetInBy names the members that do not let this node in, from what was heard by now; nil: they are not asked for.
	notLetInBy func(ctx context.Context) []string
	// recovers is set where a master runs it that is refused for a promise, or has lost its lease: it may still think itself master, and
	// it gives way to an epoch that has come into force meanwhile.
	recovers bool
}

// An Outcome is what a round ended in.
type Outcome struct {
	// Epoch is in force now, and this node's.
	Epoch config.Epoch
	// Position is the new epoch's first.
	Position config.Position
	// Adopted is the node whose configuration the epoch starts from.
	Adopted config.CID
	// Members is the member list, this node included.
	Members []config.Node
	// Missing are members that gave no promise.
	Missing []config.Node
}

// contact is a member during one attempt: what it answered, and the session for more.
type contact struct {
	answer
	peer *db.Peer // nil for this node itself and for members that do not answer
}

func (r *round) run(ctx context.Context, force bool) (Outcome, error) {
	var last error
	for range roundAttempts {
		out, err := r.attempt(ctx, force)
		if !errors.Is(err, errAgain) {
			return out, err
		}
		last = err
		r.say("%v, asking again", err)
	}
	return Outcome{}, last
}

// attempt is one pass of the round: ask, promise, adopt, begin.
func (r *round) attempt(ctx context.Context, force bool) (Outcome, error) {
	self, members, err := r.prepare(ctx)
	if err != nil {
		return Outcome{}, err
	}
	contacts := r.ask(ctx, self, members, force)
	defer closeContacts(contacts)
	if r.recovers {
		for _, c := range contacts {
			if c.err == nil && c.state.Position.Epoch.Compare(self.Position.Epoch) > 0 {
				return Outcome{}, fmt.Errorf("%w: %v at %s", errInForce, c.state.Position.Epoch, label(c.node))
			}
		}
	}
	if err := r.mayAsk(ctx, contacts, force, self); err != nil {
		return Outcome{}, err // before any promise is asked for: nothing was written
	}
	epoch := nextEpoch(self.CID, answersOf(contacts))
	r.say("asking %d members for their promise of epoch %v", len(members), epoch)
	if err := r.promise(ctx, contacts, epoch, self.CID); err != nil {
		return Outcome{}, err
	}
	if err := r.enough(contacts, true, force, self); err != nil {
		return Outcome{}, err
	}
	adopted, err := r.adopt(ctx, contacts, self.CID)
	if err != nil {
		return Outcome{}, err
	}
	if adopted != self.CID {
		now, err := r.db.Members(ctx)
		if err != nil {
			return Outcome{}, err
		}
		if !sameMembers(members, now) {
			return Outcome{}, fmt.Errorf("the newest configuration has other members: %w", errAgain)
		}
	}
	pos, err := r.db.BeginEpoch(ctx, epoch, mandate(contacts), r.author)
	if errors.Is(err, db.ErrStale) {
		return Outcome{}, fmt.Errorf("a higher epoch was promised here: %w", errAgain)
	}
	if err != nil {
		return Outcome{}, fmt.Errorf("begin epoch %v: %w", epoch, err)
	}
	out := Outcome{Epoch: epoch, Position: pos, Adopted: adopted, Members: members}
	for _, c := range contacts {
		if !c.promised {
			out.Missing = append(out.Missing, c.node)
		}
	}
	return out, nil
}

// mandate says whether the promises that were given are those of a majority.
func mandate(contacts []*contact) db.Mandate {
	answers := answersOf(contacts)
	if votes(answers, true) < majority(voters(answers)) {
		return db.ByForce
	}
	return db.ByMajority
}

// prepare reads the own state and member list, and refuses who must not ask.
func (r *round) prepare(ctx context.Context) (db.State, []config.Node, error) {
	self, err := r.db.State(ctx)
	if err != nil {
		return self, nil, err
	}
	switch {
	case self.CID == 0:
		return self, nil, ErrNoCluster
	case joining(self):
		return self, nil, ErrJoining
	case self.IsMaster() && !r.recovers:
		return self, nil, ErrAlreadyMaster
	}
	members, err := r.db.Members(ctx)
	if err != nil {
		return self, nil, err
	}
	me, ok := memberOf(members, self.CID)
	if !ok {
		return self, nil, fmt.Errorf("%w: node %d is not in the member list", ErrNoSuchNode, self.CID)
	}
	if !me.Promotable {
		return self, nil, ErrNotPromotable
	}
	return self, members, nil
}

// forcedHaste is how much less a forced round waits for each: whoever forces it knows that some are dead.
const forcedHaste = askTimeout / 2

// ask reads the position of every member, side by side. A dead one costs a bounded time; one that is far is given its round trips.
func (r *round) ask(ctx context.Context, self db.State, members []config.Node, force bool) []*contact {
	contacts := make([]*contact, len(members))
	var all sync.WaitGroup
	for i, m := range members {
		c := &contact{answer: answer{node: m}}
		contacts[i] = c
		if m.CID == self.CID {
			c.state = self
			continue
		}
		all.Go(func() {
			bound := r.bound(m.CID)
			if force {
				bound -= forcedHaste
			}
			ctx, cancel := context.WithTimeout(ctx, bound)
			defer cancel()
			if c.peer, c.err = r.open(ctx, m.CID); c.err != nil {
				return
			}
			c.state, c.err = c.peer.State(ctx)
		})
	}
	all.Wait()
	return contacts
}

// promise makes the own promise, then asks the others for theirs, side by side.
func (r *round) promise(ctx context.Context, contacts []*contact, e config.Epoch, self config.CID) error {
	st, err := r.db.Promise(ctx, e)
	if errors.Is(err, db.ErrStale) {
		return fmt.Errorf("promise here: %w", errAgain)
	}
	if err != nil {
		return fmt.Errorf("promise here: %w", err)
	}
	var all sync.WaitGroup
	for _, c := range contacts {
		if c.node.CID == self {
			c.state, c.promised = st, true
			continue
		}
		if c.err != nil {
			continue
		}
		all.Go(func() {
			ctx, cancel := context.WithTimeout(ctx, promiseTimeout)
			defer cancel()
			var st db.State
			if st, c.err = c.peer.Promise(ctx, e.N); c.err == nil {
				c.state, c.promised = st, true
			}
		})
	}
	all.Wait()
	for _, c := range contacts {
		if errors.Is(c.err, db.ErrStale) {
			return fmt.Errorf("%s has promised a higher epoch: %w", label(c.node), errAgain)
		}
	}
	return nil
}

// adopt brings the own configuration to the newest position among the promisers.
func (r *round) adopt(ctx context.Context, contacts []*contact, self config.CID) (config.CID, error) {
	from, ok := adoptFrom(self, answersOf(contacts))
	if !ok {
		return 0, ErrJoining
	}
	if from.node.CID == self {
		return self, nil
	}
	r.say("taking over the configuration of %s at %v", label(from.node), from.state.Position)
	here := from.state.Position // its own is among those that were compared
	for _, c := range contacts {
		if c.node.CID == self {
			here = c.state.Position
		}
	}
	for _, c := range contacts {
		if c.node.CID != from.node.CID {
			continue
		}
		if _, err := r.db.Adopt(ctx, c.peer, here, from.state.Position); err != nil {
			if ctx.Err() != nil {
				return 0, ctx.Err()
			}
			return 0, fmt.Errorf("%w (take over from %s: %w)", errAgain, label(from.node), err)
		}
	}
	return from.node.CID, nil
}

// mayAsk refuses a round without majority that is not forced, and also a forced one of a node that was deleted: it would make a second master
// beside a cluster that lives.
func (r *round) mayAsk(ctx context.Context, contacts []*contact, force bool, self db.State) error {
	err := r.enough(contacts, false, false, self)
	if err == nil {
		return nil
	}
	if r.notLetInBy != nil {
		if by := r.notLetInBy(ctx); len(by) > 0 {
			return fmt.Errorf("%w: %s", ErrNotLetIn, strings.Join(by, ", "))
		}
	}
	if force {
		return nil
	}
	return err
}

// enough says whether the members that answered (or promised) are a majority of those that have a vote.
func (r *round) enough(contacts []*contact, promised, force bool, self db.State) error {
	answers := answersOf(contacts)
	voters := voters(answers)
	got := votes(answers, promised)
	if force || got >= majority(voters) {
		return nil
	}
	e := &NoMajorityError{Votes: got, Voters: voters, Wanted: majority(voters), AtRisk: atRisk(self, answers)}
	for _, a := range answers {
		if a.err != nil || promised && !a.promised {
			e.Missing = append(e.Missing, label(a.node))
		}
	}
	e.Alone = len(answers) > 2 && !slices.ContainsFunc(answers, func(a answer) bool { return a.node.CID != self.CID && a.err == nil })
	return e
}

// atRisk says in words what a promote without majority may lose: whatever no answering node has.
func atRisk(self db.State, answers []answer) []string {
	line := fmt.Sprintf("own position %v", self.Position)
	if !self.PushedAt.IsZero() {
		line += ", last push " + ago(time.Since(self.PushedAt))
	}
	lines := []string{line}
	for _, a := range answers {
		if a.err == nil && a.state.Position.Compare(self.Position) > 0 {
			lines = append(lines, fmt.Sprintf("%s is further: %v; its configuration would be taken over", label(a.node), a.state.Position))
		}
	}
	return append(lines, "commits that only a missing member has would be set aside in its journal when it returns")
}

func answersOf(contacts []*contact) []answer {
	out := make([]answer, len(contacts))
	for i, c := range contacts {
		out[i] = c.answer
	}
	return out
}

func closeContacts(contacts []*contact) {
	for _, c := range contacts {
		if c.peer != nil {
			c.peer.Close()
		}
	}
}

// label is a node in texts: "mx2(2)".
func label(n config.Node) string { return fmt.Sprintf("%s(%d)", n.Name, n.CID) }

// ago is a duration in words that fit a table: "12 s ago".
func ago(d time.Duration) string {
	switch {
	case d < 2*time.Minute:
		return fmt.Sprintf("%d s ago", int(d.Seconds()))
	case d < 2*time.Hour:
		return fmt.Sprintf("%d min ago", int(d.Minutes()))
	case d < 48*time.Hour:
		return fmt.Sprintf("%d h ago", int(d.Hours()))
	}
	return fmt.Sprintf("%d days ago", int(d.Hours()/24))
}
