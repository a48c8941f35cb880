package web

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/testutil/promlint"
	"github.com/rs/zerolog"
	"go.uber.org/goleak"

	"mailproxy/config"
	"mailproxy/mail"
	"mailproxy/queue"
	"mailproxy/relay"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// rig is a running server with its three doors and a real queue.
type rig struct {
	*Server
	queue   *queue.Queue
	control *Client
	socket  string
	public  string
	// drained is who drains the node, "" for nobody; master is whom it takes orders from.
	drained atomic.Value
	master  atomic.Int32
	weight  atomic.Int64
}

func newRig(t *testing.T, checks ...Check) *rig {
	t.Helper()
	client := relay.New(relay.Options{Hostname: "mx.test", Log: zerolog.Nop()})
	t.Cleanup(client.Close)
	q, err := queue.Open(queue.Options{Dir: t.TempDir(), Relay: client, Hostname: "mx.test", Log: zerolog.Nop(),
		Route: func(mail.Path) (config.Transport, *mail.Reply) { return config.Transport{}, nil }})
	if err != nil {
		t.Fatal(err)
	}
	registry := prometheus.NewRegistry()
	registry.MustRegister(QueueCollector(q))
	r := &rig{queue: q, socket: filepath.Join(t.TempDir(), "control.sock")}
	r.drained.Store("")
	s := New(Options{Node: "mx.test", Version: "1", Checks: checks, Queue: q, Gatherer: registry, Log: zerolog.Nop(),
		Status: func(_ context.Context, verify bool) any { return map[string]bool{"verify": verify} },
		Drain: Drain{Begin: func(by string) error { r.drained.Store(by); return nil }, End: func(string) error { r.drained.Store(""); return nil },
			On: func() bool { return r.drained.Load() != "" }},
		Weight: func() int { return int(r.weight.Load()) },
		Master: func() config.CID { return config.CID(r.master.Load()) },
		Member: func(from config.CID, w http.ResponseWriter, _ *http.Request) { _, _ = fmt.Fprintf(w, "node %d", from) }})
	r.Server = s
	r.control = Control(r.socket)
	control, err := ListenControl(r.socket)
	if err != nil {
		t.Fatal(err)
	}
	public, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	r.public = "http://" + public.Addr().String()
	ctx, cancel := context.WithCancel(context.Background())
	var wg sync.WaitGroup
	for _, run := range []func() error{
		func() error { return s.ServeControl(ctx, control) },
		func() error { return s.ServePublic(ctx, public) },
		func() error { return s.Run(ctx) },
	} {
		wg.Go(func() {
			if err := run(); err != nil {
				t.Error(err)
			}
		})
	}
	t.Cleanup(func() {
		cancel()
		wg.Wait()
		_ = q.Close()
		http.DefaultClient.CloseIdleConnections()
	})
	return r
}

func (r *rig) put(t *testing.T) string {
	t.Helper()
	to, err := mail.ParsePath("to@example.test")
	if err != nil {
		t.Fatal(err)
	}
	ids, err := r.queue.Put(t.Context(), []queue.Draft{{
		Envelope: mail.Envelope{ForwardPaths: []mail.Path{to}, Client: netip.MustParseAddr("192.0.2.1"), ReceivedAt: time.Now()},
		Content:  bytes.NewReader([]byte("Subject: x\r\n\r\nbody\r\n")),
	}}, false)
	if err != nil {
		t.Fatal(err)
	}
	return ids[0]
}

func get(t *testing.T, url string) (int, string) {
	t.Helper()
	resp, err := http.Get(url)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	return resp.StatusCode, string(body)
}

func TestHealthIs503OnlyWhereACriticalCheckFails(t *testing.T) {
	bad := errors.New("bad")
	for _, c := range []struct {
		name      string
		plain     error
		critical  error
		want      string
		wantCode  int
		wantError string
	}{
		{"all is well", nil, nil, "ok", 200, ""},
		{"a check that is not critical fails", bad, nil, "degraded", 200, "bad"},
		{"a critical check fails", nil, bad, "failed", 503, "bad"},
		{"both fail", bad, bad, "failed", 503, "bad"},
	} {
		t.Run(c.name, func(t *testing.T) {
			r := newRig(t, Check{"database", false, func(context.Context) error { return c.plain }},
				Check{"spool", true, func(context.Context) error { return c.critical }})
			code, body := get(t, r.public+"/health")
			var h Health
			if err := json.Unmarshal([]byte(body), &h); err != nil {
				t.Fatal(err)
			}
			if code != c.wantCode || h.Status != c.want || len(h.Checks) != 2 || h.Node != "mx.test" || h.Version != "1" {
				t.Errorf("%d %s", code, body)
			}
			if h.Checks[0].Name != "database" || h.Checks[0].OK != (c.plain == nil) || h.Checks[1].Name != "spool" ||
				!h.Checks[1].Critical || h.Checks[1].OK != (c.critical == nil) || !strings.Contains(body, c.wantError) {
				t.Errorf("checks %+v", h.Checks)
			}
			viaControl, err := r.control.Health(t.Context())
			if err != nil || viaControl.Status != c.want {
				t.Errorf("through the control socket: %+v, %v", viaControl, err)
			}
		})
	}
}

