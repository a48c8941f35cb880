package main

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"net"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/emersion/go-smtp"
)

// sink is a next hop that takes all, and remembers the subjects.
type sink struct {
	addr string

	mu       sync.Mutex
	subjects map[string]int
}

func newSink(t testing.TB) *sink {
	t.Helper()
	s := &sink{subjects: make(map[string]int)}
	l, err := net.Listen("tcp", freePort(t))
	if err != nil {
		t.Fatal(err)
	}
	s.addr = l.Addr().String()
	server, done := smtp.NewServer(s), make(chan struct{})
	go func() { defer close(done); _ = server.Serve(l) }()
	t.Cleanup(func() { _ = server.Close(); <-done })
	return s
}

func (s *sink) NewSession(*smtp.Conn) (smtp.Session, error) { return s, nil }
func (s *sink) Reset()                                      {}
func (s *sink) Logout() error                               { return nil }
func (s *sink) Mail(string, *smtp.MailOptions) error        { return nil }
func (s *sink) Rcpt(string, *smtp.RcptOptions) error        { return nil }

func (s *sink) Data(r io.Reader) error {
	b, err := io.ReadAll(r)
	_, rest, _ := strings.Cut(string(b), "Subject: ")
	subject, _, _ := strings.Cut(rest, "\r\n")
	s.mu.Lock()
	defer s.mu.Unlock()
	s.subjects[subject]++
	return err
}

// missing gives those that have not come.
func (s *sink) missing(subjects []string) (missing []string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, subject := range subjects {
		if s.subjects[subject] == 0 {
			missing = append(missing, subject)
		}
	}
	return missing
}

// load is clients that send to a node without end, each a few messages in a session.
type load struct {
	addr string
	stop chan struct{}
	wg   sync.WaitGroup

	mu sync.Mutex
	// taken are the subjects of messages that were answered with 250.
	taken []string
	// greeted counts sessions with a greeting, turned those that were answered 421 instead or between two commands.
	greeted, turned int
	// broken is what no client should see: a connection that is refused, or ends without a word.
	broken []error
}

func startLoad(addr string, clients int) *load {
	l := &load{addr: addr, stop: make(chan struct{})}
	for i := range clients {
		l.wg.Go(func() {
			for n := 0; ; n++ {
				select {
				case <-l.stop:
					return
				default:
				}
				err := l.session(fmt.Sprintf("%d-%d", i, n))
				l.mu.Lock()
				switch {
				case errors.Is(err, errTurned):
					l.turned++
				case err != nil:
					l.broken = append(l.broken, err)
				}
				l.mu.Unlock()
			}
		})
	}
	return l
}

// end stops the clients once their sessions are over.
func (l *load) end() {
	close(l.stop)
	l.wg.Wait()
}

func (l *load) counts() (taken, greeted, turned int) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return len(l.taken), l.greeted, l.turned
}

// errTurned is a session that the server has ended with 421.
var errTurned = errors.New("421")

func (l *load) session(name string) error {
	conn, err := net.DialTimeout("tcp", l.addr, patience)
	if err != nil {
		return err
	}
	defer conn.Close()
	_ = conn.SetDeadline(time.Now().Add(patience))
	r := bufio.NewReader(conn)
	// ask sends a line, and gives errTurned for 421, also where the connection ended with it before our line.
	ask := func(line, want string) error {
		if line != "" {
			_, _ = io.WriteString(conn, line) // what became of it the reply says
		}
		for {
			reply, err := r.ReadString('\n')
			switch {
			case err != nil:
				return fmt.Errorf("%s: behind %q: %w", name, line, err)
			case strings.HasPrefix(reply, "421 4.3.2"):
				return errTurned
			case len(reply) > 3 && reply[3] == '-':
				continue
			case !strings.HasPrefix(reply, want):
				return fmt.Errorf("%s: behind %q: %s", name, line, reply)
			}
			return nil
		}
	}
	if err := ask("", "220"); err != nil {
		return err
	}
	l.mu.Lock()
	l.greeted++
	l.mu.Unlock()
	if err := ask("EHLO load.test\r\n", "250"); err != nil {
		return err
	}
	for n := range 3 {
		subject := fmt.Sprintf("%s-%d", name, n)
		for _, step := range []struct{ line, want string }{
			{"MAIL FROM:<a@b.test>\r\n", "250"}, {"RCPT TO:<to@example.test>\r\n", "250"}, {"DATA\r\n", "354"}, {"Subject: " + subject + "\r\n\r\nbody\r\n.\r\n", "250"},
		} {
			if err := ask(step.line, step.want); err != nil {
				return err
			}
		}
		l.mu.Lock()
		l.taken = append(l.taken, subject)
		l.mu.Unlock()
	}
	return ask("QUIT\r\n", "221")
}
