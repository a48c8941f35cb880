package cluster

import (
	"fmt"
	"math/bits"
	"strings"

	"mailproxy/config"
	"mailproxy/db"
)

// Bounds of a world: nodes, commits (also those that begin an epoch), rounds at once.
const (
	maxNodes   = 3
	maxCommits = 10
	maxRounds  = 3
)

// A packed is an epoch in one byte, which compares as the pair does.
type packed uint8

func pack(e config.Epoch) packed { return packed(e.N<<2 | int64(e.Owner)) }

func (e packed) epoch() config.Epoch { return config.Epoch{N: int64(e >> 2), Owner: config.CID(e & 3)} }

func (e packed) owner() int { return int(e&3) - 1 }

// A set is of commits, by their index in world.commits.
type set uint16

func (s set) has(i int) bool { return s&(1<<i) != 0 }

// A spot is a position; its rows are the commits in hist, since every commit leaves a row behind, and so its digest is the set.
type spot struct {
	epoch  packed
	serial uint8
	hist   set
}

func (p spot) position() config.Position {
	pos := config.Position{Epoch: p.epoch.epoch(), Serial: int64(p.serial)}
	pos.Digest[0], pos.Digest[1] = byte(p.hist), byte(p.hist>>8)
	return pos
}

// newer says whether p is after o, digests aside.
func (p spot) newer(o spot) bool {
	return p.epoch > o.epoch || p.epoch == o.epoch && p.serial > o.serial
}

// A modelHost is what one node's database holds: the row node.position, the rows of config, the journal.
type modelHost struct {
	at       spot
	promised packed
	// durable is the promise that a crash leaves; another than promised only where a flaw forgets to sync.
	durable packed
	journal set
	// lapsed is a master whose lease is over.
	lapsed bool
	// waived is a master by force that needs no lease until it hears a majority.
	waived bool
}

// A modelCommit is a row of config.history; one that begins an epoch stands for the row of config.epoch, too.
type modelCommit struct {
	epoch  packed
	serial uint8
	by     uint8
	begins bool
	forced bool // it begins an epoch without a majority's promises
	handed bool // it begins an epoch, and the last master has promised it
	// takers are the nodes, as bits, that took it from its epoch's master. What a majority of nodes merely hold does not count as had:
	// one that took it over for a round of its own has promised more, and a round that was promised before does not know.
	takers uint8
	before set // what its node held when it was made
}

// How far a member is during a round: asked for its position, its promise made, its answer heard.
const (
	peerUntouched = iota
	peerContacted
	peerExecuted
	peerHeard
)

// The phases of a round.
const (
	phaseIdle = iota
	phaseAsked
	phasePromising
	phaseAdopted
)

// A ride is a promote round on its way (round in round.go), in the process of pmgcm or of the daemon at node.
type ride struct {
	phase    uint8
	node     uint8
	epoch    packed
	forced   bool
	recovers bool
	handed   bool // the master of what was adopted was heard
	contact  [maxNodes]uint8
	answer   [maxNodes]spot // of those that were heard, under their promise
	promised [maxNodes]packed
}

// The kinds of a transfer: a push that its sender has read, a slave's sync that has read its master, a push of which half is in.
const (
	movesNone = iota
	movesPushed
	movesPulled
	movesHalfway
)

// A modelTransfer is rows on their way from one node to another.
type modelTransfer struct {
	kind     uint8
	from, to uint8
	at       spot
	here     spot // pulled: the reader's own position when it began
}

// A world is one state of a cluster. Nothing but what stands here is remembered, so equal worlds have equal futures.
type world struct {
	hosts   [maxNodes]modelHost
	commits [maxCommits]modelCommit
	made    uint8
	rides   [maxRounds]ride
	// transfers has the daemons' one push in its first place and the operator's sync in its second.
	transfers [2]modelTransfer
	left      budget
}

// A budget is how much more may happen.
type budget struct{ changes, rounds, forced, recovers, syncs uint8 }

// born is a cluster whose first node has begun epoch 1.1 with one commit, held by all but those who are joining.
func born(m *model) world {
	w := world{made: 1, left: m.budget}
	first := pack(config.Epoch{N: 1, Owner: 1})
	w.commits[0] = modelCommit{epoch: first, serial: 1, by: 1, begins: true}
	for i := range m.nodes {
		w.hosts[i] = modelHost{promised: first, durable: first}
		if i < m.nodes-m.joining {
			w.hosts[i].at = spot{first, 1, 1}
			w.takes(i)
		}
	}
	if m.lease && m.cut > 0 {
		w.hosts[m.cut-1].lapsed = true
	}
	return w
}

// state is what node i says when it is asked.
func (w *world) state(i int) db.State {
	h := &w.hosts[i]
	return db.State{CID: config.CID(i + 1), ClusterID: "model", Position: h.at.position(), Promised: h.promised.epoch(), JournalLen: bits.OnesCount16(uint16(h.journal))}
}

