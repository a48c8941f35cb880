package cluster

import (
	"context"
	"fmt"
	"math/rand/v2"
	"strings"
	"sync"
	"time"

	"github.com/rs/zerolog"
	"golang.org/x/sync/errgroup"

	"mailproxy/config"
	"mailproxy/db"
	"mailproxy/tunnel"
)

// Options is what a Node is made of.
type Options struct {
	Local *config.Local
	DB    *db.DB
	// Tunnel leads to the peers. It is run, and told of new members, by whoever made it.
	Tunnel *tunnel.Tunnel
	// Version is the software's.
	Version string
	// Snapshot gives the configuration that was loaded last, whether or not the mail path could compile it. Members come from
	// it, so that a node knows its peers with PostgreSQL down. It may give nil.
	Snapshot func() *config.Snapshot
	// Problems gives what other parts of the daemon know to be wrong. May be nil.
	Problems func() []Problem
	// Starting says whether the database is still being made ready, and not in vain. May be nil.
	Starting func() bool
	// Draining says how the node takes no mail by an operator's wish; nil while it does. May be nil.
	Draining func() *Draining
	// Kept counts the items of the queue that are kept; may be nil.
	Kept func() int
	// CheckPassword asks whether a password, which came from that address, is root's on this host: ErrWrongPassword, or why it cannot
	// be said. Nil: it cannot.
	CheckPassword func(ctx context.Context, from, password string) error
	// Timing: what is zero takes its default.
	Timing Timing
	Log    zerolog.Logger
	// Now is the clock that people read; nil: time.Now. Leases are counted without it.
	Now func() time.Time
}

// Timing is how often, and how long. Zero fields take the defaults that stand with them.
type Timing struct {
	// Poll is how often the own state is read where nothing wakes us: 2 s.
	Poll time.Duration
	// Probe is how often a master asks its slaves for their position: 3 s. Slaves ask each other less often.
	Probe time.Duration
	// Confirm is how often a slave in sync is compared again by its pusher, and asks its master: 10 s.
	Confirm time.Duration
	// Retry is the longest pause between two attempts to push; the first is a twentieth of it: 5 s.
	Retry time.Duration
	// Drift is how often the digest is recomputed from the rows: 45 s.
	Drift time.Duration
	// Lease is how often a master renews its lease: 2 s.
	Lease time.Duration
	// Renew is how often the certificate is looked at: 10 s.
	Renew time.Duration
	// Grace is how long a promise that nobody makes good is waited for before a refused master runs the round: 10 s.
	Grace time.Duration
}

func (t Timing) withDefaults() Timing {
	for _, d := range []struct {
		field *time.Duration
		value time.Duration
	}{
		{&t.Poll, 2 * time.Second}, {&t.Probe, 3 * time.Second}, {&t.Confirm, 10 * time.Second},
		{&t.Retry, 5 * time.Second}, {&t.Drift, 45 * time.Second}, {&t.Lease, 2 * time.Second}, {&t.Renew, 10 * time.Second}, {&t.Grace, 10 * time.Second},
	} {
		if *d.field == 0 {
			*d.field = d.value
		}
	}
	return t
}

// askTimeout bounds one question to the own database or to a peer that is near: a dead one costs no more.
const askTimeout = 2 * time.Second

// A peer that is far may take so many round trips longer: a stream and a session are opened for the question, and where there is none yet a
// connection for bulk. longestAsk bounds that, since a peer that was frozen seems far.
const (
	askRoundTrips = 8
	longestAsk    = 10 * time.Second
)

// askBound bounds one question to a peer by what the last round trip took, of which halfTrip is the half.
func askBound(halfTrip time.Duration) time.Duration {
	return min(askTimeout+askRoundTrips*2*halfTrip, longestAsk)
}

