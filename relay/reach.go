package relay

import (
	"fmt"
	"maps"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"mailproxy/config"
)

// Bounds on what is remembered of hosts that are out of reach.
const (
	lookFirst   = 10 * time.Second // until a host is looked at again; doubled with each look in vain
	lookMost    = 2 * time.Minute
	awayMaximum = 1000          // hosts remembered
	awayForget  = 2 * time.Hour // behind its last look: an item is tried every hour
)

// A reach knows which hosts are out of reach. Such a host is tried behind all others, but for one attempt now and then that looks at it
// again. The zero reach is ready.
type reach struct {
	some atomic.Bool // there is one: looked at without mu

	mu   sync.Mutex
	away map[hop]*away
}

// An away is a host that is out of reach.
type away struct {
	since time.Time
	look  time.Time // when one attempt tries it in its turn again
	wait  time.Duration
	out   *OutOfReach
}

// order puts those hosts last that are out of reach, and that it is not time to look at again; among each other they stay as they are.
// Who is given one to look at is the only one for a while.
func (r *reach) order(hops []hop, now time.Time) []hop {
	if len(hops) < 2 || !r.some.Load() {
		return hops
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	var last []hop
	first := make([]hop, 0, len(hops))
	for _, h := range hops {
		a := r.away[h.anyClient()]
		switch {
		case a == nil:
			first = append(first, h)
		case now.Before(a.look):
			last = append(last, h)
		default:
			a.look = now.Add(a.wait)
			first = append(first, h)
		}
	}
	return append(first, last...)
}

// failed notes that a host was out of reach.
func (r *reach) failed(h hop, out *OutOfReach, now time.Time) {
	r.mu.Lock()
	defer r.mu.Unlock()
	h = h.anyClient()
	a := r.away[h]
	if a == nil {
		if len(r.away) >= awayMaximum {
			clear(r.away)
		}
		if r.away == nil {
			r.away = make(map[hop]*away)
		}
		a = &away{since: now, wait: lookFirst / 2}
		r.away[h] = a
		r.some.Store(true)
	}
	if !now.Before(a.look) || a.out == nil {
		a.wait = min(2*a.wait, lookMost)
		a.look = now.Add(a.wait)
	}
	a.out = out
}

// explain says in out, of a host that was not tried since it was out of reach a moment ago, why it was.
func (r *reach) explain(h hop, out *OutOfReach) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if a := r.away[h.anyClient()]; a != nil {
		out.Stage, out.Err = a.out.Stage, fmt.Errorf("%w: %w", out.Err, a.out.Err)
	}
}

// answered notes that a host is in reach.
func (r *reach) answered(h hop) {
	if !r.some.Load() {
		return
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	delete(r.away, h.anyClient())
	r.some.Store(len(r.away) > 0)
}

// tidy forgets hosts that nobody tries any more, since no mail goes there or no transport has them: nothing is known of them now.
func (r *reach) tidy(now time.Time) {
	r.mu.Lock()
	defer r.mu.Unlock()
	maps.DeleteFunc(r.away, func(_ hop, a *away) bool { return now.Sub(a.look) >= awayForget })
	r.some.Store(len(r.away) > 0)
}

func (r *reach) forget() {
	r.mu.Lock()
	defer r.mu.Unlock()
	clear(r.away)
	r.some.Store(false)
}

// A HopState is what is known of one next hop at this moment.
type HopState struct {
	// Hop is host:port.
	Hop string     `json:"hop"`
	TLS config.TLS `json:"tls"`
	// Since is since when it is out of reach, Look when it is tried in its turn again, Reason and Error are why; all zero where it
	// is in reach.
	Since  time.Time `json:"since,omitzero"`
	Look   time.Time `json:"look,omitzero"`
	Reason string    `json:"reason,omitempty"`
	Error  string    `json:"error,omitempty"`
	// Kept is how many connections to it wait for the next message.
	Kept int `json:"kept"`
}

// Hops gives the hosts that are out of reach and those to which connections are kept, by their names.
func (c *Client) Hops() []HopState {
	states := make(map[hop]*HopState)
	state := func(h hop) *HopState {
		if h = h.anyClient(); states[h] == nil {
			states[h] = &HopState{Hop: h.addr, TLS: h.tls}
		}
		return states[h]
	}
	for h, n := range c.pool.kept() {
		state(h).Kept += n
	}
	c.reach.mu.Lock()
	for h, a := range c.reach.away {
		s := state(h)
		s.Since, s.Look, s.Reason, s.Error = a.since, a.look, a.out.Stage.Reason(), a.out.Err.Error()
	}
	c.reach.mu.Unlock()
	all := make([]HopState, 0, len(states))
	for _, s := range states {
		all = append(all, *s)
	}
	slices.SortFunc(all, func(a, b HopState) int {
		if a.Hop != b.Hop {
			return strings.Compare(a.Hop, b.Hop)
		}
		return strings.Compare(string(a.TLS), string(b.TLS))
	})
	return all
}

// turns says whose turn it is among the hosts of a transport. The zero turns is ready.
type turns struct {
	mu   sync.Mutex
	next map[string]int // by transport
}

// take gives where to begin among n, and moves on.
func (t *turns) take(transport string, n int) int {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.next == nil {
		t.next = make(map[string]int)
	}
	i := t.next[transport] % n
	t.next[transport] = i + 1
	return i
}
