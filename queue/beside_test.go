package queue

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/rs/zerolog"

	"mailproxy/relay"
	"mailproxy/spool"
)

// bubble is inBubble with options, and with a hop that takes so long for what goes by a transport whose name begins so.
func bubble(t *testing.T, change func(*Options), takes map[string]time.Duration, then func(t *testing.T, q *testQueue)) {
	dir := t.TempDir()
	synctest.Test(t, func(t *testing.T) {
		q := openTest(t, dir, change)
		q.hop.set(func(a relay.Attempt) ([]relay.Result, error) {
			time.Sleep(takes[strings.TrimRight(strings.TrimSuffix(a.Transport.Name, ".test"), "0123456789")]) // on the clock of the bubble
			return answers(a)
		})
		ctx, cancel := context.WithCancel(t.Context())
		var wg sync.WaitGroup
		wg.Go(func() { _ = q.Run(ctx) })
		then(t, q)
		cancel()
		wg.Wait()
	})
}

// triedAt gives when a path was tried, on the clock of the bubble.
func (h *hop) noteTimes(of string) func() []time.Time {
	var mu sync.Mutex
	var at []time.Time
	h.mu.Lock()
	defer h.mu.Unlock()
	serve := h.serve
	h.serve = func(a relay.Attempt) ([]relay.Result, error) {
		if slices.Contains(a.Paths, path(of)) {
			mu.Lock()
			at = append(at, time.Now())
			mu.Unlock()
		}
		return serve(a)
	}
	return func() []time.Time { mu.Lock(); defer mu.Unlock(); return slices.Clone(at) }
}

// byItsOwnBackOff checks the times of attempts.
func byItsOwnBackOff(t *testing.T, at []time.Time, within time.Duration) {
	t.Helper()
	if len(at) < 2 || time.Since(at[0]) < within {
		t.Fatalf("tried at %v", at)
	}
	for n := 1; n < len(at); n++ {
		if d := at[n].Sub(at[n-1]); d < backoff(n, 0)-together || d > backoff(n, 1)+together {
			t.Errorf("attempt %d came %v behind the one before", n+1, d)
		}
	}
	if d := time.Since(at[len(at)-1]); d > backoff(len(at), 1) {
		t.Errorf("the last of %d attempts was %v ago", len(at), d)
	}
}

// A next hop with a long backlog: who waits for room there keeps no other recipient of the item from its own schedule.
func TestWhoWaitsForRoomHoldsUpNoOtherRecipient(t *testing.T) {
	bubble(t, func(o *Options) { o.PerHop = 1 }, map[string]time.Duration{"slow": 3 * time.Hour}, func(t *testing.T, q *testQueue) {
		for range 4 {
			q.mustPut(t, false, draft("", "x@slow.test"))
		}
		synctest.Wait()
		later, room := q.hop.noteTimes("later@b.test"), q.hop.noteTimes("y@slow.test")
		id := q.mustPut(t, false, draft("", "y@slow.test", "ok@b.test", "later@b.test"))[0]
		start := time.Now()
		time.Sleep(11 * time.Hour)
		synctest.Wait()
		byItsOwnBackOff(t, later(), 11*time.Hour)
		if q.Stats().Sent != 4 || len(room()) != 0 {
			t.Errorf("%+v", q.Stats())
		}
		time.Sleep(5 * time.Hour)
		synctest.Wait()
		if at := room(); len(at) != 1 || at[0].Sub(start) != 12*time.Hour {
			t.Errorf("there was room at %v", at)
		}
		byItsOwnBackOff(t, later(), 16*time.Hour)
		if l := q.List(); len(l) != 1 || l[0].ID != id || lettersOf(l[0].ForwardPaths) != "later" || q.Stats().Sent != 6 {
			t.Errorf("%+v, %+v", l, q.Stats())
		}
	})
}

