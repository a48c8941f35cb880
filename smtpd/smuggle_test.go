package smtpd

import (
	"context"
	"errors"
	"fmt"
	"strconv"
	"strings"
	"testing"

	"mailproxy/internal/mta"
)

// evil is what a message goes on with where its sender hopes that somebody takes the octets in front of it for the end.
const evil = "MAIL FROM:<evil@test>\r\nRCPT TO:<x@one.test>\r\nDATA\r\nSubject: evil\r\n\r\nsmuggled\r\n.\r\n"

// smuggled gives the text of a DATA with one trick in it, its own name in front.
func smuggled(n int, trick string) string {
	return "Subject: n" + strconv.Itoa(n) + "\r\n\r\nBEGIN" + trick + evil
}

// A way out is a real server and what it has taken: senders, and the messages in no order, each with its "Subject: n…" in it.
type wayOut struct {
	name  string
	addr  string
	taken func() (from, messages []string)
}

func waysOut(t *testing.T) []wayOut {
	behind := newHop(t)
	postfix := mta.StartPostfix(t, behind.addr())
	exim := mta.StartExim(t)
	sink := mta.StartSink(t)
	return []wayOut{
		{"postfix", postfix.Addr, func() (from, messages []string) {
			postfix.AwaitEmpty(t)
			for _, m := range behind.messages() {
				from, messages = append(from, strings.Trim(strings.Fields(m.from)[0], "<>")), append(messages, strings.ReplaceAll(m.wire, "\r\n.", "\r\n"))
			}
			return from, messages
		}},
		{"exim", exim.Addr, func() (from, messages []string) {
			for _, m := range exim.Messages(t) {
				from, messages = append(from, m.From), append(messages, m.Header+"\n"+strings.ReplaceAll(m.Body, "\n", "\r\n"))
			}
			return from, messages
		}},
		{"smtp-sink", sink.Addr, func() (from, messages []string) {
			for _, m := range sink.Messages(t) {
				_, rest, _ := strings.Cut(m, "X-Mail-Args: ")
				text := strings.ReplaceAll(strings.TrimSuffix(m, "\n"), "\n", "\r\n")
				from, messages = append(from, strings.Trim(strings.Fields(rest)[0], "<>")), append(messages, text)
			}
			return from, messages
		}},
	}
}

// TestWhatGoesInAsOneMessageComesOutAsOne: each trick with line ends, cut between two packets at each of its octets, through us into
// servers that nobody here wrote, while the client waits and from the queue.
func TestWhatGoesInAsOneMessageComesOutAsOne(t *testing.T) {
	for _, way := range waysOut(t) {
		sent := map[int]string{} // by number, over both modes: what has to stand in the message
		for _, mode := range []string{"yes", "no"} {
			t.Run(way.name+", cut-through "+mode, func(t *testing.T) {
				g := newRig(t, with(snapshot("one.test", way.addr), "cut_through", mode), nil)
				g.runQueue()
				p := g.hello()
				for _, trick := range notEnds {
					body, _, _ := model("BEGIN" + trick + evil)
					for cut := range len(trick) + 1 {
						n := len(sent)
						sent[n] = body
						text := smuggled(n, trick)
						at := strings.Index(text, evil) - len(trick) + cut
						p.begin("x@one.test")
						p.send(text[:at])
						p.send(text[at:])
						p.want("250")
					}
				}
				waitFor(t, "the queue is empty", func() bool { return len(g.queue.List()) == 0 })
				judge(t, way, sent)
			})
		}
	}
}

// judge wants each message once and whole, and nothing besides.
func judge(t *testing.T, way wayOut, sent map[int]string) {
	t.Helper()
	from, messages := way.taken()
	seen := map[int]int{}
	for i, m := range messages {
		if from[i] != "a@sender.test" {
			t.Errorf("a message from %q came out", from[i])
		}
		_, rest, _ := strings.Cut(m, "Subject: n")
		line, _, _ := strings.Cut(rest, "\n")
		n, err := strconv.Atoi(strings.TrimSpace(line))
		if err != nil {
			t.Errorf("a message that was not sent came out: %q", m)
			continue
		}
		seen[n]++
		_, text, _ := strings.Cut(m, "BEGIN")
		if got, want := "BEGIN"+text, sent[n]; got != want {
			t.Errorf("message %d came out as %q, want %q", n, got, want)
		}
	}
	for n := range sent {
		if seen[n] != 1 {
			t.Errorf("message %d came out %d times", n, seen[n])
		}
	}
}

// TestTheTricksWork: without us in between one of the tricks makes two messages out of one, so the test above can fail.
func TestTheTricksWork(t *testing.T) {
	behind := newHop(t)
	postfix := mta.StartPostfix(t, behind.addr(), "smtpd_forbid_bare_newline = no", "smtpd_discard_ehlo_keywords = chunking")
	p := dialTo(t, postfix.Addr)
	p.want("220")
	p.ask("EHLO client.test", "250")
	p.begin("x@one.test")
	p.send(smuggled(0, "\n.\n"))
	p.want("250")
	waitFor(t, "two messages", func() bool { return len(behind.messages()) == 2 })
}

// runQueue has the rig's queue deliver until the test ends.
func (g *rig) runQueue() {
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- g.queue.Run(ctx) }()
	g.t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil && !errors.Is(err, context.Canceled) {
			g.t.Error(fmt.Errorf("queue: %w", err))
		}
	})
}
