package cluster

import (
	"fmt"
	"math/bits"
	"slices"

	"mailproxy/config"
)

// A rule is one thing that must hold always.
type rule string

const (
	oneCommitter rule = "in one epoch one node commits"
	goesBack     rule = "promise, epoch and serial never go back"
	nothingLost  rule = "what was acknowledged is in a history or a journal"
	majorityKept rule = "what a majority had survives every promote that was not forced"
	rightlySaid  rule = "what a command says a majority knows, a majority took from its master"
	handedOver   rule = "a promote that the last master has promised loses nothing of its epoch"
	notAside     rule = "nothing acknowledged is set aside" // no rule of ours; what the lease makes true of a master that is cut off
	whole        rule = "a node's rows are its line at its position"
	notWedged    rule = "no promote that died leaves a cluster that no one may configure"
	inTheEnd     rule = "all in reach come to the newest master's position, the rest is in journals"
)

// A finding is a rule that does not hold, and the facts; the zero finding is none.
type finding struct {
	rule rule
	text string
}

// check looks for a broken rule in a world and the step to it.
func (m *model) check(before *world, after *world) finding {
	for _, c := range []struct {
		rule rule
		find func() string
	}{
		{oneCommitter, func() string { return m.twoCommitters(after) }},
		{goesBack, func() string { return m.wentBack(before, after) }},
		{nothingLost, func() string { return m.lost(after) }},
		{majorityKept, func() string { return m.droppedByPromote(after) }},
		{rightlySaid, func() string { return m.saidTooMuch(after) }},
		{handedOver, func() string { return m.lostInHandOver(after) }},
		{whole, func() string { return m.torn(after) }},
	} {
		if m.rules != nil && !slices.Contains(m.rules, c.rule) {
			continue
		}
		if text := c.find(); text != "" {
			return finding{c.rule, text}
		}
	}
	if slices.Contains(m.rules, notAside) {
		if text := m.setAside(after); text != "" {
			return finding{notAside, text}
		}
	}
	if m.rules == nil || slices.Contains(m.rules, notWedged) || slices.Contains(m.rules, inTheEnd) {
		if f := m.heals(after); f.rule != "" && (m.rules == nil || slices.Contains(m.rules, f.rule)) {
			return f
		}
	}
	return finding{}
}

// twoCommitters finds two nodes that committed in one epoch, or one that is not its owner.
func (m *model) twoCommitters(w *world) string {
	for _, c := range w.commits[:w.made] {
		if int(c.by) != c.epoch.owner()+1 {
			return fmt.Sprintf("node %d committed %v/%d", c.by, c.epoch.epoch(), c.serial)
		}
	}
	for k := range w.made - 1 {
		if a, b := w.commits[k], w.commits[k+1]; a.epoch == b.epoch && a.serial == b.serial {
			return fmt.Sprintf("two commits are %v/%d", a.epoch.epoch(), a.serial)
		}
	}
	return ""
}

// wentBack finds a node whose promise, epoch or serial fell.
func (m *model) wentBack(before, after *world) string {
	for i := range m.nodes {
		b, a := &before.hosts[i], &after.hosts[i]
		if a.promised < b.promised {
			return fmt.Sprintf("node %d had promised %v, now %v", i+1, b.promised.epoch(), a.promised.epoch())
		}
		if b.at.newer(a.at) {
			return fmt.Sprintf("node %d was at %v, now at %v", i+1, b.at.position(), a.at.position())
		}
	}
	return ""
}

// lost finds commits that no node has, in its history or journal.
func (m *model) lost(w *world) string {
	var had set
	for i := range m.nodes {
		had |= w.hosts[i].at.hist | w.hosts[i].journal
	}
	if gone := w.all() &^ had; gone != 0 {
		return fmt.Sprintf("nobody has %s any more", w.names(gone))
	}
	return ""
}

// droppedByPromote finds a commit that a majority had and that a later epoch began without, with no forced promote on its line since.
func (m *model) droppedByPromote(w *world) string {
	for k, b := range w.commits[:w.made] {
		if !b.begins || b.forced {
			continue
		}
		for j, c := range w.commits[:w.made] {
			if !m.had(c) || c.epoch >= b.epoch || b.before.has(j) || w.forcedSince(b.before|1<<k, c.epoch) {
				continue
			}
			return fmt.Sprintf("a majority had %v/%d, and epoch %v began without it", c.epoch.epoch(), c.serial, b.epoch.epoch())
		}
	}
	return ""
}

