package queue

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/rs/zerolog"

	"mailproxy/config"
	"mailproxy/mail"
	"mailproxy/relay"
)

// A mood is what a next hop does for now.
type mood int

const (
	takes mood = iota
	putsOff
	refuses
	mixes // by the recipient
	isAway
	isSlow // and then mixes
	hangs  // until it is away
	noAnswer
	moods
)

// A turmoil is what random next hops and a random operator do to a queue, and what has come of it.
type turmoil struct {
	t    *testing.T
	q    *testQueue
	stop func()
	life int // which process q is

	mu     sync.Mutex
	r      *rand.Rand
	dir    string // of the process that lives
	alive  int    // which process that is: what one does that was killed does not count
	killIn int    // after so many lines of its log it is killed; 0 is not
	alsoIn int    // after so many an operator has all tried
	log    strings.Builder
	moods  map[string]mood
	items  map[string]*sent           // by session
	taken  map[string]int             // by forward-path's local part, of which each is there once
	unsure map[string]bool            // the same, of what a hop took without an answer
	told   map[said]map[string]string // the DSNs that told it, by their IDs
}

// sent is one item.
type sent struct {
	session, id string
	to          []mail.Path
	untried     string // why it may not be tried; "" where it may
	gone        bool   // by order, or never accepted
}

func (w *turmoil) int(n int) int {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.r.IntN(n)
}

// A turmoilLog is the log of one process.
type turmoilLog struct {
	*turmoil
	life  int
	flush chan struct{}
}

// Write kills the process when it is time: the next one finds the spool as it is at this moment.
func (l turmoilLog) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.life != l.alive {
		return len(p), nil
	}
	l.turmoil.log.Write(p)
	if l.alsoIn--; l.alsoIn == 0 {
		select {
		case l.flush <- struct{}{}:
		default:
		}
	}
	if l.killIn--; l.killIn == 0 {
		next := l.t.TempDir()
		for os.CopyFS(next, os.DirFS(l.dir)) != nil { // a segment has just gone
			next = l.t.TempDir()
		}
		l.dir = next
		l.alive++
	}
	return len(p), nil
}

// isKilled says whether the process was.
func (w *turmoil) isKilled() bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.life != w.alive
}

// deliver is what the next hops do, for one process.
func (w *turmoil) deliver(life int) func(context.Context, relay.Attempt) ([]relay.Result, error) {
	return func(ctx context.Context, a relay.Attempt) ([]relay.Result, error) {
		w.mu.Lock()
		m, wait, gap := w.moods[a.Transport.Name], time.Duration(w.r.Int64N(int64(2*time.Hour))), time.Duration(w.r.Int64N(int64(20*time.Second)))
		if i := w.items[a.Envelope.Session]; i != nil && a.Envelope.About == nil && i.untried != "" && life == w.alive {
			w.t.Errorf("%s is tried, and %s", i.id, i.untried)
		}
		w.mu.Unlock()
		if m == isSlow || m == hangs {
			select {
			case <-ctx.Done():
				return nil, ctx.Err()
			case <-time.After(wait):
			}
		}
		w.mu.Lock()
		killed := life != w.alive
		var results []relay.Result
		var err error
		if !killed {
			results, err = w.answer(a, m)
		}
		w.mu.Unlock()
		if killed {
			<-ctx.Done()
			return nil, ctx.Err()
		}
		time.Sleep(gap) // the answer is on its way: here a kill makes a duplicate
		return results, err
	}
}

