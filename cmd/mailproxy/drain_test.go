package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/rs/zerolog"

	"mailproxy/config"
	"mailproxy/filter"
	"mailproxy/relay"
	"mailproxy/smtpd"
)

func TestTheSwitchStaysOverARestart(t *testing.T) {
	dir := t.TempDir()
	open := func() *drainer { return openDrainer(dir, nil, zerolog.Nop()) }
	d := open()
	if d.On() || d.status() != nil {
		t.Fatal("a fresh node is draining")
	}
	for range 2 { // the second changes nothing
		if err := d.Begin("root"); err != nil {
			t.Fatal(err)
		}
	}
	if err := d.Begin("another"); err != nil {
		t.Fatal(err)
	}
	if s := open().status(); s == nil || s.By != "root" || s.Since.IsZero() {
		t.Errorf("after a restart: %+v", s)
	}
	info, err := os.Stat(filepath.Join(dir, "draining"))
	if err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("the file: %v, %v", info, err)
	}
	d = open()
	for range 2 {
		if err := d.End("root"); err != nil {
			t.Fatal(err)
		}
	}
	if d.On() || open().On() {
		t.Error("still draining after the end")
	}
	if err := os.WriteFile(filepath.Join(dir, "draining"), []byte("{half"), 0o600); err != nil {
		t.Fatal(err)
	}
	if d := open(); !d.On() {
		t.Error("a file that cannot be read lets mail in")
	} else if err := d.End("root"); err != nil || open().On() {
		t.Errorf("and cannot be ended: %v", err)
	}
}

func TestANodeThatCannotKeepTheSwitchSaysSoAndGoesOn(t *testing.T) {
	d := openDrainer(filepath.Join(t.TempDir(), "gone"), nil, zerolog.Nop())
	if err := d.Begin("root"); err == nil || d.On() {
		t.Errorf("drained without a file: %v, %v", err, d.On())
	}
}

// publicHealth asks the web listener, as a balancer does.
func (n *testNode) publicHealth() (code int, body string) {
	n.t.Helper()
	resp, err := http.Get("http://" + n.web + "/health")
	if err != nil {
		n.t.Fatal(err)
	}
	defer resp.Body.Close()
	b, _ := io.ReadAll(resp.Body)
	return resp.StatusCode, string(b)
}

// wantTurned wants 421 4.3.2 and the end of the connection.
func (s *smtpSession) wantTurned() {
	s.t.Helper()
	s.want("", "421 4.3.2 ")
	if b, err := s.r.ReadByte(); err != io.EOF {
		s.t.Errorf("behind 421: %q, %v", b, err)
	}
}

func TestANodeIsDrainedUnderLoad(t *testing.T) {
	n, hop := newNode(t), newSink(t)
	n.start()
	n.waitHealthy()
	n.must("domain", "add", "example.test", "--to", hop.addr)
	eventually(t, func() error { return n.tryMail("to@example.test") })

	l := startLoad(n.smtp, 8)
	idle, body := n.dialSMTP(), n.dialSMTP()
	idle.want("EHLO idle.test", "250 ")
	body.want("EHLO body.test", "250 ")
	body.want("MAIL FROM:<a@b.test>", "250 ")
	body.want("RCPT TO:<to@example.test>", "250 ")
	body.want("DATA", "354 ")
	eventually(t, func() error {
		if taken, _, _ := l.counts(); taken < 100 {
			return fmt.Errorf("%d taken", taken)
		}
		return nil
	})
	if out, errs, code := n.run("pmgcm", "drain"); code != 0 || !strings.Contains(out, " is draining, ") {
		t.Fatalf("pmgcm drain: %d %s%s", code, out, errs)
	}
	_, greeted, before := l.counts()
	if code, text := n.publicHealth(); code != http.StatusServiceUnavailable || !strings.Contains(text, `"draining"`) {
		t.Errorf("health: %d %s", code, text)
	}
	idle.wantTurned()
	eventually(t, func() error { // they come again and again
		if _, _, turned := l.counts(); turned < before+50 {
			return fmt.Errorf("%d turned away", turned)
		}
		return nil
	})
	l.end()
	if _, now, _ := l.counts(); now != greeted {
		t.Errorf("%d sessions were opened behind the drain", now-greeted)
	}
	for _, err := range l.broken {
		t.Errorf("a client saw: %v", err)
	}
	if s := fmt.Sprint(n.status()["draining"]); !strings.Contains(s, `"sessions":1`) {
		t.Errorf("status: %s", s)
	}
	body.want("Subject: last\r\n\r\nbody\r\n.", "250 ")
	body.wantTurned()
	if out, errs, code := n.run("pmgcm", "drain", "--wait"); code != 0 {
		t.Errorf("pmgcm drain --wait: %d %s%s", code, out, errs)
	}
	if _, errs, code := n.run("pmgcm", "undrain"); code != 0 {
		t.Errorf("pmgcm undrain: %d %s", code, errs)
	}
	if code, text := n.publicHealth(); code != http.StatusOK {
		t.Errorf("health: %d %s", code, text)
	}
	if err := n.tryMail("to@example.test"); err != nil {
		t.Error(err)
	}
	eventually(t, func() error {
		if missing := hop.missing(append(l.taken, "last")); len(missing) > 0 {
			return fmt.Errorf("answered with 250, and not there: %v", missing)
		}
		return nil
	})
	n.stop()
}

// A message that does not come to its end holds the drain up for so long, and no longer.
func TestADrainEndsAtItsBound(t *testing.T) {
	rules, err := filter.Compile(&config.Snapshot{Domains: config.NewDomains([]config.Domain{{Name: "example.test", Hosts: []string{freePort(t)}}})})
	if err != nil {
		t.Fatal(err)
	}
	client := relay.New(relay.Options{Hostname: "mx.test", Log: zerolog.Nop()})
	defer client.Close()
	server := smtpd.New(smtpd.Options{Hostname: "mx.test", Rules: func() *filter.Ruleset { return rules }, Relay: client, TempDir: t.TempDir(), Log: zerolog.Nop()})
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	served := make(chan error, 1)
	go func() { served <- server.Serve(ctx, listener, smtpd.Kind{}) }()
	conn, err := net.Dial("tcp", listener.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	s := &smtpSession{t, conn, bufio.NewReader(conn)}
	s.want("", "220 ")
	s.want("EHLO x.test", "250 ")
	s.want("MAIL FROM:<a@b.test>", "250 ")
	s.want("RCPT TO:<to@example.test>", "250 ")
	s.want("DATA", "354 ")
	d := openDrainer(t.TempDir(), server, zerolog.Nop())
	d.bound = 50 * time.Millisecond
	if err := d.Begin("root"); err != nil {
		t.Fatal(err)
	}
	_ = conn.SetReadDeadline(time.Now().Add(patience))
	if b, err := s.r.ReadByte(); err == nil || errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("read %q, %v", b, err)
	}
	eventually(t, func() error {
		if n := d.status().Sessions; n > 0 {
			return fmt.Errorf("%d sessions", n)
		}
		return nil
	})
	cancel()
	if err := <-served; err != nil {
		t.Error(err)
	}
}
