package queue

import (
	"container/heap"
	"slices"
	"sync"
	"time"

	"mailproxy/mail"
)

// An Item is one message in the queue, as it is shown.
type Item struct {
	ID string `json:"id"`
	// Size is that of the content, in octets.
	Size        int64     `json:"size"`
	ReversePath mail.Path `json:"reverse_path"`
	// ForwardPaths are those still open.
	ForwardPaths []mail.Path `json:"forward_paths"`
	Created      time.Time   `json:"created"`
	// Next is when the first of its recipients is tried next; in the past where one waits for room, or is being tried.
	Next time.Time `json:"next"`
	// Attempts counts those that have ended: of the recipient with the most, as each next hop has its own schedule.
	Attempts int `json:"attempts"`
	// LastReply is the newest answer or error: "451 4.3.0 try later".
	LastReply string `json:"last_reply,omitempty"`
	// Transport is the one that the last attempt used.
	Transport string `json:"transport,omitempty"`
	// Client is the address that it came from; empty for a DSN made here.
	Client string `json:"client,omitempty"`
	// Session is the ID of the session that it came in.
	Session string `json:"session,omitempty"`
	// Class is where that came from: dns, connect, greeting, tls, auth, mail, rcpt, data, final; route where our configuration said so.
	Class string `json:"class,omitempty"`
	// Via is the transport that an operator has ordered instead of the usual one.
	Via string `json:"via,omitempty"`
	// Unanswered is set while its client waits for an answer. An operator's order is OnHold.
	Unanswered bool `json:"unanswered,omitempty"`
	// OnHold is set while an operator has it wait.
	OnHold *Hold `json:"on_hold,omitempty"`
	// Kept is set where all its recipients were refused for good and its sender may not be told, since they were never verified: it is
	// not tried again, unless an operator orders it.
	Kept bool `json:"kept,omitempty"`
	// Busy is set while an attempt is under way.
	Busy bool `json:"busy,omitempty"`
}

// A recipient is an open forward-path, its last outcome, and its own place in the schedule. Its fields are guarded by Queue.mu; while an
// attempt has it, that writes the rest, too.
type recipient struct {
	index    int // in the envelope
	path     mail.Path
	last     *outcome
	attempts int       // those that have ended
	next     time.Time // when it is tried next
	busy     bool      // it waits for room, or an attempt has it: it is not in the schedule
	stuck    string    // the next hop (group.key) that was out of reach at the last attempt; "" where it was not

	kept bool // refused for good, and its sender may not be told: it waits for an operator

	// Behind entry.saving.
	unreported bool          // refused for good, by last, and not yet told: it is not tried again
	delayTold  bool          // its sender was told that it is late
	life       time.Duration // how long it is tried, by the transport of its last attempt here; 0 where there was none
}

// An entry is the small view of an item that is kept in memory. Its fields are guarded by Queue.mu.
type entry struct {
	id       string
	size     int64
	reverse  mail.Path
	created  time.Time
	client   string
	session  string
	open     []*recipient // changed behind saving, too
	done     []int        // behind saving, too
	attempts int          // the most of a recipient, also of a closed one

	lastReply string
	class     string // of lastReply
	transport string
	held      bool          // its client has no answer yet
	trying    int           // attempts under way
	ordered   bool          // an order is under way
	waits     bool          // a DSN: what it tells is not saved yet
	hold      *Hold         // an operator has it wait: it is not in the schedule
	paused    time.Duration // how long it was on hold before
	via       string        // the transport that an operator has ordered
	next      time.Time     // in the schedule
	position  int           // in the schedule; -1 where it is not in it

	// saving is held by whoever writes down what an attempt has brought, from what is told to what is saved: attempts for one item go on
	// side by side, and what one saves has all that another has saved before.
	saving sync.Mutex
}

func newEntry(id string, size int64, e *mail.Envelope, s *state) *entry {
	n := &entry{
		id: id, size: size, reverse: e.ReversePath, created: e.ReceivedAt, session: e.Session,
		done: s.Done, attempts: s.Attempts, position: -1,
		hold: s.Hold, paused: s.Paused, via: s.Via,
	}
	if e.Client.IsValid() {
		n.client = e.Client.String()
	}
	done := make(map[int]bool, len(s.Done))
	for _, i := range s.Done {
		done[i] = true
	}
	count := max(0, len(e.ForwardPaths)-len(s.Done))
	n.open = make([]*recipient, 0, count)
	all := make([]recipient, 0, count) // in one piece
	newest := (*outcome)(nil)
	for i, p := range e.ForwardPaths {
		if done[i] {
			continue
		}
		own := s.turn(i)
		all = append(all, recipient{
			index: i, path: p, last: s.Last[i], attempts: own.Attempts, next: own.Next,
			unreported: s.Last[i] != nil && slices.Contains(s.Unreported, i), delayTold: slices.Contains(s.DelayTold, i),
		})
		r := &all[len(all)-1]
		r.kept = r.unreported && e.Param(i).Unverified
		n.open = append(n.open, r)
		if r.last != nil && (newest == nil || !r.last.At.Before(newest.At)) {
			newest = r.last
		}
	}
	n.heard(newest)
	return n
}

