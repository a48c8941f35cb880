package cluster

import (
	"slices"
	"testing"
	"time"

	"mailproxy/config"
	"mailproxy/db"
	"mailproxy/test/history"
)

// A mutant is the model with one thing wrong, and the rules that this breaks.
type mutant struct {
	name   string
	nodes  int
	lease  bool
	deep   bool // it takes many worlds to find
	budget budget
	flaws  flaws
	change func(*decisions)
	breaks []rule
}

func mutants() []mutant {
	promote := budget{changes: 1, rounds: 1}
	twice := budget{changes: 1, rounds: 2}
	return []mutant{
		{name: "the epoch of a push is not checked", nodes: 3, budget: promote, flaws: flaws{noEpochCheck: true}, breaks: []rule{majorityKept, goesBack}},
		{name: "a push is compared with the epoch in force, not with the one promised", nodes: 3, budget: promote, flaws: flaws{appliedEpoch: true}, breaks: []rule{majorityKept}},
		{name: "the write guard looks at the epoch in force alone", nodes: 3, budget: promote, change: func(d *decisions) {
			d.mayCommit = func(s db.State) bool { return s.Position.Epoch.Owner == s.CID }
		}, breaks: []rule{handedOver}},
		{name: "a promise is not synced", nodes: 3, budget: promote, flaws: flaws{unsyncedPromise: true}, breaks: []rule{goesBack, majorityKept}},
		{name: "nothing is adopted", nodes: 3, budget: promote, flaws: flaws{noAdoption: true}, breaks: []rule{majorityKept}},
		{name: "nothing is set aside", nodes: 2, budget: budget{changes: 1, forced: 1}, flaws: flaws{noJournal: true}, breaks: []rule{nothingLost, inTheEnd}},
		{name: "a push is applied in two transactions", nodes: 2, budget: budget{changes: 1}, flaws: flaws{twoTransactions: true}, breaks: []rule{whole}},
		{name: "a round takes over although its own position has changed", deep: true, nodes: 3, budget: twice, flaws: flaws{blindAdoption: true}, breaks: []rule{goesBack}},
		{name: "a sync takes over although a push came between", nodes: 2, budget: budget{changes: 2, syncs: 1}, flaws: flaws{blindAdoption: true}, breaks: []rule{goesBack}},
		{name: "a push of the own epoch is applied whatever its serial", nodes: 2, budget: budget{changes: 2, syncs: 1}, flaws: flaws{serialsGoBack: true}, breaks: []rule{goesBack}},
		{name: "who took it over for a round of its own counts as holding it", nodes: 3, budget: twice, flaws: flaws{holdersCount: true}, breaks: []rule{majorityKept}},
		{name: "a position is as good as the commit that was made there", nodes: 3, budget: twice, change: func(d *decisions) {
			d.holds = func(s db.State, pos config.Position) bool { return s.Position.Compare(pos) >= 0 }
		}, breaks: []rule{rightlySaid}},
		{name: "a lease binds a master by force, too", nodes: 3, lease: true, budget: budget{forced: 1}, flaws: flaws{leaseBindsForce: true}, breaks: []rule{notWedged}},
		{name: "who has not heard of a forced epoch counts for its lease", nodes: 3, lease: true, budget: budget{forced: 1}, change: func(d *decisions) {
			d.leaseFrom = func(self config.Epoch, now time.Time, others []standing) (time.Time, bool, bool) {
				for i := range others {
					if others[i].state.Promised.Compare(self) < 0 {
						others[i].state.Promised, others[i].state.Position.Epoch = self, self
					}
				}
				return leaseFrom(self, now, others)
			}
		}, breaks: []rule{notWedged}},
		{name: "a higher epoch in force is not promised", nodes: 2, budget: budget{forced: 1}, flaws: flaws{noLearning: true}, breaks: []rule{notWedged}},
		{name: "a refused master does nothing", nodes: 2, budget: promote, change: func(d *decisions) {
			d.wedged = func(*Node) bool { return false }
		}, breaks: []rule{notWedged}},
		{name: "half of the members are a majority", nodes: 2, budget: promote, change: func(d *decisions) {
			d.majority = func(n int) int { return max(1, n/2) }
		}, breaks: []rule{majorityKept}},
		{name: "who is down has no vote", nodes: 3, budget: promote, change: func(d *decisions) {
			d.voters = func(a []answer) int { return votes(a, false) }
		}, breaks: []rule{majorityKept}},
		{name: "who was heard counts as having promised", nodes: 3, budget: promote, change: func(d *decisions) {
			d.votes = func(a []answer, _ bool) int { return votes(a, false) + boolInt(votes(a, false) == 1) }
		}, breaks: []rule{majorityKept}},
		{name: "an epoch has no owner", nodes: 3, budget: twice, change: func(d *decisions) {
			d.nextEpoch = func(_ config.CID, a []answer) config.Epoch { return nextEpoch(1, a) }
		}, breaks: []rule{oneCommitter}},
		{name: "the next epoch does not look at promises", nodes: 3, budget: twice, change: func(d *decisions) {
			d.nextEpoch = func(self config.CID, a []answer) config.Epoch {
				a = slices.Clone(a)
				for i := range a {
					a[i].state.Promised = a[i].state.Position.Epoch
				}
				return nextEpoch(self, a)
			}
		}, breaks: []rule{notWedged}},
		{name: "the highest serial is adopted, whatever its epoch", deep: true, nodes: 3, budget: budget{changes: 2, rounds: 2}, change: func(d *decisions) {
			d.adoptFrom = func(self config.CID, a []answer) (answer, bool) {
				a = slices.Clone(a)
				for i := range a {
					a[i].state.Position.Epoch = config.Epoch{N: 1, Owner: 1}
				}
				return adoptFrom(self, a)
			}
		}, breaks: []rule{majorityKept}},
	}
}