// A Node is this node's part in the cluster. Its methods may be called at once from several goroutines.
//
//	           create                 a higher epoch seen in force, or promised to a peer
//	single ──────────────> master ──────────────────────────────────────────────────────┐
//	  │                      ^                                                          v
//	  │ join                 └───────── promote, or the round of a refused master ─── slave
//	  └────────────────────────────────────────────────────────────────────────────────>┘
//
// The role is never set: it is read from the state row (roleOf), which promise, push and BeginEpoch change in the database.
type Node struct {
	o       Options
	started time.Time
	// wake asks the role loop to read the state again; capacity 1.
	wake chan struct{}
	// heard asks a master to look at its lease: a peer has answered again. Capacity 1.
	heard chan struct{}
	// forgotten is when copies of trimmed commits were last dropped; the role loop's alone.
	forgotten forgotten
	// guesses slows down who tries passwords.
	guesses guesses

	mu sync.Mutex // guards the rest
	// changed is closed and replaced when peers may have changed.
	changed chan struct{}
	// state is the last that was read, stateErr why the last reading failed, stateAt when it last succeeded.
	state    db.State
	stateErr error
	stateAt  time.Time
	// views is what each peer was when it last answered.
	views map[config.CID]*view
	// kicks wake the prober and the pusher of a peer.
	kicks map[config.CID]*kicks
	// drift is set while the rows are known to differ from the kept digest.
	drift *drift
	// renewErr is why the certificate, which is due, was not renewed.
	renewErr error
	// noLease is set while this master does not hold its lease.
	noLease bool
	// pushErrs is why the last push to a slave failed.
	pushErrs map[config.CID]error
	// rolesFor is the member list that the peers' login roles were last made for, and when.
	rolesFor   string
	rolesForAt time.Time
	// said limits repeated warnings.
	said map[warning]*repeat
	// clockSaid is when a peer's clock was last logged to differ.
	clockSaid map[config.CID]time.Time
}

// A view is what is known of a peer.
type view struct {
	state    db.State
	answered bool // state was heard at least once since the daemon started
	err      error
	seenAt   time.Time // when it last answered
	askedAt  time.Time // when that was asked which it answered last, by time.Now: leases hang on its age, whatever the clock does
	since    time.Time // since when err (or its absence) stands
}

// kicks carry no data: who is woken reads the state again. Capacity 1 each.
type kicks struct{ probe, dirty, up chan struct{} }

func newKicks() *kicks {
	return &kicks{make(chan struct{}, 1), make(chan struct{}, 1), make(chan struct{}, 1)}
}

func kick(c chan struct{}) {
	select {
	case c <- struct{}{}:
	default:
	}
}

// New makes a Node; Run starts it.
func New(o Options) *Node {
	o.Timing = o.Timing.withDefaults()
	if o.Now == nil {
		o.Now = time.Now
	}
	if o.Snapshot == nil {
		o.Snapshot = func() *config.Snapshot { return nil }
	}
	return &Node{
		o: o, started: o.Now(), wake: make(chan struct{}, 1), heard: make(chan struct{}, 1), changed: make(chan struct{}),
		views: map[config.CID]*view{}, kicks: map[config.CID]*kicks{}, pushErrs: map[config.CID]error{}, said: map[warning]*repeat{},
		clockSaid: map[config.CID]time.Time{},
	}
}

// Run does the node's work until ctx ends, and returns when all of it has ended.
func (n *Node) Run(ctx context.Context) error {
	g, ctx := errgroup.WithContext(ctx)
	for _, f := range []func(context.Context) error{n.roles, n.probers, n.watchTunnel, n.watchPromises, n.checkDrift, n.renewCertificate} {
		g.Go(func() error { return f(ctx) })
	}
	if err := g.Wait(); ctx.Err() == nil {
		return err
	}
	return nil
}

// Wake tells the node that the configuration was loaded again: members may have changed. It does not block.
func (n *Node) Wake() {
	n.mu.Lock()
	n.peersChangedLocked()
	n.mu.Unlock()
	kick(n.wake)
}

