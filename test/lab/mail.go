package lab

import (
	"bufio"
	"bytes"
	"fmt"
	"net"
	"net/textproto"
	"strings"
	"sync"
	"sync/atomic"
	"time"
)

// A Sink is a receiving mail server that keeps what it took, by Subject.
type Sink struct {
	// Address is where it is to listen.
	Address string
	// Replies are what it says instead to a command ("": on connecting, ".": to a message); an empty one closes.
	Replies map[string]string

	mu    sync.Mutex
	taken map[string]int
	open  map[net.Conn]bool
}

// sinks counts them: each has a port of its own.
var sinks atomic.Int64

// NewSink reserves an address for a sink; nobody answers there before Listen.
func NewSink() *Sink {
	return &Sink{Address: fmt.Sprintf("%s:%d", HubAddress, 20000+sinks.Add(1)), taken: map[string]int{}, open: map[net.Conn]bool{}}
}

// Listen takes mail until close is called.
func (s *Sink) Listen() (stop func(), err error) {
	l, err := net.Listen("tcp", s.Address)
	if err != nil {
		return nil, err
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
	return func() {
		_ = l.Close()
		s.mu.Lock()
		for c := range s.open {
			_ = c.Close()
		}
		s.mu.Unlock()
		all.Wait()
	}, nil
}

func (s *Sink) serve(c net.Conn) {
	defer func() {
		_ = c.Close()
		s.mu.Lock()
		delete(s.open, c)
		s.mu.Unlock()
	}()
	text := textproto.NewConn(c)
	say := func(verb, line string) bool {
		if own, ok := s.Replies[verb]; ok {
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
func (s *Sink) take(text *textproto.Conn) bool {
	body, err := text.ReadDotBytes()
	if err != nil {
		return false
	}
	if _, refused := s.Replies["."]; !refused {
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

// Count says how often a message came.
func (s *Sink) Count(subject string) int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.taken[subject]
}

// Len says how many different messages came.
func (s *Sink) Len() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return len(s.taken)
}

// A RefusalError is a reply that is not the wanted one.
type RefusalError struct {
	Line string // what was said
	Code int
	Text string
}

func (r *RefusalError) Error() string { return fmt.Sprintf("C: %s S: %d %s", r.Line, r.Code, r.Text) }

// Send gives one message with a subject to the node over SMTP and gives the last reply, or a *RefusalError. filler is how many octets of
// body it has besides.
func (h *Host) Send(to, subject string, filler int) (string, error) {
	c, err := net.DialTimeout("tcp", net.JoinHostPort(h.Address, SMTPPort), 5*time.Second)
	if err != nil {
		return "", err
	}
	defer c.Close()
	if err := c.SetDeadline(time.Now().Add(Patience / 2)); err != nil {
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
			return "", &RefusalError{step.line[:min(len(step.line), 40)], code, message}
		}
		if err != nil {
			return "", err
		}
		reply = message
	}
	return reply, nil
}
