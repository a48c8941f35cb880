package queue

import (
	"context"
	"errors"
	"io"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/emersion/go-smtp"
	"github.com/rs/zerolog"

	"mailproxy/config"
	"mailproxy/mail"
	"mailproxy/relay"
)

func TestDamagedFilesAreSetAsideAndShown(t *testing.T) {
	for _, tt := range []struct {
		name   string
		damage func(b []byte) []byte
	}{
		{"a bit of the envelope", func(b []byte) []byte { b[headSize+5] ^= 1; return b }},
		{"a bit of the content", func(b []byte) []byte { b[len(b)-8] ^= 1; return b }},
		{"the end is missing", func(b []byte) []byte { return b[:len(b)-1] }},
		{"empty", func([]byte) []byte { return nil }},
		{"lengths of the head", func(b []byte) []byte { b[12] = 0xff; return b }},
	} {
		t.Run(tt.name, func(t *testing.T) {
			dir := t.TempDir()
			q := openTest(t, dir, nil)
			bad := q.mustPut(t, false, draft("from@a.test", "x@b.test"))[0]
			good := q.mustPut(t, false, draft("from@a.test", "good@b.test"))[0]
			q.Close()
			file := filepath.Join(dir, "item", bad)
			b, err := os.ReadFile(file)
			if err != nil {
				t.Fatal(err)
			}
			if err := os.WriteFile(file, tt.damage(b), 0o600); err != nil {
				t.Fatal(err)
			}
			q = openTest(t, dir, nil)
			q.run(t)
			waitFor(t, "the good one is delivered and the bad one gone", func() bool { return len(q.List()) == 0 })
			if calls := q.hop.attempts(); len(calls) != 1 || calls[0].Paths[0] != path("good@b.test") {
				t.Errorf("attempts %+v; good is %s", calls, good)
			}
			if got := names(t, filepath.Join(dir, "damaged")); !slices.Equal(got, []string{bad}) {
				t.Errorf("damaged/ has %v", got)
			}
			if err := q.Healthy(); !errors.Is(err, ErrDamaged) || q.Stats().Damaged != 1 {
				t.Errorf("Healthy: %v", err)
			}
			if !strings.Contains(q.log.String(), "spool.damaged") {
				t.Error("not in the log")
			}
		})
	}
}

func TestDamagedStateSetsItsItemAside(t *testing.T) {
	dir := t.TempDir()
	q := openTest(t, dir, nil)
	id := q.mustPut(t, false, draft("from@a.test", "x@b.test"))[0]
	q.Close()
	if err := os.WriteFile(filepath.Join(dir, "item", id+".state"), []byte("00000000 {}\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	q = openTest(t, dir, nil)
	if len(q.List()) != 0 || len(names(t, filepath.Join(dir, "damaged"))) != 2 || q.Stats().Damaged != 1 {
		t.Errorf("items %v, damaged/ %v", q.List(), names(t, filepath.Join(dir, "damaged")))
	}
}

func TestUnfinishedFilesAreRemovedAtStart(t *testing.T) {
	dir := t.TempDir()
	openTest(t, dir, nil).Close()
	if err := os.WriteFile(filepath.Join(dir, "new", "X"), []byte("half"), 0o600); err != nil {
		t.Fatal(err)
	}
	openTest(t, dir, nil)
	if !spoolIsEmpty(t, dir) {
		t.Error("new/ was not emptied")
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

func TestReleaseThatGoesWrongHalfWayCanBeDropped(t *testing.T) {
	dir := t.TempDir()
	q := openTest(t, dir, nil)
	ids := q.mustPut(t, true, draft("from@a.test", "x@b.test"), draft("from@a.test", "y@b.test"))
	if err := os.Remove(filepath.Join(dir, "item", ids[1]+".held")); err != nil {
		t.Fatal(err)
	}
	var r *mail.Reply
	if err := q.Release(ids); !errors.As(err, &r) || r.Code != 451 {
		t.Errorf("Release: %v", err)
	}
	if err := q.Drop(ids); err != nil {
		t.Error(err)
	}
	if len(q.List()) != 0 || !spoolIsEmpty(t, dir) {
		t.Error("something is left")
	}
}
