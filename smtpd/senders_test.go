package smtpd

import (
	"errors"
	"fmt"
	"strings"
	"testing"

	"mailproxy/internal/mta"
)

// Debian's Postfix and Exim send through us: what is refused for good they report, what is put off they bring again, what is too large they
// do not send, and where TLS is wanted they use it.
func TestRealSenders(t *testing.T) {
	for name, start := range map[string]func(next string) (addr string, log func() string){
		"Postfix": func(next string) (string, func() string) {
			p := mta.StartPostfix(t, next, "smtp_tls_security_level = may", "minimal_backoff_time = 1s", "maximal_backoff_time = 1s", "queue_run_delay = 1s",
				"message_size_limit = 1000000")
			return p.Addr, p.Log
		},
		"Exim": func(next string) (string, func() string) { e := mta.StartEximTo(t, next); return e.Addr, e.Log },
	} {
		t.Run(name, func(t *testing.T) {
			h := newHop(t)
			h.set("rcpt no@one.test", "550 5.1.1 no such user")
			h.set("rcpt grey@one.test", "451 4.7.1 come again")
			s := with(snapshot("one.test", h.addr(), "sender.test", h.addr()), "max_message_size", "64KB", "internal_require_tls", "yes")
			s.Networks = nil
			s.Networks = append(s.Networks, loopback)
			g := newRig(t, s, func(o *Options) { o.TLS = selfSigned(t) })
			addr, log := start(g.addr)
			p := dialTo(t, addr)
			p.want("220")
			p.ask("EHLO client.test", "250")
			send := func(subject, body string, to ...string) {
				t.Helper()
				p.ask("MAIL FROM:<a@sender.test>", "250")
				for _, r := range to {
					p.ask("RCPT TO:<"+r+">", "250")
				}
				p.ask("DATA", "354")
				p.send("From: <a@sender.test>\r\nSubject: " + subject + "\r\n\r\n" + body + "\r\n.\r\n")
				p.want("250")
			}
			send("mixed", "body", "ok@one.test", "no@one.test", "grey@one.test")
			send("large", strings.Repeat(strings.Repeat("x", 70)+"\r\n", 2000), "ok@one.test")
			// What has come, as "subject to whom", each with how it came.
			came := func() map[string]string {
				all := map[string]string{}
				for _, m := range h.messages() {
					_, subject, _ := strings.Cut(m.wire, "\nSubject: ")
					subject, _, _ = strings.Cut(subject, "\r\n")
					for _, to := range m.to {
						if m.from == "" || strings.HasPrefix(m.from, "<>") {
							for _, about := range []string{"no@one.test", "large"} {
								if strings.Contains(m.wire, about) {
									all["report of "+about+" to "+to] = m.wire
								}
							}
							continue
						}
						all[subject+" to "+to] = m.wire
					}
				}
				return all
			}
			until := func(want ...string) {
				t.Helper()
				mta.Until(t, func() error {
					there := came()
					for _, w := range want {
						wire, ok := there[w]
						if !ok {
							return fmt.Errorf("no %q; the sender says:\n%s", w, log())
						}
						if !strings.Contains(wire, " with ESMTPS id ") {
							return errors.New("it came in clear: " + w)
						}
					}
					return nil
				})
			}
			until("mixed to ok@one.test", "report of no@one.test to a@sender.test", "report of large to a@sender.test")
			if there := came(); there["mixed to grey@one.test"] != "" || there["large to ok@one.test"] != "" {
				t.Error("what was put off, or is too large, has come")
			}
			h.set("rcpt grey@one.test", "250 2.1.5 ok")
			until("mixed to grey@one.test")
			if n := len(g.queue.List()); n != 0 {
				t.Errorf("%d in our queue", n)
			}
		})
	}
}
