package relay

import (
	"bytes"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/rs/zerolog"

	"mailproxy/config"
	"mailproxy/mail"
)

// script is a server that plays one dialog a connection: "C: line" is expected, "S: text" is sent, "C~" reads whatever comes
// up to the line given, "tls" takes the handshake, "wait" waits for goOn, "hang" keeps the connection open until the test ends, "close" ends it.
type script struct {
	t        *testing.T
	l        net.Listener
	mu       sync.Mutex
	got      []*bytes.Buffer // the octets of each connection
	problems []string
	done     chan struct{}
	tls      *tls.Config   // for "tls" steps
	goOn     chan struct{} // one token for each "wait" step
	served   sync.WaitGroup
}

func newScript(t *testing.T, dialogs ...string) *script {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	s := &script{t: t, l: l, done: make(chan struct{}), goOn: make(chan struct{}, 10)}
	s.served.Go(func() {
		for _, d := range dialogs {
			c, err := l.Accept()
			if err != nil {
				return
			}
			buf := &bytes.Buffer{}
			s.mu.Lock()
			s.got = append(s.got, buf)
			n := len(s.got)
			s.mu.Unlock()
			s.served.Go(func() { s.play(n, c, buf, d) })
		}
	})
	t.Cleanup(func() { s.stop() })
	return s
}

func (s *script) addr() string { return s.l.Addr().String() }

// stop ends the server and reports what went wrong in its dialogs.
func (s *script) stop() {
	s.mu.Lock()
	select {
	case <-s.done:
		s.mu.Unlock()
		return
	default:
		close(s.done)
	}
	s.mu.Unlock()
	s.l.Close()
	s.served.Wait()
	for _, p := range s.problems {
		s.t.Error(p)
	}
}

// bytes gives what connection n (from 1) sent so far.
func (s *script) bytes(n int) string {
	s.mu.Lock()
	defer s.mu.Unlock()
	if n > len(s.got) {
		return ""
	}
	return s.got[n-1].String()
}

func (s *script) connections() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return len(s.got)
}

func (s *script) problem(format string, args ...any) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.problems = append(s.problems, fmt.Sprintf(format, args...))
}

func (s *script) play(n int, raw net.Conn, buf *bytes.Buffer, dialog string) {
	c := raw // or TLS over it
	defer raw.Close()
	stop := make(chan struct{})
	defer close(stop)
	go func() { // ends with the connection
		select {
		case <-s.done:
			raw.Close()
		case <-stop:
		}
	}()
	line := func() (string, error) {
		var l []byte
		var b [1]byte
		for {
			if _, err := c.Read(b[:]); err != nil {
				return string(l), err
			}
			s.mu.Lock()
			buf.WriteByte(b[0])
			s.mu.Unlock()
			l = append(l, b[0])
			if b[0] == '\n' {
				return strings.TrimRight(string(l), "\r\n"), nil
			}
		}
	}
	for step := range strings.SplitSeq(strings.TrimSpace(dialog), "\n") {
		if step = strings.TrimSpace(step); step == "" {
			continue
		}
		switch kind, text, _ := strings.Cut(step, " "); kind {
		case "S:":
			fmt.Fprintf(c, "%s\r\n", strings.NewReplacer(`\r`, "\r", `\n`, "\n").Replace(text))
		case "S-": // without a line end
			fmt.Fprint(c, text)
		case "C:":
			got, err := line()
			if err != nil || got != text {
				s.problem("connection %d: got %q, %v; want %q", n, got, err, text)
				return
			}
		case "C~":
			for {
				got, err := line()
				if err != nil {
					s.problem("connection %d: %v before %q", n, err, text)
					return
				}
				if got == text {
					break
				}
			}
		case "tls":
			c = tls.Server(raw, s.tls)
		case "hang": // to the connection's end
			for {
				if _, err := line(); err != nil {
					return
				}
			}
		case "wait":
			select {
			case <-s.goOn:
			case <-s.done:
				return
			}
		case "close":
			return
		default:
			s.problem("bad step %q", step)
			return
		}
	}
	_, _ = line() // QUIT or the end
}

const hello = `
S: 220 hop ready
C: EHLO test.example
S: 250-hop\r\n250-PIPELINING\r\n250-SIZE 1000000\r\n250-8BITMIME\r\n250 ENHANCEDSTATUSCODES
`

const helloPlain = `
S: 220 hop ready
C: EHLO test.example
S: 250 hop
`

func testClient(t *testing.T, change func(*Options)) *Client {
	t.Helper()
	o := Options{Hostname: "test.example", Log: zerolog.Nop(), Timeouts: Timeouts{
		Lookup: 5 * time.Second, Connect: 5 * time.Second, Greeting: 5 * time.Second, Ehlo: 5 * time.Second, TLS: 5 * time.Second,
		Mail: 5 * time.Second, Rcpt: 5 * time.Second, Data: 5 * time.Second, Block: 5 * time.Second, Dot: 5 * time.Second,
	}}
	if change != nil {
		change(&o)
	}
	c := New(o)
	t.Cleanup(c.Close)
	return c
}

func path(s string) mail.Path {
	p, err := mail.ParsePath(s)
	if err != nil {
		panic(err)
	}
	return p
}

func paths(s ...string) (out []mail.Path) {
	for _, a := range s {
		out = append(out, path(a))
	}
	return out
}

func attempt(addr, body string, to ...string) Attempt {
	return Attempt{
		Transport: config.Transport{Name: "t", Hosts: []string{addr}, TLS: config.TLSNone},
		Envelope:  &mail.Envelope{ReversePath: path("from@a.test")},
		Paths:     paths(to...),
		Content:   strings.NewReader(body),
	}
}

// summary gives results as "stage code[ enhanced] text" lines.
func summary(results []Result) string {
	var b strings.Builder
	for _, r := range results {
		fmt.Fprintf(&b, "%s %s\n", r.Stage, r.Reply)
	}
	return strings.TrimSpace(b.String())
}

// waitFor polls a condition.
func waitFor(t *testing.T, what string, cond func() bool) {
	t.Helper()
	deadline := time.Now().Add(10 * time.Second)
	for !cond() {
		if time.Now().After(deadline) {
			t.Fatalf("not within 10 s: %s", what)
		}
		time.Sleep(time.Millisecond)
	}
}

var errStop = errors.New("stop")

func bg() context.Context { return context.Background() }
