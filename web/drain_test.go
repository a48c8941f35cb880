package web

import (
	"context"
	"net"
	"net/http"
	"strings"
	"testing"
)

// The tunnel has proven that the rig's peer is node 2.
func TestTheMasterAloneMayDrainAPeer(t *testing.T) {
	r := newRig(t)
	peer := &http.Client{Transport: &http.Transport{DisableKeepAlives: true,
		DialContext: func(context.Context, string, string) (net.Conn, error) { return r.dialPeer(t), nil }}}
	drain := func(client *http.Client, method, body string) int {
		req, err := http.NewRequestWithContext(t.Context(), method, "http://x/drain", strings.NewReader(body))
		if err != nil {
			t.Fatal(err)
		}
		resp, err := client.Do(req)
		if err != nil {
			t.Fatal(err)
		}
		_ = resp.Body.Close()
		return resp.StatusCode
	}
	const root = `{"by":"root"}`
	for master, want := range map[int32]int{0: 403, 1: 403, 3: 403} {
		r.master.Store(master)
		if code := drain(peer, "POST", root); code != want || r.drained.Load() != "" {
			t.Errorf("node 2 drains while node %d is master: %d, drained by %q", master, code, r.drained.Load())
		}
	}
	r.master.Store(2)
	if code := drain(peer, "POST", root); code != 204 || r.drained.Load() != "root" {
		t.Errorf("the master drains: %d, drained by %q", code, r.drained.Load())
	}
	if code := drain(peer, "DELETE", root); code != 204 || r.drained.Load() != "" {
		t.Errorf("the master ends it: %d, drained by %q", code, r.drained.Load())
	}
	r.master.Store(1)
	if code := drain(r.control.http, "POST", root); code != 204 || r.drained.Load() != "root" {
		t.Errorf("the node itself, whoever is master: %d", code)
	}
	for _, bad := range []string{"", "{}", `{"by":""}`, `{"by":"` + strings.Repeat("x", maxBy+1) + `"}`} {
		if code := drain(r.control.http, "DELETE", bad); code != 400 || r.drained.Load() != "root" {
			t.Errorf("body %.20q: %d", bad, code)
		}
	}
}

func TestHealthSaysDrainingAtOnce(t *testing.T) {
	r := newRig(t)
	for _, by := range []string{"", "root", ""} { // within a second, in which the checks' answers are kept
		r.drained.Store(by)
		code, body := get(t, r.public+"/health")
		if draining := code == 503 && strings.Contains(body, `"status":"draining"`); draining != (by != "") {
			t.Errorf("drained by %q: %d %s", by, code, body)
		}
	}
}
