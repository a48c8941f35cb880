package queue

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/rs/zerolog"

	"mailproxy/mail"
)

// over gives items to another queue as one node does to another: through JSON.
func over(to *Queue) func(context.Context, *Moved, mail.Content) error {
	return func(_ context.Context, m *Moved, c mail.Content) error {
		b, err := json.Marshal(m)
		if err != nil {
			return err
		}
		var there Moved
		if err := json.Unmarshal(b, &there); err != nil {
			return err
		}
		if err := to.Receive(1, &there, io.NewSectionReader(c, 0, c.Size())); errors.Is(err, ErrComing) {
			return err
		} else if err != nil {
			return fmt.Errorf("%w: %w", ErrRefused, err)
		}
		return nil
	}
}

func (q *testQueue) move(t testing.TB, s Selection, send func(context.Context, *Moved, mail.Content) error) map[string]error {
	t.Helper()
	said := map[string]error{}
	err := q.Move(t.Context(), Order{Deed: Move, Selection: s, To: 2}, send, func(id string, err error) error { said[id] = err; return nil })
	if err != nil && !errors.Is(err, errLost) {
		t.Fatal(err)
	}
	return said
}

var errLost = errors.New("connection lost")

func TestAMovedItemIsThereAsItWasHere(t *testing.T) {
	dir, thereDir := t.TempDir(), t.TempDir()
	q, there := openTest(t, dir, nil), openTest(t, thereDir, nil)
	d := draft("from@a.test", "ok@b.test", "later@b.test", `"quoted \" one"@c.test`)
	d.Envelope.EnvID, d.Envelope.Params = "id", []mail.RcptParams{{}, {Notify: mail.NotifyNever}, {}}
	d.Envelope.Client, d.Envelope.Helo, d.Envelope.SMTPUTF8 = netip.MustParseAddr("192.0.2.1"), "h.test", true
	large := draft("", "later@b.test")
	large.Content = bytes.NewReader(bytes.Repeat([]byte("0123456\r\n"), 300_000))
	onHold := draft("from@a.test", "z@b.test")
	items := q.mustPut(t, false, d, large, onHold)
	q.order(t, Order{Deed: PutOnHold, Selection: ids(items[2]), Who: "root"})
	stop := q.run(t)
	waitFor(t, "the first was tried", func() bool { i := q.List(); return i[0].Attempts > 0 && i[1].Attempts > 0 && !i[0].Busy && !i[1].Busy })
	stop()
	for _, want := range []int{3, 0} { // the second finds nothing to be done
		if said := q.move(t, Selection{}, over(there.Queue)); len(said) != want || len(q.List()) != 0 || !spoolIsEmpty(t, dir) {
			t.Errorf("said %v; %d are left", said, len(q.List()))
		}
	}
	if n := there.items[items[2]]; n.position != -1 {
		t.Error("what is on hold is in the schedule")
	}
	there.Close()
	there = openTest(t, thereDir, nil)
	if list := there.List(); len(list) != 3 {
		t.Fatalf("there: %+v", list)
	}
	first, err := there.Story(items[0])
	if err != nil || len(first.Item.ForwardPaths) != 1 || first.Item.Attempts != 1 || first.Item.LastReply != "451 4.7.1 try later" || first.Item.Class != "final" ||
		!first.Recipients[0].Done || first.Envelope.Helo != "h.test" || !first.Envelope.SMTPUTF8 || first.Item.Client != "192.0.2.1" ||
		first.Envelope.EnvID != "id" || first.Envelope.Param(1).Notify != mail.NotifyNever || first.Item.Next.After(time.Now()) || !first.Item.Created.Equal(d.Envelope.ReceivedAt) {
		t.Errorf("%+v, %v", first, err)
	}
	if h := there.List()[2].OnHold; h == nil || h.By != "root" {
		t.Errorf("on hold: %+v", there.List()[2])
	}
	err = there.Message(items[1], func(c mail.Content) error {
		if got, err := io.ReadAll(io.NewSectionReader(c, 0, c.Size())); err != nil || len(got) != 9*300_000 || !bytes.HasSuffix(got, []byte("\n0123456\r\n")) {
			t.Errorf("%d octets, %v", len(got), err)
		}
		return nil
	})
	if err != nil {
		t.Error(err)
	}
}

