package queue

import (
	"context"
	"errors"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"mailproxy/config"
	"mailproxy/mail"
	"mailproxy/relay"
	"mailproxy/spool"
)

func TestPutIsDeliveredAndRemoved(t *testing.T) {
	dir := t.TempDir()
	q := openTest(t, dir, nil)
	id := q.mustPut(t, false, draft("from@a.test", "x@b.test", "y@b.test"))[0]
	item, header, err := q.Show(id)
	if err != nil || string(header) != "From: a\r\nSubject: s\r\n" || len(item.ForwardPaths) != 2 {
		t.Errorf("Show: %+v %q %v", item, header, err)
	}
	q.run(t)
	waitFor(t, "the queue is empty", func() bool { return len(q.List()) == 0 })
	calls := q.hop.attempts()
	if len(calls) != 1 || len(calls[0].Paths) != 2 || calls[0].Envelope.ReversePath != path("from@a.test") {
		t.Errorf("attempts %+v", calls)
	}
	if !spoolIsEmpty(t, dir) {
		t.Errorf("left in the spool: %v", names(t, filepath.Join(dir, "item")))
	}
}

func TestItemsAreThereAfterRestartAndHeldOnesAreNot(t *testing.T) {
	dir := t.TempDir()
	q := openTest(t, dir, nil)
	ids := q.mustPut(t, false, draft("from@a.test", "x@b.test"), draft("", "y@c.test"))
	held := q.mustPut(t, true, draft("from@a.test", "z@b.test"))
	if err := q.Delete(held[0]); !errors.Is(err, ErrUnanswered) {
		t.Errorf("Delete of a held item: %v", err)
	}
	released := q.mustPut(t, true, draft("from@a.test", "r@b.test"))
	if err := q.Release(released); err != nil {
		t.Fatal(err)
	}
	q.Close()
	q = openTest(t, dir, nil)
	var got []string
	for _, i := range q.List() {
		got = append(got, i.ID+" "+i.ReversePath.String()+" "+i.ForwardPaths[0].String())
	}
	want := []string{ids[0] + " from@a.test x@b.test", ids[1] + "  y@c.test", released[0] + " from@a.test r@b.test"}
	slices.Sort(got)
	slices.Sort(want)
	if !slices.Equal(got, want) {
		t.Errorf("got %v, want %v", got, want)
	}
	q.Close()
	if _, r, err := spool.Inspect(dir); err != nil || r.Messages != 3 || r.Held != 0 {
		t.Errorf("spool holds %+v, %v", r, err)
	}
}

func TestHeldItemsAreNotTriedBeforeReleaseAndDropLeavesNothing(t *testing.T) {
	dir := t.TempDir()
	q := openTest(t, dir, nil)
	q.run(t)
	held := q.mustPut(t, true, draft("from@a.test", "x@b.test"))
	dropped := q.mustPut(t, true, draft("from@a.test", "y@b.test"))
	q.mustPut(t, false, draft("from@a.test", "other@b.test"))
	waitFor(t, "the other is delivered", func() bool { return len(q.hop.attempts()) == 1 })
	if err := q.Drop(dropped); err != nil {
		t.Fatal(err)
	}
	if err := q.Drop(dropped); !errors.Is(err, ErrNoSuch) {
		t.Errorf("Drop again: %v", err)
	}
	if q.Flush(); len(q.hop.attempts()) != 1 {
		t.Error("a held item was tried")
	}
	if err := q.Release(held); err != nil {
		t.Fatal(err)
	}
	waitFor(t, "the queue is empty", func() bool { return len(q.List()) == 0 })
	for _, a := range q.hop.attempts() {
		if a.Paths[0] == path("y@b.test") {
			t.Error("a dropped item was tried")
		}
	}
	if !spoolIsEmpty(t, dir) {
		t.Error("spool is not empty")
	}
}

func TestMixedAnswersCloseSomeKeepSomeAndReportSomeInOneDSN(t *testing.T) {
	dir := t.TempDir()
	q := openTest(t, dir, nil)
	id := q.mustPut(t, false, draft("from@a.test", "ok@b.test", "later@b.test", "no1@b.test", "no2@b.test", "x@nowhere.test"))[0]
	stop := q.run(t)
	waitFor(t, "the DSN is delivered", func() bool {
		return slices.ContainsFunc(q.hop.attempts(), func(a relay.Attempt) bool { return a.Paths[0] == path("from@a.test") })
	})
	waitFor(t, "one item is left", func() bool { return len(q.List()) == 1 && !q.List()[0].Busy })
	item := q.List()[0]
	if item.ID != id || len(item.ForwardPaths) != 1 || item.ForwardPaths[0] != path("later@b.test") || item.Attempts != 1 ||
		item.LastReply != "451 4.7.1 try later" {
		t.Errorf("left: %+v", item)
	}
	if s := q.Stats(); s.Sent != 2 || s.Failed != 3 || s.DSNs != 1 {
		t.Errorf("stats %+v", s)
	}
	stop()
	q.Close()
	// After a restart only what was open is open, at its time.
	q2 := openTest(t, dir, nil)
	again := q2.List()
	if len(again) != 1 || again[0].ForwardPaths[0] != path("later@b.test") || again[0].Attempts != 1 ||
		!again[0].Next.Equal(item.Next) || again[0].LastReply != item.LastReply {
		t.Errorf("after restart: %+v, want %+v", again, item)
	}
}

