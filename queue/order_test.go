package queue

import (
	"context"
	"errors"
	"fmt"
	"reflect"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"mailproxy/config"
	"mailproxy/mail"
	"mailproxy/relay"
)

// order carries out one and gives what was said of each item.
func (q *testQueue) order(t testing.TB, o Order) map[string]error {
	t.Helper()
	said := map[string]error{}
	if err := q.Do(t.Context(), o, func(id string, err error) error { said[id] = err; return nil }); err != nil {
		t.Fatal(err)
	}
	return said
}

func ids(items ...string) Selection { return Selection{IDs: items} }

// select gives the IDs that a Selection means.
func (q *testQueue) selected(t testing.TB, s Selection) (out []string) {
	t.Helper()
	if _, err := q.Each(s, -1, func(i Item) error { out = append(out, i.ID); return nil }); err != nil {
		t.Fatal(err)
	}
	return out
}

func TestWhatIsOnHoldIsNotTriedAlsoAfterARestartUntilItIsReleased(t *testing.T) {
	dir := t.TempDir()
	q := openTest(t, dir, nil)
	id := q.mustPut(t, false, draft("from@a.test", "x@b.test"))[0]
	if said := q.order(t, Order{Deed: PutOnHold, Selection: ids(id), Who: "root", Node: 2}); len(said) != 1 || said[id] != nil {
		t.Fatalf("said %v", said)
	}
	for _, want := range []string{`"item":"` + id + `","order":"hold","who":"root","node":2`, `"order":"hold","who":"root","node":2,"items":1,"refused":0`} {
		if !strings.Contains(q.log.String(), want) {
			t.Errorf("no %s in %s", want, q.log)
		}
	}
	q.Close()
	q = openTest(t, dir, nil)
	if h := q.List()[0].OnHold; h == nil || h.By != "root at node 2" || h.Since.IsZero() || q.Stats().OnHold != 1 {
		t.Fatalf("after a restart: %+v", q.List())
	}
	stop := q.run(t)
	other := q.mustPut(t, false, draft("from@a.test", "y@b.test"))[0]
	waitFor(t, "the other is delivered", func() bool { return len(q.List()) == 1 })
	if n := q.Flush(); n != 0 || len(q.hop.attempts()) != 1 {
		t.Errorf("flushed %d, tried %d", n, len(q.hop.attempts()))
	}
	if said := q.order(t, Order{Deed: Retry, Selection: ids(id, other, id)}); !errors.Is(said[id], ErrOnHold) || !errors.Is(said[other], ErrNoSuch) || len(said) != 2 {
		t.Errorf("retry: %v", said)
	}
	for range 2 { // the second finds it so
		if said := q.order(t, Order{Deed: PutOnHold, Selection: ids(id)}); said[id] != nil {
			t.Errorf("hold again: %v", said)
		}
	}
	if said := q.order(t, Order{Deed: PutOnHold}); len(said) != 0 {
		t.Errorf("what is on hold was put on hold: %v", said)
	}
	q.order(t, Order{Deed: Free, Selection: Selection{OnHold: true}})
	waitFor(t, "the queue is empty", func() bool { return len(q.List()) == 0 })
	stop()
	if !spoolIsEmpty(t, dir) {
		t.Error("something is left")
	}
}

