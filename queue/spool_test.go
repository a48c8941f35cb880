package queue

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/emersion/go-smtp"
	"github.com/rs/zerolog"

	"mailproxy/config"
	"mailproxy/mail"
	"mailproxy/relay"
)

func TestADamagedMessageIsSetAsideAndShown(t *testing.T) {
	for _, tt := range []struct {
		name string
		from string // what is damaged
	}{
		{"of the envelope", "x@bad.test"},
		{"of the content", "the bad body"},
	} {
		for _, restarted := range []bool{true, false} {
			t.Run(fmt.Sprintf("a bit %s, restarted %v", tt.name, restarted), func(t *testing.T) {
				dir := t.TempDir()
				q := openTest(t, dir, nil)
				d := draft("from@a.test", "x@bad.test")
				d.Content = strings.NewReader("Subject: x\r\n\r\nthe bad body\r\n")
				q.mustPut(t, false, d)
				good := q.mustPut(t, false, draft("from@a.test", "good@b.test"))[0]
				files, err := filepath.Glob(filepath.Join(dir, "log", "*"))
				if err != nil || len(files) != 1 {
					t.Fatal(files, err)
				}
				b, err := os.ReadFile(files[0])
				if err != nil {
					t.Fatal(err)
				}
				f, err := os.OpenFile(files[0], os.O_WRONLY, 0)
				if err != nil {
					t.Fatal(err)
				}
				if _, err := f.WriteAt([]byte("X"), int64(bytes.Index(b, []byte(tt.from)))); err != nil {
					t.Fatal(err)
				}
				f.Close()
				if restarted {
					q.Close()
					q = openTest(t, dir, nil)
				}
				q.run(t)
				waitFor(t, "the good one is delivered and the bad one gone", func() bool { return len(q.List()) == 0 })
				if calls := q.hop.attempts(); len(calls) != 1 || calls[0].Paths[0] != path("good@b.test") {
					t.Errorf("attempts %+v; good is %s", calls, good)
				}
				if got := names(t, filepath.Join(dir, "damaged")); len(got) != 1 {
					t.Errorf("damaged/ has %v", got)
				}
				if err := q.Whole(); !errors.Is(err, ErrDamaged) || q.Stats().Damaged != 1 || q.Healthy() != nil {
					t.Errorf("Whole: %v; Healthy: %v", err, q.Healthy())
				}
				if !strings.Contains(q.log.String(), "spool.damaged") {
					t.Errorf("not in the log: %s", q.log)
				}
			})
		}
	}
}

func TestPutThatCannotReadItsContentLeavesNothing(t *testing.T) {
	dir := t.TempDir()
	q := openTest(t, dir, nil)
	bad := draft("from@a.test", "y@b.test")
	bad.Content = brokenContent{}
	_, err := q.Put(context.Background(), []Draft{draft("from@a.test", "x@b.test"), bad}, false)
	var reply *mail.Reply
	if !errors.As(err, &reply) || reply.Code != 451 || reply.Status() != "4.3.0" {
		t.Errorf("error %v", err)
	}
	if len(q.List()) != 0 || !spoolIsEmpty(t, dir) {
		t.Error("something is left")
	}
	if err := q.Healthy(); err != nil {
		t.Errorf("the spool has no part in it: %v", err)
	}
}

type brokenContent struct{}

func (brokenContent) ReadAt([]byte, int64) (int, error) { return 0, errors.New("broken") }
func (brokenContent) Size() int64                       { return 1000 }

// taker is a real SMTP server's session that keeps what it takes.
type taker struct {
	got  chan string
	from string
	to   []string
}

func (s *taker) NewSession(*smtp.Conn) (smtp.Session, error) { return &taker{got: s.got}, nil }
func (s *taker) Reset()                                      { s.from, s.to = "", nil }
func (s *taker) Logout() error                               { return nil }
func (s *taker) Mail(from string, _ *smtp.MailOptions) error { s.from = from; return nil }

func (s *taker) Rcpt(to string, _ *smtp.RcptOptions) error {
	if strings.HasPrefix(to, "no") {
		return &smtp.SMTPError{Code: 550, EnhancedCode: smtp.EnhancedCode{5, 1, 1}, Message: "no such user"}
	}
	s.to = append(s.to, to)
	return nil
}

func (s *taker) Data(r io.Reader) error {
	b, err := io.ReadAll(r)
	s.got <- s.from + " " + strings.Join(s.to, ",") + "\n" + string(b)
	return err
}

// From the spool through the real relay into a real server, and the DSN of what it refuses.
func TestSpoolToServer(t *testing.T) {
	b := &taker{got: make(chan string, 10)}
	srv := smtp.NewServer(b)
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan struct{})
	go func() { _ = srv.Serve(l); close(done) }()
	t.Cleanup(func() { srv.Close(); <-done })
	client := relay.New(relay.Options{Hostname: "mx.test", Log: zerolog.Nop()})
	defer client.Close()
	dir := t.TempDir()
	q, err := Open(Options{Dir: dir, Relay: client, Hostname: "mx.test", Route: func(mail.Path) (config.Transport, *mail.Reply) {
		return config.Transport{Name: "t", Hosts: []string{l.Addr().String()}}, nil
	}})
	if err != nil {
		t.Fatal(err)
	}
	defer q.Close()
	tq := &testQueue{Queue: q}
	tq.mustPut(t, false, draft("from@a.test", "x@b.test", "no@b.test"))
	stop := tq.run(t)
	if got := <-b.got; got != "from@a.test x@b.test\n"+body {
		t.Errorf("arrived: %q", got)
	}
	if got := <-b.got; !strings.HasPrefix(got, " from@a.test\n") || !strings.Contains(got, "Final-Recipient: rfc822; no@b.test") {
		t.Errorf("arrived: %q", got)
	}
	waitFor(t, "the queue is empty", func() bool { return len(q.List()) == 0 })
	stop()
	if !spoolIsEmpty(t, dir) {
		t.Error("spool is not empty")
	}
}

// An item that was spooled, and tried once, before there were DSN parameters: it is read as it was, and its sender is told as one that
// did not say of what it wants to hear.
func TestAnItemFromBeforeDSNParametersIsRead(t *testing.T) {
	dir := t.TempDir()
	b, err := os.ReadFile("testdata/before-dsn.segment")
	if err != nil {
		t.Fatal(err)
	}
	if err := os.MkdirAll(filepath.Join(dir, "log"), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, "log", "0000000000000001"), b, 0o600); err != nil {
		t.Fatal(err)
	}
	q := openTest(t, dir, nil)
	l := q.List()
	if len(l) != 1 || len(l[0].ForwardPaths) != 1 || l[0].ForwardPaths[0] != path("later@b.test") || l[0].Attempts != 1 ||
		l[0].LastReply != "451 4.7.1 try later" {
		t.Fatalf("read: %+v", l)
	}
	q.o.Now = func() time.Time { return l[0].Created.Add(5 * time.Hour) }
	q.run(t)
	waitFor(t, "it was tried, and its sender told", func() bool {
		l := q.List()
		return len(l) == 1 && l[0].Attempts == 2 && !l[0].Busy && q.Stats().DSNs == 1 && q.Stats().Sent == 1
	})
	a := q.hop.attempts()[0]
	if e := a.Envelope; a.Params != nil || !e.SMTPUTF8 || !e.EightBit || e.Return != "" || e.EnvID != "" || e.Client != netip.MustParseAddr("192.0.2.1") {
		t.Errorf("%+v", a)
	}
}
