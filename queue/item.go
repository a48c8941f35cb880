package queue

import (
	"container/heap"
	"slices"
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
	// Next is when it is tried next.
	Next time.Time `json:"next"`
	// Attempts counts those that have ended.
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
	// Held is set while its client waits for an answer. An operator's order is OnHold.
	Held bool `json:"undecided,omitempty"`
	// OnHold is set while an operator has it wait.
	OnHold *Hold `json:"on_hold,omitempty"`
	// Kept is set where all its recipients were refused for good and its sender may not be told, since they were never verified: it is
	// not tried again, unless an operator orders it.
	Kept bool `json:"kept,omitempty"`
	// Busy is set while an attempt is under way.
	Busy bool `json:"busy,omitempty"`
}

// A recipient is an open forward-path and its last outcome.
type recipient struct {
	index int // in the envelope
	path  mail.Path
	last  *outcome

	unreported bool // refused for good, by last, and not yet told: it is not tried again
	delayTold  bool // its sender was told that it is late

	life time.Duration // how long it is tried, by the transport of its last attempt here; 0 where there was none
}

// An entry is the small view of an item that is kept in memory. Its fields are guarded by Queue.mu, but while busy is set open
// and done belong to the attempt.
type entry struct {
	id       string
	size     int64
	reverse  mail.Path
	created  time.Time
	client   string
	session  string
	open     []recipient
	done     []int
	next     time.Time
	attempts int

	lastReply string
	class     string // of lastReply
	transport string
	held      bool          // its client has no answer yet
	busy      bool          // an attempt or an order is under way
	ordered   bool          // busy by an order
	kept      bool          // as Item.Kept
	hold      *Hold         // an operator has it wait: it is not in the schedule
	paused    time.Duration // how long it was on hold before
	via       string        // the transport that an operator has ordered
	stuck     string        // the next hop that was out of reach at the last attempt, as group.key
	position  int           // in the schedule; -1 where it is not in it
	left      string        // a next hop (group.key) for which there was no room in the last attempt; "" where all were tried
	round     time.Time     // since when the others were tried; zero where all were
}

// isLeft says whether a recipient was not tried in this round.
func (n *entry) isLeft(r recipient) bool { return r.last == nil || r.last.At.Before(n.round) }

func newEntry(id string, size int64, e *mail.Envelope, s *state) *entry {
	n := &entry{
		id: id, size: size, reverse: e.ReversePath, created: e.ReceivedAt, session: e.Session,
		done: s.Done, next: s.Next, attempts: s.Attempts, position: -1,
		hold: s.Hold, paused: s.Paused, via: s.Via,
	}
	if e.Client.IsValid() {
		n.client = e.Client.String()
	}
	done := make(map[int]bool, len(s.Done))
	for _, i := range s.Done {
		done[i] = true
	}
	n.open = make([]recipient, 0, max(0, len(e.ForwardPaths)-len(s.Done)))
	n.kept = len(s.Unreported) > 0
	for i, p := range e.ForwardPaths {
		if done[i] {
			continue
		}
		n.kept = n.kept && slices.Contains(s.Unreported, i) && e.Param(i).Unverified
		n.open = append(n.open, recipient{
			index: i, path: p, last: s.Last[i],
			unreported: s.Last[i] != nil && slices.Contains(s.Unreported, i), delayTold: slices.Contains(s.DelayTold, i),
		})
		if s.Last[i] != nil {
			n.lastReply, n.class = s.Last[i].reply().String(), s.Last[i].Class
		}
	}
	return n
}

// state gives what is to be saved.
func (n *entry) state() *state {
	s := &state{Attempts: n.attempts, Next: n.next, Done: n.done, Hold: n.hold, Paused: n.paused, Via: n.via}
	for _, r := range n.open {
		if r.last != nil {
			if s.Last == nil {
				s.Last = make(map[int]*outcome)
			}
			s.Last[r.index] = r.last
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
	for i := range n.open { // not a copy of the whole: an attempt under way writes the rest
		paths[i] = n.open[i].path
	}
	return Item{
		ID: n.id, Size: n.size, ReversePath: n.reverse, ForwardPaths: paths, Created: n.created, Next: n.next,
		Attempts: n.attempts, LastReply: n.lastReply, Transport: n.transport, Client: n.client, Session: n.session,
		Class: n.class, Via: n.via, Held: n.held, OnHold: n.hold, Kept: n.kept, Busy: n.busy && !n.ordered,
	}
}

// tryAllLocked has those tried again, too, that were refused for good and not yet told, or tried already while there was no room for the
// others: an operator knows better.
func (n *entry) tryAllLocked() {
	n.round = time.Time{}
	n.kept = false
	for i := range n.open {
		n.open[i].unreported = false
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
