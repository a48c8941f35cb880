package queue

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/rs/zerolog"

	"mailproxy/mail"
	"mailproxy/relay"
)

// A mixedCase is an item with recipients that are letters, a and b at the next hop one, c and d at two, and one attempt at each.
type mixedCase struct {
	name     string
	to       string
	one, two string // "a=550 b=451": what is not named is taken; "down"; "dot=?" has no answer; "dsn" offers DSN
	about    string // what the sender said: "a:NEVER b:SUCCESS,DELAY"; "b:?" was never verified
	age      time.Duration

	taken   string
	open    string // to be tried again
	failed  string // in a DSN, as are the next two
	delayed string
	relayed string
	untold  int // given up without
}

const (
	late    = 5 * time.Hour
	expired = defaultLife + time.Minute
)

var mixedCases = []mixedCase{
	{name: "all are taken", to: "abc", taken: "abc"},
	{name: "some of each", to: "abcd", one: "a=550 b=451", two: "d=550", taken: "c", open: "b", failed: "ad"},
	{name: "all are refused", to: "abc", one: "a=550 b=550", two: "c=550", failed: "abc"},
	{name: "all are put off", to: "ac", one: "a=451", two: "c=451", open: "ac"},
	{name: "one next hop is away", to: "abc", one: "b=550", two: "down", taken: "a", open: "c", failed: "b"},
	{name: "both are away", to: "abc", one: "down", two: "down", open: "abc"},
	{name: "no answer to the dot", to: "abc", one: "b=550 dot=?", taken: "c", open: "a", failed: "b"},
	{name: "no way for one", to: "ax", taken: "a", failed: "x"},

	{name: "late, some of each", to: "abcd", one: "a=550 b=451", two: "down", age: late, open: "bcd", failed: "a", delayed: "bcd"},
	{name: "late, and taken", to: "a", age: late, taken: "a"},
	{name: "its life is over", to: "abcd", one: "a=550 b=451", two: "down", age: expired, failed: "abcd"},
	{name: "its life is over, and it is taken", to: "ac", one: "", two: "c=451", age: expired, taken: "a", failed: "c"},

	{name: "success is told where the next hop does not tell", to: "abc", about: "a:SUCCESS b:SUCCESS,FAILURE c:SUCCESS", one: "b=550", two: "dsn",
		taken: "ac", failed: "b", relayed: "a"},
	{name: "success was asked for, and failure was not", to: "ab", about: "a:SUCCESS b:SUCCESS", one: "b=550", taken: "a", relayed: "a", untold: 1},
	{name: "nothing was asked for", to: "abc", about: "a:NEVER b:NEVER c:NEVER", one: "b=550", two: "c=451", age: expired, taken: "a", untold: 2},
	{name: "delay was asked for, and failure was not", to: "abc", about: "a:DELAY b:FAILURE c:NEVER", one: "a=451 b=451", two: "down", age: late,
		open: "abc", delayed: "a"},
	{name: "of success nothing is told before it", to: "a", about: "a:SUCCESS", one: "a=451", open: "a"},
	{name: "perhaps taken is no success", to: "a", about: "a:SUCCESS", one: "dot=?", open: "a"},

	{name: "refused, and never verified: no backscatter, and kept", to: "abc", about: "a:? b:?", one: "a=550", two: "c=550", taken: "b", open: "a",
		failed: "c"},
	{name: "the same at the end of its life", to: "abc", about: "a:? b:?", one: "a=550", two: "c=550", age: expired, taken: "b", failed: "c",
		untold: 1},
	{name: "late, and never verified: no backscatter", to: "ac", about: "a:?", one: "down", two: "down", age: late, open: "ac", delayed: "c"},
	{name: "given up, and never verified: it may be there, and is not lost in silence", to: "a", about: "a:?", one: "down", age: expired, failed: "a"},
}

