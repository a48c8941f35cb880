package queue

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"mailproxy/config"
	"mailproxy/mail"
	"mailproxy/relay"
)

func TestBackoff(t *testing.T) {
	for n, want := range map[int]time.Duration{
		1: time.Minute, 2: 2 * time.Minute, 3: 4 * time.Minute, 6: 32 * time.Minute, 7: time.Hour, 8: time.Hour, 1000: time.Hour,
	} {
		low, high := backoff(n, 0), backoff(n, 0.999999)
		if low != want*8/10 || high < want*119/100 || high > want*12/10 {
			t.Errorf("behind attempt %d: %v to %v, want around %v", n, low, high, want)
		}
	}
}

// inBubble opens a queue under a fake clock and runs it; then is called with it.
func inBubble(t *testing.T, then func(t *testing.T, q *testQueue)) {
	dir := t.TempDir()
	synctest.Test(t, func(t *testing.T) {
		q := openTest(t, dir, nil)
		ctx, cancel := context.WithCancel(t.Context())
		var wg sync.WaitGroup
		wg.Go(func() { _ = q.Run(ctx) })
		then(t, q)
		cancel()
		wg.Wait()
	})
}

func TestScheduleOfAnItemThatIsNeverTaken(t *testing.T) {
	inBubble(t, func(t *testing.T, q *testQueue) {
		start := time.Now()
		var at []time.Duration
		q.hop.set(func(a relay.Attempt) ([]relay.Result, error) {
			if a.Envelope.ReversePath.IsNull() { // the DSN
				return answers(a)
			}
			at = append(at, time.Since(start))
			return outOfReach(a)
		})
		id := q.mustPut(t, false, draft("from@a.test", "x@b.test"))[0]
		time.Sleep(defaultLife - time.Hour)
		synctest.Wait()
		if i := q.List(); len(i) != 1 || i[0].ID != id {
			t.Fatalf("before the end of its life: %+v", i)
		}
		time.Sleep(time.Hour + time.Minute)
		synctest.Wait()
		if i := q.List(); len(i) != 0 {
			t.Fatalf("behind the end of its life: %+v", i)
		}
		if at[0] != 0 {
			t.Errorf("first attempt after %v", at[0])
		}
		for n := 1; n < len(at)-1; n++ {
			if d := at[n] - at[n-1]; d < backoff(n, 0) || d > backoff(n, 1) {
				t.Errorf("attempt %d came %v behind the one before", n+1, d)
			}
		}
		if last := at[len(at)-1]; last != defaultLife {
			t.Errorf("last attempt after %v", last)
		}
		if s := q.Stats(); s.Expired != 1 || s.DSNs != 2 || s.Sent != 2 { // it was late, and it was given up
			t.Errorf("stats %+v", s)
		}
	})
}

// The notice is sent with the first attempt behind the delay, and not again, after a restart either.
func TestALateItemIsToldOfOnce(t *testing.T) {
	dir := t.TempDir()
	synctest.Test(t, func(t *testing.T) {
		start := time.Now()
		var told []time.Duration
		serve := func(a relay.Attempt) ([]relay.Result, error) {
			if !a.Envelope.ReversePath.IsNull() {
				return outOfReach(a)
			}
			text := readAll(t, a.Content)
			if !strings.Contains(text, "Action: delayed\r\n") || !strings.Contains(text, "Status: 4.4.1\r\n") ||
				!strings.Contains(text, "Will-Retry-Until: "+start.Add(defaultLife).Format(time.RFC1123Z)+"\r\n") {
				t.Errorf("DSN:\n%s", text)
			}
			told = append(told, time.Since(start))
			return answers(a)
		}
		for day := range 3 {
			q := openTest(t, dir, nil)
			q.hop.set(serve)
			if day == 0 {
				q.mustPut(t, false, draft("from@a.test", "x@b.test"))
			}
			ctx, cancel := context.WithCancel(t.Context())
			var wg sync.WaitGroup
			wg.Go(func() { _ = q.Run(ctx) })
			time.Sleep(24 * time.Hour)
			cancel()
			wg.Wait()
			q.Close()
		}
		if len(told) != 1 || told[0] < defaultDelayNotice || told[0] > defaultDelayNotice+lastDelay*12/10 {
			t.Errorf("told after %v", told)
		}
	})
}