func (w *turmoil) answer(a relay.Attempt, m mood) (out []relay.Result, err error) {
	if m == isAway || m == hangs {
		return outOfReach(a)
	}
	for _, p := range a.Paths {
		r := relay.Result{Path: p, Hop: a.Transport.Hosts[0], Stage: relay.StageDot, DSN: w.r.IntN(2) == 0}
		does := m
		if m == mixes || m == isSlow {
			does = mood(w.r.IntN(int(mixes)))
		}
		switch does {
		case putsOff:
			r.Reply = &mail.Reply{Code: 451, Enhanced: [3]int{4, 7, 1}, Text: "try later"}
		case refuses:
			r.Reply = &mail.Reply{Code: 550, Enhanced: [3]int{5, 1, 1}, Text: "no such user"}
		case noAnswer:
			r.Reply, err = &mail.Reply{Code: 451, Enhanced: [3]int{4, 4, 2}, Text: "no answer"}, relay.ErrNoAnswer
			w.taken[p.Local]++
			w.unsure[p.Local] = true
		default:
			r.Reply = &mail.Reply{Code: 250, Text: "taken"}
			w.taken[p.Local]++
		}
		out = append(out, r)
	}
	if a.Domain == "" && a.Transport.Name == "sender.test" {
		w.tell(a)
	}
	return out, err
}

// tell reads a DSN that has arrived.
func (w *turmoil) tell(a relay.Attempt) {
	b := make([]byte, a.Content.Size())
	if _, err := a.Content.ReadAt(b, 0); err != nil {
		w.t.Error(err)
	}
	_, id, _ := strings.Cut(string(b), "\r\nMessage-ID: ")
	id, _, _ = strings.Cut(id, "\r\n")
	for _, s := range saidBy(string(b)) {
		if w.told[s] == nil {
			w.told[s] = map[string]string{}
		}
		w.told[s][id] = a.Envelope.Session
	}
}

const (
	randomLife  = 12 * time.Hour
	randomHops  = 8
	randomWide  = 2 * mostOfItem
	randomItems = 60
)

func hopName(n int) string { return fmt.Sprintf("h%d.test", n) }

// start has a process run on the spool.
func (w *turmoil) start() {
	w.mu.Lock()
	w.life = w.alive
	w.mu.Unlock()
	flush := make(chan struct{}, 1)
	w.q = openTest(w.t, w.dir, func(o *Options) {
		o.PerHop, o.Concurrency = 2, mostOfItem+5
		o.Life = func() time.Duration { return randomLife }
		o.DelayNotice = func() time.Duration { return time.Hour }
		o.Transport = func(name string) (config.Transport, bool) {
			t, _ := route(mail.Path{Domain: name})
			return t, name != ""
		}
		o.Log = zerolog.New(turmoilLog{w, w.life, flush})
	})
	w.q.deliver = w.deliver(w.life)
	ctx, cancel := context.WithCancel(w.t.Context())
	var all sync.WaitGroup
	q := w.q
	all.Go(func() { _ = q.Run(ctx) })
	all.Go(func() {
		for {
			select {
			case <-ctx.Done():
				return
			case <-flush:
				q.Flush()
			}
		}
	})
	w.stop = func() { cancel(); all.Wait(); w.q.Close() }
}

// restart stops the process in good order, unless it is killed meanwhile.
func (w *turmoil) restart() {
	w.stop()
	if w.isKilled() {
		return
	}
	cut, before := w.cuts(), w.q.durable()
	w.start()
	if n := w.cuts(); n != cut {
		w.t.Errorf("%d cut by a stop in good order", n-cut)
	}
	if after := w.q.durable(); before != after {
		w.t.Errorf("before a restart:\n%s\nand after it:\n%s", before, after)
	}
}

// cuts counts attempts that a process has found cut.
func (w *turmoil) cuts() int {
	w.mu.Lock()
	defer w.mu.Unlock()
	return strings.Count(w.log.String(), "attempt.cut")
}

// durable is what a restart must find.
func (q *testQueue) durable() string {
	q.mu.Lock()
	defer q.mu.Unlock()
	var lines []string
	for _, n := range q.items {
		s := n.state()
		slices.Sort(s.Done)
		since := time.Time{}
		if s.Hold != nil {
			since = s.Hold.Since.UTC().Round(0)
		}
		lines = append(lines, fmt.Sprint(n.id, " done ", s.Done, " told of delay ", s.DelayTold, " attempts ", n.attempts, " hold ", since, s.Paused, s.Via))
	}
	slices.Sort(lines)
	return strings.Join(lines, "\n")
}

