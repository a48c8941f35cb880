package history

import (
	"fmt"
	"slices"
	"strings"
	"time"

	"mailproxy/config"
)

// Bounds that the rules name.
const (
	// deletedWithin is how long after a delete a node in reach may still let the deleted one in.
	deletedWithin = time.Second
	// readersWait is how long a reader may wait.
	readersWait = 50 * time.Millisecond
	// calmWithin is how long after all is calm somebody must take configuration: the grace of a refused master, and a round.
	calmWithin = 30 * time.Second
)

// A Rule is one of the six, or a part of it.
type Rule string

// The rules; each begins with its number.
const (
	OneCommitter Rule = "1: in one epoch one node commits"
	NoWayBack    Rule = "1: promise, epoch and serial never go back"
	NothingLost  Rule = "2: a commit leaves a history only into a journal"
	MajorityKept Rule = "2: what a majority had survives every promote that was not forced"
	OneDigest    Rule = "3: one position has one digest of rows"
	ShownInSync  Rule = "3: who is shown in sync is where the master is"
	ShutOut      Rule = "4: a deleted node opens no tunnel and reads nothing"
	RunAgain     Rule = "5: a killed command can be run again"
	NotWedged    Rule = "5: somebody takes configuration once all is calm"
	ReadersFree  Rule = "6: no reader waits longer than 50 ms"
)

// A Violation is a rule that does not hold, in words, and the facts that show it, by their index.
type Violation struct {
	Rule  Rule   `json:"rule"`
	Text  string `json:"text"`
	Facts []int  `json:"facts"`
}

func (v Violation) String() string {
	return fmt.Sprintf("rule %s: %s (facts %v)", v.Rule, v.Text, v.Facts)
}

// Check judges a run. It gives the violations in the order in which they show, and nil where all rules hold.
func Check(facts []Fact) []Violation {
	c := &checker{
		facts: facts, nodes: map[config.CID]*seen{}, commits: map[place]noted{}, digests: map[place]digest{},
		forced: map[config.Epoch]bool{}, begun: map[config.Epoch]bool{}, deleted: map[config.CID]int{}, killed: map[ran]int{}, calm: -1,
	}
	for i, f := range facts {
		c.fact(i, f)
	}
	c.end()
	return c.found
}

// A place is a position without its digest.
type place struct {
	epoch  config.Epoch
	serial int64
}

func placeOf(p config.Position) place { return place{p.Epoch, p.Serial} }

func (p place) String() string { return fmt.Sprintf("%v/%d", p.epoch, p.serial) }

// noted is a commit and the fact that showed it first; digest the same for rows.
type noted struct {
	commit Commit
	fact   int
}

type digest struct {
	rows config.Digest
	fact int
}

// seen is what is known of a node.
type seen struct {
	fact     int // its last state; -1: none that counts
	state    State
	log      *Log
	logFact  int
	acked    []int // by the node, since its last log
	pulled   bool  // since the last state
	tampered bool  // since rows were last seen as they should be
	dealt    map[place]bool
}

// ran is a command line on a node.
type ran struct {
	node config.CID
	line string
}

// checker is the judgement so far.
type checker struct {
	facts []Fact
	found []Violation

	nodes   map[config.CID]*seen
	commits map[place]noted
	digests map[place]digest
	// majority are the commits that a majority had, by the facts that say so.
	majority []int
	// forced are epochs that a forced promote put in force; forcedBy are nodes on which one was run whose epoch is not known.
	forced   map[config.Epoch]bool
	forcedBy []config.CID
	begun    map[config.Epoch]bool
	deleted  map[config.CID]int
	killed   map[ran]int
	calm     int  // the fact since which all is calm and nothing was acknowledged; -1: none
	quiet    bool // all is calm
	last     time.Time
}

func (c *checker) report(r Rule, facts []int, format string, args ...any) {
	c.found = append(c.found, Violation{r, fmt.Sprintf(format, args...), facts})
}

func (c *checker) node(cid config.CID) *seen {
	n := c.nodes[cid]
	if n == nil {
		n = &seen{fact: -1, dealt: map[place]bool{}}
		c.nodes[cid] = n
	}
	return n
}