func TestTimeOnHoldIsNoPartOfAnItemsLife(t *testing.T) {
	now := time.Now()
	dir := t.TempDir()
	var mu sync.Mutex
	clock := func(o *Options) {
		o.Now = func() time.Time { mu.Lock(); defer mu.Unlock(); return now }
		o.Life = func() time.Duration { return 30 * time.Second } // less than any back-off: the next attempt is at the end of it
	}
	q := openTest(t, dir, clock)
	id := q.mustPut(t, false, draft("from@a.test", "later@b.test"))[0]
	q.order(t, Order{Deed: PutOnHold, Selection: ids(id)})
	if s, err := q.Story(id); err != nil || !s.Expires.IsZero() {
		t.Errorf("on hold it expires at %v, %v", s.Expires, err)
	}
	now = now.Add(10 * time.Hour)
	q.order(t, Order{Deed: Free, Selection: ids(id)})
	q.Close()
	q = openTest(t, dir, clock) // it is on the disk
	story, err := q.Story(id)
	if err != nil || story.Expires.Sub(story.Item.Created.Add(10*time.Hour+30*time.Second)).Abs() > time.Second {
		t.Errorf("it expires at %v, %v", story.Expires, err)
	}
	q.run(t)
	waitFor(t, "it was tried", func() bool { i := q.List(); return i[0].Attempts == 1 && !i[0].Busy })
	if s := q.Stats(); s.Expired != 0 || !q.List()[0].Next.Equal(story.Expires) {
		t.Errorf("stats %+v, next %v, want %v", s, q.List()[0].Next, story.Expires)
	}
	mu.Lock()
	now = now.Add(time.Minute)
	mu.Unlock()
	q.Flush()
	waitFor(t, "its life is over", func() bool { return q.Stats().Expired == 1 })
}

func TestAnotherTransportIsTakenUntilTheUsualOneIsOrdered(t *testing.T) {
	dir := t.TempDir()
	transports := map[string]bool{"backup": true}
	options := func(o *Options) {
		o.Transport = func(name string) (config.Transport, bool) {
			return config.Transport{Name: name, Hosts: []string{name + ":25"}}, transports[name]
		}
	}
	q := openTest(t, dir, options)
	q.hop.set(outOfReach)
	id := q.mustPut(t, false, draft("from@a.test", "x@b.test", "y@c.test"))[0]
	if err := q.Do(t.Context(), Order{Deed: Reroute, Transport: "none"}, nil); !errors.Is(err, ErrNoTransport) {
		t.Errorf("by no transport: %v", err)
	}
	q.order(t, Order{Deed: Reroute, Transport: "backup", Selection: ids(id)})
	if s, err := q.Summary(Selection{}); err != nil || len(s.Hops) != 1 || s.Hops[0].Hop != "backup backup:25" || s.Hops[0].Items != 1 {
		t.Errorf("summary %+v, %v", s, err)
	}
	q.Close()
	q = openTest(t, dir, options)
	q.hop.set(outOfReach)
	stop := q.run(t)
	waitFor(t, "it was tried", func() bool { i := q.List(); return i[0].Attempts == 1 && !i[0].Busy })
	stop()
	if calls := q.hop.attempts(); len(calls) != 1 || calls[0].Transport.Name != "backup" || len(calls[0].Paths) != 2 {
		t.Errorf("tried %+v", calls)
	}
	delete(transports, "backup")
	q.run(t)
	q.Flush()
	waitFor(t, "it was put off", func() bool { i := q.List(); return i[0].Class == "route" && !i[0].Busy })
	if i := q.List()[0]; len(q.hop.attempts()) != 1 || !strings.HasPrefix(i.LastReply, "451 4.3.5 ordered to go by transport backup") || i.Via != "backup" {
		t.Errorf("%+v", i)
	}
	q.hop.set(answers)
	q.order(t, Order{Deed: Reroute, Selection: ids(id)})
	waitFor(t, "the queue is empty", func() bool { return len(q.List()) == 0 })
	if calls := q.hop.attempts(); len(calls) != 3 || calls[1].Transport.Name+calls[2].Transport.Name != "b.testc.test" && calls[2].Transport.Name+calls[1].Transport.Name != "b.testc.test" {
		t.Errorf("tried %+v", calls)
	}
}

