package main

import (
	"bytes"
	"crypto/tls"
	"fmt"
	"io"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"

	"github.com/emersion/go-sasl"
	"github.com/emersion/go-smtp"
)

// A smarthost takes mail from who has logged in, inside TLS.
type smarthost struct {
	mu       sync.Mutex
	password string
	taken    int
	refused  int
}

type smarthostSession struct {
	s    *smarthost
	user string
}

func (s *smarthost) NewSession(*smtp.Conn) (smtp.Session, error) { return &smarthostSession{s: s}, nil }

func (s *smarthostSession) AuthMechanisms() []string { return []string{sasl.Plain} }

func (s *smarthostSession) Auth(string) (sasl.Server, error) {
	return sasl.NewPlainServer(func(_, user, password string) error {
		s.s.mu.Lock()
		defer s.s.mu.Unlock()
		if user != "us@example.net" || password != s.s.password {
			s.s.refused++
			return smtp.ErrAuthFailed
		}
		s.user = user
		return nil
	}), nil
}

func (s *smarthostSession) Mail(string, *smtp.MailOptions) error {
	if s.user == "" {
		return smtp.ErrAuthRequired
	}
	return nil
}
func (s *smarthostSession) Rcpt(string, *smtp.RcptOptions) error { return nil }
func (s *smarthostSession) Data(r io.Reader) error {
	if _, err := io.Copy(io.Discard, r); err != nil {
		return err
	}
	s.s.mu.Lock()
	defer s.s.mu.Unlock()
	s.s.taken++
	return nil
}
func (s *smarthostSession) Reset()        {}
func (s *smarthostSession) Logout() error { return nil }

func (s *smarthost) counts() (taken, refused int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.taken, s.refused
}

func (s *smarthost) set(password string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.password = password
}

func TestASmarthostIsLoggedInToAlsoWithoutADatabase(t *testing.T) {
	n := newNode(t)
	n.start()
	n.waitHealthy()
	certificate, err := tls.LoadX509KeyPair(tlsFile(n.local), tlsFile(n.local))
	if err != nil {
		t.Fatal(err)
	}
	host := &smarthost{password: "hunter2"}
	server := smtp.NewServer(host)
	server.TLSConfig = &tls.Config{Certificates: []tls.Certificate{certificate}}
	l, err := net.Listen("tcp", freePort(t))
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan struct{})
	go func() { defer close(done); _ = server.Serve(l) }()
	t.Cleanup(func() { _ = server.Close(); <-done })

	secret := filepath.Join(n.dir, "secret")
	store := func(value string) {
		t.Helper()
		if err := os.WriteFile(secret, []byte(value), 0o600); err != nil {
			t.Fatal(err)
		}
		n.must("secret", "set", "smtp-password", "--file", secret)
	}
	store("hunter2")
	n.must("transport", "add", "smart", "--to", l.Addr().String(), "--tls", "encrypt", "--user", "us@example.net", "--password", "secret:smtp-password")
	n.must("domain", "add", "example.test", "--transport", "smart")
	n.must("setting", "set", "outbound_transport", "smart")
	arrives := func(what string) {
		t.Helper()
		before, _ := host.counts()
		eventually(t, func() error {
			if err := n.tryMail("to@example.test"); err != nil {
				return err
			}
			if taken, refused := host.counts(); taken <= before {
				return fmt.Errorf("%s: %d messages there, %d logins refused", what, taken, refused)
			}
			return nil
		})
	}
	arrives("with the first password")

	// Another password on both sides is taken up without a restart; the connections that are kept are those of the login before.
	host.set("hunter3")
	store("hunter3")
	// What ends the daemon as soon as the command has ended finds it in the file.
	n.signal(syscall.SIGKILL)
	n.wait()
	file := opened{file: n.local.SecretsFile(), keyDir: n.local.KeyDir()}
	if err := file.start(); err != nil || string(file.values["smtp-password"]) != "hunter3" {
		t.Errorf("in the file: %q, %v", file.values["smtp-password"], err)
	}
	info, err := os.Stat(file.file)
	if err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("%v, %v", info, err)
	}
	n.start() // takes the database that was left running, and stops it
	n.waitDatabase()
	n.stop()

	// PostgreSQL does not come up any more.
	text, err := os.ReadFile(n.file)
	if err != nil {
		t.Fatal(err)
	}
	text = bytes.Replace(text, []byte("[database]\n"), []byte("[database]\nbin = \"/nonexistent\"\n"), 1)
	if err := os.WriteFile(n.file, text, 0o640); err != nil {
		t.Fatal(err)
	}
	log := n.stderr.String()
	n.start()
	arrives("without a database")
	if _, refused := host.counts(); refused != 0 {
		t.Errorf("%d logins with a wrong password", refused)
	}
	n.stop()
	if log += n.stderr.String(); strings.Contains(log, "hunter") || strings.Contains(log, "aHVudGVy") {
		t.Error("the password is in the log")
	}
	for _, dir := range []string{n.local.StateDir, n.local.RunDir} {
		_ = filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
			if err != nil || !d.Type().IsRegular() {
				return err
			}
			if b, err := os.ReadFile(path); err == nil && bytes.Contains(b, []byte("hunter")) {
				t.Errorf("the password is in %s", path)
			}
			return nil
		})
	}
}
