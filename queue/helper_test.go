package queue

import (
	"bytes"
	"context"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/rs/zerolog"

	"mailproxy/config"
	"mailproxy/mail"
	"mailproxy/relay"
	"mailproxy/spool"
)

func path(s string) mail.Path {
	p, err := mail.ParsePath(s)
	if err != nil {
		panic(err)
	}
	return p
}

func paths(s ...string) (out []mail.Path) {
	for _, a := range s {
		out = append(out, path(a))
	}
	return out
}

// logBuffer is a log that several write and the test reads.
type logBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (l *logBuffer) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

func (l *logBuffer) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}

// hop plays the next hop: answers by the forward-path, one function for all.
type hop struct {
	mu    sync.Mutex
	calls []relay.Attempt
	serve func(a relay.Attempt) ([]relay.Result, error)
}

func (h *hop) deliver(_ context.Context, a relay.Attempt) ([]relay.Result, error) {
	h.mu.Lock()
	h.calls = append(h.calls, a)
	serve := h.serve
	h.mu.Unlock()
	return serve(a)
}

func (h *hop) set(serve func(a relay.Attempt) ([]relay.Result, error)) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.serve = serve
}

func (h *hop) attempts() []relay.Attempt {
	h.mu.Lock()
	defer h.mu.Unlock()
	return slices.Clone(h.calls)
}

// answers gives each path the reply of its local part: ok, later, no.
func answers(a relay.Attempt) (out []relay.Result, err error) {
	for _, p := range a.Paths {
		r := relay.Result{Path: p, Hop: "hop.test:25", Stage: relay.StageDot}
		switch {
		case strings.HasPrefix(p.Local, "no"):
			r.Reply, r.Stage = &mail.Reply{Code: 550, Enhanced: [3]int{5, 1, 1}, Text: "no such user"}, relay.StageRcpt
		case strings.HasPrefix(p.Local, "later"):
			r.Reply = &mail.Reply{Code: 451, Enhanced: [3]int{4, 7, 1}, Text: "try later"}
		default:
			r.Reply = &mail.Reply{Code: 250, Text: "taken"}
		}
		out = append(out, r)
	}
	return out, nil
}

func outOfReach(relay.Attempt) ([]relay.Result, error) {
	return nil, &relay.OutOfReach{Hop: "hop.test:25", Stage: relay.StageConnect, Err: errors.New("connection refused")}
}

// one route for all, by domain.
func route(p mail.Path) (config.Transport, *mail.Reply) {
	if p.Domain == "nowhere.test" {
		return config.Transport{}, &mail.Reply{Code: 550, Enhanced: [3]int{5, 1, 2}, Text: "no route"}
	}
	return config.Transport{Name: p.Domain, Hosts: []string{p.Domain + ":25"}}, nil
}

type testQueue struct {
	*Queue
	hop *hop
	log *logBuffer
}

func openTest(t testing.TB, dir string, change func(*Options)) *testQueue {
	t.Helper()
	log := &logBuffer{}
	o := Options{Dir: dir, Route: route, Hostname: "mx.test", Log: zerolog.New(log)}
	if change != nil {
		change(&o)
	}
	q, err := Open(o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { q.Close() })
	h := &hop{serve: answers}
	q.deliver = h.deliver
	return &testQueue{q, h, log}
}

// run runs the queue until the test or the returned function ends it.
func (q *testQueue) run(t testing.TB) (stop func()) {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	var wg sync.WaitGroup
	wg.Go(func() {
		if err := q.Run(ctx); err != nil {
			t.Error(err)
		}
	})
	stop = func() { cancel(); wg.Wait() }
	t.Cleanup(stop)
	return stop
}

const body = "From: a\r\nSubject: s\r\n\r\nhello\r\n"

func draft(reverse string, to ...string) Draft {
	return Draft{
		Envelope: mail.Envelope{Session: "S1", ReversePath: path(reverse), ForwardPaths: paths(to...), ReceivedAt: time.Now()},
		Content:  strings.NewReader(body),
	}
}

func (q *testQueue) mustPut(t testing.TB, held bool, drafts ...Draft) []string {
	t.Helper()
	ids, err := q.Put(context.Background(), drafts, held)
	if err != nil {
		t.Fatal(err)
	}
	return ids
}

func waitFor(t testing.TB, what string, cond func() bool) {
	t.Helper()
	deadline := time.Now().Add(10 * time.Second)
	for !cond() {
		if time.Now().After(deadline) {
			t.Fatalf("not within 10 s: %s", what)
		}
		time.Sleep(time.Millisecond)
	}
}

func names(t testing.TB, dir string) (out []string) {
	t.Helper()
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range entries {
		out = append(out, e.Name())
	}
	return out
}

// spoolIsEmpty says whether nothing is in the spool that another start would find.
func spoolIsEmpty(t testing.TB, dir string) bool {
	t.Helper()
	s, r, err := spool.Inspect(dir)
	if err != nil {
		t.Fatal(err)
	}
	_ = s.Close()
	return r.Messages+r.Held+len(r.Bad)+len(names(t, filepath.Join(dir, "new"))) == 0
}

// Show gives an item and its message's header.
func (q *testQueue) Show(id string) (Item, []byte, error) {
	s, err := q.Story(id)
	return s.Item, []byte(s.Header), err
}