// heard notes the newest answer; nil is none.
func (n *entry) heard(o *outcome) {
	if o != nil {
		n.lastReply, n.class = o.reply().String(), o.Class
	}
}

// state gives what is to be saved.
func (n *entry) state() *state {
	s := &state{Attempts: n.attempts, Next: n.first(), Done: n.done, Hold: n.hold, Paused: n.paused, Via: n.via}
	for _, r := range n.open {
		if r.last != nil {
			if s.Last == nil {
				s.Last = make(map[int]*outcome)
			}
			s.Last[r.index] = r.last
		}
		if own := (turn{r.attempts, r.next}); own.Attempts != s.Attempts || !own.Next.Equal(s.Next) {
			if s.Turns == nil {
				s.Turns = make(map[int]turn)
			}
			s.Turns[r.index] = own
		}
		if r.unreported {
			s.Unreported = append(s.Unreported, r.index)
		}
		if r.delayTold {
			s.DelayTold = append(s.DelayTold, r.index)
		}
	}
	return s
}

// view copies the entry for showing.
func (n *entry) view() Item {
	paths := make([]mail.Path, len(n.open))
	for i, r := range n.open {
		paths[i] = r.path
	}
	return Item{
		ID: n.id, Size: n.size, ReversePath: n.reverse, ForwardPaths: paths, Created: n.created, Next: n.first(),
		Attempts: n.attempts, LastReply: n.lastReply, Transport: n.transport, Client: n.client, Session: n.session,
		Class: n.class, Via: n.via, Unanswered: n.held, OnHold: n.hold, Kept: n.kept(), Busy: n.trying > 0,
	}
}

// kept is Item.Kept.
func (n *entry) kept() bool {
	return len(n.open) > 0 && !slices.ContainsFunc(n.open, func(r *recipient) bool { return !r.kept })
}

// first is when the first of its recipients is tried, or was to be tried that waits or is being tried.
func (n *entry) first() (first time.Time) {
	for i, r := range n.open {
		if i == 0 || r.next.Before(first) {
			first = r.next
		}
	}
	return first
}

// nextFree is when the first is tried of those that are in the schedule; ok is false where none is.
func (n *entry) nextFree() (next time.Time, ok bool) {
	for _, r := range n.open {
		if !r.busy && (!ok || r.next.Before(next)) {
			next, ok = r.next, true
		}
	}
	return next, ok
}

// together is how long before its time a recipient is tried with others of its item.
const together = 10 * time.Second

// takeDueLocked takes those out of the schedule that are due, or nearly, whoever has waited longest first.
func (n *entry) takeDueLocked(now time.Time) (due []*recipient) {
	for _, r := range n.open {
		if !r.busy && !r.next.After(now.Add(together)) {
			r.busy = true
			due = append(due, r)
		}
	}
	slices.SortStableFunc(due, func(a, b *recipient) int { return a.next.Compare(b.next) })
	return due
}

// tryAllLocked makes due all that no attempt has, also those that were refused for good and not yet told: an operator knows better.
func (n *entry) tryAllLocked(now time.Time) {
	for _, r := range n.open {
		if !r.busy {
			r.next, r.unreported, r.kept = now, false, false
		}
	}
}

// bornAt is since when its life counts: the time on hold does not.
func (n *entry) bornAt() time.Time { return n.created.Add(n.paused) }

// A schedule is a heap of entries by their next time.
type schedule []*entry

func (s schedule) Len() int           { return len(s) }
func (s schedule) Less(i, j int) bool { return s[i].next.Before(s[j].next) }
func (s schedule) Swap(i, j int) {
	s[i], s[j] = s[j], s[i]
	s[i].position, s[j].position = i, j
}

// Push is heap.Interface's.
func (s *schedule) Push(x any) {
	n := x.(*entry)
	n.position = len(*s)
	*s = append(*s, n)
}

// Pop is heap.Interface's.
func (s *schedule) Pop() any {
	old := *s
	n := old[len(old)-1]
	old[len(old)-1] = nil
	n.position = -1
	*s = old[:len(old)-1]
	return n
}

// set puts an entry at a time, whether it is in the schedule or not.
func (s *schedule) set(n *entry, next time.Time) {
	n.next = next
	if n.position >= 0 {
		heap.Fix(s, n.position)
		return
	}
	heap.Push(s, n)
}

func (s *schedule) remove(n *entry) {
	if n.position >= 0 {
		heap.Remove(s, n.position)
	}
}

// Times of the back-off.
const (
	firstDelay = time.Minute
	lastDelay  = time.Hour
	jitter     = 0.2 // of the delay, to either side
)

// backoff is how long to wait behind the n-th attempt (from 1): 1 minute, doubling to an hour, with jitter. random is in [0, 1).
func backoff(n int, random float64) time.Duration {
	d := lastDelay
	if n < 7 { // 2^6 minutes are more than an hour
		d = min(firstDelay<<max(n-1, 0), lastDelay)
	}
	return time.Duration(float64(d) * (1 - jitter + 2*jitter*random))
}