func boolInt(b bool) int {
	if b {
		return 1
	}
	return 0
}

// Each rule that a mutant is said to break is looked for by itself.
func TestModelFindsMutants(t *testing.T) {
	for _, c := range mutants() {
		if c.deep && !deep() {
			continue
		}
		for _, r := range c.breaks {
			t.Run(c.name+": "+string(r), func(t *testing.T) {
				t.Parallel()
				m := model{nodes: c.nodes, lease: c.lease, budget: c.budget, flaws: c.flaws, decisions: ours(), rules: []rule{r}}
				if c.change != nil {
					c.change(&m.decisions)
				}
				worlds, found, way := m.explore()
				if found.rule != r {
					t.Fatalf("nothing found in %d worlds", worlds)
				}
				t.Logf("%s, after %d worlds:\n%s", found.text, worlds, way)
				if !slices.Contains(seenFromOutside(), r) {
					return
				}
				violations := history.Check(factsOf(&m, way))
				if len(violations) == 0 {
					t.Error("the checker of histories sees nothing in it")
				}
				for _, v := range violations {
					t.Logf("the checker: %v", v)
				}
			})
		}
	}
}

// Without a lease all rules hold, and with one that lapses at any instant, too. What it adds: a master that is cut off for longer than
// that acknowledges nothing that is set aside when it returns.
func TestLeaseKeepsACutOffMasterFromAcknowledging(t *testing.T) {
	without := model{nodes: 3, cut: 1, budget: budget{changes: 1, rounds: 1}, rules: []rule{notAside}}
	if _, found, _ := without.explore(); found.rule != notAside {
		t.Error("without a lease nothing was set aside")
	}
	with := model{nodes: 3, cut: 1, lease: true, budget: budget{changes: 1, rounds: 1}, rules: []rule{notAside}}
	if worlds, found, way := with.explore(); found.rule != "" {
		t.Errorf("%s, after %d worlds:\n%s", found.text, worlds, way)
	}
}
