package cluster

import (
	"fmt"
	"time"

	"mailproxy/config"
	"mailproxy/db"
)

// A model is what a cluster may do within bounds: the project's own decisions, over the steps that node and database take.
type model struct {
	nodes   int
	joining int // how many of them, the last ones, have not been pushed to yet
	budget  budget
	// lease makes masters' leases lapse and come back, at any instant.
	lease bool
	// cut is a node that hears nobody and that nobody hears, for longer than a lease lasts; 0: none.
	cut   int
	flaws flaws
	decisions
	// rules are those that are checked; nil: all.
	rules []rule

	healed map[world]finding // by what is durable
}

// decisions are the functions of decide.go; a mutant takes another.
type decisions struct {
	adoptFrom func(config.CID, []answer) (answer, bool)
	nextEpoch func(config.CID, []answer) config.Epoch
	majority  func(int) int
	voters    func([]answer) int
	votes     func([]answer, bool) int
	relate    func(master, theirs config.Position) Relation
	mayCommit func(db.State) bool
	wedged    func(*Node) bool
	holds     func(db.State, config.Position) bool
	leaseFrom func(config.Epoch, time.Time, []standing) (time.Time, bool, bool)
}

func ours() decisions {
	return decisions{
		adoptFrom: adoptFrom, nextEpoch: nextEpoch, majority: majority, voters: voters, votes: votes, relate: relate,
		mayCommit: func(s db.State) bool { return roleOf(s) == Master }, wedged: (*Node).wedged, holds: holds,
		leaseFrom: leaseFrom,
	}
}

// flaws are what a mutant does wrong in the database's part.
type flaws struct {
	noEpochCheck    bool // a push of any epoch is applied
	appliedEpoch    bool // a push is compared with the epoch in force
	unsyncedPromise bool // a promise is lost in a crash
	noAdoption      bool
	noJournal       bool
	twoTransactions bool // rows first, then the position
	blindAdoption   bool // the own position may have changed since it was compared
	serialsGoBack   bool // a push of the own epoch is applied whatever its serial
	holdersCount    bool // who holds a commit counts for its majority, whatever it has promised
	leaseBindsForce bool // a master by force needs a majority for its lease, too
	noLearning      bool // a higher epoch in force is not promised, but when it is pushed
}

// The kinds of step.
const (
	doCommit = iota
	doLearn
	doSend
	doApply
	doFinish
	doRead
	doLose
	doStart
	doOwnPromise
	doPromise
	doHear
	doAdopt
	doBegin
	doCrash
	doLapse
	doRenew
)

// A modelStep is one thing that happens. Whatever may happen may also not happen: a message lost, a node cut off.
type modelStep struct{ kind, node, peer, detail uint8 }

func (s modelStep) String() string {
	n, p := s.node+1, s.peer+1
	switch s.kind {
	case doCommit:
		return fmt.Sprintf("node %d commits a change", n)
	case doLearn:
		return fmt.Sprintf("node %d sees node %d's epoch and promises it", n, p)
	case doSend:
		return fmt.Sprintf("node %d reads what it pushes to node %d%s", n, p, map[uint8]string{1: " (pmgcm sync)"}[s.detail])
	case doApply:
		return fmt.Sprintf("node %d applies what was read from node %d%s", n, p, map[uint8]string{1: " (pmgcm sync)"}[s.detail])
	case doFinish:
		return fmt.Sprintf("node %d sets its position", n)
	case doRead:
		return fmt.Sprintf("node %d reads its master node %d, to take it over (pmgcm sync)", n, p)
	case doLose:
		return fmt.Sprintf("the rows from node %d to node %d are lost", p, n)
	case doStart:
		how := map[uint8]string{0: "promote", 1: "promote --force", 2: "the round of a refused master"}[s.detail&3]
		heard := ""
		for j := range maxNodes {
			if s.detail>>2&(1<<j) != 0 && j != int(s.node) {
				heard += fmt.Sprintf(" %d", j+1)
			}
		}
		if heard == "" {
			heard = " nobody"
		}
		return fmt.Sprintf("node %d begins %s and hears%s", n, how, heard)
	case doOwnPromise:
		return fmt.Sprintf("node %d promises the round's epoch to itself", n)
	case doPromise:
		return fmt.Sprintf("node %d is asked by node %d for its promise", p, n)
	case doHear:
		return fmt.Sprintf("node %d hears node %d's position under its promise", n, p)
	case doAdopt:
		return fmt.Sprintf("node %d counts the promises and adopts", n)
	case doBegin:
		return fmt.Sprintf("node %d begins its epoch", n)
	case doCrash:
		return fmt.Sprintf("node %d crashes", n)
	case doLapse:
		return fmt.Sprintf("the lease of node %d lapses", n)
	}
	return fmt.Sprintf("node %d hears a majority and renews its lease", n)
}