func TestMixedAnswers(t *testing.T) {
	for _, c := range mixedCases {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			dir := t.TempDir()
			q := openTest(t, dir, nil)
			q.hop.set(c.answer)
			q.mustPut(t, false, c.draft())
			stop := q.run(t)
			waitFor(t, "it was tried", func() bool {
				return !slices.ContainsFunc(q.List(), func(i Item) bool { return i.Busy || i.Attempts == 0 && !i.ReversePath.IsNull() })
			})
			stop()
			got := c.cameOf(t, q)
			for _, a := range q.hop.attempts() {
				if !a.Envelope.ReversePath.IsNull() {
					got.taken += c.takenOf(a)
				}
			}
			got.taken = sorted(got.taken)
			got.untold = int(q.Stats().Untold)
			if got != c {
				t.Errorf("\n got %+v\nwant %+v", got, c)
			}
			kept := q.Stats().Kept
			q.Close()
			q = openTest(t, dir, nil) // the disk says the same
			if again := q.Stats().Kept; again != kept {
				t.Errorf("%d are kept, after a restart %d", kept, again)
			}
			again := c.cameOf(t, q)
			if again.taken, again.untold = got.taken, got.untold; again != got {
				t.Errorf("after a restart\n got %+v\nwant %+v", again, got)
			}
			if c.open == "" {
				return
			}
			q.hop.set(c.answer)
			q.Flush()
			q.run(t)
			waitFor(t, "it was tried again", func() bool {
				return !slices.ContainsFunc(q.List(), func(i Item) bool { return i.Busy || i.Attempts < 2 && !i.ReversePath.IsNull() })
			})
			tried := ""
			for _, a := range q.hop.attempts() {
				if !a.Envelope.ReversePath.IsNull() {
					tried += lettersOf(a.Paths)
				}
			}
			if sorted(tried) != c.open {
				t.Errorf("tried again: %s, want %s", sorted(tried), c.open)
			}
			if last := c.cameOf(t, q); last.delayed != c.delayed || last.failed != c.failed || last.relayed != c.relayed {
				t.Errorf("told again: %+v", last)
			}
		})
	}
}

func (c *mixedCase) draft() Draft {
	d := draft("from@a.test")
	d.Envelope.ReceivedAt = time.Now().Add(-c.age)
	for _, l := range c.to {
		p := path(string(l) + "@" + map[bool]string{true: "one.test", false: "two.test"}[l <= 'b'])
		if l == 'x' {
			p.Domain = "nowhere.test"
		}
		var params mail.RcptParams
		for word := range strings.FieldsSeq(c.about) {
			if who, said, _ := strings.Cut(word, ":"); who == string(l) {
				if params.Unverified = said == "?"; !params.Unverified {
					params.Notify, _ = mail.ParseNotify(said)
				}
			}
		}
		d.Envelope.Add(p, params)
	}
	return d
}

func (c *mixedCase) says(domain string) string {
	if domain == "one.test" {
		return c.one
	}
	return c.two
}

// answer is the next hop's; DSNs find theirs away.
func (c *mixedCase) answer(a relay.Attempt) (out []relay.Result, err error) {
	says := strings.Fields(c.says(a.Paths[0].Domain))
	if a.Envelope.ReversePath.IsNull() || slices.Contains(says, "down") {
		return outOfReach(a)
	}
	for _, p := range a.Paths {
		r := relay.Result{Path: p, Hop: "hop.test:25", Stage: relay.StageDot, Reply: &mail.Reply{Code: 250}, DSN: slices.Contains(says, "dsn")}
		switch {
		case slices.Contains(says, p.Local+"=550"):
			r.Reply, r.Stage = &mail.Reply{Code: 550}, relay.StageRcpt
		case slices.Contains(says, p.Local+"=451"):
			r.Reply, r.Stage = &mail.Reply{Code: 451}, relay.StageRcpt
		case slices.Contains(says, "dot=?"):
			r.Reply, err = &mail.Reply{Code: 451}, relay.ErrNoAnswer
		}
		out = append(out, r)
	}
	return out, err
}

func (c *mixedCase) takenOf(a relay.Attempt) (taken string) {
	results, _ := c.answer(a)
	for _, r := range results {
		if r.Reply.Positive() {
			taken += r.Path.Local
		}
	}
	return taken
}

// cameOf gives the case with what lies in the queue.
func (c *mixedCase) cameOf(t *testing.T, q *testQueue) mixedCase {
	t.Helper()
	got := *c
	got.taken, got.open, got.failed, got.delayed, got.relayed, got.untold = "", "", "", "", "", 0
	for _, i := range q.List() {
		if !i.ReversePath.IsNull() {
			got.open += lettersOf(i.ForwardPaths)
			continue
		}
		m, err := q.spool.Open(i.ID)
		if err != nil {
			t.Fatal(err)
		}
		for _, said := range saidBy(readAll(t, m.Content)) {
			field := map[string]*string{"failed": &got.failed, "delayed": &got.delayed, "relayed": &got.relayed}[said.action]
			*field += said.who
		}
		m.Close()
	}
	for _, s := range []*string{&got.open, &got.failed, &got.delayed, &got.relayed} {
		*s = sorted(*s)
	}
	return got
}

// said is what a DSN tells of one recipient.
type said struct{ action, who string }

func saidBy(dsn string) (all []said) {
	who := ""
	for line := range strings.SplitSeq(dsn, "\r\n") {
		if rest, ok := strings.CutPrefix(line, "Final-Recipient: rfc822; "); ok {
			who, _, _ = strings.Cut(rest, "@")
		}
		if rest, ok := strings.CutPrefix(line, "Action: "); ok {
			all = append(all, said{rest, who})
		}
	}
	return all
}