// put has an item come, to a few next hops or to very many.
func (w *turmoil) put() {
	n := len(w.items)
	i := &sent{session: fmt.Sprint("S", n)}
	count, hops := 1+w.int(6), randomHops
	if n%20 == 10 {
		count, hops = randomWide, randomWide
	}
	d := Draft{Content: strings.NewReader(body), Envelope: mail.Envelope{Session: i.session, ReceivedAt: time.Now()}}
	if w.int(8) != 0 {
		d.Envelope.ReversePath = path(fmt.Sprintf("from%d@sender.test", n))
	}
	for c := range count {
		hop := w.int(hops)
		if hops == randomWide {
			hop = c
		}
		d.Envelope.ForwardPaths = append(d.Envelope.ForwardPaths, path(fmt.Sprintf("to%d-%d@%s", n, c, hopName(hop))))
		p := mail.RcptParams{Unverified: w.int(5) == 0}
		if w.int(4) == 0 {
			p.Notify = []mail.Notify{mail.NotifyNever, mail.NotifySuccess | mail.NotifyFailure, mail.NotifyFailure}[w.int(3)]
		}
		d.Envelope.Params = append(d.Envelope.Params, p)
	}
	i.to = d.Envelope.ForwardPaths
	held := w.int(4) == 0
	if held {
		i.untried = "has no answer yet"
	}
	w.mu.Lock()
	w.items[i.session] = i
	w.mu.Unlock()
	i.id = w.q.mustPut(w.t, held, d)[0]
	if held {
		time.Sleep(time.Duration(w.int(60)) * time.Second)
		if w.int(3) == 0 {
			i.gone = true
			w.forbid(i, "was never accepted")
			w.must(w.q.Drop([]string{i.id}))
			return
		}
		w.forbid(i, "")
		w.must(w.q.Release([]string{i.id}))
	}
	i.gone = w.isKilled() // nobody has heard that it is there
}

func (w *turmoil) must(err error) {
	w.t.Helper()
	if err != nil {
		w.t.Fatal(err)
	}
}

func (w *turmoil) forbid(i *sent, why string) {
	w.mu.Lock()
	defer w.mu.Unlock()
	i.untried = why
}

// order gives a random order about some items.
func (w *turmoil) order() {
	var named []*sent
	for range 1 + w.int(5) {
		if i := w.items[fmt.Sprint("S", w.int(len(w.items)))]; !i.gone && !slices.Contains(named, i) {
			named = append(named, i)
		}
	}
	if len(named) == 0 {
		return
	}
	deed := []Deed{PutOnHold, Free, Retry, Reroute, Delete, Move}[w.int(6)]
	if (deed == Delete || deed == Move) && w.int(3) != 0 {
		deed = PutOnHold
	}
	w.do(deed, named)
}

func (w *turmoil) do(deed Deed, named []*sent) {
	o := Order{Deed: deed, To: 2}
	for _, i := range named {
		o.Selection.IDs = append(o.Selection.IDs, i.id)
	}
	if deed == Reroute && w.int(2) == 0 {
		o.Transport = hopName(w.int(randomHops))
	}
	was := map[string]string{}
	if deed == Free {
		for _, i := range named {
			was[i.id] = i.untried
			w.forbid(i, "")
		}
	}
	said := func(id string, err error) error {
		i := named[slices.IndexFunc(named, func(i *sent) bool { return i.id == id })]
		switch {
		case deed == Free && err != nil:
			w.forbid(i, was[id])
		case err != nil:
		case w.isKilled(): // it may be done, or not
			i.gone = i.gone || deed == Delete || deed == Move
		case deed == PutOnHold:
			w.forbid(i, "is on hold")
		case deed == Delete, deed == Move:
			i.gone = true
			w.forbid(i, "is gone by order")
		}
		return nil
	}
	if deed != Move {
		w.must(w.q.Do(w.t.Context(), o, said))
		return
	}
	err := w.q.Move(w.t.Context(), o, func(context.Context, *Moved, mail.Content) error {
		time.Sleep(time.Duration(w.int(5)) * time.Second)
		return []error{nil, ErrRefused, errLost}[w.int(3)]
	}, said)
	if err != nil && !errors.Is(err, errLost) {
		w.t.Fatal(err)
	}
}