// peersChangedLocked tells who waits for nextPeers.
func (n *Node) peersChangedLocked() {
	close(n.changed)
	n.changed = make(chan struct{})
}

// nextPeers gives a channel that is closed when peers may next have changed: with the member list, or with who this node is.
func (n *Node) nextPeers() <-chan struct{} {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.changed
}

// Changed tells the node that a commit or a promise became visible in the database. It does not block, and slaves are pushed to
// without waiting until the daemon has loaded and compiled the new configuration.
func (n *Node) Changed() {
	n.mu.Lock()
	for _, k := range n.kicks {
		kick(k.dirty)
	}
	n.mu.Unlock()
	kick(n.wake)
}

// members is the member list of the configuration loaded last.
func (n *Node) members() []config.Node {
	if s := n.o.Snapshot(); s != nil {
		return s.Nodes
	}
	return nil
}

// peers is members without this node.
func (n *Node) peers() []config.Node {
	self := n.self()
	var out []config.Node
	for _, m := range n.members() {
		if m.CID != self && self != 0 {
			out = append(out, m)
		}
	}
	return out
}

// self is this node's CID; where PostgreSQL has not answered since the start, that of its identity.
func (n *Node) self() config.CID {
	n.mu.Lock()
	st, read := n.state, !n.stateAt.IsZero()
	n.mu.Unlock()
	if read {
		return st.CID
	}
	return n.lastKnown(st).CID
}

// refresh reads the own state.
func (n *Node) refresh(ctx context.Context) (db.State, error) {
	ctx, cancel := context.WithTimeout(ctx, askTimeout)
	defer cancel()
	st, err := n.o.DB.State(ctx)
	n.mu.Lock()
	defer n.mu.Unlock()
	n.stateErr = err
	if err != nil {
		return n.state, err
	}
	n.keepLocked(st)
	return st, nil
}

// keepLocked keeps a state that was read. Rows that changed without a commit or a push show by it.
func (n *Node) keepLocked(st db.State) {
	if !n.stateAt.IsZero() && drifted(n.state, st) {
		n.foundDriftLocked(n.state.Position, st.Position.Digest)
	}
	if n.state.Promised != st.Promised || n.state.Position.Epoch != st.Position.Epoch { // another master, asked at another pace
		for _, k := range n.kicks {
			kick(k.probe)
		}
	}
	if n.state.CID != st.CID || n.stateAt.IsZero() {
		n.peersChangedLocked()
	}
	n.state, n.stateAt = st, n.o.Now()
	if n.drift != nil && n.drift.over(st.Position) {
		n.drift = nil
	}
}

// known is the own state as it was last read.
func (n *Node) known() db.State {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.state
}

// A reign is a role in an epoch; another reign is another context.
type reign struct {
	cid   config.CID
	role  Role
	epoch config.Epoch
}

func reignOf(s db.State) reign {
	r := reign{cid: s.CID, role: roleOf(s)}
	if r.role == Master {
		r.epoch = s.Position.Epoch
	}
	return r
}

// roles is the role loop: it is in one role at a time, and in none while the database has never answered.
func (n *Node) roles(ctx context.Context) error {
	var last reign
	for ctx.Err() == nil {
		st, err := n.refresh(ctx)
		if err != nil {
			n.pause(ctx, n.o.Timing.Poll, n.wake)
			continue
		}
		if r := reignOf(st); r != last {
			n.o.Log.Info().Int("node", int(r.cid)).Str("role", string(r.role)).Str("was", string(last.role)).
				Stringer("epoch", st.Position.Epoch).Stringer("promised", st.Promised).Int64("serial", st.Position.Serial).Msg("role.changed")
			last = r
		}
		n.hold(ctx, st)
	}
	return ctx.Err()
}

