package web

import (
	"bytes"
	"context"
	"errors"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"mailproxy/config"
	"mailproxy/mail"
	"mailproxy/queue"
)

// all gives the IDs that a client lists.
func all(t *testing.T, c *Client, sel queue.Selection, limit int) (ids []string, counted queue.Counted) {
	t.Helper()
	counted, err := c.Queue(t.Context(), sel, limit, func(i queue.Item) error { ids = append(ids, i.ID); return nil })
	if err != nil {
		t.Fatal(err)
	}
	return ids, counted
}

// order gives what a client is told of each item.
func order(t *testing.T, c *Client, o queue.Order) (map[string]string, error) {
	t.Helper()
	said := map[string]string{}
	err := c.Order(t.Context(), o, func(d Ordered) error { said[d.ID] = d.Error; return nil })
	return said, err
}

func TestTheClientSeesAndChangesTheQueue(t *testing.T) {
	r := newRig(t)
	first, second := r.put(t), r.put(t)
	if ids, counted := all(t, r.control, queue.Selection{}, -1); len(ids) != 2 || counted.Total != 2 || ids[0] != first {
		t.Fatalf("%v, %+v", ids, counted)
	}
	if ids, counted := all(t, r.control, queue.Selection{To: "example.test"}, 1); len(ids) != 1 || counted.Matched != 2 || counted.Bytes != 40 {
		t.Errorf("%v, %+v", ids, counted)
	}
	sel := queue.Selection{IDs: []string{first}, From: "<>", To: "to@example.test", Older: time.Nanosecond}
	if ids, _ := all(t, r.control, sel, -1); len(ids) != 1 {
		t.Errorf("%+v: %v", sel, ids)
	}
	for _, none := range []queue.Selection{{From: "a.test"}, {To: "b.test"}, {Older: time.Hour}, {Reason: "x"}, {OnHold: true}, {Kept: true}, {IDs: []string{"NONE"}}} {
		if ids, _ := all(t, r.control, none, -1); len(ids) != 0 {
			t.Errorf("%+v: %v", none, ids)
		}
	}
	many := queue.Selection{IDs: slices.Repeat([]string{second}, queue.MaxIDs)}
	if ids, _ := all(t, r.control, many, -1); len(ids) != 1 {
		t.Errorf("as many IDs as there may be: %v", ids)
	}
	if said, err := order(t, r.control, queue.Order{Deed: queue.Retry, Selection: many, Who: "root"}); err != nil || len(said) != 1 {
		t.Errorf("an order with as many: %v, %v", said, err)
	}
	many.IDs = append(many.IDs, first)
	if _, err := order(t, r.control, queue.Order{Deed: queue.Retry, Selection: many, Who: "root"}); err == nil || !strings.Contains(err.Error(), "more than 2000 IDs") {
		t.Errorf("one more: %v", err)
	}
	item, err := r.control.Item(t.Context(), first)
	if err != nil || item.Item.ID != first || item.Recipients[0].ForwardPath.String() != "to@example.test" || !strings.Contains(item.Header, "Subject: x") {
		t.Errorf("%+v, %v", item, err)
	}
	var content strings.Builder
	if err := r.control.Content(t.Context(), first, &content); err != nil || content.String() != "Subject: x\r\n\r\nbody\r\n" {
		t.Errorf("%q, %v", content.String(), err)
	}
	if s, err := r.control.QueueSummary(t.Context(), queue.Selection{}); err != nil || s.Total != 2 || len(s.Hops) != 1 {
		t.Errorf("%+v, %v", s, err)
	}
	who := queue.Order{Who: "root", Deed: queue.PutOnHold, Selection: queue.Selection{IDs: []string{second, "NONE"}}}
	if said, err := order(t, r.control, who); err != nil || len(said) != 2 || said[second] != "" || said["NONE"] != queue.ErrNoSuch.Error() {
		t.Errorf("%v, %v", said, err)
	}
	if i, err := r.control.Item(t.Context(), second); err != nil || i.Item.OnHold == nil || i.Item.OnHold.By != "root" {
		t.Errorf("%+v, %v", i, err)
	}
	if said, err := order(t, r.control, queue.Order{Who: "root", Deed: queue.Delete}); err != nil || len(said) != 2 {
		t.Errorf("%v, %v", said, err)
	}
	if _, err := r.control.Item(t.Context(), first); !errors.Is(err, ErrNoSuch) {
		t.Errorf("a deleted item: %v", err)
	}
	if err := r.control.Content(t.Context(), first, io.Discard); !errors.Is(err, ErrNoSuch) {
		t.Errorf("a deleted item's content: %v", err)
	}
	if _, err := r.control.Item(t.Context(), "../health"); !errors.Is(err, ErrNoSuch) {
		t.Errorf("an ID that is a path: %v", err)
	}
}