// step is one thing that happens.
func (w *turmoil) step() {
	switch n := w.int(100); {
	case n < 25 && len(w.items) < randomItems || len(w.items) == 0:
		w.put()
	case n < 55:
		hop := hopName(w.int(randomHops))
		if n < 35 { // many change at once
			hop = ""
		}
		w.mu.Lock()
		for h := range randomWide {
			if hop == "" && w.r.IntN(2) == 0 || hop == hopName(h) {
				w.moods[hopName(h)] = mood(w.r.IntN(int(moods)))
			}
		}
		w.mu.Unlock()
	case n < 75:
		w.order()
	case n < 80:
		t, _ := route(path("x@" + hopName(w.int(randomHops))))
		w.q.HopAnswered(t, path("x@"+t.Name))
	case n < 83:
		w.q.Flush()
	case n < 86:
		w.restart()
	case n < 91:
		w.mu.Lock()
		w.killIn = 1 + w.r.IntN(30)
		w.mu.Unlock()
	default:
		w.mu.Lock()
		w.alsoIn = 1 + w.r.IntN(30)
		w.mu.Unlock()
	}
}

// consistent checks what the queue counts and remembers by what there is.
func (w *turmoil) consistent() {
	w.t.Helper()
	q := w.q
	q.mu.Lock()
	defer q.mu.Unlock()
	waits, stuck, slots, trying := map[*recipient]int{}, 0, 0, 0
	for key, list := range q.waiting {
		if _, there := q.inRing[key]; !there || len(list) == 0 {
			w.t.Errorf("%d wait for %s, in the ring: %v", len(list), key, there)
		}
		for _, one := range list {
			for _, r := range one.recipients {
				waits[r]++
			}
		}
	}
	if len(q.ring) != len(q.inRing) {
		w.t.Errorf("ring %v, %v", q.ring, q.inRing)
	}
	for key, list := range q.stuck {
		stuck += len(list)
		for r, n := range list {
			if r.stuck != key || q.items[n.id] != n || r.busy {
				w.t.Errorf("%s of %s is stuck at %q and noted at %q", r.path, n.id, r.stuck, key)
			}
		}
	}
	if int(q.anyStuck.Load()) != stuck {
		w.t.Errorf("%d are stuck, counted %d", stuck, q.anyStuck.Load())
	}
	for _, s := range q.slots {
		slots += s
	}
	for _, n := range q.items {
		trying += n.trying
		next, free := n.nextFree()
		free = free && !n.held && n.hold == nil && !n.ordered && !n.waits && n.trying < mostOfItem
		if free != (n.position >= 0) || free && !n.next.Equal(next) {
			w.t.Errorf("%s is at %d for %v; want %v, %v", n.id, n.position, n.next, free, next)
		}
		busy := 0
		for _, r := range n.open {
			if r.busy && waits[r] == 0 {
				busy++
			}
			if waits[r] > 1 || waits[r] > 0 && !r.busy {
				w.t.Errorf("%s of %s waits at %d, busy: %v", r.path, n.id, waits[r], r.busy)
			}
		}
		if busy > 0 && n.trying == 0 {
			w.t.Errorf("%d of %s are neither tried nor wait nor are in the schedule", busy, n.id)
		}
	}
	if q.running != trying || slots > trying || len(q.due) > len(q.items) {
		w.t.Errorf("%d under way, of items %d, slots %d, %d of %d due", q.running, trying, slots, len(q.due), len(q.items))
	}
}

