package smtpd

import (
	"bufio"
	"fmt"
	"io"
	"net"
	"strings"
	"sync"
	"testing"
)

// A hop is a next hop of a test: a small SMTP server of its own, sharing no code with what is tested.
type hop struct {
	t    testing.TB
	l    net.Listener
	wait sync.WaitGroup

	mu    sync.Mutex
	conns map[net.Conn]struct{}
	// say has the reply to a command: "rcpt a@b.test", "mail", "data", "dot"; "close" closes instead, "hang" says nothing. "body" has
	// "close" where it closes behind its 354.
	say map[string]string
	// hold, where not nil, is waited for before the reply to the dot (holdDot) or to DATA (holdData).
	holdDot, holdData chan struct{}
	dotSeen, dataSeen chan struct{} // get a value each time
	got               []delivered
	told              []string // MAIL and RCPT, as they came
	cut               int      // messages that ended before their dot
}

// delivered is a message that a hop has taken: its octets as they were on the wire between DATA and the final dot, stuffed.
type delivered struct {
	from string
	to   []string
	wire string
}

func newHop(t testing.TB) *hop {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	h := &hop{
		t: t, l: l, say: map[string]string{}, conns: map[net.Conn]struct{}{},
		dotSeen: make(chan struct{}, 100), dataSeen: make(chan struct{}, 100),
	}
	h.wait.Go(func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			h.mu.Lock()
			h.conns[c] = struct{}{}
			h.mu.Unlock()
			h.wait.Go(func() { h.serve(c) })
		}
	})
	t.Cleanup(h.close)
	return h
}

func (h *hop) addr() string { return h.l.Addr().String() }

func (h *hop) close() {
	h.l.Close()
	h.mu.Lock()
	for c := range h.conns {
		c.Close()
	}
	h.mu.Unlock()
	h.wait.Wait()
}

func (h *hop) reply(key, otherwise string) string {
	h.mu.Lock()
	defer h.mu.Unlock()
	if s, ok := h.say[key]; ok {
		return s
	}
	return otherwise
}

func (h *hop) set(key, reply string) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.say[key] = reply
}

func (h *hop) messages() []delivered {
	h.mu.Lock()
	defer h.mu.Unlock()
	return append([]delivered(nil), h.got...)
}

func (h *hop) commands() []string {
	h.mu.Lock()
	defer h.mu.Unlock()
	return append([]string(nil), h.told...)
}

func (h *hop) tell(line string) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.told = append(h.told, line)
}

func (h *hop) cuts() int {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.cut
}

func (h *hop) rcpts() (n int) {
	h.mu.Lock()
	defer h.mu.Unlock()
	for _, line := range h.told {
		if strings.HasPrefix(line, "RCPT ") {
			n++
		}
	}
	return n
}

func (h *hop) serve(c net.Conn) {
	defer c.Close()
	r := bufio.NewReaderSize(c, 1<<20)
	fmt.Fprint(c, "220 hop ready\r\n")
	var m delivered
	for {
		line, err := r.ReadString('\n')
		if err != nil {
			return
		}
		line = strings.TrimSuffix(line, "\r\n")
		verb, rest, _ := strings.Cut(line, " ")
		answer := "250 2.0.0 OK"
		switch strings.ToUpper(verb) {
		case "EHLO":
			answer = h.reply("ehlo", "250-hop\r\n250-PIPELINING\r\n250-SMTPUTF8\r\n250 8BITMIME")
		case "MAIL":
			h.tell(line)
			m = delivered{from: strings.TrimPrefix(rest, "FROM:")}
			if answer = h.reply("mail", answer); answer[0] != '2' {
				m.from = ""
			}
		case "RCPT":
			if m.from == "" {
				answer = "503 5.5.1 MAIL first"
				break
			}
			h.tell(line)
			to := bracketed(strings.TrimPrefix(rest, "TO:<"))
			if answer = h.reply("rcpt "+to, answer); answer[0] == '2' {
				m.to = append(m.to, to)
			}
		case "DATA":
			if answer = h.data(c, r, &m); answer == "" {
				return
			}
		case "QUIT":
			fmt.Fprint(c, "221 bye\r\n")
			return
		}
		switch answer {
		case "close":
			return
		case "hang":
			_, _ = io.Copy(io.Discard, r) // until we are left
			return
		}
		fmt.Fprint(c, answer+"\r\n")
	}
}

// bracketed gives what stands before the closing bracket, which is not one inside quotes.
func bracketed(s string) string {
	quoted := false
	for i := 0; i < len(s); i++ {
		switch s[i] {
		case '\\':
			i++
		case '"':
			quoted = !quoted
		case '>':
			if !quoted {
				return s[:i]
			}
		}
	}
	return s
}

// data takes a message; "" where the connection ended.
func (h *hop) data(c net.Conn, r *bufio.Reader, m *delivered) string {
	if len(m.to) == 0 {
		return "554 5.5.1 no valid recipients"
	}
	answer := h.reply("data", "354 go on")
	tell(h.dataSeen)
	if h.holdData != nil {
		<-h.holdData
	}
	if answer[0] != '3' {
		return answer
	}
	fmt.Fprint(c, answer+"\r\n")
	if h.reply("body", "") == "close" {
		return ""
	}
	var wire strings.Builder
	for {
		b, err := r.ReadString('\n')
		if err != nil {
			h.mu.Lock()
			h.cut++
			h.mu.Unlock()
			return ""
		}
		if b == ".\r\n" {
			break
		}
		wire.WriteString(b)
	}
	m.wire = wire.String()
	tell(h.dotSeen)
	if h.holdDot != nil {
		<-h.holdDot
	}
	answer = h.reply("dot", "250 2.0.0 taken")
	if answer[0] == '2' {
		h.mu.Lock()
		h.got = append(h.got, *m)
		h.mu.Unlock()
	}
	return answer
}

// tell notes an event; where nobody looks they are not counted without end.
func tell(c chan struct{}) {
	select {
	case c <- struct{}{}:
	default:
	}
}

func (h *hop) forget() {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.got = nil
}

// reset ends its connections the hard way: what we write next meets an error at once.
func (h *hop) reset() {
	h.mu.Lock()
	defer h.mu.Unlock()
	for c := range h.conns {
		_ = c.(*net.TCPConn).SetLinger(0)
		c.Close()
	}
}
