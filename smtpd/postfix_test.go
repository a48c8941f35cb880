package smtpd

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"mailproxy/config"
	"mailproxy/internal/mta"
	"mailproxy/queue"
)

// What a sender wants to hear comes through Postfix to us, and from us through another to the host behind it.
func TestDSNParametersPassBetweenPostfixes(t *testing.T) {
	behind := newHop(t)
	behind.set("ehlo", "250-behind\r\n250-8BITMIME\r\n250 DSN")
	next := mta.StartPostfix(t, behind.addr())
	s := snapshot("one.test", next.Addr)
	s.Networks = []config.Network{loopback}
	g := newRig(t, s, nil)
	client := mta.StartPostfix(t, g.addr)
	p := dialTo(t, client.Addr)
	p.want("220")
	p.ask("EHLO client.test", "250")
	p.ask("MAIL FROM:<a@sender.test> RET=HDRS ENVID=QQ+2Bx", "250")
	p.ask("RCPT TO:<x@one.test> NOTIFY=DELAY,FAILURE ORCPT=rfc822;old+2Bx@one.test", "250")
	p.ask("RCPT TO:<y@one.test> NOTIFY=NEVER", "250")
	p.ask("RCPT TO:<z@one.test> NOTIFY=SUCCESS", "250")
	p.ask("DATA", "354")
	p.send("Subject: x\r\n\r\nbody\r\n.\r\n")
	p.want("250")
	mta.Until(t, func() error {
		if n := len(behind.messages()); n == 0 {
			return errors.New("nothing has come through; the first says:\n" + client.Log() + "the second:\n" + next.Log())
		}
		return nil
	})
	client.AwaitEmpty(t)
	if n := g.server.Stats().Delivered; n != 1 || len(g.queue.List()) != 0 {
		t.Errorf("delivered %d, queue %+v", n, g.queue.List()) // none of success: the next hop offers DSN
	}
	var told []string // Postfix has an order of its own
	for _, line := range behind.commands() {
		words := strings.FieldsFunc(line, func(r rune) bool { return r == ' ' || r == ',' })
		slices.Sort(words)
		told = append(told, strings.Join(words, " "))
	}
	want := []string{
		"ENVID=QQ+2Bx FROM:<a@sender.test> MAIL RET=HDRS",
		"DELAY NOTIFY=FAILURE ORCPT=rfc822;old+2Bx@one.test RCPT TO:<x@one.test>",
		"NOTIFY=NEVER ORCPT=rfc822;y@one.test RCPT TO:<y@one.test>",
		"NOTIFY=SUCCESS ORCPT=rfc822;z@one.test RCPT TO:<z@one.test>",
	}
	if !slices.Equal(told, want) {
		t.Errorf("told %q\nwant %q", told, want)
	}
}

// Postfix is sent each kind of DSN, with its strict checks on, and says what it finds in them when it takes the MIME structure apart.
func TestPostfixReadsOurDSNs(t *testing.T) {
	home, out := newHop(t), newHop(t)
	home.set("ehlo", "250-home\r\n250-SMTPUTF8\r\n250 8BITMIME")
	out.set("rcpt bad@else.test", "550 5.1.1 no such user")
	out.set("rcpt slow@else.test", "451 4.2.0 later")
	strict := mta.StartPostfix(t, home.addr(), "strict_8bitmime_body = yes", "strict_mime_encoding_domain = yes",
		`mime_header_checks = regexp:{ { /^content-type: message\/(.*)/ WARN part $$1 } { /^content-type: text\/rfc822-headers/ WARN part headers } }`,
		`nested_header_checks = regexp:{ { /^subject: (.*)/ WARN returned $$1 } }`)
	s := snapshot("sender.test", strict.Addr)
	s.Networks = []config.Network{loopback}
	s.Transports = []config.Transport{{Name: "out", Hosts: []string{out.addr()}}}
	s.Settings = []config.Setting{{Name: "outbound_transport", Value: "out"}}
	g := newRigWithQueue(t, s, nil, func(o *queue.Options) { o.DelayNotice = func() time.Duration { return time.Nanosecond } })
	ctx, cancel := context.WithCancel(t.Context())
	var wg sync.WaitGroup
	wg.Go(func() { _ = g.queue.Run(ctx) })
	defer wg.Wait()
	defer cancel()
	p := g.hello()
	for _, from := range []string{"a@sender.test", "ü@sender.test"} {
		p.ask("MAIL FROM:<"+from+"> SMTPUTF8 BODY=8BITMIME RET=FULL ENVID=id", "250")
		for _, to := range []string{"good", "bad", "slow"} {
			p.ask("RCPT TO:<"+to+"@else.test> NOTIFY=SUCCESS,FAILURE,DELAY ORCPT=utf-8;\\x{FC}@else.test", "250")
		}
		p.ask("DATA", "354")
		p.send("Subject: 8-bit\r\nMIME-Version: 1.0\r\nContent-Type: text/plain; charset=utf-8\r\nContent-Transfer-Encoding: 8bit\r\n\r\n\xc3\xbc\r\n.\r\n")
		p.want("250")
	}
	var log string
	mta.Until(t, func() error {
		if log = strict.WholeLog(); len(home.messages()) < 6 {
			return fmt.Errorf("%d DSNs of 6; Postfix says:\n%s", len(home.messages()), strict.Log())
		}
		return nil
	})
	for part, want := range map[string]int{
		": part delivery-status": 3, ": part global-delivery-status": 3, ": part rfc822": 2, ": returned 8-bit": 2,
		": part headers": 2, ": part global-headers": 2,
	} {
		if n := strings.Count(log, part+"\n"); n != want {
			t.Errorf("%d of %q, want %d, in:\n%s", n, part, want, log)
		}
	}
	var actions []string
	for _, m := range home.messages() {
		_, action, _ := strings.Cut(m.wire, "\nAction: ")
		action, _, _ = strings.Cut(action, "\r\n")
		actions = append(actions, action)
	}
	slices.Sort(actions)
	if got := strings.Join(actions, " "); got != "delayed delayed failed failed relayed relayed" {
		t.Errorf("came: %s", got)
	}
}