// An order meets what is being tried once that has ended, and says so where it takes too long.
func TestAnOrderWaitsForAnAttemptThatIsUnderWay(t *testing.T) {
	q := openTest(t, t.TempDir(), nil)
	proceed := make(chan struct{})
	started := make(chan struct{}, 10)
	q.hop.set(func(a relay.Attempt) ([]relay.Result, error) {
		started <- struct{}{}
		<-proceed
		return outOfReach(a)
	})
	slow := q.mustPut(t, false, draft("from@a.test", "x@b.test"))[0]
	q.run(t)
	<-started
	if said := q.order(t, Order{Deed: PutOnHold, Selection: Selection{To: "b.test"}}); !errors.Is(said[slow], ErrBusy) {
		t.Errorf("said %v", said)
	}
	done := make(chan map[string]error)
	go func() { done <- q.order(t, Order{Deed: PutOnHold, Selection: Selection{To: "b.test"}}) }()
	waitFor(t, "the order waits", func() bool { q.mu.Lock(); defer q.mu.Unlock(); return q.idle != nil })
	close(proceed)
	if said := <-done; len(said) != 1 || said[slow] != nil {
		t.Errorf("said %v", said)
	}
	if i := q.List()[0]; i.OnHold == nil || i.Attempts != 1 || i.Busy {
		t.Errorf("%+v", i)
	}
}

func TestSelections(t *testing.T) {
	now := time.Now()
	q := openTest(t, t.TempDir(), func(o *Options) { o.Now = func() time.Time { return now } })
	put := func(age time.Duration, from string, to ...string) string {
		d := draft(from, to...)
		d.Envelope.ReceivedAt = now.Add(-age)
		return q.mustPut(t, false, d)[0]
	}
	old := put(3*time.Hour, "Boss@a.test", "later@b.test")
	null := put(2*time.Hour, "", "later@c.test", "later@b.test")
	idn := put(time.Hour, "from@müller.test", "no@nowhere.test", "later@d.test")
	fresh := put(0, "from@a.test", "x@e.test")
	unanswered := q.mustPut(t, true, draft("from@a.test", "x@f.test"))[0]
	q.order(t, Order{Deed: PutOnHold, Selection: ids(fresh)})
	stop := q.run(t)
	waitFor(t, "all were tried", func() bool {
		return !slices.ContainsFunc(q.List(), func(i Item) bool { return !i.Unanswered && i.OnHold == nil && (i.Attempts == 0 || i.Busy) })
	})
	stop()
	for _, c := range []struct {
		name string
		s    Selection
		want []string
	}{
		{"all", Selection{}, []string{old, null, idn, fresh, unanswered}},
		{"an address, its local part in any case", Selection{From: "<boss@A.test>"}, []string{old}},
		{"a domain of the reverse-path", Selection{From: "a.test"}, []string{old, fresh, unanswered}},
		{"the null reverse-path", Selection{From: "<>"}, []string{null}},
		{"an address in A-labels", Selection{From: "from@xn--mller-kva.test"}, []string{idn}},
		{"an address in U-labels", Selection{From: "from@müller.test"}, []string{idn}},
		{"a domain in A-labels", Selection{From: "xn--mller-kva.test"}, []string{idn}},
		{"a domain in U-labels", Selection{From: "@müller.test"}, []string{idn}},
		{"one of several forward-paths", Selection{To: "later@b.test"}, []string{old, null}},
		{"a domain of one", Selection{To: "C.test"}, []string{null}},
		{"one that is closed already", Selection{To: "nowhere.test"}, nil},
		{"what is older", Selection{Older: 2 * time.Hour}, []string{old, null}},
		{"a class", Selection{Reason: "final"}, []string{old, null, idn}},
		{"a part of the answer", Selection{Reason: "Try Later"}, []string{old, null, idn}},
		{"another answer", Selection{Reason: "no such user"}, nil},
		{"on hold", Selection{OnHold: true}, []string{fresh}},
		{"everything must hold", Selection{To: "b.test", From: "a.test", Older: time.Hour, Reason: "later"}, []string{old}},
		{"IDs", ids(idn, old, idn, "NONE"), []string{old, idn}},
		{"IDs and more", Selection{IDs: []string{idn, old}, To: "d.test"}, []string{idn}},
	} {
		if got := q.selected(t, c.s); !slices.Equal(got, c.want) {
			t.Errorf("%s: %v, want %v", c.name, got, c.want)
		}
	}
	counted, err := q.Each(Selection{To: "b.test"}, 1, func(i Item) error {
		if i.ID != old {
			t.Errorf("the first is %s", i.ID)
		}
		return nil
	})
	if err != nil || counted.Total != 5 || counted.Matched != 2 || counted.Bytes != 2*int64(len(body)) || counted.Others != 1 {
		t.Errorf("%+v, %v", counted, err)
	}
	for _, s := range []Selection{{From: "@"}, {To: "a b"}, {To: "a@b@c"}, {Older: -time.Second}} {
		if err := q.Do(t.Context(), Order{Deed: Delete, Selection: s}, nil); !errors.Is(err, ErrSelection) || !errors.Is(s.Check(), ErrSelection) {
			t.Errorf("%+v: %v", s, err)
		}
	}
	if said := q.order(t, Order{Deed: Delete, Selection: ids(unanswered)}); !errors.Is(said[unanswered], ErrUnanswered) {
		t.Errorf("said %v", said)
	}
	if said := q.order(t, Order{Deed: Delete, Selection: Selection{From: "a.test"}}); len(said) != 2 {
		t.Errorf("said %v", said)
	}
	if left := q.selected(t, Selection{}); slices.Contains(left, old) || !slices.Contains(left, unanswered) {
		t.Errorf("left %v", left)
	}
}