func TestNobodyIsToldOfDelayWhereTheSettingIsZero(t *testing.T) {
	inBubble(t, func(t *testing.T, q *testQueue) {
		q.o.DelayNotice = func() time.Duration { return 0 }
		q.hop.set(outOfReach)
		q.mustPut(t, false, draft("from@a.test", "x@b.test"))
		time.Sleep(48 * time.Hour)
		synctest.Wait()
		if s := q.Stats(); s.DSNs != 0 || len(q.List()) != 1 {
			t.Errorf("%+v", s)
		}
	})
}

func TestTemporaryAnswersAreTriedAgainAndExpireTogether(t *testing.T) {
	inBubble(t, func(t *testing.T, q *testQueue) {
		var dsn string
		q.hop.set(func(a relay.Attempt) ([]relay.Result, error) {
			if a.Envelope.ReversePath.IsNull() {
				dsn = readAll(t, a.Content)
			}
			return answers(a)
		})
		q.mustPut(t, false, draft("from@a.test", "later1@b.test", "later2@b.test", "later3@c.test"))
		time.Sleep(defaultLife + time.Minute)
		synctest.Wait()
		if s := q.Stats(); len(q.List()) != 0 || s.Expired != 3 || s.DSNs != 2 { // they were late, and they were given up
			t.Errorf("%+v, %+v", q.List(), s)
		}
		if strings.Count(dsn, "Status: 5.4.7") != 3 || !strings.Contains(dsn, "given up after 5 days") ||
			!strings.Contains(dsn, "Diagnostic-Code: smtp; 451 4.7.1 try later") {
			t.Errorf("DSN:\n%s", dsn)
		}
	})
}

func TestDSNOfAHopThatWasNeverInReachQuotesNobody(t *testing.T) {
	inBubble(t, func(t *testing.T, q *testQueue) {
		var dsn string
		q.hop.set(func(a relay.Attempt) ([]relay.Result, error) {
			if a.Envelope.ReversePath.IsNull() {
				dsn = readAll(t, a.Content)
				return answers(a)
			}
			return nil, &relay.OutOfReach{Hop: "hop.test:25", Stage: relay.StageConnect, Err: errors.New("no\r\nway \xfc")}
		})
		q.mustPut(t, false, draft("from@a.test", "x@b.test"))
		time.Sleep(defaultLife + time.Minute)
		synctest.Wait()
		_, parts := parseDSN(t, dsn)
		if want := "<x@b.test>:\r\n    given up after 5 days; the last attempt ended with:\r\n" +
			"    could not reach host hop.test:25: connect: no??way ?\r\n"; !strings.Contains(parts[0].body, want) {
			t.Errorf("text:\n%s", parts[0].body)
		}
		if f := fieldsOf(t, parts[1].body)[1]; f.Get("Status") != "5.4.7" || f.Get("Remote-Mta")+f.Get("Diagnostic-Code") != "" {
			t.Errorf("status %+v", f)
		}
	})
}

func TestItemThatExpiresWithoutAReversePathIsDropped(t *testing.T) {
	inBubble(t, func(t *testing.T, q *testQueue) {
		q.hop.set(outOfReach)
		q.mustPut(t, false, draft("", "x@b.test"))
		time.Sleep(defaultLife + time.Minute)
		synctest.Wait()
		if s := q.Stats(); len(q.List()) != 0 || s.Expired != 1 || s.DSNs != 0 {
			t.Errorf("%+v, %+v", q.List(), s)
		}
	})
}