// A taker is given what may come after a world.
type taker func(modelStep, world)

// next gives every world that may come after w.
func (m *model) next(w *world, take taker) {
	for i := range m.nodes {
		m.nodeSteps(w, i, take)
		for j := range m.nodes {
			if i != j && i+1 != m.cut && j+1 != m.cut {
				m.pairSteps(w, i, j, take)
			}
		}
	}
	for k := range w.rides {
		m.rideSteps(w, k, take)
	}
	for k := range w.transfers {
		m.transferSteps(w, k, take)
	}
}

// nodeSteps are those of a node by itself.
func (m *model) nodeSteps(w *world, i int, take taker) {
	h := &w.hosts[i]
	if w.left.changes > 0 && m.mayCommit(w.state(i)) && !h.lapsed {
		after := *w
		after.left.changes--
		after.add(i, modelCommit{epoch: h.at.epoch, serial: h.at.serial + 1})
		take(modelStep{kind: doCommit, node: uint8(i)}, after)
	}
	m.starts(w, i, take)
	if h.durable != h.promised {
		take(modelStep{kind: doCrash, node: uint8(i)}, crashed(w, i))
	}
	if m.lease && !h.lapsed && (!h.waived || m.flaws.leaseBindsForce) && roleOf(w.state(i)) == Master {
		after := *w
		after.hosts[i].lapsed = true
		take(modelStep{kind: doLapse, node: uint8(i)}, after)
	}
	if (h.lapsed || h.waived) && m.lease && i+1 != m.cut && roleOf(w.state(i)) == Master && m.renews(w, i) {
		after := *w
		after.hosts[i].lapsed, after.hosts[i].waived = false, false
		take(modelStep{kind: doRenew, node: uint8(i)}, after)
	}
}

// renews says whether a master that hears everybody holds a lease of a majority: renewLease in lease.go.
func (m *model) renews(w *world, i int) bool {
	now := time.Unix(0, 0)
	var others []standing
	for j := range m.nodes {
		if j != i {
			others = append(others, standing{asked: true, answered: now, state: w.state(j)})
		}
	}
	_, byMajority, ok := m.leaseFrom(w.hosts[i].at.epoch.epoch(), now, others)
	return ok && byMajority
}

// crashed ends what runs on a node and leaves what is on its disk.
func crashed(w *world, i int) world {
	after := *w
	after.hosts[i].promised = after.hosts[i].durable
	for k := range after.rides {
		if int(after.rides[k].node) == i {
			after.rides[k] = ride{}
		}
	}
	for k, t := range after.transfers {
		if t.kind != movesNone && (int(t.to) == i || int(t.from) == i) {
			after.transfers[k] = modelTransfer{}
		}
	}
	after.sortRides()
	return after
}