// hold is in st's role until the state says another.
func (n *Node) hold(ctx context.Context, st db.State) {
	ctx, end := context.WithCancel(ctx)
	done := make(chan struct{})
	go func() {
		defer close(done)
		n.play(ctx, roleOf(st))
	}()
	defer func() { end(); <-done }()
	for ctx.Err() == nil {
		n.ensurePeerRoles(ctx)
		n.forgetTrimmed(ctx)
		n.pause(ctx, n.o.Timing.Poll, n.wake)
		if now, err := n.refresh(ctx); err == nil && reignOf(now) != reignOf(st) {
			return
		}
	}
}

// play is the role: the function that one is in.
func (n *Node) play(ctx context.Context, r Role) {
	if r == Master {
		var lease sync.WaitGroup
		lease.Go(func() { n.keepLease(ctx) })
		n.perPeer(ctx, n.push)
		lease.Wait()
		return
	}
	// A slave takes pushes, which the gate and the database do; a single node has nobody to push to.
	<-ctx.Done()
}

// ensurePeerRoles makes the peers' login roles fit the member list, when that has changed and once a minute.
func (n *Node) ensurePeerRoles(ctx context.Context) {
	var b strings.Builder
	fmt.Fprintf(&b, "%d:", n.known().CID)
	for _, m := range n.members() {
		fmt.Fprintf(&b, " %d", m.CID)
	}
	now := time.Now()
	n.mu.Lock()
	due := b.String() != n.rolesFor || now.Sub(n.rolesForAt) > time.Minute
	n.mu.Unlock()
	if !due {
		return
	}
	if err := n.o.DB.EnsurePeerRoles(ctx); err != nil {
		n.warn(ctx, "peers.roles", 0, err)
		return
	}
	n.mu.Lock()
	n.rolesFor, n.rolesForAt = b.String(), now
	n.mu.Unlock()
}

// pause waits for d, a little varied so that nodes do not march in step, or for one of the kicks, or for ctx.
func (n *Node) pause(ctx context.Context, d time.Duration, wakes ...chan struct{}) (woken bool) {
	t := time.NewTimer(varied(d))
	defer t.Stop()
	var a, b chan struct{}
	if len(wakes) > 0 {
		a = wakes[0]
	}
	if len(wakes) > 1 {
		b = wakes[1]
	}
	select {
	case <-ctx.Done():
	case <-t.C:
	case <-a:
		return true
	case <-b:
		return true
	}
	return false
}

// pauseUntil is pause until an event at the latest.
func (n *Node) pauseUntil(ctx context.Context, d time.Duration, event <-chan struct{}) {
	t := time.NewTimer(varied(d))
	defer t.Stop()
	select {
	case <-ctx.Done():
	case <-t.C:
	case <-event:
	}
}

func varied(d time.Duration) time.Duration { return d - d/8 + rand.N(d/4+1) }

// A warning is named by its event and the peer that it is about; 0 is none.
type warning struct {
	event string
	peer  config.CID
}

// A repeat is a warning that comes again and again.
type repeat struct {
	text  string
	at    time.Time
	count int
}

// repeatEvery is how often the same warning is logged at most (STYLE, logs).
const repeatEvery = 30 * time.Second

// warn logs that something will be tried again; the same at most once in 30 s, with a count. Silent when ctx has ended.
func (n *Node) warn(ctx context.Context, event string, peer config.CID, err error) {
	if ctx.Err() != nil {
		return
	}
	key, now := warning{event, peer}, n.o.Now()
	n.mu.Lock()
	r := n.said[key]
	if r == nil {
		r = &repeat{}
		n.said[key] = r
	}
	r.count++
	if r.text == err.Error() && now.Sub(r.at) < repeatEvery {
		n.mu.Unlock()
		return
	}
	count := r.count
	*r = repeat{text: err.Error(), at: now}
	n.mu.Unlock()
	e := n.o.Log.Warn()
	if peer != 0 {
		e = e.Int32("node", int32(peer))
	}
	e.Int("count", count).Err(err).Msg(event)
}