// What waits for a slot is taken out of there too.
func TestOrdersReachWhatWaitsForASlot(t *testing.T) {
	q := openTest(t, t.TempDir(), func(o *Options) { o.PerHop = 1 })
	proceed := make(chan struct{})
	q.hop.set(func(a relay.Attempt) ([]relay.Result, error) { <-proceed; return answers(a) })
	for i := range 5 {
		q.mustPut(t, false, draft("from@a.test", fmt.Sprintf("x%d@b.test", i)))
	}
	q.run(t)
	waitFor(t, "four wait", func() bool { q.mu.Lock(); defer q.mu.Unlock(); return len(q.waiting["b.test b.test:25"]) == 4 })
	busy := slices.IndexFunc(q.List(), func(i Item) bool { return i.Busy })
	held, deleted := q.List()[(busy+1)%5].ID, q.List()[(busy+2)%5].ID
	q.order(t, Order{Deed: PutOnHold, Selection: ids(held)})
	q.order(t, Order{Deed: Delete, Selection: ids(deleted)})
	close(proceed)
	waitFor(t, "one is left", func() bool { return len(q.List()) == 1 })
	if i := q.List()[0]; i.ID != held || i.Attempts != 0 || len(q.hop.attempts()) != 3 {
		t.Errorf("left %+v, %d attempts", i, len(q.hop.attempts()))
	}
	if strings.Contains(q.log.String(), "spool.unreadable") {
		t.Error("one that was deleted was tried")
	}
}

// What goes while a long list is read is not shown any more.
func TestAListShowsOnlyWhatIsThere(t *testing.T) {
	q := openTest(t, t.TempDir(), nil)
	var last string
	for range chunk + 2 {
		last = q.mustPut(t, false, draft("from@a.test", "x@b.test"))[0]
	}
	seen := 0
	counted, err := q.Each(Selection{}, -1, func(i Item) error {
		if seen++; seen == 1 {
			if err := q.Delete(last); err != nil {
				t.Error(err)
			}
		}
		if i.ID == last {
			t.Error("a deleted item is listed")
		}
		return nil
	})
	if err != nil || counted.Matched != chunk+1 || counted.Total != chunk+2 {
		t.Errorf("%+v, %v", counted, err)
	}
}