func TestBadOrdersAndSelectionsAreRefusedAsSuch(t *testing.T) {
	r := newRig(t)
	r.put(t)
	for name, o := range map[string]queue.Order{
		"nobody's":        {Deed: queue.Delete},
		"a long name":     {Deed: queue.Delete, Who: strings.Repeat("x", maxWho+1)},
		"of no such kind": {Deed: "burn", Who: "root"},
		"no selection":    {Deed: queue.Delete, Who: "root", Selection: queue.Selection{From: "a b"}},
		"no transport":    {Deed: queue.Reroute, Who: "root", Transport: "none"},
		"too many IDs":    {Deed: queue.Delete, Who: "root", Selection: queue.Selection{IDs: make([]string, queue.MaxIDs+1)}},
	} {
		_, err := order(t, r.control, o)
		var p *ProblemError
		if !errors.As(err, &p) || !p.Usage() {
			t.Errorf("%s: %v", name, err)
		}
	}
	_, err := r.control.Queue(t.Context(), queue.Selection{To: "a b"}, -1, nil)
	var p *ProblemError
	if !errors.As(err, &p) || !p.Usage() || !strings.Contains(p.Error(), "bad selection: to: ") {
		t.Errorf("%v", err)
	}
	if _, err := order(t, r.control, queue.Order{Deed: queue.Move, Who: "root", To: 7}); err == nil || err.Error() != "node 7 is no other node of this cluster" {
		t.Errorf("to no node: %v", err)
	}
	if ids, _ := all(t, r.control, queue.Selection{}, -1); len(ids) != 1 {
		t.Errorf("left: %v", ids)
	}
}

// bridge makes a socket that leads to a rig as the one of a peer does: every connection is a channel of node 2.
func (r *rig) bridge(t *testing.T) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "peer.sock")
	l, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	var wg sync.WaitGroup
	wg.Go(func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			wg.Go(func() { r.ServePeer(ctx, 2, c) })
		}
	})
	t.Cleanup(func() { cancel(); _ = l.Close(); wg.Wait() })
	return path
}

func TestItemsAreMovedToAPeer(t *testing.T) {
	here, there := newRig(t), newRig(t)
	socket := there.bridge(t)
	here.opts.Peer = func(cid config.CID) (string, bool) { return socket, cid == 3 }
	small := here.put(t)
	to, _ := mail.ParsePath("to@example.test")
	large, err := here.queue.Put(t.Context(), []queue.Draft{{
		Envelope: mail.Envelope{ForwardPaths: []mail.Path{to}, ReceivedAt: time.Now()}, Content: bytes.NewReader(make([]byte, 3<<20)),
	}}, false)
	if err != nil {
		t.Fatal(err)
	}
	// One that an earlier order is bringing there just now stays here, and is named as such: it may come to be there.
	r, w := io.Pipe()
	first := make(chan error)
	go func() {
		first <- there.queue.Receive(1, &queue.Moved{ID: small, Size: 2, Envelope: mail.Envelope{ForwardPaths: []mail.Path{to}, ReceivedAt: time.Now()}}, r)
	}()
	_, _ = w.Write([]byte("x")) // it is read: that order is under way
	said, err := order(t, here.control, queue.Order{Deed: queue.Move, Who: "root", To: 3, Selection: queue.Selection{IDs: []string{small}}})
	if err != nil || said[small] != queue.ErrComing.Error() {
		t.Errorf("%v, %v", said, err)
	}
	_ = w.CloseWithError(io.ErrUnexpectedEOF)
	if err := <-first; err == nil {
		t.Error("half an item was taken")
	}
	for range 2 { // again: the second finds nothing here
		if said, err := order(t, here.control, queue.Order{Deed: queue.Move, Who: "root", To: 3}); err != nil || said[small]+said[large[0]] != "" {
			t.Errorf("%v, %v", said, err)
		}
	}
	if ids, _ := all(t, here.control, queue.Selection{}, -1); len(ids) != 0 {
		t.Errorf("here: %v", ids)
	}
	peer := Peer(socket)
	if ids, _ := all(t, peer, queue.Selection{}, -1); len(ids) != 2 || ids[0] != small {
		t.Errorf("there: %v", ids)
	}
	// A peer's administrator may do what he may at home; the hold tells where that is.
	if said, err := order(t, peer, queue.Order{Deed: queue.PutOnHold, Who: "eva", Selection: queue.Selection{IDs: []string{small}}}); err != nil || said[small] != "" {
		t.Errorf("%v, %v", said, err)
	}
	if i, err := there.control.Item(t.Context(), small); err != nil || i.Item.OnHold == nil || i.Item.OnHold.By != "eva at node 2" {
		t.Errorf("%+v, %v", i, err)
	}
}