func TestACheckThatHangsOrPanicsIsAFailedCheck(t *testing.T) {
	r := newRig(t, Check{"hangs", false, func(ctx context.Context) error { <-ctx.Done(); return ctx.Err() }},
		Check{"panics", false, func(context.Context) error { panic("boom") }})
	h, err := r.control.Health(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if h.Status != "degraded" || !strings.Contains(h.Checks[0].Error, "deadline") || !strings.Contains(h.Checks[1].Error, "boom") {
		t.Errorf("%+v", h)
	}
}

func TestAskingOftenChecksOnce(t *testing.T) {
	var n atomic.Int32
	clock := time.Unix(0, 0)
	c := &checker{now: func() time.Time { return clock }, checks: []Check{{"x", false, func(context.Context) error { n.Add(1); return nil }}}}
	for range 5 {
		c.run()
	}
	if n.Load() != 1 {
		t.Errorf("checked %d times within a moment", n.Load())
	}
	clock = clock.Add(healthAge)
	c.run()
	if n.Load() != 2 {
		t.Errorf("checked %d times, want a second time a second later", n.Load())
	}
}

// door is how a request comes in.
type door func(method, path string) (code int, body string)

func (r *rig) doors(t *testing.T) map[string]door {
	ask := func(c *http.Client, base string) door {
		return func(method, path string) (int, string) {
			req, err := http.NewRequestWithContext(t.Context(), method, base+path, nil)
			if err != nil {
				t.Fatal(err)
			}
			resp, err := c.Do(req)
			if err != nil {
				t.Fatal(err)
			}
			defer resp.Body.Close()
			body, err := io.ReadAll(resp.Body)
			if err != nil {
				t.Fatal(err)
			}
			return resp.StatusCode, string(body)
		}
	}
	peer := &http.Client{Transport: &http.Transport{DisableKeepAlives: true,
		DialContext: func(context.Context, string, string) (net.Conn, error) { return r.dialPeer(t), nil }}}
	return map[string]door{"control": ask(r.control.http, "http://x"), "web": ask(http.DefaultClient, r.public), "peer": ask(peer, "http://x")}
}

// dialPeer gives the peer's end of a channel that ServePeer serves.
func (r *rig) dialPeer(t *testing.T) net.Conn {
	here, there := net.Pipe()
	served := make(chan struct{})
	go func() {
		defer close(served)
		r.ServePeer(context.Background(), 2, there)
	}()
	t.Cleanup(func() {
		_ = here.Close()
		select {
		case <-served:
		case <-time.After(10 * time.Second):
			t.Error("ServePeer does not return when the channel is closed")
		}
	})
	return here
}

func TestEachDoorOpensToWhatItShould(t *testing.T) {
	r := newRig(t)
	doors := r.doors(t)
	for _, c := range []struct {
		method, path       string
		control, web, peer int
	}{
		{"GET", "/health", 200, 200, 200},
		{"GET", "/metrics", 200, 200, 200},
		{"GET", "/status", 200, 404, 200},
		{"GET", "/queue", 200, 404, 200},
		{"GET", "/queue/summary", 200, 404, 200},
		{"GET", "/queue/ID", 200, 404, 200},
		{"GET", "/queue/ID/content", 200, 404, 200},
		{"POST", "/queue/order", 400, 404, 400},
		{"PUT", "/queue/ID", 405, 404, 400},
		{"POST", "/drain", 400, 404, 403},
		{"DELETE", "/drain", 400, 404, 403},
		{"POST", "/member/x", 404, 404, 200},
		{"GET", "/member/x", 404, 404, 404},
		{"POST", "/health", 405, 405, 405},
		{"DELETE", "/queue", 405, 404, 405},
		{"GET", "/", 404, 404, 404},
		{"GET", "/debug/pprof/", 404, 404, 404},
		{"GET", "/queue/../health", 404, 404, 404},
	} {
		for name, want := range map[string]int{"control": c.control, "web": c.web, "peer": c.peer} {
			id := r.put(t)
			path := strings.Replace(c.path, "ID", id, 1)
			if c.path == "/queue/../health" {
				want = 200 // the mux redirects to the clean path
			}
			if code, body := doors[name](c.method, path); code != want {
				t.Errorf("%s %s at %s: %d %s, want %d", c.method, path, name, code, body, want)
			}
			if err := r.queue.Delete(id); c.method != "DELETE" && err != nil {
				t.Errorf("%s %s at %s took the item: %v", c.method, path, name, err)
			}
		}
	}
}

func TestStatusIsAskedToVerify(t *testing.T) {
	r := newRig(t)
	for name, d := range r.doors(t) {
		if name == "web" {
			continue
		}
		if _, body := d("GET", "/status?verify=1"); strings.TrimSpace(body) != `{"verify":true}` {
			t.Errorf("%s: %s", name, body)
		}
		if _, body := d("GET", "/status"); strings.TrimSpace(body) != `{"verify":false}` {
			t.Errorf("%s: %s", name, body)
		}
	}
}

func TestTheClientSaysThatNoDaemonRuns(t *testing.T) {
	socket := filepath.Join(t.TempDir(), "control.sock")
	if _, err := Control(socket).Health(t.Context()); !errors.Is(err, ErrNotRunning) {
		t.Errorf("without a socket: %v", err)
	}
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: socket, Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	l.SetUnlinkOnClose(false)
	_ = l.Close()
	if _, err := Control(socket).Health(t.Context()); !errors.Is(err, ErrNotRunning) {
		t.Errorf("with a socket that a daemon left behind: %v", err)
	}
}

func TestTheControlSocketIsForItsOwnerAlone(t *testing.T) {
	path := filepath.Join(t.TempDir(), "control.sock")
	if err := os.WriteFile(path+".new", nil, 0o666); err != nil { // left by a daemon that was killed
		t.Fatal(err)
	}
	var before net.Listener
	for range 2 { // the second takes the place of the first
		l, err := ListenControl(path)
		if err != nil {
			t.Fatal(err)
		}
		info, err := os.Stat(path)
		if err != nil || info.Mode() != os.ModeSocket|0o600 {
			t.Fatalf("mode %v, %v", info.Mode(), err)
		}
		if before != nil {
			c, err := net.Dial("unix", path)
			if err != nil {
				t.Fatal(err)
			}
			_ = c.Close()
			_ = l.Close()
		}
		before = l
	}
	if _, err := os.Stat(path); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the file is still there: %v", err)
	}
	_ = before.Close()
}