func TestAnItemStaysUntilTheOtherNodeHasIt(t *testing.T) {
	dir := t.TempDir()
	q, there := openTest(t, dir, nil), openTest(t, t.TempDir(), nil)
	id := q.mustPut(t, false, draft("from@a.test", "x@b.test"))[0]
	lost := errLost
	for name, c := range map[string]struct {
		err    error
		unsure bool
	}{"refused": {fmt.Errorf("%w: full", ErrRefused), false}, "the answer is lost": {lost, true}} {
		said := q.move(t, ids(id), func(context.Context, *Moved, mail.Content) error {
			if s, err := stateOf(q, id); err != nil || s.Moving != 2 {
				t.Errorf("%s: state on its way: %+v, %v", name, s, err)
			}
			return c.err
		})
		if !errors.Is(said[id], c.err) || strings.Contains(q.log.String(), "move.unsure") != c.unsure && c.unsure {
			t.Errorf("%s: %v, %s", name, said, q.log)
		}
		if s, err := stateOf(q, id); err != nil || s.Moving != 0 || len(q.List()) != 1 || q.List()[0].Busy {
			t.Errorf("%s: %+v, %v", name, s, err)
		}
	}
	// Taken, and the answer lost: the second order finds it there.
	said := q.move(t, ids(id), func(ctx context.Context, m *Moved, c mail.Content) error {
		return errors.Join(over(there.Queue)(ctx, m, c), lost)
	})
	if !errors.Is(said[id], lost) || len(q.List()) != 1 || len(there.List()) != 1 {
		t.Fatalf("%v", said)
	}
	if said := q.move(t, ids(id), over(there.Queue)); said[id] != nil || len(q.List()) != 0 || len(there.List()) != 1 {
		t.Errorf("again: %v, %d here, %d there", said, len(q.List()), len(there.List()))
	}
	other := Moved{ID: id, Size: 3, Envelope: mail.Envelope{ReversePath: path("else@a.test"), ForwardPaths: paths("x@b.test"), ReceivedAt: time.Now()}}
	if err := there.Receive(1, &other, strings.NewReader("x\r\n")); !errors.Is(err, ErrOther) {
		t.Errorf("another of that ID: %v", err)
	}
	// The same on its way in twice.
	r, w := io.Pipe()
	m := &Moved{ID: mail.NewID(time.Now()), Size: 3, Envelope: other.Envelope}
	first := make(chan error)
	go func() { first <- there.Receive(1, m, r) }()
	_, _ = io.WriteString(w, "x\r")
	if err := there.Receive(1, m, strings.NewReader("x\r\n")); !errors.Is(err, ErrComing) {
		t.Errorf("while it is on its way: %v", err)
	}
	_, _ = io.WriteString(w, "\n")
	if err := <-first; err != nil {
		t.Error(err)
	}
	if err := there.Receive(1, m, strings.NewReader("")); err != nil {
		t.Errorf("when it is there: %v", err)
	}
	// One that an earlier order is bringing there just now may come to be there: it stays, named, and the others go on.
	both := q.mustPut(t, false, draft("from@a.test", "x@b.test"), draft("from@a.test", "x@b.test"))
	there.coming[both[0]] = struct{}{}
	said = q.move(t, ids(both...), over(there.Queue))
	if said[both[0]] != ErrComing || said[both[1]] != nil || len(q.List()) != 1 || !strings.Contains(q.log.String(), `"item":"`+both[0]+`","to":2,"err":"another order`) {
		t.Errorf("%v, %s", said, q.log)
	}
	delete(there.coming, both[0])
	if err := q.Delete(both[0]); err != nil {
		t.Fatal(err)
	}
	// What the disk does not take is refused, and stays.
	full := openTest(t, t.TempDir(), func(o *Options) { o.MinFree = 1 << 60 })
	id = q.mustPut(t, false, draft("from@a.test", "y@b.test"))[0]
	if said := q.move(t, ids(id), over(full.Queue)); !errors.Is(said[id], ErrRefused) || !errors.Is(said[id], ErrFull) || len(q.List()) != 1 || len(full.List()) != 0 {
		t.Errorf("to a full disk: %v", said)
	}
}

// Two nodes that give each other the same item, one before it has heard that the other has it, lose neither it nor their word.
func TestAnItemThatIsGivenBackAtOnceIsNotLost(t *testing.T) {
	here, there := openTest(t, t.TempDir(), nil), openTest(t, t.TempDir(), nil)
	id := here.mustPut(t, false, draft("from@a.test", "x@b.test"))[0]
	var back map[string]error
	said := here.move(t, ids(id), func(ctx context.Context, m *Moved, c mail.Content) error {
		err := over(there.Queue)(ctx, m, c)
		back = there.move(t, ids(id), over(here.Queue)) // the answer is still on its way
		return err
	})
	if said[id] != nil || !errors.Is(back[id], ErrComing) || len(here.List()) != 0 || len(there.List()) != 1 {
		t.Errorf("%v, and back %v: %d here, %d there", said, back, len(here.List()), len(there.List()))
	}
	if said := there.move(t, ids(id), over(here.Queue)); said[id] != nil || len(here.List()) != 1 {
		t.Errorf("back again: %v", said)
	}
}

