package e2e

import (
	"bufio"
	"bytes"
	"fmt"
	"net"
	"net/textproto"
	"strings"
	"sync"
	"testing"
	"time"
)

// A sink is a receiving mail server that keeps what it took, by Subject.
type sink struct {
	address string
	// replies are what it says instead to a command ("": on connecting, ".": to a message); an empty one closes.
	replies map[string]string

	mu    sync.Mutex
	taken map[string]int
	open  map[net.Conn]bool
}

// newSink reserves an address for a sink; nobody answers there before listen.
func newSink() *sink {
	i := addresses.Add(1)
	return &sink{address: fmt.Sprintf("127.0.%d.%d:25", 1+i/200, 10+i%200), taken: map[string]int{}, open: map[net.Conn]bool{}}
}

// listen takes mail until the test ends.
func (s *sink) listen(t testing.TB) {
	t.Helper()
	l, err := net.Listen("tcp", s.address)
	if err != nil {
		t.Fatal(err)
	}
	var all sync.WaitGroup
	all.Go(func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			s.mu.Lock()
			s.open[c] = true
			s.mu.Unlock()
			all.Go(func() { s.serve(c) })
		}
	})
	t.Cleanup(func() {
		_ = l.Close()
		s.mu.Lock()
		for c := range s.open {
			_ = c.Close()
		}
		s.mu.Unlock()
		all.Wait()
	})
}

func (s *sink) serve(c net.Conn) {
	defer c.Close()
	text := textproto.NewConn(c)
	say := func(verb, line string) bool {
		if own, ok := s.replies[verb]; ok {
			line = own
		}
		return line != "" && text.PrintfLine("%s", line) == nil
	}
	for verb, going := "", say("", "220 sink.test ESMTP"); going && verb != "QUIT"; {
		line, err := text.ReadLine()
		if err != nil {
			return
		}
		verb, _, _ = strings.Cut(strings.ToUpper(line), " ")
		switch verb {
		case "EHLO":
			going = say(verb, "250-sink.test\r\n250 PIPELINING")
		case "DATA":
			going = say(verb, "354 go on") && s.take(text) && say(".", "250 2.0.0 taken")
		default:
			going = say(verb, "250 2.0.0 ok")
		}
	}
}

// take reads a message, and keeps that it came where it is not refused then.
func (s *sink) take(text *textproto.Conn) bool {
	body, err := text.ReadDotBytes()
	if err != nil {
		return false
	}
	if _, refused := s.replies["."]; !refused {
		s.mu.Lock()
		s.taken[subject(body)]++
		s.mu.Unlock()
	}
	return true
}

func subject(body []byte) string {
	h, err := textproto.NewReader(bufio.NewReader(bytes.NewReader(body))).ReadMIMEHeader()
	if err != nil {
		return "unreadable"
	}
	return h.Get("Subject")
}

// count says how often a message came.
func (s *sink) count(subject string) int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.taken[subject]
}

func (s *sink) len() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return len(s.taken)
}

// A refusal is a reply that is not the wanted one.
type refusal struct {
	line string // what was said
	code int
	text string
}

func (r *refusal) Error() string { return fmt.Sprintf("C: %s S: %d %s", r.line, r.code, r.text) }

// send gives one message with a subject to the node over SMTP and gives the last reply, or a *refusal. filler is how many octets of
// body it has besides.
func (n *node) send(to, subject string, filler int) (string, error) {
	c, err := net.DialTimeout("tcp", net.JoinHostPort(n.address, smtpPort), 5*time.Second)
	if err != nil {
		return "", err
	}
	defer c.Close()
	if err := c.SetDeadline(time.Now().Add(patience / 2)); err != nil {
		return "", err
	}
	text := textproto.NewConn(c)
	body := "Subject: " + subject + "\r\n\r\n" + strings.Repeat(strings.Repeat("x", 76)+"\r\n", filler/78) + "."
	var reply string
	for _, step := range []struct {
		line string
		want int
	}{{"", 220}, {"EHLO client.test", 250}, {"MAIL FROM:<from@client.test>", 250}, {"RCPT TO:<" + to + ">", 250}, {"DATA", 354}, {body, 250}} {
		if step.line != "" {
			if err := text.PrintfLine("%s", step.line); err != nil {
				return "", err
			}
		}
		code, message, err := text.ReadResponse(step.want)
		if code != step.want && code != 0 {
			return "", &refusal{step.line[:min(len(step.line), 40)], code, message}
		}
		if err != nil {
			return "", err
		}
		reply = message
	}
	return reply, nil
}

// mustSend wants the message to be taken.
func (n *node) mustSend(to, subject string) {
	n.t.Helper()
	if _, err := n.send(to, subject, 0); err != nil {
		n.t.Errorf("%s takes no mail: %v", n.name, err)
	}
}

// takes waits until the node accepts mail for an address: then it has the configuration that says so.
func (n *node) takes(to string) {
	n.t.Helper()
	n.eventually(func() error { _, err := n.send(to, "probe", 0); return err })
}