// A tarpit: what is tried there for hours keeps no other recipient of the item waiting, neither for its first attempt nor for the next.
func TestASlowHopHoldsUpNoOtherRecipient(t *testing.T) {
	bubble(t, nil, map[string]time.Duration{"slow": 10 * time.Hour}, func(t *testing.T, q *testQueue) {
		later := q.hop.noteTimes("later@b.test")
		id := q.mustPut(t, false, draft("", "x@slow.test", "later@b.test", "ok@c.test"))[0]
		synctest.Wait()
		if s, err := stateOf(q, id); q.Stats().Sent != 1 || err != nil || !slices.Equal(s.Done, []int{2}) {
			t.Errorf("%+v, on disk %+v, %v", q.Stats(), s, err)
		}
		time.Sleep(9 * time.Hour)
		synctest.Wait()
		byItsOwnBackOff(t, later(), 9*time.Hour)
		if !marked(t, q, id) {
			t.Error("a kill now would not name what may come twice")
		}
		time.Sleep(time.Hour + time.Minute)
		synctest.Wait()
		if l := q.List(); len(l) != 1 || lettersOf(l[0].ForwardPaths) != "later" || l[0].Busy || marked(t, q, id) {
			t.Errorf("%+v", l)
		}
	})
}

// marked says whether an attempt is under way on disk.
func marked(t *testing.T, q *testQueue, id string) (marked bool) {
	t.Helper()
	err := q.spool.Each(func(f spool.Found) error {
		marked = marked || f.ID == id && !f.Tried.IsZero()
		return nil
	}, func(_ string, err error) error { return err })
	if err != nil {
		t.Fatal(err)
	}
	return marked
}

// A restart finds each recipient's own place in the schedule.
func TestEachRecipientsTurnIsOnDisk(t *testing.T) {
	dir := t.TempDir()
	synctest.Test(t, func(t *testing.T) {
		q := openTest(t, dir, nil)
		away := true
		q.hop.set(func(a relay.Attempt) ([]relay.Result, error) {
			if a.Transport.Name == "c.test" && away {
				time.Sleep(30 * time.Minute)
			}
			return answers(a)
		})
		ctx, cancel := context.WithCancel(t.Context())
		var wg sync.WaitGroup
		wg.Go(func() { _ = q.Run(ctx) })
		q.mustPut(t, false, draft("", "later1@b.test", "later2@c.test", "ok@d.test"))
		time.Sleep(40 * time.Minute)
		cancel()
		wg.Wait()
		turns := func() (out []turn) {
			q.mu.Lock()
			defer q.mu.Unlock()
			for _, n := range q.items {
				for _, r := range n.open {
					out = append(out, turn{r.attempts, r.next.Round(0)})
				}
			}
			return out
		}
		before := turns()
		q.Close()
		q = openTest(t, dir, nil)
		after := turns()
		for i := range before {
			if before[i].Attempts != after[i].Attempts || !before[i].Next.Equal(after[i].Next) {
				t.Errorf("%+v, after a restart %+v", before, after)
			}
		}
		if len(before) != 2 || before[0].Attempts <= before[1].Attempts || before[1].Attempts == 0 {
			t.Errorf("turns %+v", before)
		}
		away = false
		q.hop.set(answers)
		later := q.hop.noteTimes("later1@b.test")
		ctx, cancel = context.WithCancel(t.Context())
		wg.Go(func() { _ = q.Run(ctx) })
		time.Sleep(time.Until(before[0].Next) + time.Second)
		synctest.Wait()
		if at := later(); len(at) != 1 || at[0].Before(before[0].Next.Add(-together)) {
			t.Errorf("tried at %v, want at %v", at, before[0].Next)
		}
		cancel()
		wg.Wait()
	})
}

// Of what is refused by several next hops that are tried together one DSN tells, though one of them is slow.
func TestOneDSNTellsOfAllThatAreTriedTogether(t *testing.T) {
	bubble(t, nil, map[string]time.Duration{"slow": time.Hour}, func(t *testing.T, q *testQueue) {
		q.mustPut(t, false, draft("from@a.test", "no1@b.test", "no2@c.test", "no3@slow.test", "ok@d.test"))
		time.Sleep(2 * time.Hour)
		synctest.Wait()
		if s := q.Stats(); len(q.List()) != 0 || s.DSNs != 1 || s.Failed != 3 || s.Sent != 2 {
			t.Errorf("%+v, queue %+v", s, q.List())
		}
	})
}

// Also where more next hops refuse than one item is tried at together.
func TestOneDSNTellsOfAllHoweverManyHopsRefuse(t *testing.T) {
	bubble(t, nil, map[string]time.Duration{"b": time.Minute}, func(t *testing.T, q *testQueue) {
		var to []string
		for i := range 5 * mostOfItem {
			to = append(to, fmt.Sprintf("no%d@b%d.test", i, i))
		}
		q.mustPut(t, false, draft("from@a.test", to...))
		time.Sleep(time.Hour)
		synctest.Wait()
		if s := q.Stats(); len(q.List()) != 0 || s.DSNs != 1 || s.Failed != 5*mostOfItem {
			t.Errorf("%+v, queue %+v", s, q.List())
		}
	})
}

