package queue

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"net"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"mailproxy/config"
	"mailproxy/mail"
	"mailproxy/relay"
)

var errRefused = &relay.OutOfReach{Hop: "hop.test:25", Stage: relay.StageConnect, Err: errors.New("connection refused")}

func TestTheWindowMovesByOneNthOfItself(t *testing.T) {
	at := time.Now()
	s := newSite(20)
	good := func(n int) {
		for range n {
			s.succeeded(s.window, 20)
		}
	}
	want := func(what string, window int) {
		t.Helper()
		if s.window != window {
			t.Fatalf("%s: window %d, want %d", what, s.window, window)
		}
	}
	want("at first", 5)
	good(4)
	want("4 good ones", 5)
	good(1)
	want("5 good ones", 6)
	good(6 + 7)
	want("13 more", 8)
	good(1000)
	want("the bound", 20)
	for range 20 {
		good(1)
		s.failed(nil, at)
	}
	want("20 bad ones", 19)
	for range 1000 {
		good(1)
		s.failed(errRefused, at)
	}
	want("the least", 1)
	if s.out != nil {
		t.Error("it is dead, with good ones in between")
	}
	if s.need != mostNeed {
		t.Errorf("one more takes %v good ones", s.need)
	}
	good(mostNeed - 1)
	want("one too few", 1)
	good(1)
	want("enough", 2)
	s = newSite(3)
	want("a bound below the first window", 3)
	s.window = 10
	s.good = 1
	s.succeeded(1, 20)
	want("one at a time tells nothing of more", 10)
}

func TestAHopThatEndsWith421BearsLess(t *testing.T) {
	q := openTest(t, t.TempDir(), nil)
	said := &mail.Reply{Code: 421, Text: "enough"}
	ended := []relay.Result{{Reply: &mail.Reply{Code: 451, Text: "enough", Cause: said}}}
	for range firstWindow {
		g := &group{key: "key", slot: true}
		q.slots["key"]++
		q.feedback(g, ended, nil)
	}
	if s := q.sites["key"]; s.window != firstWindow-1 || s.out != nil || len(q.slots) != 0 {
		t.Errorf("%+v, slots %v", s, q.slots)
	}
}

func TestADeadHopIsLeftAloneAndLookedAtNowAndThen(t *testing.T) {
	at := time.Now()
	s := newSite(20)
	for i := range firstWindow {
		if s.left(at) != nil {
			t.Fatalf("dead after %d bad ones", i)
		}
		s.failed(errRefused, at)
	}
	for _, wait := range []time.Duration{deadFirst, 2 * deadFirst, 4 * deadFirst, 8 * deadFirst, 16 * deadFirst, deadMost, deadMost} {
		if s.left(at.Add(wait-1)) != errRefused {
			t.Fatalf("tried again before %v", wait)
		}
		s.failed(errRefused, at) // one that was under way already changes nothing
		at = at.Add(wait)
		if s.left(at) != nil {
			t.Fatalf("not looked at after %v", wait)
		}
		s.looking = true
		if s.left(at) == nil {
			t.Fatal("two look at once")
		}
		s.failed(errRefused, at)
	}
	s.looking = true
	s.succeeded(1, 20)
	if s.left(at) != nil || s.wait != 0 {
		t.Error("still dead, though it answered")
	}
}

func TestTheDeadOfMyriadsOfHopsAreForgotten(t *testing.T) {
	q := openTest(t, t.TempDir(), nil)
	q.mu.Lock()
	defer q.mu.Unlock()
	q.stickLocked(&entry{id: "x", position: -1}, &recipient{}, "key 7")
	for i := range 3 * manySites {
		for range firstWindow {
			q.siteLocked(fmt.Sprintf("key %d", i)).failed(errRefused, time.Now())
		}
	}
	if len(q.sites) > 2*manySites || q.sites["key 7"] == nil {
		t.Errorf("%d are known, the one that is waited for: %v", len(q.sites), q.sites["key 7"])
	}
}

// A hop that bears so many at once says 421 to more, and takes some time for each message.
type narrowHop struct {
	bears int64
	takes time.Duration

	now, most, refused, taken atomic.Int64
	last                      atomic.Int64 // when it took one
}