// add makes a commit at node i, which is its newest from then on. Commits are kept sorted, so that worlds in which the same
// happened in another order are the same.
func (w *world) add(i int, c modelCommit) {
	h := &w.hosts[i]
	c.by, c.before = uint8(i+1), h.at.hist
	at := 0
	for at < int(w.made) && !c.sortsBefore(w.commits[at]) {
		at++
	}
	copy(w.commits[at+1:], w.commits[at:w.made])
	w.made++
	w.commits[at] = c
	low := set(1)<<at - 1
	shift := func(s *set) { *s = *s&low | (*s &^ low << 1) }
	for k := range w.commits[:w.made] {
		shift(&w.commits[k].before)
	}
	for k := range w.hosts {
		shift(&w.hosts[k].at.hist)
		shift(&w.hosts[k].journal)
	}
	for k := range w.rides {
		for j := range w.rides[k].answer {
			shift(&w.rides[k].answer[j].hist)
		}
	}
	for k := range w.transfers {
		shift(&w.transfers[k].at.hist)
		shift(&w.transfers[k].here.hist)
	}
	h.at = spot{c.epoch, c.serial, h.at.hist | 1<<at}
	h.durable = h.promised
	w.takes(i)
}

func (c modelCommit) sortsBefore(o modelCommit) bool {
	switch {
	case c.epoch != o.epoch:
		return c.epoch < o.epoch
	case c.serial != o.serial:
		return c.serial < o.serial
	}
	return c.by < o.by
}

// all is every commit that was made.
func (w *world) all() set { return set(1)<<w.made - 1 }

// setPromise is node.set_promise: false where a higher epoch is promised.
func (w *world) setPromise(i int, e packed, f flaws) bool {
	h := &w.hosts[i]
	if e < h.promised {
		return false
	}
	if e > h.promised {
		h.promised = e
		if !f.unsyncedPromise {
			h.durable = e
		}
	}
	return true
}

// orphan is node.orphan: c is not on the line that ends at to.
func (w *world) orphan(c modelCommit, to spot) bool {
	if c.serial > to.serial {
		return true
	}
	known := c.epoch == to.epoch
	for i, e := range w.commits[:w.made] {
		if !e.begins || !to.hist.has(i) {
			continue
		}
		if e.epoch > c.epoch && e.serial <= c.serial {
			return true
		}
		known = known || e.epoch == c.epoch
	}
	return !known
}

// canDelta is node.can_delta: a node at there is behind on the line that ends at to.
func (w *world) canDelta(there, to spot) bool {
	return there.serial > 0 && there.serial < to.serial && !w.orphan(modelCommit{epoch: there.epoch, serial: there.serial}, to)
}

// apply is node.apply_staged at node i: by the rows that the commits since then touched, or else by whole tables, and then what is not
// on the sender's line is set aside.
func (w *world) apply(i int, to spot, whole bool, f flaws) {
	h := &w.hosts[i]
	if !whole && w.canDelta(h.at, to) {
		merged := h.at.hist
		for k, c := range w.commits[:w.made] {
			if to.hist.has(k) && c.serial > h.at.serial {
				merged |= 1 << k
			}
		}
		whole = merged != to.hist // the digest tells
	} else {
		whole = true
	}
	if whole && !f.noJournal {
		w.setAside(i, to)
	}
	h.at = to
	h.durable = h.promised
}

// takes notes that node i has its commits of the epoch in force from that epoch's master.
func (w *world) takes(i int) {
	at := w.hosts[i].at
	for k := range w.commits[:w.made] {
		if c := &w.commits[k]; c.epoch == at.epoch && at.hist.has(k) {
			c.takers |= 1 << i
		}
	}
}

// holds counts node i as a taker of all that it holds.
func (w *world) holds(i int) {
	for k := range w.commits[:w.made] {
		if w.hosts[i].at.hist.has(k) {
			w.commits[k].takers |= 1 << i
		}
	}
}

// setAside is node.set_aside.
func (w *world) setAside(i int, to spot) {
	h := &w.hosts[i]
	for k, c := range w.commits[:w.made] {
		if !h.at.hist.has(k) {
			continue
		}
		other := false // another commit in its spot
		for j, o := range w.commits[:w.made] {
			other = other || j != k && to.hist.has(j) && o.epoch == c.epoch && o.serial == c.serial
		}
		if w.orphan(c, to) || other {
			h.journal |= 1 << k
		}
	}
}

// line is the commits of the line that ends at a position: the commit made there and what its node held before.
func (w *world) line(at spot) (set, bool) {
	if at.serial == 0 {
		return 0, at.epoch == 0
	}
	for k, c := range w.commits[:w.made] {
		if c.epoch == at.epoch && c.serial == at.serial {
			return c.before | 1<<k, true
		}
	}
	return 0, false
}

// names shows a set as "1.1/1 1.1/2".
func (w *world) names(s set) string {
	var out []string
	for k, c := range w.commits[:w.made] {
		if s.has(k) {
			out = append(out, fmt.Sprintf("%v/%d", c.epoch.epoch(), c.serial))
		}
	}
	if len(out) == 0 {
		return "nothing"
	}
	return strings.Join(out, " ")
}

// String shows every node on a line.
func (w *world) String() string {
	var b strings.Builder
	for i, h := range w.hosts {
		if h.promised == 0 {
			continue
		}
		fmt.Fprintf(&b, "      node %d at %v, promised %v, holds %s", i+1, h.at.position(), h.promised.epoch(), w.names(h.at.hist))
		if h.journal != 0 {
			fmt.Fprintf(&b, ", journal %s", w.names(h.journal))
		}
		b.WriteByte('\n')
	}
	return b.String()
}