// An item that goes to hundreds of slow next hops gets to all of them, and leaves room for others.
func TestAnItemForVeryManyHopsLeavesRoomForOthers(t *testing.T) {
	const hops = 300
	var most atomic.Int64
	bubble(t, nil, map[string]time.Duration{"slow": time.Minute}, func(t *testing.T, q *testQueue) {
		var now atomic.Int64
		serve := q.hop.serve
		q.hop.set(func(a relay.Attempt) ([]relay.Result, error) {
			if strings.HasPrefix(a.Transport.Name, "slow") {
				most.Store(max(most.Load(), now.Add(1)))
				defer now.Add(-1)
			}
			return serve(a)
		})
		var to []string
		for i := range hops {
			to = append(to, fmt.Sprintf("ok@slow%d.test", i))
		}
		q.mustPut(t, false, draft("", to...))
		synctest.Wait()
		q.mustPut(t, false, draft("", "x@quick.test"))
		synctest.Wait()
		if s := q.Stats(); s.Sent != 1 {
			t.Errorf("the other item waits: %+v", s)
		}
		time.Sleep(hops / mostOfItem * time.Minute)
		synctest.Wait()
		if s := q.Stats(); s.Sent != 1+hops || most.Load() != mostOfItem {
			t.Errorf("%+v, %d at once", s, most.Load())
		}
	})
}

// Nor do a few of such items.
func TestAFewItemsForVeryManyHopsLeaveRoomForOthers(t *testing.T) {
	const items = 2 * defaultConcurrency / mostOfItem
	bubble(t, nil, map[string]time.Duration{"slow": time.Hour}, func(t *testing.T, q *testQueue) {
		for n := range items {
			var to []string
			for i := range mostOfItem {
				to = append(to, fmt.Sprintf("no%d@slow%d.test", n*mostOfItem+i, n*mostOfItem+i))
			}
			q.mustPut(t, false, draft("from@a.test", to...))
		}
		synctest.Wait()
		q.mustPut(t, false, draft("", "x@quick.test"))
		synctest.Wait()
		if s := q.Stats(); s.Sent != 1 {
			t.Errorf("the other item waits: %+v", s)
		}
		time.Sleep(time.Hour * mostOfItem)
		synctest.Wait()
		if s := q.Stats(); len(q.List()) != 0 || s.Failed != items*mostOfItem || s.DSNs != items {
			t.Errorf("%+v", s)
		}
	})
}

// Next hops that answer at the same moment: nothing that one of them has brought is overwritten by what another has. The state is large, so
// that it takes its time to be written down.
func TestWhatTwoHopsBringAtOnceIsBothOnDisk(t *testing.T) {
	const count, hops = 8, 6
	dir := t.TempDir()
	q := openTest(t, dir, func(o *Options) { o.PerHop, o.Concurrency = 100, 1000 })
	proceed := make(chan struct{})
	open := sync.OnceFunc(func() { close(proceed) })
	var blocked atomic.Int64
	q.hop.set(func(a relay.Attempt) ([]relay.Result, error) {
		if a.Transport.Name != "z.test" {
			blocked.Add(1)
			<-proceed
		}
		return answers(a)
	})
	for n := range count {
		var to []string
		for i := range 200 {
			to = append(to, fmt.Sprintf("later%d@z.test", i))
		}
		for i := range hops {
			to = append(to, fmt.Sprintf("ok@b%d-%d.test", n, i))
		}
		q.mustPut(t, false, draft("", to...))
	}
	stop := q.run(t)
	t.Cleanup(open) // before the queue's own
	waitFor(t, "those at one hop are put off, and those at others being tried", func() bool {
		return blocked.Load() == count*hops && !slices.ContainsFunc(q.List(), func(i Item) bool { return i.LastReply == "" })
	})
	open()
	waitFor(t, "all were tried", func() bool {
		return !slices.ContainsFunc(q.List(), func(i Item) bool { return i.Busy || len(i.ForwardPaths) != 200 })
	})
	stop()
	q.Close()
	q = openTest(t, dir, nil)
	for _, i := range q.List() {
		if len(i.ForwardPaths) != 200 {
			t.Errorf("after a restart %s goes to %d, %v first", i.ID, len(i.ForwardPaths), i.ForwardPaths[0])
		}
	}
}