func (h *narrowHop) serve(a relay.Attempt) ([]relay.Result, error) {
	n := h.now.Add(1)
	defer h.now.Add(-1)
	if n > h.bears {
		h.refused.Add(1)
		return nil, &relay.OutOfReach{Hop: "narrow.test:25", Stage: relay.StageGreeting, Err: &mail.Reply{Code: 421, Text: "busy"}}
	}
	h.most.Store(max(h.most.Load(), n))
	time.Sleep(h.takes) // on the clock of the bubble
	h.taken.Add(1)
	h.last.Store(time.Now().UnixNano())
	return answers(a)
}

func TestAHopThatBearsOneAtATimeIsAskedForLittleMore(t *testing.T) {
	dir := t.TempDir()
	synctest.Test(t, func(t *testing.T) {
		const count = 300
		q := openTest(t, dir, nil)
		narrow, wide := &narrowHop{bears: 1, takes: time.Second}, &narrowHop{bears: 1000, takes: 100 * time.Millisecond}
		q.hop.set(func(a relay.Attempt) ([]relay.Result, error) {
			if a.Transport.Name == "narrow.test" {
				return narrow.serve(a)
			}
			return wide.serve(a)
		})
		for i := range count {
			q.mustPut(t, false, draft("", fmt.Sprintf("x%d@narrow.test", i)))
		}
		for i := range count {
			q.mustPut(t, false, draft("", fmt.Sprintf("x%d@wide.test", i)))
		}
		start := time.Now()
		ctx, cancel := context.WithCancel(t.Context())
		var wg sync.WaitGroup
		wg.Go(func() { _ = q.Run(ctx) })
		time.Sleep(count * time.Second * 5 / 4)
		synctest.Wait()
		cancel()
		wg.Wait()
		if narrow.taken.Load() != count || wide.taken.Load() != count || len(q.List()) != 0 {
			t.Errorf("%d and %d of %d taken, %d left", narrow.taken.Load(), wide.taken.Load(), count, len(q.List()))
		}
		if n := narrow.refused.Load(); n > count/5 {
			t.Errorf("the narrow hop refused %d times for %d messages", n, count)
		}
		if n := wide.most.Load(); n < 2*firstWindow || n > defaultPerHop {
			t.Errorf("the wide hop got at most %d at once", n)
		}
		if took := time.Unix(0, wide.last.Load()).Sub(start); took > 6*time.Second { // 300 of 0.1 s, 5 to 20 at once: 2 s, and what ramps up
			t.Errorf("the wide hop had all its messages after %v", took)
		}
		t.Logf("narrow: refused %d of %d; wide: %v", narrow.refused.Load(), count, time.Unix(0, wide.last.Load()).Sub(start))
	})
}

// One destination has very many items, and is slow; small ones come behind it.
func TestManyItemsForOneHopHoldUpNobodyElse(t *testing.T) {
	const many, small = 100_000, 200
	dir := t.TempDir()
	synctest.Test(t, func(t *testing.T) {
		q := openTest(t, dir, nil)
		big := &narrowHop{bears: 1000, takes: time.Minute}
		var smallDone atomic.Int64
		q.hop.set(func(a relay.Attempt) ([]relay.Result, error) {
			if a.Transport.Name == "big.test" {
				return big.serve(a)
			}
			time.Sleep(time.Second)
			smallDone.Add(1)
			return answers(a)
		})
		q.mu.Lock() // in the schedule without the disk, which is not what is tested
		now := time.Now()
		for i := range many {
			n := &entry{id: fmt.Sprintf("big%d", i), position: -1, open: []*recipient{{path: path("x@big.test")}}, created: now}
			q.items[n.id] = n
			q.due.set(n, now.Add(-time.Hour)) // long before the others
		}
		q.mu.Unlock()
		for i := range small {
			q.mustPut(t, false, draft("", fmt.Sprintf("x@small%d.test", i)))
		}
		ctx, cancel := context.WithCancel(t.Context())
		var wg sync.WaitGroup
		wg.Go(func() { q.runWithout(ctx, "big") })
		time.Sleep(10 * time.Second)
		synctest.Wait()
		if n := smallDone.Load(); n != small { // 80 or more at once, one second each
			t.Errorf("after 10 s %d of %d small ones are done", n, small)
		}
		cancel()
		wg.Wait()
	})
}