// pairSteps are those of node i with node j.
func (m *model) pairSteps(w *world, i, j int, take taker) {
	if w.hosts[j].at.epoch > w.hosts[i].promised && !m.flaws.noLearning { // learn, in probe.go
		after := *w
		after.setPromise(i, w.hosts[j].at.epoch, m.flaws)
		take(modelStep{kind: doLearn, node: uint8(i), peer: uint8(j)}, after)
	}
	if w.transfers[0].kind == movesNone && m.sends(w, i, j) {
		after := *w
		after.transfers[0] = modelTransfer{kind: movesPushed, from: uint8(i), to: uint8(j), at: w.hosts[i].at}
		take(modelStep{kind: doSend, node: uint8(i), peer: uint8(j)}, after)
	}
	if w.left.syncs == 0 || w.transfers[1].kind != movesNone {
		return
	}
	after := *w
	after.left.syncs--
	if m.sends(w, i, j) {
		after.transfers[1] = modelTransfer{kind: movesPushed, from: uint8(i), to: uint8(j), at: w.hosts[i].at}
		take(modelStep{kind: doSend, node: uint8(i), peer: uint8(j), detail: 1}, after)
	}
	if m.reads(w, i, j) {
		after.transfers[1] = modelTransfer{kind: movesPulled, from: uint8(j), to: uint8(i), at: w.hosts[j].at, here: w.hosts[i].at}
		take(modelStep{kind: doRead, node: uint8(i), peer: uint8(j)}, after)
	}
}

// sends is pushOnce in master.go, and what db.Push asks before it reads: a master sends to who is behind and has promised its epoch.
func (m *model) sends(w *world, i, j int) bool {
	mine, theirs := w.state(i), w.state(j)
	if roleOf(mine) != Master || theirs.Promised != mine.Position.Epoch && !m.flaws.noLearning {
		return false
	}
	switch m.relate(mine.Position, theirs.Position) {
	case Behind, Joining:
		return theirs.Position.Epoch.Compare(mine.Position.Epoch) <= 0
	}
	return false
}

// reads is fetchMaster in sync.go: the master that a slave last heard of, in the epoch that it has promised.
func (m *model) reads(w *world, i, j int) bool {
	mine, theirs := w.state(i), w.state(j)
	return roleOf(mine) == Slave && roleOf(theirs) == Master && mine.Promised == theirs.Position.Epoch && mine.Position != theirs.Position
}

// transferSteps are those of rows on their way.
func (m *model) transferSteps(w *world, k int, take taker) {
	t := w.transfers[k]
	if t.kind == movesNone {
		return
	}
	i := int(t.to)
	lost := *w
	lost.transfers[k] = modelTransfer{}
	take(modelStep{kind: doLose, node: t.to, peer: t.from, detail: uint8(k)}, lost)
	after := lost
	by := modelStep{kind: doApply, node: t.to, peer: t.from, detail: uint8(k)}
	switch t.kind {
	case movesPushed:
		switch {
		case !m.takesPush(w, t):
			return
		case m.flaws.twoTransactions:
			after.hosts[i].at.hist = t.at.hist
			after.transfers[k] = t
			after.transfers[k].kind = movesHalfway
		default:
			after.apply(i, t.at, false, m.flaws)
			after.takes(i)
		}
	case movesPulled:
		if !m.takesAdoption(w, i, t.at, t.here) {
			return
		}
		after.apply(i, t.at, true, m.flaws)
		after.takes(i)
	case movesHalfway:
		after.hosts[i].at = t.at
		by.kind = doFinish
	}
	take(by, after)
}

// takesPush is node.may_push and the first lines of node.push.
func (m *model) takesPush(w *world, t modelTransfer) bool {
	h := &w.hosts[t.to]
	switch {
	case m.flaws.noEpochCheck:
	case m.flaws.appliedEpoch:
		if t.at.epoch < h.at.epoch {
			return false
		}
	case t.at.epoch != h.promised:
		return false
	}
	return m.flaws.serialsGoBack || t.at.epoch != h.at.epoch || h.at.serial <= t.at.serial
}

// takesAdoption is db.Adopt and the first lines of node.adopt.
func (m *model) takesAdoption(w *world, i int, to, here spot) bool {
	h := &w.hosts[i]
	if h.at != here && !m.flaws.blindAdoption {
		return false
	}
	own := h.promised.owner() == i
	return own && h.promised > to.epoch && h.promised > h.at.epoch || !own && h.promised == to.epoch
}