// A node that does not answer any more is not waited for again and again.
func TestAMoveEndsWhereTheOtherNodeIsLost(t *testing.T) {
	q := openTest(t, t.TempDir(), nil)
	for range 2 * chunk {
		q.mustPut(t, false, draft("from@a.test", "x@b.test"))
	}
	var given atomic.Int32
	said := q.move(t, Selection{}, func(context.Context, *Moved, mail.Content) error { given.Add(1); return errLost })
	if n := given.Load(); n > movesAtOnce || len(said) != chunk || len(q.List()) != 2*chunk {
		t.Errorf("%d were given, %d of %d said", n, len(said), len(q.List()))
	}
	if slices.ContainsFunc(q.List(), func(i Item) bool { return i.Busy }) || len(q.due) != 2*chunk {
		t.Error("they are not tried any more")
	}
}

func TestADamagedItemIsNotMoved(t *testing.T) {
	dir := t.TempDir()
	q := openTest(t, dir, nil)
	id := q.mustPut(t, false, draft("from@a.test", "x@b.test"))[0]
	segment := filepath.Join(dir, "log", names(t, filepath.Join(dir, "log"))[0])
	b, err := os.ReadFile(segment)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(segment, bytes.Replace(b, []byte("hello"), []byte("hallo"), 1), 0o600); err != nil {
		t.Fatal(err)
	}
	said := q.move(t, ids(id), func(context.Context, *Moved, mail.Content) error { t.Error("it was given away"); return nil })
	if !errors.Is(said[id], ErrDamaged) || len(q.List()) != 1 {
		t.Errorf("%v", said)
	}
}

func TestWhatAnotherNodeGivesIsChecked(t *testing.T) {
	q := openTest(t, t.TempDir(), nil)
	good := func() *Moved {
		return &Moved{ID: mail.NewID(time.Now()), Size: 3, Envelope: mail.Envelope{ForwardPaths: paths("x@b.test", "y@b.test"), ReceivedAt: time.Now()},
			State: json.RawMessage(`{"attempts":1,"done":[1],"moving":2}`)}
	}
	for name, change := range map[string]func(m *Moved){
		"an ID that is a path":          func(m *Moved) { m.ID = "../../../../x/xxx" },
		"an ID of another length":       func(m *Moved) { m.ID += "0" },
		"no forward-paths":              func(m *Moved) { m.Envelope.ForwardPaths = nil },
		"a size below nothing":          func(m *Moved) { m.Size = -1 },
		"a size over the bound":         func(m *Moved) { m.Size = maxMoved + 1 },
		"no time":                       func(m *Moved) { m.Envelope.ReceivedAt = time.Time{} },
		"an address with a line end":    func(m *Moved) { m.Envelope.ForwardPaths[0].Local = "a\r\nb" },
		"parameters of too few":         func(m *Moved) { m.Envelope.Params = make([]mail.RcptParams, 1) },
		"an order without a name":       func(m *Moved) { m.Order = "x y" },
		"no state's JSON":               func(m *Moved) { m.State = json.RawMessage(`[]`) },
		"a forward-path that is not":    func(m *Moved) { m.State = json.RawMessage(`{"done":[2]}`) },
		"all forward-paths closed":      func(m *Moved) { m.State = json.RawMessage(`{"done":[0,1]}`) },
		"less content than is promised": func(m *Moved) { m.Size = 4 },
	} {
		m := good()
		change(m)
		if err := q.Receive(1, m, strings.NewReader("x\r\n")); err == nil || len(q.List()) != 0 {
			t.Errorf("%s: %v", name, err)
		}
	}
	if err := q.Receive(1, good(), strings.NewReader("x\r\n")); err != nil || len(q.List()) != 1 {
		t.Errorf("%v", err)
	}
	if err := q.Healthy(); err != nil {
		t.Errorf("the spool has no part in it: %v", err)
	}
}

// helperMove moves all from one queue to another in dir, slowly, so that it can be killed in between.
func helperMove(dir string) {
	from, err := Open(Options{Dir: filepath.Join(dir, "from"), Hostname: "mx.test", Route: route, Log: zerolog.New(os.Stdout)})
	fatal(err)
	to, err := Open(Options{Dir: filepath.Join(dir, "to"), Hostname: "mx.test", Route: route})
	fatal(err)
	send := over(to)
	fatal(from.Move(context.Background(), Order{Deed: Move, To: 2}, func(ctx context.Context, m *Moved, c mail.Content) error {
		err := send(ctx, m, c)
		time.Sleep(5 * time.Millisecond) // the answer is on its way: here the kill makes a duplicate
		return err
	}, func(string, error) error { return nil }))
	_, _ = os.Stdout.WriteString("moved\n")
}