// runWithout is Run, whose attempts for items whose ID begins so do not read the spool.
func (q *testQueue) runWithout(ctx context.Context, prefix string) {
	var attempts sync.WaitGroup
	defer attempts.Wait()
	for ctx.Err() == nil {
		w, wait := q.take()
		if w == nil {
			timer := time.NewTimer(wait)
			select {
			case <-ctx.Done():
			case <-q.wake:
			case <-timer.C:
			}
			timer.Stop()
			continue
		}
		ready, rest := q.reserve(w.n, q.plan(w))
		if len(ready) == 0 {
			continue
		}
		attempts.Go(func() {
			if !strings.HasPrefix(w.n.id, prefix) {
				q.try(ctx, w.n, ready, rest)
				return
			}
			t := &trial{Queue: q.Queue, n: w.n, groups: ready, fates: map[int]fate{}}
			_, _ = t.bring(ctx, ready[0], relay.Attempt{Transport: ready[0].transport})
			q.mu.Lock()
			delete(q.items, w.n.id)
			q.mu.Unlock()
			t.giveBack(ready...)
			q.poke()
		})
	}
}

func TestWhatWaitsAndWhatHasBecomeDueTakeTurns(t *testing.T) {
	q := openTest(t, t.TempDir(), nil)
	for i := range 6 {
		q.mustPut(t, false, draft("", fmt.Sprintf("x%d@due.test", i)))
	}
	q.mu.Lock()
	for i := range 6 {
		q.waitLocked(&waiter{n: &entry{id: fmt.Sprintf("waits %d", i), position: -1}}, fmt.Sprintf("key %d", i%2))
	}
	q.mu.Unlock()
	var waited []string
	due := 0
	for range 8 {
		w, _ := q.take()
		if w.recipients == nil {
			waited = append(waited, w.n.id)
		} else {
			due++
		}
	}
	if due != 4 || strings.Join(waited, ", ") != "waits 0, waits 1, waits 2, waits 3" {
		t.Errorf("%d that were due, and %q", due, waited)
	}
}

func TestTheNextHopsOfWhatWaitsTakeTurns(t *testing.T) {
	q := openTest(t, t.TempDir(), nil)
	q.mu.Lock()
	defer q.mu.Unlock()
	for i := range 9 {
		key := "many"
		if i >= 6 {
			key = fmt.Sprintf("few %d", i)
		}
		q.waitLocked(&waiter{n: &entry{id: fmt.Sprint(i), position: -1}}, key)
	}
	q.slots["few 7"] = firstWindow // no room
	var got []string
	for w := q.admitLocked(); w != nil; w = q.admitLocked() {
		got = append(got, w.n.id)
	}
	if strings.Join(got, " ") != "0 6 8 1 2 3 4 5" {
		t.Errorf("got %v", got)
	}
	if len(q.ring) != 1 || len(q.waiting) != 1 || len(q.inRing) != 1 {
		t.Errorf("left: %v, %v, %v", q.ring, q.waiting, q.inRing)
	}
}

// With half of all room taken, an item that is being tried elsewhere waits behind the others for the same next hop, and has its turn then.
func TestNobodyWaitsBehindAnItemThatHasEnough(t *testing.T) {
	q := openTest(t, t.TempDir(), nil)
	q.mu.Lock()
	defer q.mu.Unlock()
	q.running = q.o.Concurrency
	busy := &entry{id: "busy", position: -1, trying: 1}
	q.waitLocked(&waiter{n: busy}, "key")
	q.waitLocked(&waiter{n: &entry{id: "other", position: -1}}, "key")
	if w := q.admitLocked(); w == nil || w.n.id != "other" {
		t.Errorf("got %+v", w)
	}
	if w := q.admitLocked(); w != nil {
		t.Errorf("got %s", w.n.id)
	}
	busy.trying = 0
	if w := q.admitLocked(); w == nil || w.n != busy || len(q.waiting)+len(q.inRing)+len(q.ring) != 0 {
		t.Errorf("got %+v, left: %v, %v, %v", w, q.ring, q.waiting, q.inRing)
	}
}

func TestALookThatIsNotMadeIsAnothers(t *testing.T) {
	q := openTest(t, t.TempDir(), nil)
	q.mu.Lock()
	defer q.mu.Unlock()
	at := time.Now()
	for range firstWindow {
		q.siteLocked("key").failed(errRefused, at)
	}
	at = at.Add(deadFirst)
	n := &entry{created: at}
	first, second, third := &group{key: "key"}, &group{key: "key"}, &group{key: "key"}
	if q.putOffLocked(first, n, at) || !q.takeSlotLocked(first, at) || !first.looks || !q.putOffLocked(second, n, at) {
		t.Fatalf("%+v, %+v", first, second)
	}
	q.giveBackLocked(first) // such as for an item that cannot be read
	if q.putOffLocked(third, n, at) || !q.takeSlotLocked(third, at) || !third.looks {
		t.Errorf("%+v", third)
	}
}