func (c *checker) fact(i int, f Fact) {
	c.last = f.At
	n := c.node(f.Node)
	switch {
	case f.State != nil:
		c.state(i, f.Node, n, *f.State)
	case f.Ack != nil:
		c.ack(i, f.Node, *f.Ack)
	case f.Promote != nil && f.Promote.Forced && f.Promote.Epoch.N == 0:
		c.forcedBy = append(c.forcedBy, f.Node)
	case f.Promote != nil && f.Promote.Forced:
		c.forced[f.Promote.Epoch] = true
	case f.Pull != nil:
		n.pulled = true
	case f.Reset != nil:
		*n = seen{fact: -1, dealt: map[place]bool{}}
		c.majority = nil // any of them may have been this node's alone beside one more
	case f.Tamper != nil:
		n.tampered = true
	case f.Dealt != nil:
		n.dealt[place{f.Dealt.Epoch, f.Dealt.Serial}] = true
	case f.Deleted != nil:
		c.deleted[f.Node] = i
	case f.Tunnel != nil:
		c.tunnel(i, f)
	case f.Command != nil:
		c.command(i, f)
	case f.Calm != nil:
		c.calm, c.quiet = i, true
	case f.Storm != nil:
		c.waited(f.At)
		c.calm, c.quiet = -1, false
	case f.Reader != nil && f.Reader.Took > readersWait:
		c.report(ReadersFree, []int{i}, "node %d: %s took %v", f.Node, f.Reader.What, f.Reader.Took)
	}
}

func (c *checker) state(i int, cid config.CID, n *seen, s State) {
	c.wayBack(i, cid, n, s)
	c.rows(i, cid, n, s)
	if s.Log != nil {
		for _, commit := range s.Log.History {
			c.commit(i, commit)
		}
		c.kept(i, cid, n, *s.Log)
		c.acked(i, cid, n, s)
		c.masters(i, cid, s)
		n.log, n.logFact = s.Log, i
	}
	n.fact, n.state, n.pulled = i, s, false
}

// wayBack is the second half of rule 1. A pull takes the position back, never the promise.
func (c *checker) wayBack(i int, cid config.CID, n *seen, s State) {
	if n.fact < 0 {
		return
	}
	if s.Promised.Compare(n.state.Promised) < 0 {
		c.report(NoWayBack, []int{n.fact, i}, "node %d had promised %v, then %v", cid, n.state.Promised, s.Promised)
	}
	if s.Position.Compare(n.state.Position) < 0 && !n.pulled {
		c.report(NoWayBack, []int{n.fact, i}, "node %d was at %v, then at %v", cid, n.state.Position, s.Position)
	}
}

// rows is rule 3. A node that has not been pushed to holds nothing; one that was tampered with must not be shown in sync.
func (c *checker) rows(i int, cid config.CID, n *seen, s State) {
	for _, d := range []*config.Digest{&s.Position.Digest, s.Rows} {
		if d == nil || s.Position.Epoch.N == 0 {
			continue
		}
		first, ok := c.digests[placeOf(s.Position)]
		switch {
		case ok && first.rows == *d:
			n.tampered = n.tampered && d != s.Rows
		case ok && n.tampered && s.InSync:
			c.report(ShownInSync, []int{first.fact, i}, "node %d is shown in sync at %v with rows of digest %v, elsewhere it is %v", cid, s.Position, *d, first.rows)
			return
		case n.tampered:
		case !ok:
			c.digests[placeOf(s.Position)] = digest{*d, i}
		default:
			c.report(OneDigest, []int{first.fact, i}, "node %d at %v has rows of digest %v, elsewhere it is %v", cid, s.Position, *d, first.rows)
			return
		}
	}
}

// commit is the first half of rule 1.
func (c *checker) commit(i int, commit Commit) {
	if commit.Epoch.N == 0 {
		return // from before there was a cluster
	}
	at := place{commit.Epoch, commit.Serial}
	first, ok := c.commits[at]
	switch {
	case !ok:
		c.commits[at] = noted{commit, i}
		if commit.Node != commit.Epoch.Owner {
			c.report(OneCommitter, []int{i}, "%v was made by node %d", at, commit.Node)
		}
	case !same(first.commit, commit):
		c.report(OneCommitter, []int{first.fact, i}, "%v is two commits: %+v and %+v", at, first.commit, commit)
	}
}

func same(a, b Commit) bool {
	return a.Node == b.Node && a.At.Equal(b.At) && a.Who == b.Who && a.Command == b.Command
}

// kept is the first half of rule 2, as one node shows it: what it had it has, in its history or its journal.
func (c *checker) kept(i int, cid config.CID, n *seen, now Log) {
	if n.log == nil {
		return
	}
	has := map[place]bool{}
	for _, commit := range slices.Concat(now.History, now.Journal) {
		has[place{commit.Epoch, commit.Serial}] = true
	}
	var lost []string
	for _, commit := range n.log.History {
		if at := (place{commit.Epoch, commit.Serial}); !has[at] && !n.dealt[at] && commit.Serial > now.Above {
			lost = append(lost, at.String())
		}
	}
	for _, commit := range n.log.Journal {
		if at := (place{commit.Epoch, commit.Serial}); !n.dealt[at] && !slices.ContainsFunc(now.Journal, func(o Commit) bool { return place{o.Epoch, o.Serial} == at }) {
			lost = append(lost, at.String()+" from the journal")
		}
	}
	if len(lost) > 0 {
		c.report(NothingLost, []int{n.logFact, i}, "node %d has neither in history nor in journal what it had: %s", cid, strings.Join(lost, ", "))
	}
}