// saidTooMuch finds a commit of which askHeld and enough, in delete.go, say on its node that a majority knows it.
func (m *model) saidTooMuch(w *world) string {
	for _, c := range w.commits[:w.made] {
		pos := config.Position{Epoch: c.epoch.epoch(), Serial: int64(c.serial)}
		told := 1
		for i := range m.nodes {
			if i+1 != int(c.by) && m.holds(w.state(i), pos) {
				told++
			}
		}
		if told >= m.majority(m.nodes) && !m.had(c) {
			return fmt.Sprintf("node %d counts %d nodes that know %v, and %d took it from it", c.by, told, pos, bits.OnesCount8(c.takers))
		}
	}
	return ""
}

// lostInHandOver finds a commit that the last master made and that the next one, which it has promised, began without.
func (m *model) lostInHandOver(w *world) string {
	for _, b := range w.commits[:w.made] {
		if !b.handed {
			continue
		}
		var last packed
		for k, c := range w.commits[:w.made] {
			if b.before.has(k) {
				last = max(last, c.epoch)
			}
		}
		for k, c := range w.commits[:w.made] {
			if c.epoch == last && !b.before.has(k) {
				return fmt.Sprintf("the master of %v promised %v, and %v/%d is not in it", last.epoch(), b.epoch.epoch(), c.epoch.epoch(), c.serial)
			}
		}
	}
	return ""
}

// setAside finds a change that is not in what the newest master holds: it is in a journal now, or will be.
func (m *model) setAside(w *world) string {
	newest := 0
	for i := range m.nodes {
		if w.hosts[i].at.epoch > w.hosts[newest].at.epoch {
			newest = i
		}
	}
	for k, c := range w.commits[:w.made] {
		if !c.begins && c.epoch < w.hosts[newest].at.epoch && !w.hosts[newest].at.hist.has(k) {
			return fmt.Sprintf("%v/%d was acknowledged, and node %d is master of %v without it", c.epoch.epoch(), c.serial, newest+1, w.hosts[newest].at.epoch.epoch())
		}
	}
	return ""
}

func (w *world) forcedSince(line set, e packed) bool {
	for k, c := range w.commits[:w.made] {
		if line.has(k) && c.forced && c.epoch > e {
			return true
		}
	}
	return false
}

// torn finds a node whose rows are not those of its position.
func (m *model) torn(w *world) string {
	for i := range m.nodes {
		at := w.hosts[i].at
		if line, ok := w.line(at); !ok || line != at.hist {
			return fmt.Sprintf("node %d at %v shows %s, the line there is %s", i+1, at.position(), w.names(at.hist), w.names(line))
		}
	}
	return ""
}

// had says whether a majority took a commit from its master.
func (m *model) had(c modelCommit) bool { return bits.OnesCount8(c.takers) >= m.majority(m.nodes) }

// heals lets every process that is under way die, then lets all nodes, and each majority of them, hear each other for as long as it
// takes, with nobody giving a command.
func (m *model) heals(w *world) finding {
	dead := *w
	dead.rides, dead.transfers, dead.left = [maxRounds]ride{}, [2]modelTransfer{}, budget{}
	if f, ok := m.healed[dead]; ok {
		return f
	}
	f := m.healsTogether(&dead)
	m.healed[dead] = f
	return f
}

func (m *model) healsTogether(w *world) finding {
	all := uint8(1)<<m.nodes - 1
	for reach := uint8(1); reach <= all; reach++ {
		after := *w
		m.settle(&after, reach)
		if !m.hasMajority(w, reach) {
			if f := m.mastersByForce(&after, reach); f.rule != "" {
				return f
			}
			continue
		}
		if f := m.settled(&after, reach); f.rule != "" {
			return f
		}
	}
	return finding{}
}

// mastersByForce finds a master by force whose lease is over and of whose epoch no majority knows: it was promoted so for want of one.
func (m *model) mastersByForce(w *world, reach uint8) finding {
	for i := range m.nodes {
		h := &w.hosts[i]
		if reach&(1<<i) == 0 || !h.lapsed || roleOf(w.state(i)) != Master || !w.begunByForce(h.at.epoch) {
			continue
		}
		know := 0
		for _, o := range w.hosts[:m.nodes] {
			know += boolInt(o.promised >= h.at.epoch)
		}
		if know < m.majority(m.nodes) {
			return finding{notWedged, fmt.Sprintf("node %d was promoted by force and has no lease for want of a majority:\n%v", i+1, w)}
		}
	}
	return finding{}
}

func (w *world) begunByForce(e packed) bool {
	return slices.ContainsFunc(w.commits[:w.made], func(c modelCommit) bool { return c.epoch == e && c.forced })
}