func TestUnansweredDotIsTriedAgainAndNamed(t *testing.T) {
	inBubble(t, func(t *testing.T, q *testQueue) {
		calls := 0
		q.hop.set(func(a relay.Attempt) ([]relay.Result, error) {
			if calls++; calls > 1 {
				return answers(a)
			}
			r, _ := answers(a)
			for i := range r {
				if r[i].Reply.Positive() {
					r[i].Reply = refusal(relay.ErrNoAnswer)
				}
			}
			return r, relay.ErrNoAnswer
		})
		id := q.mustPut(t, false, draft("", "x@b.test", "no@b.test"))[0]
		synctest.Wait()
		if i := q.List(); len(i) != 1 || len(i[0].ForwardPaths) != 1 || i[0].Attempts != 1 {
			t.Fatalf("items %+v", i)
		}
		want := `"item":"` + id + `","attempt":1,"err":"no answer to the final dot","message":"attempt.unanswered"`
		if log := q.log.String(); !strings.Contains(log, want) {
			t.Errorf("log: %s", log)
		}
		time.Sleep(2 * time.Minute)
		synctest.Wait()
		if s := q.Stats(); len(q.List()) != 0 || s.Unsure != 1 || s.Sent != 1 {
			t.Errorf("%+v, %+v", q.List(), s)
		}
	})
}

func TestOwnStopLeavesTheItemAsItWas(t *testing.T) {
	dir := t.TempDir()
	q := openTest(t, dir, nil)
	started := make(chan struct{})
	ctx, cancel := context.WithCancel(context.Background())
	q.deliver = func(ctx context.Context, _ relay.Attempt) ([]relay.Result, error) {
		close(started)
		<-ctx.Done()
		return nil, ctx.Err()
	}
	id := q.mustPut(t, false, draft("from@a.test", "x@b.test"))[0]
	before := q.List()[0]
	var wg sync.WaitGroup
	wg.Go(func() { _ = q.Run(ctx) })
	<-started
	cancel()
	wg.Wait()
	if after := q.List()[0]; after.ID != id || after.Attempts != 0 || !after.Next.Equal(before.Next) || after.LastReply != "" {
		t.Errorf("got %+v, want %+v", after, before)
	}
	q.Close()
	if q = openTest(t, dir, nil); strings.Contains(q.log.String(), "attempt.cut") || len(q.List()) != 1 {
		t.Error("an attempt that we ended ourselves is not a cut one")
	}
}

// A group whose slots are all taken keeps its item waiting, not others'.
func TestSlowHopDoesNotHoldUpOthers(t *testing.T) {
	q := openTest(t, t.TempDir(), func(o *Options) { o.PerHop, o.Concurrency = 2, 4 })
	release := make(chan struct{})
	q.hop.set(func(a relay.Attempt) ([]relay.Result, error) {
		if a.Transport.Name == "slow.test" {
			<-release
		}
		return answers(a)
	})
	for i := range 20 {
		q.mustPut(t, false, draft("from@a.test", fmt.Sprintf("x%d@slow.test", i)))
	}
	q.mustPut(t, false, draft("from@a.test", "x@fast.test"))
	q.run(t)
	waitFor(t, "the fast one is delivered", func() bool { return q.Stats().Sent == 1 })
	waiting := q.List()[5]
	if err := q.Delete(q.List()[19].ID); err != nil {
		t.Error(err)
	}
	if n := q.Flush(); n != 17 {
		t.Errorf("Flush: %d", n)
	}
	close(release)
	waitFor(t, "the queue is empty", func() bool { return len(q.List()) == 0 })
	if s := q.Stats(); s.Sent != 20 {
		t.Errorf("sent %d; one that waited was %s", s.Sent, waiting.ID)
	}
}