// acked is kept for what the node acknowledged since its last log. What was acknowledged while this one was read may be missing in it.
func (c *checker) acked(i int, cid config.CID, n *seen, s State) {
	var later []int
	for _, k := range n.acked {
		at := placeOf(c.facts[k].Ack.Position)
		is := func(commit Commit) bool { return place{commit.Epoch, commit.Serial} == at }
		switch {
		case slices.ContainsFunc(s.Log.History, is) || slices.ContainsFunc(s.Log.Journal, is) || n.dealt[at] || at.serial <= s.Log.Above:
		case !c.facts[k].At.Before(s.Began):
			later = append(later, k)
		default:
			c.report(NothingLost, []int{k, i}, "node %d acknowledged %v and has it neither in history nor in journal", cid, at)
		}
	}
	n.acked = later
}

func (c *checker) ack(i int, cid config.CID, a Ack) {
	c.calm = -1
	n := c.node(cid)
	n.acked = append(n.acked, i)
	if a.Position.Epoch.Owner != cid && a.Position.Epoch.N != 0 {
		c.report(OneCommitter, []int{i}, "node %d acknowledged %v", cid, a.Position)
	}
	if a.Position.Digest == (config.Digest{}) {
		// it was not told
	} else if first, ok := c.digests[placeOf(a.Position)]; !ok {
		c.digests[placeOf(a.Position)] = digest{a.Position.Digest, i}
	} else if first.rows != a.Position.Digest {
		c.report(OneDigest, []int{first.fact, i}, "%v was acknowledged with digest %v, elsewhere it is %v", a.Position, a.Position.Digest, first.rows)
	}
	if a.Majority {
		c.majority = append(c.majority, i)
	}
}

// masters is the second half of rule 2: a master's history, each time that it is seen.
func (c *checker) masters(i int, cid config.CID, s State) {
	e := s.Position.Epoch
	if e.Owner != cid || s.Promised != e {
		return
	}
	if !c.begun[e] {
		c.begun[e] = true
		if k := slices.Index(c.forcedBy, cid); k >= 0 { // the first epoch of a node after it used force
			c.forcedBy = slices.Delete(c.forcedBy, k, k+1)
			c.forced[e] = true
		}
	}
	has, line := map[place]bool{}, map[config.Epoch]bool{}
	for _, commit := range s.Log.History {
		has[place{commit.Epoch, commit.Serial}] = true
		line[commit.Epoch] = true
	}
	for _, k := range c.majority {
		at := placeOf(c.facts[k].Ack.Position)
		if at.epoch.Compare(e) >= 0 || has[at] || at.serial <= s.Log.Above || c.forcedSince(line, s.Log.Above > 0, at.epoch) {
			continue
		}
		c.report(MajorityKept, []int{k, i}, "a majority had %v, and node %d is master of %v without it", at, cid, e)
	}
}

// forcedSince says whether a forced promote is on a master's line after epoch e; where the line was trimmed, whether it may be.
func (c *checker) forcedSince(line map[config.Epoch]bool, trimmed bool, e config.Epoch) bool {
	for forced := range c.forced {
		if (line[forced] || trimmed) && forced.Compare(e) > 0 {
			return true
		}
	}
	return false
}

// tunnel is rule 4.
func (c *checker) tunnel(i int, f Fact) {
	k, ok := c.deleted[f.Node]
	if !ok || !f.Tunnel.Opened && !f.Tunnel.Read {
		return
	}
	since := c.facts[k].At
	if f.Tunnel.Since.After(since) {
		since = f.Tunnel.Since
	}
	if late := f.At.Sub(since); late > deletedWithin {
		c.report(ShutOut, []int{k, i}, "node %d was deleted, and %v later node %d let it in", f.Node, late, f.Tunnel.To)
	}
}

// command is the first half of rule 5.
func (c *checker) command(i int, f Fact) {
	r := ran{f.Node, f.Command.Line}
	k, again := c.killed[r]
	switch f.Command.Outcome {
	case Killed:
		c.killed[r] = i
		return
	case Failed:
		if again && c.quiet {
			c.report(RunAgain, []int{k, i}, "node %d: %s was killed, and run again it failed: %s", f.Node, r.line, f.Command.Error)
		}
	}
	delete(c.killed, r)
}

// waited is the second half of rule 5: calm since long, and nothing was acknowledged.
func (c *checker) waited(until time.Time) {
	if c.calm >= 0 && until.Sub(c.facts[c.calm].At) > calmWithin {
		c.report(NotWedged, []int{c.calm}, "all was calm for %v, and nobody took configuration", until.Sub(c.facts[c.calm].At))
		c.calm = -1
	}
}

func (c *checker) end() { c.waited(c.last) }