// hasMajority says whether those in reach may promote one of them without force.
func (m *model) hasMajority(w *world, reach uint8) bool {
	answers := make([]answer, m.nodes)
	for j := range m.nodes {
		answers[j] = answer{node: config.Node{CID: config.CID(j + 1)}, err: errDown}
		if reach&(1<<j) != 0 {
			answers[j].state, answers[j].err = w.state(j), nil
		}
	}
	return m.enough(answers, false, false)
}

// settle does what the daemons in reach do by themselves, until nothing changes.
func (m *model) settle(w *world, reach uint8) {
	for range 20 {
		before := *w
		for i := range m.nodes {
			for j := range m.nodes {
				if i != j && reach&(1<<i) != 0 && reach&(1<<j) != 0 {
					m.meet(w, i, j)
				}
			}
			if reach&(1<<i) != 0 && m.hasMajority(w, reach) {
				w.hosts[i].lapsed, w.hosts[i].waived = false, false
			}
		}
		if *w != before {
			continue
		}
		for i := range m.nodes {
			if reach&(1<<i) != 0 && m.wedged(m.viewOf(w, i, reach)) {
				m.promotes(w, i, reach, 2)
			}
		}
		if *w == before {
			return
		}
	}
}

// meet lets node i see node j, and push to it.
func (m *model) meet(w *world, i, j int) {
	if e := w.hosts[j].at.epoch; e > w.hosts[i].promised && !m.flaws.noLearning {
		w.setPromise(i, e, m.flaws)
	}
	if m.sends(w, i, j) {
		if t := (modelTransfer{kind: movesPushed, from: uint8(i), to: uint8(j), at: w.hosts[i].at}); m.takesPush(w, t) {
			w.apply(j, t.at, false, m.flaws)
			w.takes(j)
		}
	}
}

// promotes runs a whole round on node i.
func (m *model) promotes(w *world, i int, reach, kind uint8) bool {
	for range roundAttempts {
		if w.made == maxCommits {
			panic("the model wants more commits than it has room for")
		}
		w.left = budget{rounds: 1, recovers: 1}
		r, ok := m.begun(w, i, reach, kind)
		w.left = budget{}
		if !ok {
			return false
		}
		w.rides[0] = r
		ok = m.rides(w, i)
		w.rides[0] = ride{}
		if ok {
			return true
		}
	}
	return false
}

// rides takes the round in the first spot to its end.
func (m *model) rides(w *world, i int) bool {
	r := &w.rides[0]
	if !w.setPromise(i, r.epoch, m.flaws) {
		return false
	}
	w.hear(0, i)
	for j := range m.nodes {
		if r.contact[j] == peerContacted {
			if !w.setPromise(j, r.epoch, m.flaws) {
				return false
			}
			w.hear(0, j)
		}
	}
	return m.adopts(w, 0) && m.begins(w, 0)
}

// settled says whether somebody in reach may commit, or may become master by a plain promote; and with all in reach, whether all is
// where it should be.
func (m *model) settled(w *world, reach uint8) finding {
	masters := 0
	for i := range m.nodes {
		if reach&(1<<i) != 0 && m.mayCommit(w.state(i)) && !w.hosts[i].lapsed {
			masters++
		}
	}
	if reach != 1<<m.nodes-1 {
		for i := range m.nodes {
			if masters > 0 || reach&(1<<i) == 0 || joining(w.state(i)) {
				continue
			}
			if after := *w; !m.promotes(&after, i, reach, 0) {
				return finding{notWedged, fmt.Sprintf("with nodes %s in reach of each other nobody commits, and node %d cannot be promoted:\n%v", namesOf(reach), i+1, w)}
			}
		}
		return finding{}
	}
	if masters != 1 {
		return finding{notWedged, fmt.Sprintf("with all nodes in reach of each other %d of them may commit:\n%v", masters, w)}
	}
	return m.arrived(w)
}

// arrived says whether all nodes are in sync with their master, and what it lacks is in journals.
func (m *model) arrived(w *world) finding {
	var journals set
	newest := 0
	for i := range m.nodes {
		journals |= w.hosts[i].journal
		if m.mayCommit(w.state(i)) {
			newest = i
		}
	}
	at := w.state(newest).Position
	for i := range m.nodes {
		if r := relate(at, w.state(i).Position); r != InSync {
			return finding{inTheEnd, fmt.Sprintf("node %d stays %s:\n%v", i+1, r, w)}
		}
	}
	if gone := w.all() &^ (w.hosts[newest].at.hist | journals); gone != 0 {
		return finding{inTheEnd, fmt.Sprintf("%s is in no history and no journal:\n%v", w.names(gone), w)}
	}
	return finding{}
}

func namesOf(reach uint8) string {
	s := ""
	for j := range maxNodes {
		if reach&(1<<j) != 0 {
			s += fmt.Sprintf(" %d", j+1)
		}
	}
	return s[1:]
}