// Slow hops with much to do leave room for one that comes later.
func TestSlowHopsLeaveRoomForOneThatComes(t *testing.T) {
	dir := t.TempDir()
	synctest.Test(t, func(t *testing.T) {
		q := openTest(t, dir, nil)
		slow := &narrowHop{bears: 1000, takes: time.Hour}
		var quick atomic.Bool
		q.hop.set(func(a relay.Attempt) ([]relay.Result, error) {
			if strings.HasPrefix(a.Transport.Name, "slow") {
				return slow.serve(a)
			}
			quick.Store(true)
			return answers(a)
		})
		for i := range 60 {
			for range 5 {
				q.mustPut(t, false, draft("", fmt.Sprintf("x@slow%d.test", i)))
			}
		}
		ctx, cancel := context.WithCancel(t.Context())
		var wg sync.WaitGroup
		wg.Go(func() { _ = q.Run(ctx) })
		synctest.Wait()
		if n := slow.now.Load(); n < defaultConcurrency*8/10 {
			t.Errorf("only %d attempts at once", n)
		}
		q.mustPut(t, false, draft("", "x@quick.test"))
		synctest.Wait()
		if !quick.Load() {
			t.Errorf("%d slow attempts hold up the quick one", slow.now.Load())
		}
		cancel()
		wg.Wait()
	})
}

func TestARecipientWaitsForNoOthersHop(t *testing.T) {
	q := openTest(t, t.TempDir(), func(o *Options) { o.PerHop = 1 })
	release := make(chan struct{})
	var once sync.Once
	open := func() { once.Do(func() { close(release) }) }
	t.Cleanup(open)
	q.hop.set(func(a relay.Attempt) ([]relay.Result, error) {
		if a.Transport.Name == "slow.test" {
			<-release
		}
		return answers(a)
	})
	q.mustPut(t, false, draft("from@a.test", "x@slow.test"))
	q.run(t)
	waitFor(t, "the slow hop is in use", func() bool { return len(q.hop.attempts()) == 1 })
	q.mustPut(t, false, draft("from@a.test", "y@slow.test", "ok@b.test", "later@b.test"))
	waitFor(t, "the other hop's recipient has it", func() bool { return q.Stats().Sent == 1 })
	waitFor(t, "it waits for the slow hop", func() bool {
		i := q.List()
		return len(i) == 2 && !i[1].Busy && len(i[1].ForwardPaths) == 2 && i[1].Attempts == 1
	})
	open()
	waitFor(t, "the slow hop's has it", func() bool { return q.Stats().Sent == 3 })
	waitFor(t, "one is left", func() bool { i := q.List(); return len(i) == 1 && !i[0].Busy && i[0].Attempts == 1 })
	if n := len(q.hop.attempts()); n != 3 { // what was put off is not tried again with the rest
		t.Errorf("%d attempts: %+v", n, q.hop.attempts())
	}
}

// Of many items for a dead hop a few are tried; all are put off, with the reason, and go when it is back.
func TestADeadHopCostsFewAttempts(t *testing.T) {
	inBubble(t, func(t *testing.T, q *testQueue) {
		const count = 300
		q.hop.set(outOfReach)
		for i := range count {
			q.mustPut(t, false, draft("from@a.test", fmt.Sprintf("x%d@b.test", i)))
		}
		synctest.Wait()
		for _, i := range q.List() {
			if i.Attempts != 1 || i.LastReply != "451 4.4.1 hop.test:25: connect: connection refused" || i.Class != "connect" {
				t.Fatalf("item %+v", i)
			}
		}
		time.Sleep(time.Hour)
		synctest.Wait()
		if n := len(q.hop.attempts()); n > 30 { // 5 to 20 until it is dead, and one for each look
			t.Errorf("%d attempts in an hour", n)
		}
		q.hop.set(answers)
		time.Sleep(deadMost + 2*time.Minute) // the next look, by an item that is due then
		synctest.Wait()
		time.Sleep(time.Hour)
		synctest.Wait()
		if n := len(q.List()); n != 0 {
			t.Errorf("%d are left", n)
		}
	})
}