// starts are the rounds that may begin at node i (prepare, ask and the first enough, in round.go).
func (m *model) starts(w *world, i int, take taker) {
	slot := -1
	for k := range w.rides {
		if w.rides[k].phase == phaseIdle {
			slot = k
		}
	}
	if slot < 0 {
		return
	}
	for heardBy := range uint8(1 << m.nodes) {
		if heardBy&(1<<i) == 0 || m.cut > 0 && heardBy != 1<<i && (i+1 == m.cut || heardBy&(1<<(m.cut-1)) != 0) {
			continue
		}
		for kind := range uint8(3) {
			r, ok := m.begun(w, i, heardBy, kind)
			if !ok {
				continue
			}
			after := *w
			switch kind {
			case 0:
				after.left.rounds--
			case 1:
				after.left.forced--
			case 2:
				after.left.recovers--
			}
			after.rides[slot] = r
			after.sortRides()
			take(modelStep{kind: doStart, node: uint8(i), detail: kind | heardBy<<2}, after)
		}
	}
}

// begun is a round that has asked for positions and heard some members: kind 0 a promote, 1 with --force, 2 of a refused master.
func (m *model) begun(w *world, i int, heardBy, kind uint8) (ride, bool) {
	left := [3]uint8{w.left.rounds, w.left.forced, w.left.recovers}
	if left[kind] == 0 {
		return ride{}, false
	}
	self := w.state(i)
	r := ride{phase: phaseAsked, node: uint8(i), forced: kind == 1, recovers: kind == 2 || self.IsMaster() && w.hosts[i].lapsed}
	if joining(self) || self.IsMaster() && !r.recovers || kind == 2 && !m.wedged(m.viewOf(w, i, heardBy)) {
		return r, false
	}
	answers := make([]answer, m.nodes)
	for j := range m.nodes {
		answers[j] = answer{node: config.Node{CID: config.CID(j + 1)}, err: errDown}
		if heardBy&(1<<j) != 0 {
			answers[j].state, answers[j].err = w.state(j), nil
			r.contact[j] = peerContacted
			if r.recovers && w.hosts[j].at.epoch > w.hosts[i].at.epoch {
				return r, false
			}
		}
	}
	if !m.enough(answers, false, r.forced) {
		return r, false
	}
	r.epoch = pack(m.nextEpoch(config.CID(i+1), answers))
	return r, true
}

// viewOf is what the daemon on node i knows.
func (m *model) viewOf(w *world, i int, heardBy uint8) *Node {
	n := &Node{state: w.state(i), views: map[config.CID]*view{}}
	for j := range m.nodes {
		if j != i && heardBy&(1<<j) != 0 {
			n.views[config.CID(j+1)] = &view{state: w.state(j), answered: true}
		}
	}
	return n
}

func (m *model) enough(answers []answer, promised, force bool) bool {
	return force || m.votes(answers, promised) >= m.majority(m.voters(answers))
}

// rideSteps are those of a round on its way.
func (m *model) rideSteps(w *world, k int, take taker) {
	r := &w.rides[k]
	if r.phase == phaseIdle {
		return
	}
	end := *w
	end.rides[k] = ride{}
	end.sortRides()
	switch r.phase {
	case phaseAsked:
		m.ownPromise(w, k, end, take)
	case phasePromising:
		for j := range m.nodes {
			m.askPromise(w, k, j, end, take)
		}
		after := *w
		if !m.adopts(&after, k) {
			after = end
		}
		after.sortRides()
		take(modelStep{kind: doAdopt, node: r.node}, after)
	case phaseAdopted:
		after := *w
		if !m.begins(&after, k) {
			after = end
		}
		after.sortRides()
		take(modelStep{kind: doBegin, node: r.node}, after)
	}
}