func TestNullReversePathGetsNoDSN(t *testing.T) {
	q := openTest(t, t.TempDir(), nil)
	q.mustPut(t, false, draft("", "no@b.test"))
	q.run(t)
	waitFor(t, "the queue is empty", func() bool { return len(q.List()) == 0 })
	if s := q.Stats(); s.DSNs != 0 || len(q.hop.attempts()) != 1 {
		t.Errorf("stats %+v, %d attempts", s, len(q.hop.attempts()))
	}
	if !strings.Contains(q.log.String(), `"message":"dsn.none"`) {
		t.Error("no dsn.none in the log")
	}
}

func TestHopThatAnswersAgainMakesItsItemsDue(t *testing.T) {
	q := openTest(t, t.TempDir(), nil)
	q.hop.set(outOfReach)
	for range firstWindow - 1 { // one more, and it would be dead
		q.mustPut(t, false, draft("from@a.test", "x@b.test"))
	}
	q.run(t)
	waitFor(t, "all were tried", func() bool {
		return !slices.ContainsFunc(q.List(), func(i Item) bool { return i.Attempts == 0 || i.Busy })
	})
	if r := q.List()[0].LastReply; r != "451 4.4.1 hop.test:25: connect: connection refused" {
		t.Errorf("last reply %q", r)
	}
	q.hop.set(answers)
	q.mustPut(t, false, draft("from@a.test", "y@b.test"))
	waitFor(t, "the queue is empty", func() bool { return len(q.List()) == 0 })
}

func TestFlushMakesAllDueNow(t *testing.T) {
	q := openTest(t, t.TempDir(), nil)
	q.mustPut(t, false, draft("from@a.test", "later1@b.test"), draft("from@a.test", "later2@c.test"))
	q.run(t)
	tried := func(n int) func() bool {
		return func() bool {
			return !slices.ContainsFunc(q.List(), func(i Item) bool { return i.Attempts != n || i.Busy })
		}
	}
	waitFor(t, "both were tried", tried(1))
	if n := q.Flush(); n != 2 {
		t.Errorf("Flush: %d", n)
	}
	waitFor(t, "both were tried again", tried(2))
}

func TestDeleteIsRefusedWhileBusy(t *testing.T) {
	dir := t.TempDir()
	q := openTest(t, dir, nil)
	started, proceed := make(chan struct{}), make(chan struct{})
	q.hop.set(func(a relay.Attempt) ([]relay.Result, error) {
		close(started)
		<-proceed
		return outOfReach(a)
	})
	id := q.mustPut(t, false, draft("from@a.test", "x@b.test"))[0]
	q.run(t)
	<-started
	if err := q.Delete(id); !errors.Is(err, ErrBusy) {
		t.Errorf("Delete while busy: %v", err)
	}
	marked := false
	if err := q.spool.Each(func(f spool.Found) error { marked = marked || f.ID == id && !f.Tried.IsZero(); return nil }, nil); err != nil || !marked {
		t.Errorf("no mark of the attempt: %v", err)
	}
	close(proceed)
	waitFor(t, "the attempt has ended", func() bool { return !q.List()[0].Busy })
	if err := q.Delete(id); err != nil {
		t.Error(err)
	}
	if err := q.Delete(id); !errors.Is(err, ErrNoSuch) {
		t.Errorf("Delete again: %v", err)
	}
	if len(q.List()) != 0 || !spoolIsEmpty(t, dir) {
		t.Error("something is left")
	}
}

func TestCutAttemptIsNamedAtStart(t *testing.T) {
	dir := t.TempDir()
	q := openTest(t, dir, nil)
	id := q.mustPut(t, false, draft("from@a.test", "x@b.test"))[0]
	if err := q.spool.Mark(id, time.Now()); err != nil { // what a killed daemon leaves
		t.Fatal(err)
	}
	q.Close()
	q = openTest(t, dir, nil)
	if log := q.log.String(); !strings.Contains(log, `"item":"`+id+`"`) || !strings.Contains(log, `"message":"attempt.cut"`) {
		t.Errorf("log: %s", log)
	}
	if len(q.List()) != 1 || q.Stats().Cut != 1 {
		t.Errorf("items %v", q.List())
	}
	q.Close()
	if q = openTest(t, dir, nil); strings.Contains(q.log.String(), "attempt.cut") {
		t.Error("named twice")
	}
}