func lettersOf(paths []mail.Path) (s string) {
	for _, p := range paths {
		s += p.Local
	}
	return s
}

func sorted(s string) string {
	b := []byte(s)
	slices.Sort(b)
	return string(b)
}

// settleCase has something of everything: a is taken and the sender wants to hear it, b refused, c put off, d taken.
var settleCase = mixedCase{to: "abcd", one: "b=550", two: "c=451", about: "a:SUCCESS,FAILURE c:DELAY,FAILURE", age: late}

// settleQueue runs the case's item, and writes what DSNs are delivered to a synced file.
func settleQueue(dir string, log zerolog.Logger) (*Queue, error) {
	q, err := Open(Options{Dir: filepath.Join(dir, "spool"), Hostname: "mx.test", Route: route, Log: log})
	if err != nil {
		return nil, err
	}
	told, err := os.OpenFile(filepath.Join(dir, "told"), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		return nil, err
	}
	q.deliver = func(_ context.Context, a relay.Attempt) ([]relay.Result, error) {
		if !a.Envelope.ReversePath.IsNull() {
			return settleCase.answer(a)
		}
		b := make([]byte, a.Content.Size())
		if _, err := a.Content.ReadAt(b, 0); err != nil && a.Content.Size() == 0 {
			return nil, err
		}
		_, id, _ := strings.Cut(string(b), "\r\nMessage-ID: ")
		id, _, _ = strings.Cut(id, "\r\n")
		for _, s := range saidBy(string(b)) {
			if _, err := fmt.Fprintln(told, s.action, s.who, id); err != nil {
				return nil, err
			}
		}
		return answers(a)
	}
	return q, nil
}

// nthKiller kills the process at the n-th line of the log.
type nthKiller struct{ n int }

func (k *nthKiller) Write(p []byte) (int, error) {
	if k.n--; k.n == 0 {
		_ = syscall.Kill(os.Getpid(), syscall.SIGKILL)
		select {}
	}
	return len(p), nil
}

func helperSettle(dir string) {
	var n int
	_, err := fmt.Sscan(os.Getenv("QUEUE_TEST_KILL"), &n)
	fatal(err)
	q, err := settleQueue(dir, zerolog.New(zerolog.SyncWriter(&nthKiller{n})))
	fatal(err)
	ctx, cancel := context.WithCancel(context.Background())
	go func() {
		for len(q.List()) != 1 || q.List()[0].Busy || q.List()[0].Attempts == 0 {
			time.Sleep(time.Millisecond)
		}
		cancel()
	}()
	fatal(q.Run(ctx))
	fatal(q.Close())
}

// Killed at each line of its log in turn, and started again: of each recipient the sender is told once, by one DSN.
func TestKillBetweenTheStepsOfSettlingTellsOnce(t *testing.T) {
	points := 0
	for n := 1; ; n++ {
		dir := t.TempDir()
		q := openTest(t, filepath.Join(dir, "spool"), nil)
		q.mustPut(t, false, settleCase.draft())
		q.Close()
		cmd := helper("settle", dir)
		cmd.Env = append(cmd.Env, fmt.Sprint("QUEUE_TEST_KILL=", n))
		err := cmd.Run()
		killed := cmd.ProcessState.Sys().(syscall.WaitStatus).Signaled()
		if err != nil && !killed {
			t.Fatal(err)
		}
		again, err := settleQueue(dir, zerolog.Nop())
		if err != nil {
			t.Fatal(err)
		}
		tq := &testQueue{Queue: again}
		stop := tq.run(t)
		waitFor(t, "only what was put off is left", func() bool {
			l := tq.List()
			return len(l) == 1 && lettersOf(l[0].ForwardPaths) == "c" && !l[0].Busy && l[0].Attempts > 0
		})
		stop()
		if err := again.Close(); err != nil {
			t.Fatal(err)
		}
		b, err := os.ReadFile(filepath.Join(dir, "told"))
		if err != nil {
			t.Fatal(err)
		}
		dsns := map[string]bool{} // the same one may come twice, as all mail may
		for line := range strings.Lines(string(b)) {
			dsns[line] = true
		}
		var told []string
		for line := range dsns {
			told = append(told, strings.Join(strings.Fields(line)[:2], " "))
		}
		slices.Sort(told)
		if got, want := strings.Join(told, ", "), "delayed c, failed b, relayed a"; got != want {
			t.Errorf("killed at line %d: told %s; want %s", n, got, want)
		}
		if !killed {
			break
		}
		points++
	}
	if points < 10 {
		t.Errorf("killed at %d lines only", points)
	}
	t.Logf("killed at %d points", points)
}