// ownPromise is the first half of promise in round.go.
func (m *model) ownPromise(w *world, k int, end world, take taker) {
	after := *w
	i := int(w.rides[k].node)
	if after.setPromise(i, w.rides[k].epoch, m.flaws) {
		after.hear(k, i)
		after.rides[k].phase = phasePromising
	} else {
		after = end
	}
	after.sortRides()
	take(modelStep{kind: doOwnPromise, node: uint8(i)}, after)
}

// askPromise is the second half: the promise, and then the position, each of which may be lost. Who refuses ends the round.
func (m *model) askPromise(w *world, k, j int, end world, take taker) {
	r := &w.rides[k]
	after := *w
	switch r.contact[j] {
	case peerContacted:
		if after.setPromise(j, r.epoch, m.flaws) {
			after.rides[k].contact[j] = peerExecuted
		} else {
			after = end
		}
		after.sortRides()
		take(modelStep{kind: doPromise, node: r.node, peer: uint8(j)}, after)
	case peerExecuted:
		after.hear(k, j)
		after.sortRides()
		take(modelStep{kind: doHear, node: r.node, peer: uint8(j)}, after)
	}
}

// hear notes node j's answer under its promise.
func (w *world) hear(k, j int) {
	r := &w.rides[k]
	r.contact[j], r.answer[j], r.promised[j] = peerHeard, w.hosts[j].at, w.hosts[j].promised
}

// adopts counts the promises and brings the own configuration to the newest position among the promisers: adopt in round.go. It
// says whether the round goes on.
func (m *model) adopts(w *world, k int) bool {
	r := &w.rides[k]
	i := int(r.node)
	answers := make([]answer, m.nodes)
	for j := range m.nodes {
		a := answer{node: config.Node{CID: config.CID(j + 1)}, err: errDown}
		if r.contact[j] == peerHeard {
			a.err, a.promised = nil, true
			a.state = db.State{CID: a.node.CID, Position: r.answer[j].position(), Promised: r.promised[j].epoch()}
		}
		answers[j] = a
	}
	if !m.enough(answers, true, r.forced) {
		return false
	}
	r.forced = !m.enough(answers, true, false) // mandate, in round.go
	from, ok := m.adoptFrom(config.CID(i+1), answers)
	if !ok {
		return false
	}
	if j := int(from.node.CID) - 1; j != i && !m.flaws.noAdoption {
		at := r.answer[j]
		if w.hosts[j].at != at || !m.takesAdoption(w, i, at, r.answer[i]) { // node.export_config gives exactly that position or nothing
			return false
		}
		w.apply(i, at, true, m.flaws)
		switch {
		case w.hosts[i].promised == at.epoch: // somebody else has begun, and node i, which has promised it, takes it as a slave does
			w.takes(i)
		case m.flaws.holdersCount:
			w.holds(i)
		}
	}
	r.phase = phaseAdopted
	r.handed = r.contact[w.hosts[i].at.epoch.owner()] == peerHeard
	r.contact, r.answer, r.promised = [maxNodes]uint8{}, [maxNodes]spot{}, [maxNodes]packed{}
	return true
}

// begins is node.begin_epoch, and the round is over.
func (m *model) begins(w *world, k int) bool {
	r := w.rides[k]
	h := &w.hosts[r.node]
	if r.epoch != h.promised || r.epoch <= h.at.epoch {
		return false
	}
	w.rides[k] = ride{}
	h.lapsed, h.waived = false, m.lease && r.forced
	w.add(int(r.node), modelCommit{epoch: r.epoch, serial: h.at.serial + 1, begins: true, forced: r.forced, handed: r.handed})
	return true
}

// sortRides makes it all one which round has which number.
func (w *world) sortRides() {
	for k := 1; k < maxRounds; k++ {
		for j := k; j > 0 && w.rides[j-1].key() > w.rides[j].key(); j-- {
			w.rides[j-1], w.rides[j] = w.rides[j], w.rides[j-1]
		}
	}
}

func (r *ride) key() uint64 {
	k := uint64(r.phase)<<24 | uint64(r.node)<<16 | uint64(r.epoch)<<8
	for j := range r.contact {
		k = k<<3 | uint64(r.contact[j])
	}
	return k
}