func TestRouteIsAskedAtEachAttempt(t *testing.T) {
	var mu sync.Mutex
	to := "old"
	q := openTest(t, t.TempDir(), func(o *Options) {
		o.Route = func(mail.Path) (config.Transport, *mail.Reply) {
			mu.Lock()
			defer mu.Unlock()
			return config.Transport{Name: to, Hosts: []string{to + ":25"}}, nil
		}
	})
	q.hop.set(outOfReach)
	q.mustPut(t, false, draft("from@a.test", "x@b.test"))
	q.run(t)
	waitFor(t, "it was tried", func() bool { return q.List()[0].Attempts == 1 && !q.List()[0].Busy })
	mu.Lock()
	to = "new"
	mu.Unlock()
	q.hop.set(answers)
	q.Flush()
	waitFor(t, "the queue is empty", func() bool { return len(q.List()) == 0 })
	calls := q.hop.attempts()
	if calls[0].Transport.Name != "old" || calls[1].Transport.Name != "new" {
		t.Errorf("tried by %q, then %q", calls[0].Transport.Name, calls[1].Transport.Name)
	}
}

func TestAttemptsPerHopAreBounded(t *testing.T) {
	q := openTest(t, t.TempDir(), func(o *Options) { o.PerHop, o.Concurrency = 2, 5 })
	var mu sync.Mutex
	running, most, mostAll := map[string]int{}, 0, 0
	release := make(chan struct{})
	q.hop.set(func(a relay.Attempt) ([]relay.Result, error) {
		mu.Lock()
		running[a.Transport.Name]++
		all := 0
		for _, n := range running {
			all += n
			most = max(most, n)
		}
		mostAll = max(mostAll, all)
		mu.Unlock()
		<-release
		mu.Lock()
		running[a.Transport.Name]--
		mu.Unlock()
		return answers(a)
	})
	for range 10 {
		q.mustPut(t, false, draft("from@a.test", "x@b.test"), draft("from@a.test", "x@c.test"), draft("from@a.test", "x@d.test"),
			draft("from@a.test", "x@b.test", "x@c.test"))
	}
	q.run(t)
	waitFor(t, "all slots are taken", func() bool { mu.Lock(); defer mu.Unlock(); return mostAll >= 4 })
	close(release)
	waitFor(t, "the queue is empty", func() bool { return len(q.List()) == 0 })
	if most > 2 || mostAll > 5 {
		t.Errorf("%d at one hop, %d in all", most, mostAll)
	}
}

func TestWhatOneHopTookIsOnDiskWhileAnotherIsStillTried(t *testing.T) {
	dir := t.TempDir()
	q := openTest(t, dir, nil)
	id := q.mustPut(t, false, draft("from@a.test", "x@b.test", "y@c.test"))[0]
	q.hop.set(func(a relay.Attempt) ([]relay.Result, error) {
		if a.Transport.Name == "c.test" { // a kill here leaves what is on disk now
			waitFor(t, "the other is closed on disk", func() bool {
				s, err := stateOf(q, id)
				return err == nil && slices.Equal(s.Done, []int{0}) && s.Last[0] == nil
			})
			return outOfReach(a)
		}
		return answers(a)
	})
	q.run(t)
	waitFor(t, "both were tried", func() bool { i := q.List(); return len(i) == 1 && i[0].Attempts == 1 && !i[0].Busy })
	if i := q.List()[0]; len(i.ForwardPaths) != 1 || i.ForwardPaths[0] != path("y@c.test") {
		t.Errorf("left %+v", i)
	}
}

// stateOf reads an item's state from the disk.
func stateOf(q *testQueue, id string) (s *state, err error) {
	err = errors.Join(q.spool.Each(func(f spool.Found) error {
		if f.ID != id {
			return nil
		}
		var err error
		s, err = decodeState(f.State)
		return err
	}, func(_ string, err error) error { return err }))
	return s, err
}

func TestAnEnvelopeThatIsTooBigIsNoFaultOfTheSpool(t *testing.T) {
	q := openTest(t, t.TempDir(), nil)
	d := draft("from@a.test", "x@b.test")
	long := path(strings.Repeat("x", 64) + "@" + strings.Repeat("y", 60) + "." + strings.Repeat("z", 60) + ".test")
	for range 4<<20/len(long.String()) + 1 {
		d.Envelope.ForwardPaths = append(d.Envelope.ForwardPaths, long)
	}
	if _, err := q.Put(context.Background(), []Draft{d}, false); err == nil {
		t.Fatal("it was taken")
	}
	if err := q.Healthy(); err != nil {
		t.Errorf("one client's message stops the spool for all: %v", err)
	}
	q.mustPut(t, false, draft("from@a.test", "x@b.test"))
}