// Killed again and again while it moves: each item is in one of the queues, and one that is in both is named by move.cut.
func TestAMoveThatIsKilledLosesNothingAndNamesWhatIsInBoth(t *testing.T) {
	dir := t.TempDir()
	q := openTest(t, filepath.Join(dir, "from"), nil)
	const count = 300
	want := map[string]bool{}
	for range count {
		id := q.mustPut(t, false, draft("from@a.test", "x@b.test", "closed@b.test"))[0]
		if err := q.saveState(id, &state{Done: []int{1}}, false); err != nil {
			t.Fatal(err)
		}
		want[id] = true
	}
	q.Close()
	var log bytes.Buffer
	both := 0
	for round, moved := 0, false; !moved; round++ {
		if round > 50 {
			t.Fatal("does not come to an end")
		}
		cmd := helper("move", dir)
		var out logBuffer
		cmd.Stdout = &out
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		waitFor(t, "some are moved", func() bool {
			text := out.String()
			moved = strings.Contains(text, "moved\n")
			return moved || strings.Count(text, `"reason":"moved"`) > 20+round
		})
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
		log.WriteString(out.String())
		here, there := openTest(t, filepath.Join(dir, "from"), nil), openTest(t, filepath.Join(dir, "to"), nil)
		all := log.String() + here.log.String()
		log.WriteString(here.log.String())
		for _, i := range append(here.List(), there.List()...) {
			if len(i.ForwardPaths) != 1 {
				t.Errorf("round %d: %s goes to %v", round, i.ID, i.ForwardPaths)
			}
		}
		left := here.selected(t, Selection{})
		arrived := there.selected(t, Selection{})
		for id := range want {
			switch in := slices.Contains(left, id); {
			case !in && !slices.Contains(arrived, id):
				t.Fatalf("round %d: %s is lost", round, id)
			case in && slices.Contains(arrived, id):
				if both++; !strings.Contains(all, `"item":"`+id+`","to":2,"message":"move.cut"`) {
					t.Errorf("round %d: %s is in both, and the log does not name it", round, id)
				}
			}
		}
		here.Close()
		there.Close()
	}
	there := openTest(t, filepath.Join(dir, "to"), nil)
	if n := len(there.List()); n != count || !spoolIsEmpty(t, filepath.Join(dir, "from")) {
		t.Errorf("%d are there", n)
	}
	if t.Logf("%d were in both between two rounds", both); both == 0 {
		t.Error("no move was cut: the test shows nothing")
	}
}

func FuzzMoved(f *testing.F) {
	for _, seed := range []string{
		`{"id":"FD48HH9N316_MVYJ","size":3,"envelope":{"reverse_path":"a@b.test","forward_paths":["x@b.test","y@b.test"],"received_at":"2026-01-01T00:00:00Z"},"state":{"done":[1],"last":{"0":{"code":451}}}}`,
		`{"id":"../../../../xxxx","size":-1,"envelope":{"forward_paths":["a b"]},"state":[]}`,
		`{"id":"FD48HH9N316_MVYJ","envelope":{"forward_paths":["x@b.test"],"params":[{},{}],"received_at":"2026-01-01T00:00:00Z"},"state":{"done":[-1,7]}}`,
	} {
		f.Add([]byte(seed))
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		var m Moved
		if json.Unmarshal(b, &m) != nil {
			return
		}
		s, err := m.check()
		if err != nil {
			return
		}
		n := newEntry(m.ID, m.Size, &m.Envelope, s)
		if len(n.open) == 0 || filepath.Base(m.ID) != m.ID {
			t.Errorf("taken: %s", b)
		}
		all := make([]int, len(n.open))
		for i := range n.open {
			all[i] = n.open[i].index
		}
		m.Envelope.For(all)
		if _, err := n.state().encode(); err != nil {
			t.Error(err)
		}
	})
}

func FuzzSelection(f *testing.F) {
	f.Add("a@b.test", "müller.test", "connect")
	f.Add("<>", `"a b"@c.test`, "4.4.1")
	f.Add("@", "a@b@c", "")
	f.Fuzz(func(t *testing.T, from, to, reason string) {
		s := Selection{From: from, To: to, Reason: reason}
		m, err := s.matcher(time.Now())
		if err != nil {
			if !errors.Is(err, ErrSelection) {
				t.Error(err)
			}
			return
		}
		e := mail.Envelope{ReversePath: path("a@b.test"), ForwardPaths: paths("x@müller.test")}
		m.matchLocked(newEntry("ID", 1, &e, &state{}))
	})
}