func TestHopThatAnsweredSomebodyElseMakesItsItemsDue(t *testing.T) {
	q := openTest(t, t.TempDir(), nil)
	q.hop.set(outOfReach)
	q.mustPut(t, false, draft("from@a.test", "x@b.test"), draft("from@a.test", "x@c.test"))
	q.run(t)
	waitFor(t, "both were tried", func() bool { return q.anyStuck.Load() == 2 })
	q.hop.set(answers)
	transport, _ := route(path("other@b.test"))
	q.HopAnswered(transport, path("other@b.test"))
	waitFor(t, "the one is gone", func() bool { return len(q.List()) == 1 })
	if i := q.List(); len(i) != 1 || i[0].ForwardPaths[0] != path("x@c.test") || i[0].Attempts != 1 || q.anyStuck.Load() != 1 {
		t.Errorf("left: %+v", i)
	}
	if err := q.Delete(q.List()[0].ID); err != nil || q.anyStuck.Load() != 0 {
		t.Errorf("%v, %d stuck", err, q.anyStuck.Load())
	}
}

func TestDSNThatCannotBeSpooledKeepsItsItem(t *testing.T) {
	q := openTest(t, t.TempDir(), nil)
	q.mustPut(t, false, draft("from@a.test", "no@b.test"))
	q.health.note(time.Now(), q.Queue.log, errors.New("disk"))
	q.run(t)
	waitFor(t, "it was tried", func() bool { i := q.List(); return len(i) == 1 && i[0].Attempts == 1 && !i[0].Busy })
	if i := q.List()[0]; len(i.ForwardPaths) != 1 || i.LastReply != "550 5.1.1 no such user" {
		t.Errorf("item %+v", i)
	}
	if err := q.Healthy(); !errors.Is(err, ErrSick) {
		t.Errorf("Healthy: %v", err)
	}
	q.health.written(time.Now(), q.Queue.log, nil)
	q.Flush()
	waitFor(t, "the queue is empty", func() bool { return len(q.List()) == 0 })
	if q.Stats().DSNs != 1 {
		t.Error("no DSN")
	}
}

func TestSickSpoolIsProbed(t *testing.T) {
	inBubble(t, func(t *testing.T, q *testQueue) {
		q.hop.set(outOfReach)
		q.health.note(time.Now(), q.Queue.log, errors.New("input/output error"))
		put := func() error {
			_, err := q.Put(t.Context(), []Draft{draft("from@a.test", "x@b.test")}, false)
			return err
		}
		if err := put(); !errors.Is(err, ErrSick) {
			t.Errorf("Put into a sick spool: %v", err)
		}
		time.Sleep(probeEvery)
		if err := put(); err != nil { // the probe, and it is durable
			t.Errorf("the probe: %v", err)
		}
		if err := errors.Join(put(), q.Healthy()); err != nil {
			t.Errorf("behind the probe: %v", err)
		}
	})
}

func TestAnItemThatWasJustTriedWaitsForItsTimeOrForTheHop(t *testing.T) {
	inBubble(t, func(t *testing.T, q *testQueue) {
		tried := draft("from@a.test", "x@b.test")
		tried.Tried = &relay.OutOfReach{Hop: "hop.test:25", Stage: relay.StageConnect, Err: errors.New("connection refused")}
		q.mustPut(t, false, tried)
		synctest.Wait()
		item := q.List()[0]
		if len(q.hop.attempts()) != 0 || item.Attempts != 1 || item.Transport != "b.test" ||
			item.LastReply != "451 4.4.1 hop.test:25: connect: connection refused" { // as behind an attempt of the queue's own
			t.Fatalf("behind the put: %d attempts here, %+v", len(q.hop.attempts()), item)
		}
		transport, _ := route(path("other@b.test"))
		q.HopAnswered(transport, path("other@b.test"))
		synctest.Wait()
		if n := len(q.hop.attempts()); n != 1 || len(q.List()) != 0 {
			t.Fatalf("behind the hop's answer: %d attempts, %+v", n, q.List())
		}
		q.mustPut(t, false, tried)
		time.Sleep(2 * time.Minute)
		synctest.Wait()
		if n := len(q.hop.attempts()); n != 2 {
			t.Errorf("two minutes later: %d attempts, want 2", n)
		}
	})
}

