package main

import (
	"context"
	"fmt"
	"math/rand/v2"
	"net"
	"net/textproto"
	"strings"
	"time"

	"mailproxy/test/lab"
)

// A message is one that a client sends until it is taken.
type message struct {
	subject    string
	hops       []*hop
	size       int
	accepted   bool // answered with 250 to its end
	unanswered int  // how often the client was cut off behind its end
}

// sendOn sends one message after the other, each again and again until it has an answer of 250.
func (r *run) sendOn(ctx context.Context, dice *rand.Rand) {
	for n := 0; ctx.Err() == nil; n++ {
		m := &message{subject: fmt.Sprintf("m%d-%d", dice.Uint32(), n), hops: r.hops[:1], size: 1000}
		switch dice.IntN(10) {
		case 0, 1, 2, 3:
			m.hops = r.hops[1:]
		case 4, 5:
			m.hops = r.hops[:]
		}
		switch dice.IntN(20) {
		case 0:
			m.size = 2 << 20 // a file of its own in the spool
		case 1, 2:
			m.size = 300 << 10 // not in memory
		}
		r.mu.Lock()
		r.messages = append(r.messages, m)
		r.mu.Unlock()
		for ctx.Err() == nil && !m.accepted {
			if m.accepted = r.send(m); !m.accepted {
				pause(ctx, 20*time.Millisecond)
			}
		}
	}
}

// send makes one attempt, and says whether the message was taken.
func (r *run) send(m *message) bool {
	c, err := net.DialTimeout("tcp", net.JoinHostPort(r.host.Address, lab.SMTPPort), 5*time.Second)
	if err != nil {
		return false
	}
	defer c.Close()
	if c.SetDeadline(time.Now().Add(20*time.Second)) != nil {
		return false
	}
	text := textproto.NewConn(c)
	says := func(want int, line string) bool {
		if line != "" && text.PrintfLine("%s", line) != nil {
			return false
		}
		_, _, err := text.ReadResponse(want)
		return err == nil
	}
	if !says(220, "") || !says(250, "EHLO client.test") || !says(250, "MAIL FROM:<>") {
		return false
	}
	for _, h := range m.hops {
		if !says(250, "RCPT TO:<to@"+h.domain+">") {
			return false
		}
	}
	if !says(354, "DATA") {
		return false
	}
	body := "Subject: " + m.subject + "\r\n\r\n" + strings.Repeat(strings.Repeat("x", 76)+"\r\n", m.size/78)
	if text.PrintfLine("%s.", body) != nil {
		return false // it has no end, and is nobody's
	}
	code, _, err := text.ReadResponse(250)
	if err != nil && code == 0 {
		m.unanswered++
	}
	return err == nil
}