func TestLongRequestsAreRefused(t *testing.T) {
	r := newRig(t)
	c, err := net.Dial("tcp", strings.TrimPrefix(r.public, "http://"))
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	fmt.Fprintf(c, "GET /health HTTP/1.1\r\nHost: x\r\nX: %s\r\n\r\n", strings.Repeat("x", 2*maxHeaderBytes))
	resp, err := http.ReadResponse(bufio.NewReader(c), nil)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusRequestHeaderFieldsTooLarge {
		t.Errorf("answered %s", resp.Status)
	}
}

func TestServersBoundEveryWait(t *testing.T) {
	s := New(Options{Gatherer: prometheus.NewRegistry()})
	for name, h := range map[string]*http.Server{"control": s.control, "public": s.public, "peer": s.peer} {
		if h.ReadHeaderTimeout == 0 || h.ReadTimeout == 0 || h.WriteTimeout == 0 || h.IdleTimeout == 0 || h.MaxHeaderBytes == 0 {
			t.Errorf("%s waits without bound", name)
		}
	}
}

func TestMetricsAreNamedAsPrometheusWants(t *testing.T) {
	r := newRig(t)
	r.put(t)
	code, body := get(t, r.public+"/metrics")
	if code != 200 || !strings.Contains(body, "\nmailproxy_queue_items 1\n") || !strings.Contains(body, "\nmailproxy_queue_size_bytes ") {
		t.Errorf("%d %s", code, body)
	}
	problems, err := promlint.New(strings.NewReader(body)).Lint()
	if err != nil || len(problems) > 0 {
		t.Errorf("%v, %v", problems, err)
	}
}

// The daemon that root starts has given the directory away; whoever can write there must not reach another file's mode by it.
func TestTheControlSocketsModeGoesToNoOtherFile(t *testing.T) {
	dir := t.TempDir()
	run, outside := filepath.Join(dir, "r"), filepath.Join(dir, "outside")
	if err := errors.Join(os.Mkdir(run, 0o755), os.WriteFile(outside, nil, 0o644)); err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(run, "c")
	end, ended := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(ended)
		link := filepath.Join(run, "link")
		for {
			select {
			case <-end:
				return
			default:
				_ = os.Symlink(outside, link)
				_ = os.Rename(link, path+".new")
			}
		}
	}()
	for range 3000 {
		if l, err := ListenControl(path); err == nil {
			_ = l.Close()
		}
	}
	close(end)
	<-ended
	if info, err := os.Stat(outside); err != nil || info.Mode().Perm() != 0o644 {
		t.Errorf("the file outside: %v, %v", info.Mode(), err)
	}
}