func TestBothFormsOfADomainAreOneNextHop(t *testing.T) {
	mx := config.Transport{Name: "mx"}
	u, uDomain := groupKey(mx, mail.Path{Local: "a", Domain: "b\u00fccher.test"})
	a, aDomain := groupKey(mx, mail.Path{Local: "b", Domain: "xn--bcher-kva.test"})
	if u != a || uDomain != aDomain {
		t.Errorf("%q and %q, %q and %q", u, a, uDomain, aDomain)
	}
}

// Each recipient is given up by the life of its own transport, with an attempt at its end.
func TestLifeIsTheTransports(t *testing.T) {
	dir := t.TempDir()
	synctest.Test(t, func(t *testing.T) {
		lives := map[string]time.Duration{"short.test": 2 * time.Hour, "usual.test": 0, "long.test": 14 * 24 * time.Hour}
		q := openTest(t, dir, func(o *Options) {
			o.DelayNotice = func() time.Duration { return 0 }
			o.Route = func(p mail.Path) (config.Transport, *mail.Reply) {
				return config.Transport{Name: p.Domain, Hosts: []string{p.Domain + ":25"}, QueueLife: config.Duration(lives[p.Domain])}, nil
			}
		})
		start := time.Now()
		given := map[string]time.Duration{}
		q.hop.set(func(a relay.Attempt) ([]relay.Result, error) {
			if !a.Envelope.ReversePath.IsNull() {
				return outOfReach(a)
			}
			text := readAll(t, a.Content)
			for domain := range lives {
				if strings.Contains(text, "Final-Recipient: rfc822; x@"+domain) {
					given[domain] = time.Since(start)
				}
			}
			return answers(a)
		})
		ctx, cancel := context.WithCancel(t.Context())
		var wg sync.WaitGroup
		wg.Go(func() { _ = q.Run(ctx) })
		q.mustPut(t, false, draft("from@a.test", "x@short.test", "x@usual.test", "x@long.test"))
		time.Sleep(15 * 24 * time.Hour)
		cancel()
		wg.Wait()
		lives["usual.test"] = defaultLife
		for domain, want := range lives {
			if given[domain] != want {
				t.Errorf("%s: given up after %v, want %v", domain, given[domain], want)
			}
		}
		if l := q.List(); len(l) != 0 {
			t.Errorf("queue: %+v", l)
		}
	})
}

// A path that was never verified and is refused: nobody is told, it is not tried again, and it is there for an operator until its life
// is over.
func TestWhatWasNeverVerifiedIsKeptForAnOperator(t *testing.T) {
	for _, ordered := range []bool{false, true} {
		inBubble(t, func(t *testing.T, q *testQueue) {
			d := draft("from@a.test")
			d.Envelope.Add(path("no@b.test"), mail.RcptParams{Unverified: true})
			d.Envelope.Add(path("later@c.test"), mail.RcptParams{Notify: mail.NotifyNever})
			id := q.mustPut(t, false, d)[0]
			time.Sleep(24 * time.Hour)
			synctest.Wait()
			tried := func() (n int) {
				for _, a := range q.hop.attempts() {
					if a.Paths[0] == path("no@b.test") {
						n++
					}
				}
				return n
			}
			l := q.List()
			if len(l) != 1 || len(l[0].ForwardPaths) != 2 || l[0].Kept || tried() != 1 || strings.Count(q.log.String(), "dsn.kept") != 1 {
				t.Errorf("tried %d times, queue %+v", tried(), l)
			}
			if ordered {
				q.hop.set(func(a relay.Attempt) ([]relay.Result, error) {
					return []relay.Result{{Path: a.Paths[0], Reply: &mail.Reply{Code: 250}}}, nil
				})
				if err := q.Do(t.Context(), Order{Deed: Retry, Selection: Selection{IDs: []string{id}}}, func(_ string, err error) error { return err }); err != nil {
					t.Error(err)
				}
				synctest.Wait()
				if s := q.Stats(); len(q.List()) != 0 || s.Sent != 2 || s.DSNs != 0 || s.Untold != 0 {
					t.Errorf("%+v, queue %+v", s, q.List())
				}
				return
			}
			time.Sleep(defaultLife)
			synctest.Wait()
			if s := q.Stats(); len(q.List()) != 0 || tried() != 1 || s.DSNs != 0 || s.Untold != 2 || s.Failed != 1 {
				t.Errorf("tried %d times, %+v, queue %+v", tried(), s, q.List())
			}
		})
	}
}