func TestAnOrderOfManyEndsWithWhoeverWaitsForIt(t *testing.T) {
	q := openTest(t, t.TempDir(), nil)
	for range 3 * chunk / 2 {
		q.mustPut(t, false, draft("from@a.test", "x@b.test"))
	}
	ctx, cancel := context.WithCancel(t.Context())
	gone := errors.New("gone")
	said := 0
	err := q.Do(ctx, Order{Deed: PutOnHold}, func(string, error) error {
		if said++; said == chunk {
			cancel()
		}
		return nil
	})
	if !errors.Is(err, context.Canceled) || said != chunk {
		t.Errorf("said %d, %v", said, err)
	}
	if err := q.Do(t.Context(), Order{Deed: Free}, func(string, error) error { return gone }); !errors.Is(err, gone) {
		t.Errorf("%v", err)
	}
	if q.Stats().OnHold != 0 {
		t.Errorf("%d are on hold", q.Stats().OnHold)
	}
	two := q.mustPut(t, false, draft("from@a.test", "x@b.test"), draft("from@a.test", "x@b.test"))
	q.order(t, Order{Deed: PutOnHold, Selection: ids(two[0])})
	if err := q.Do(t.Context(), Order{Deed: PutOnHold, Selection: ids(two...)}, func(string, error) error { return gone }); !errors.Is(err, gone) {
		t.Errorf("%v", err)
	}
	q.order(t, Order{Deed: Free})
	q.run(t)
	waitFor(t, "the queue is empty", func() bool { return len(q.List()) == 0 })
}

func TestSummaryCountsByNextHopAndAge(t *testing.T) {
	now := time.Now()
	q := openTest(t, t.TempDir(), func(o *Options) {
		o.Now = func() time.Time { return now }
		o.Route = func(p mail.Path) (config.Transport, *mail.Reply) {
			switch p.Domain {
			case "mx.test":
				return config.Transport{Name: "out"}, nil
			case "usual.test":
				return config.Transport{Name: "mx"}, nil
			}
			return route(p)
		}
	})
	for age, to := range map[time.Duration]string{
		0: "b.test", 11 * time.Minute: "b.test", 5 * time.Hour: "b.test", 30 * time.Hour: "b.test", 2 * time.Hour: "mx.test",
	} {
		d := draft("from@a.test", "x@"+to, "y@"+to)
		d.Envelope.ReceivedAt = now.Add(-age)
		q.mustPut(t, false, d)
	}
	q.mustPut(t, false, draft("from@a.test", "x@b.test", "x@nowhere.test", "x@usual.test"))
	q.order(t, Order{Deed: PutOnHold, Selection: Selection{Older: 20 * time.Hour}})
	s, err := q.Summary(Selection{})
	if err != nil || s.Total != 6 || s.Matched != 6 || s.OnHold != 1 || !s.Oldest.Equal(now.Add(-30*time.Hour)) || len(s.Hops) != 4 {
		t.Fatalf("%+v, %v", s, err)
	}
	if h := s.Hops[0]; h.Hop != "b.test b.test:25" || h.Items != 5 || h.OnHold != 1 || h.Ages != [5]int{2, 1, 0, 1, 1} || h.Bytes != 5*int64(len(body)) {
		t.Errorf("%+v", h)
	}
	if h := s.Hops[2]; h.Hop != "none: 550 5.1.2 no route" || h.Items != 1 {
		t.Errorf("%+v", h)
	}
	if h := s.Hops[3]; h.Hop != "out mx mx.test" || h.Ages != [5]int{0, 0, 1, 0, 0} {
		t.Errorf("%+v", h)
	}
	if h := s.Hops[1]; h.Hop != "mx usual.test" {
		t.Errorf("%+v", h)
	}
	if s, err := q.Summary(Selection{To: "nowhere.test"}); err != nil || s.Matched != 1 || len(s.Hops) != 3 || s.Others != 1 {
		t.Errorf("%+v, %v", s, err)
	}
}