// One attempt finds an item damaged while another for it is under way.
func TestAnItemThatIsSetAsideWhileItIsTriedIsNoFaultOfTheSpool(t *testing.T) {
	dir := t.TempDir()
	q := openTest(t, dir, nil)
	proceed := make(chan struct{})
	open := sync.OnceFunc(func() { close(proceed) })
	q.hop.set(func(a relay.Attempt) ([]relay.Result, error) {
		if a.Transport.Name == "slow.test" {
			<-proceed
		}
		return answers(a)
	})
	q.mustPut(t, false, draft("from@a.test", "no@slow.test", "later@b.test"))
	q.run(t)
	t.Cleanup(open) // before the queue's own
	waitFor(t, "the one is put off", func() bool { i := q.List(); return len(q.hop.attempts()) == 2 && i[0].Attempts == 1 })
	damage(t, dir)
	q.Flush()
	waitFor(t, "it is set aside", func() bool { return len(q.List()) == 0 })
	open()
	waitFor(t, "nothing is under way", func() bool { q.mu.Lock(); defer q.mu.Unlock(); return q.running == 0 && len(q.slots) == 0 })
	if s := q.Stats(); q.Healthy() != nil || s.Damaged != 1 || s.DSNs != 0 {
		t.Errorf("%v, %+v", q.Healthy(), s)
	}
}

// A DSN is not tried before what it tells is saved, also where an operator has all tried at that moment.
func TestARetryReachesNoDSNBeforeWhatItTellsIsSaved(t *testing.T) {
	var q *testQueue
	log := &onLine{"dsn.queued", func() {
		q.Flush()
		synctest.Wait()
		for _, a := range q.hop.attempts() {
			if a.Envelope.About != nil {
				t.Error("it is tried")
			}
		}
	}}
	bubble(t, func(o *Options) { o.Log = zerolog.New(log) }, nil, func(t *testing.T, opened *testQueue) {
		q = opened
		q.mustPut(t, false, draft("from@a.test", "no@b.test"))
		time.Sleep(time.Minute)
		synctest.Wait()
		if s := q.Stats(); len(q.List()) != 0 || s.DSNs != 1 || s.Sent != 1 || s.Failed != 1 || len(q.hop.attempts()) != 2 {
			t.Errorf("%+v, queue %+v", s, q.List())
		}
	})
}

// onLine is a log that does something at a line that has a text.
type onLine struct {
	text string
	do   func()
}

func (l *onLine) Write(p []byte) (int, error) {
	if bytes.Contains(p, []byte(l.text)) {
		l.do()
	}
	return len(p), nil
}

// An item is set aside while another of its recipients waits for a next hop that is away: nothing is remembered of it.
func TestWhatIsSetAsideWaitsForNoHop(t *testing.T) {
	bubble(t, nil, map[string]time.Duration{"slow": 40 * time.Second}, func(t *testing.T, q *testQueue) {
		serve := q.hop.serve
		q.hop.set(func(a relay.Attempt) ([]relay.Result, error) {
			if a.Transport.Name == "away.test" {
				return outOfReach(a)
			}
			return serve(a)
		})
		q.mustPut(t, false, draft("from@a.test", "x@away.test", "later@slow.test"))
		time.Sleep(80 * time.Second) // that at away.test had its second attempt, and the other had not
		damage(t, q.o.Dir)
		time.Sleep(time.Minute)
		synctest.Wait()
		q.mu.Lock()
		defer q.mu.Unlock()
		if len(q.items)+len(q.due)+len(q.stuck)+int(q.anyStuck.Load()) != 0 || len(q.hop.attempts()) != 3 {
			t.Errorf("%d items, %d due, stuck %v, counted %d, %d attempts", len(q.items), len(q.due), q.stuck, q.anyStuck.Load(), len(q.hop.attempts()))
		}
	})
}

// damage changes the only message of a spool.
func damage(t *testing.T, dir string) {
	t.Helper()
	segment := filepath.Join(dir, "log", names(t, filepath.Join(dir, "log"))[0])
	b, err := os.ReadFile(segment)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(segment, bytes.Replace(b, []byte("hello"), []byte("hallo"), 1), 0o600); err != nil {
		t.Fatal(err)
	}
}