// An item for a dead hop ends with its life, though it is not tried.
func TestItemsForADeadHopExpire(t *testing.T) {
	inBubble(t, func(t *testing.T, q *testQueue) {
		q.hop.set(func(a relay.Attempt) ([]relay.Result, error) {
			if a.Transport.Name == "a.test" {
				return answers(a) // the DSNs
			}
			return outOfReach(a)
		})
		for range 10 {
			q.mustPut(t, false, draft("from@a.test", "x@b.test"))
		}
		time.Sleep(defaultLife + time.Minute)
		synctest.Wait()
		if s := q.Stats(); s.Expired != 10 || len(q.List()) != 0 {
			t.Errorf("%+v", s)
		}
	})
}

func TestADeadHopThatAnsweredAnotherIsTried(t *testing.T) {
	inBubble(t, func(t *testing.T, q *testQueue) {
		q.hop.set(outOfReach)
		for range 20 {
			q.mustPut(t, false, draft("from@a.test", "x@b.test"))
		}
		synctest.Wait()
		q.hop.set(answers)
		transport, _ := route(path("x@b.test"))
		q.HopAnswered(transport, path("y@b.test"))
		synctest.Wait()
		if n := len(q.List()); n != 0 {
			t.Errorf("%d are left", n)
		}
	})
}

func TestAnOperatorsRetryTriesADeadHop(t *testing.T) {
	q := openTest(t, t.TempDir(), nil)
	q.hop.set(outOfReach)
	for range 20 {
		q.mustPut(t, false, draft("from@a.test", "x@b.test"))
	}
	q.run(t)
	waitFor(t, "all were tried", func() bool {
		for _, i := range q.List() {
			if i.Attempts == 0 || i.Busy {
				return false
			}
		}
		return true
	})
	q.hop.set(answers)
	q.Flush()
	waitFor(t, "the queue is empty", func() bool { return len(q.List()) == 0 })
}

// What an operator orders is tried at once, also where its next hop is taken for dead; at another node, too.
func TestAnOrderTriesADeadHop(t *testing.T) {
	dir := t.TempDir()
	for _, deed := range []Deed{Retry, Free, Reroute, Move} {
		synctest.Test(t, func(t *testing.T) {
			options := func(o *Options) {
				o.Transport = func(name string) (config.Transport, bool) {
					return config.Transport{Name: name, Hosts: []string{"b.test:25"}}, true
				}
			}
			q, from := openTest(t, filepath.Join(dir, string(deed)), options), openTest(t, filepath.Join(dir, string(deed)+" from"), options)
			ctx, cancel := context.WithCancel(t.Context())
			var wg sync.WaitGroup
			wg.Go(func() { _ = q.Run(ctx) })
			q.hop.set(outOfReach)
			for range 20 {
				q.mustPut(t, false, draft("", "x@b.test"))
			}
			synctest.Wait()
			q.mu.Lock()
			dead := q.sites["b.test b.test:25"].left(time.Now()) != nil
			q.mu.Unlock()
			before := len(q.hop.attempts())
			switch item := q.List()[0].ID; deed {
			case Free:
				q.order(t, Order{Deed: PutOnHold, Selection: ids(item)})
				q.order(t, Order{Deed: Free, Selection: ids(item)})
			case Move:
				from.move(t, ids(from.mustPut(t, false, draft("", "x@b.test"), draft("", "x@b.test"))...), over(q.Queue))
			default:
				q.order(t, Order{Deed: deed, Transport: "b.test", Selection: ids(item)})
			}
			synctest.Wait()
			if n := len(q.hop.attempts()) - before; !dead || n < 1 || n > 2 {
				t.Errorf("%s: %d attempts; dead: %v", deed, n, dead)
			}
			cancel()
			wg.Wait()
		})
	}
}

// oneAtATime is a real SMTP server that bears one connection, and says 421 to more.
type oneAtATime struct {
	l       net.Listener
	wait    sync.WaitGroup
	takes   time.Duration
	open    atomic.Int64
	refused atomic.Int64
	taken   atomic.Int64
}