// A node that is gone costs little, and nothing is taken out of the queue for it.
func TestNothingIsMovedToANodeThatDoesNotAnswer(t *testing.T) {
	r := newRig(t)
	r.put(t)
	socket := filepath.Join(t.TempDir(), "peer.sock")
	l, err := net.Listen("unix", socket) // its connections are taken, and nobody answers
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	r.opts.Peer = func(config.CID) (string, bool) { return socket, true }
	began := time.Now()
	if said, err := order(t, r.control, queue.Order{Deed: queue.Move, Who: "root", To: 3}); err == nil || len(said) != 0 ||
		!strings.HasPrefix(err.Error(), "node 3 does not answer: ") {
		t.Errorf("%v, %v", said, err)
	}
	if took := time.Since(began); took > 2*peerPatience {
		t.Errorf("it took %v", took)
	}
	if ids, _ := all(t, r.control, queue.Selection{}, -1); len(ids) != 1 {
		t.Errorf("left: %v", ids)
	}
}

func TestAnAnswerThatIsCutIsNoEnd(t *testing.T) {
	socket := filepath.Join(t.TempDir(), "c.sock")
	l, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	s := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		_, _ = io.WriteString(w, `{"done":{"id":"A"}}`+"\n"+`{"done":{"id"`)
	})}
	done := make(chan struct{})
	go func() { defer close(done); _ = s.Serve(l) }()
	defer func() { _ = s.Close(); <-done }()
	if said, err := order(t, Control(socket), queue.Order{Deed: queue.Delete, Who: "root"}); !errors.Is(err, ErrCut) || len(said) != 1 {
		t.Errorf("%v, %v", said, err)
	}
}

func TestAnItemComesUnderItsOwnName(t *testing.T) {
	r := newRig(t)
	peer := Peer(r.bridge(t))
	id := mail.NewID(time.Now())
	for path, want := range map[string]int{mail.NewID(time.Now()): http.StatusBadRequest, id: http.StatusNoContent} {
		body := `{"id":"` + id + `","size":3,"envelope":{"forward_paths":["x@b.test"],"received_at":"2026-01-01T00:00:00Z"}}` + "\nx\r\n"
		req, err := http.NewRequestWithContext(t.Context(), http.MethodPut, "http://x/queue/"+path, strings.NewReader(body))
		if err != nil {
			t.Fatal(err)
		}
		resp, err := peer.http.Do(req)
		if err != nil {
			t.Fatal(err)
		}
		text, _ := io.ReadAll(resp.Body)
		_ = resp.Body.Close()
		if resp.StatusCode != want {
			t.Errorf("at %s: %d %s", path, resp.StatusCode, text)
		}
	}
}

// deadlineRecorder notes the deadlines of reading.
type deadlineRecorder struct {
	patientRecorder
	read []time.Time
}

func (d *deadlineRecorder) SetReadDeadline(t time.Time) error { d.read = append(d.read, t); return nil }

// The server's bound of the reading of a request would end an answer that takes longer.
func TestALongAnswerHasAllTheTime(t *testing.T) {
	d := &deadlineRecorder{patientRecorder: patientRecorder{httptest.NewRecorder()}}
	newLines(d)
	if len(d.read) != 1 || !d.read[0].IsZero() || !d.Flushed {
		t.Errorf("deadlines %v, flushed %v", d.read, d.Flushed)
	}
}