// Random next hops, orders, restarts and kills. At the end each recipient was delivered, or its sender told, or that nobody is told is in the
// log, or its item has gone by order; nothing came twice that no log names; and the queue counts nothing that is not there.
// QUEUE_SEED=N has the same happen again, as far as goroutines do.
func TestNothingIsLostWhateverHappens(t *testing.T) {
	seed := rand.Uint64()
	if text := os.Getenv("QUEUE_SEED"); text != "" {
		var err error
		if seed, err = strconv.ParseUint(text, 10, 64); err != nil {
			t.Fatal(err)
		}
	}
	t.Logf("again with QUEUE_SEED=%d", seed)
	w := &turmoil{
		dir: t.TempDir(), r: rand.New(rand.NewPCG(seed, 0)), moods: map[string]mood{}, items: map[string]*sent{},
		taken: map[string]int{}, unsure: map[string]bool{}, told: map[said]map[string]string{},
	}
	synctest.Test(t, func(t *testing.T) {
		w.t = t
		w.start()
		for end := time.Now().Add(30 * time.Hour); time.Now().Before(end) && !t.Failed(); {
			time.Sleep(time.Duration(w.int(600)) * time.Second)
			w.step()
			synctest.Wait()
			w.consistent()
			if w.isKilled() {
				w.stop()
				w.start()
			}
		}
		w.calm()
		w.stop()
		w.judge()
	})
}

// calm has all next hops take what comes, until there is nothing left.
func (w *turmoil) calm() {
	w.mu.Lock()
	w.killIn = 0
	clear(w.moods)
	w.mu.Unlock()
	if w.isKilled() {
		w.stop()
		w.start()
	}
	for _, i := range w.items {
		w.forbid(i, "")
	}
	w.must(w.q.Do(w.t.Context(), Order{Deed: Free}, func(_ string, err error) error { return err }))
	w.q.Flush()
	time.Sleep(3 * randomLife)
	synctest.Wait()
	w.consistent()
	q := w.q
	q.mu.Lock()
	defer q.mu.Unlock()
	if len(q.items)+len(q.due)+len(q.waiting)+len(q.slots)+len(q.stuck)+len(q.coming)+q.running != 0 {
		w.t.Errorf("%d items, %d due, %v wait, slots %v, stuck %v, %d under way", len(q.items), len(q.due), q.waiting, q.slots, q.stuck, q.running)
	}
}

// judge looks at what has come of each recipient.
func (w *turmoil) judge() {
	cut, untold := map[string]bool{}, map[string]bool{}
	for line := range strings.Lines(w.log.String()) {
		var l struct {
			Message, Item string
			Path          string `json:"forward_path"`
		}
		if !strings.Contains(line, "attempt.cut") && !strings.Contains(line, "dsn.none") {
			continue
		}
		w.must(json.Unmarshal([]byte(line), &l))
		cut[l.Item] = cut[l.Item] || l.Message == "attempt.cut"
		if l.Message == "dsn.none" {
			local, _, _ := strings.Cut(l.Path, "@")
			untold[local] = true
		}
	}
	var taken, twice, failed, silent, gone int
	for _, i := range w.items {
		for _, p := range i.to {
			n := w.taken[p.Local]
			switch {
			case n > 0:
				taken++
			case len(w.told[said{"failed", p.Local}]) > 0:
				failed++
			case untold[p.Local]:
				silent++
			case i.gone:
				gone++
			default:
				w.t.Errorf("%s of %s is lost", p, i.id)
			}
			if n > 1 {
				if twice++; !cut[i.id] && !w.unsure[p.Local] {
					w.t.Errorf("%s of %s came %d times, and nothing says so", p, i.id, n)
				}
			}
		}
	}
	for s, by := range w.told {
		if len(by) > 1 {
			w.t.Errorf("%d DSNs say that %s is %s: %v", len(by), s.who, s.action, by)
		}
	}
	w.t.Logf("%d taken, %d of them twice, %d failed, %d in silence, %d gone by order", taken, twice, failed, silent, gone)
}