func newOneAtATime(t *testing.T, bears int64, takes time.Duration) *oneAtATime {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	h := &oneAtATime{l: l, takes: takes}
	h.wait.Go(func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			h.wait.Go(func() {
				defer c.Close()
				if h.open.Add(1) > bears {
					h.open.Add(-1)
					h.refused.Add(1)
					fmt.Fprint(c, "421 4.3.2 one at a time\r\n")
					return
				}
				h.serve(c)
				h.open.Add(-1)
			})
		}
	})
	t.Cleanup(func() { l.Close(); h.wait.Wait() })
	return h
}

func (h *oneAtATime) serve(c net.Conn) {
	fmt.Fprint(c, "220 hop\r\n")
	for r := bufio.NewReader(c); ; {
		line, err := r.ReadString('\n')
		if err != nil {
			return
		}
		switch verb := strings.ToUpper(line[:min(4, len(line))]); verb {
		case "DATA":
			fmt.Fprint(c, "354 go\r\n")
			for line != ".\r\n" {
				if line, err = r.ReadString('\n'); err != nil {
					return
				}
			}
			timer := time.NewTimer(h.takes) // a hop that works on each message
			<-timer.C
			h.taken.Add(1)
			fmt.Fprint(c, "250 taken\r\n")
		case "QUIT":
			fmt.Fprint(c, "221 bye\r\n")
			return
		default:
			fmt.Fprint(c, "250 ok\r\n")
		}
	}
}

func TestARealHopThatBearsOneBesideAFastOne(t *testing.T) {
	const count = 100
	narrow, fast := newOneAtATime(t, 1, 5*time.Millisecond), newOneAtATime(t, 1000, 0)
	client := relay.New(relay.Options{Hostname: "mx.test"})
	q := openTest(t, t.TempDir(), func(o *Options) {
		o.Route = func(p mail.Path) (config.Transport, *mail.Reply) {
			to := map[string]*oneAtATime{"narrow.test": narrow, "fast.test": fast}[p.Domain]
			return config.Transport{Name: p.Domain, Hosts: []string{to.l.Addr().String()}, TLS: config.TLSNone}, nil
		}
	})
	q.deliver = client.Deliver
	t.Cleanup(client.Close)
	var order []string
	for i := range count {
		order = append(order, q.mustPut(t, false, draft("", fmt.Sprintf("x%d@narrow.test", i)))[0])
	}
	for i := range count {
		q.mustPut(t, false, draft("", fmt.Sprintf("x%d@fast.test", i)))
	}
	q.run(t)
	waitFor(t, "the fast hop has all of its", func() bool { return fast.taken.Load() == count })
	left := len(q.List())
	waitFor(t, "the narrow hop has all of its", func() bool { return narrow.taken.Load() == count && len(q.List()) == 0 })
	if fast.refused.Load() != 0 || left == 0 || narrow.refused.Load() > count/2 {
		t.Errorf("the narrow hop refused %d, the fast one %d; %d of %d were left when the fast one had all", narrow.refused.Load(),
			fast.refused.Load(), left, len(order))
	}
	t.Logf("the narrow hop refused %d times for %d messages; %d were left when the fast one had all of its", narrow.refused.Load(), count, left)
}

// An item that goes to several next hops takes no room at one while it is tried at another, which may be slow.
func TestASlowHopTakesNoRoomAtAnother(t *testing.T) {
	q := openTest(t, t.TempDir(), nil)
	proceed := make(chan struct{})
	q.hop.set(func(a relay.Attempt) ([]relay.Result, error) {
		if a.Transport.Name == "slow.test" {
			<-proceed
		}
		return answers(a)
	})
	for i := range firstWindow {
		q.mustPut(t, false, draft("from@a.test", fmt.Sprintf("x%d@slow.test", i), "x@big.test"))
	}
	q.run(t)
	open := sync.OnceFunc(func() { close(proceed) })
	t.Cleanup(open) // before the queue's own
	waitFor(t, "the slow hop has its fill", func() bool { return q.Stats().Sent == firstWindow && len(q.hop.attempts()) == 2*firstWindow })
	id := q.mustPut(t, false, draft("from@a.test", "other@big.test"))[0]
	waitFor(t, "the other has gone", func() bool { q.mu.Lock(); defer q.mu.Unlock(); return q.items[id] == nil })
	open()
	waitFor(t, "all have gone, and nothing is under way", func() bool {
		q.mu.Lock()
		defer q.mu.Unlock()
		return len(q.items)+len(q.slots)+q.running == 0
	})
}