// What cannot be written down is not done: the item is on hold, kept, untold and due as it was.
func TestAnOrderThatIsNotDurableChangesNothing(t *testing.T) {
	q := openTest(t, t.TempDir(), func(o *Options) {
		o.Transport = func(name string) (config.Transport, bool) { return config.Transport{Name: name}, true }
	})
	d := draft("from@a.test")
	d.Envelope.Add(path("no@b.test"), mail.RcptParams{Unverified: true})
	id := q.mustPut(t, false, d)[0]
	stop := q.run(t)
	waitFor(t, "it is kept", func() bool { i := q.List()[0]; return i.Kept && !i.Busy })
	stop()
	q.order(t, Order{Deed: PutOnHold, Selection: ids(id), Who: "root"})
	look := func() (Item, recipient) {
		q.mu.Lock()
		defer q.mu.Unlock()
		return q.items[id].view(), *q.items[id].open[0]
	}
	before, turn := look()
	if err := q.spool.Close(); err != nil { // nothing more can be written
		t.Fatal(err)
	}
	for _, o := range []Order{{Deed: Free}, {Deed: Reroute, Transport: "x"}} {
		o.Selection = ids(id)
		if said := q.order(t, o); said[id] == nil {
			t.Errorf("%s: said %v", o.Deed, said)
		}
		if after, now := look(); !reflect.DeepEqual(before, after) || turn != now {
			t.Errorf("%s: %+v, %+v; before %+v, %+v", o.Deed, after, now, before, turn)
		}
	}
}

// An order is about all recipients, also about those that were tried while there was no room for another's next hop.
func TestAnOrderReachesRecipientsThatWaitForAnothersHop(t *testing.T) {
	q := openTest(t, t.TempDir(), func(o *Options) { o.PerHop = 1 })
	proceed := make(chan struct{})
	open := sync.OnceFunc(func() { close(proceed) })
	q.hop.set(func(a relay.Attempt) ([]relay.Result, error) {
		if a.Transport.Name == "slow.test" {
			<-proceed
		}
		return answers(a)
	})
	q.mustPut(t, false, draft("from@a.test", "x@slow.test"))
	q.run(t)
	t.Cleanup(open) // before the queue's own
	waitFor(t, "the slow one has its hop", func() bool { return len(q.hop.attempts()) == 1 })
	id := q.mustPut(t, false, draft("from@a.test", "later@b.test", "y@slow.test"))[0]
	tried := func() (n int) {
		for _, a := range q.hop.attempts() {
			if a.Paths[0] == path("later@b.test") {
				n++
			}
		}
		return n
	}
	waitFor(t, "the other waits for it", func() bool {
		q.mu.Lock()
		defer q.mu.Unlock()
		return tried() == 1 && len(q.waiting["slow.test slow.test:25"]) == 1
	})
	q.order(t, Order{Deed: Retry, Selection: ids(id)})
	waitFor(t, "the first is tried again", func() bool { return tried() == 2 })
	open()
	waitFor(t, "the rest is done", func() bool { return len(q.List()) == 1 && len(q.List()[0].ForwardPaths) == 1 })
}

func TestAStoryEndsWithTheLifeOfItsTransport(t *testing.T) {
	q := openTest(t, t.TempDir(), func(o *Options) {
		o.Route = func(p mail.Path) (config.Transport, *mail.Reply) {
			return config.Transport{Name: p.Domain, Hosts: []string{p.Domain + ":25"}, QueueLife: config.Duration(time.Hour)}, nil
		}
	})
	story, err := q.Story(q.mustPut(t, false, draft("from@a.test", "x@b.test"))[0])
	if err != nil || !story.Expires.Equal(story.Item.Created.Add(time.Hour)) {
		t.Errorf("came at %v, expires at %v, %v", story.Item.Created, story.Expires, err)
	}
}

// What a hop said last is its own word, not that of another hop of the same item.
func TestASummaryHasTheReplyOfEachHop(t *testing.T) {
	q := openTest(t, t.TempDir(), nil)
	id := q.mustPut(t, false, draft("from@a.test", "x@b.test", "x@c.test"))[0]
	q.mu.Lock()
	n := q.items[id]
	n.open[0].last, n.lastReply = &outcome{Code: 451, Text: "said by b"}, "451 said by b"
	q.mu.Unlock()
	s, err := q.Summary(Selection{})
	if err != nil || len(s.Hops) != 2 || s.Hops[0].LastReply != "451 said by b" || s.Hops[1].LastReply != "" {
		t.Errorf("%+v, %v", s.Hops, err)
	}
}