// Nothing is left to do for it but to wait: it is not looked at every hour.
func TestWhatIsOnlyKeptWaitsForTheEndOfItsLife(t *testing.T) {
	inBubble(t, func(t *testing.T, q *testQueue) {
		d := draft("from@a.test")
		d.Envelope.Add(path("no@b.test"), mail.RcptParams{Unverified: true})
		id := q.mustPut(t, false, d)[0]
		synctest.Wait()
		if l := q.List(); len(l) != 1 || !l[0].Next.Equal(l[0].Created.Add(defaultLife)) || l[0].LastReply != "550 5.1.1 no such user" || !l[0].Kept {
			t.Errorf("queue %+v", l)
		}
		q.mustPut(t, false, draft("from@a.test", "later@c.test"))
		synctest.Wait()
		if got, s := q.selected(t, Selection{Kept: true}), q.Stats(); s.Kept != 1 || len(got) != 1 || got[0] != id || !(Selection{Kept: true}).Bounded() {
			t.Errorf("%+v, kept: %v", s, got)
		}
		if s, err := q.Summary(Selection{}); err != nil || s.Matched != 2 || s.Kept != 1 {
			t.Errorf("%+v, %v", s, err)
		}
		q.order(t, Order{Deed: Delete, Selection: Selection{To: "c.test"}})
		q.hop.set(func(a relay.Attempt) ([]relay.Result, error) {
			if l := q.List(); len(l) != 1 || l[0].Kept {
				t.Errorf("while it is tried again: queue %+v", l)
			}
			return []relay.Result{{Path: a.Paths[0], Reply: &mail.Reply{Code: 450}}}, nil
		})
		if err := q.Do(t.Context(), Order{Deed: Retry}, func(_ string, err error) error { return err }); err != nil {
			t.Error(err)
		}
		synctest.Wait()
		if l, s := q.List(), q.Stats(); len(l) != 1 || l[0].Kept || s.Kept != 0 {
			t.Errorf("tried again: %+v, queue %+v", s, l)
		}
	})
}

// What is kept is kept as long as its transport would have tried, also where it is looked at in between.
func TestWhatIsKeptIsGivenUpByItsTransportsLife(t *testing.T) {
	dir := t.TempDir()
	for _, life := range []time.Duration{2 * time.Hour, 10 * 24 * time.Hour} {
		synctest.Test(t, func(t *testing.T) {
			q := openTest(t, filepath.Join(dir, life.String()), func(o *Options) {
				o.DelayNotice = func() time.Duration { return 0 }
				o.Route = func(p mail.Path) (config.Transport, *mail.Reply) {
					return config.Transport{Name: p.Domain, Hosts: []string{p.Domain + ":25"}, QueueLife: config.Duration(life)}, nil
				}
			})
			d := draft("from@a.test", "later@c.test") // looked at again and again, and the other with it
			d.Envelope.Add(path("no@b.test"), mail.RcptParams{Unverified: true})
			ctx, cancel := context.WithCancel(t.Context())
			var wg sync.WaitGroup
			wg.Go(func() { _ = q.Run(ctx) })
			q.mustPut(t, false, d)
			time.Sleep(life - time.Second)
			synctest.Wait()
			if l := q.List(); len(l) != 1 || len(l[0].ForwardPaths) != 2 {
				t.Errorf("a second before the end of %v: %+v", life, l)
			}
			time.Sleep(2 * time.Second)
			synctest.Wait()
			if s := q.Stats(); len(q.List()) != 0 || s.Untold != 1 || s.Expired != 1 {
				t.Errorf("after %v: %+v, queue %+v", life, s, q.List())
			}
			cancel()
			wg.Wait()
		})
	}
}
