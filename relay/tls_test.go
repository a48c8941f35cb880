package relay

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"errors"
	"io"
	"math/big"
	"net"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/emersion/go-smtp"

	"mailproxy/config"
	"mailproxy/mail"
)

// certificate makes a self-signed one for localhost, and the pool that trusts it.
func certificate(t *testing.T) (tls.Certificate, *x509.CertPool) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "localhost"}, DNSNames: []string{"localhost"},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour), IsCA: true, BasicConstraintsValid: true,
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, &key.PublicKey, key)
	if err != nil {
		t.Fatal(err)
	}
	leaf, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	pool := x509.NewCertPool()
	pool.AddCert(leaf)
	return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}, pool
}

// backend is a receiving server of go-smtp's.
type backend struct {
	mu          sync.Mutex
	got         []received
	eachSession func(c *smtp.Conn)
}

type received struct {
	from string
	to   []string
	body []byte
	utf8 bool
	tls  bool
}

func (b *backend) NewSession(c *smtp.Conn) (smtp.Session, error) {
	if b.eachSession != nil {
		b.eachSession(c)
	}
	return &session{b: b, c: c}, nil
}

type session struct {
	b *backend
	c *smtp.Conn
	m received
}

func (s *session) Reset()        { s.m = received{} }
func (s *session) Logout() error { return nil }
func (s *session) Mail(from string, o *smtp.MailOptions) error {
	_, isTLS := s.c.TLSConnectionState()
	s.m = received{from: from, utf8: o.UTF8, tls: isTLS}
	return nil
}

func (s *session) Rcpt(to string, _ *smtp.RcptOptions) error {
	if strings.HasPrefix(to, "no") {
		return &smtp.SMTPError{Code: 550, EnhancedCode: smtp.EnhancedCode{5, 1, 1}, Message: "no such user"}
	}
	s.m.to = append(s.m.to, to)
	return nil
}

func (s *session) Data(r io.Reader) (err error) {
	if s.m.body, err = io.ReadAll(r); err != nil {
		return err
	}
	s.b.mu.Lock()
	defer s.b.mu.Unlock()
	s.b.got = append(s.b.got, s.m)
	return nil
}

func (b *backend) messages() []received {
	b.mu.Lock()
	defer b.mu.Unlock()
	return append([]received(nil), b.got...)
}

// smtpServer runs go-smtp on loopback.
func smtpServer(t testing.TB, b *backend, change func(*smtp.Server)) (addr string) {
	t.Helper()
	srv := smtp.NewServer(b)
	srv.Domain, srv.EnableSMTPUTF8, srv.MaxLineLength = "hop.test", true, 1<<20
	if change != nil {
		change(srv)
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan struct{})
	go func() { _ = srv.Serve(l); close(done) }()
	t.Cleanup(func() { srv.Close(); <-done })
	return l.Addr().String()
}

func TestRealServerGetsEveryOctet(t *testing.T) {
	b := &backend{}
	addr := smtpServer(t, b, nil)
	c := testClient(t, nil)
	bodies := []string{
		"", "\r\n", ".\r\n", "..\r\n.\r\n...\r\n", "a\r\n.\r\nb\r\n", strings.Repeat("x", 70000) + "\r\n",
		strings.Repeat(".\r\n", 50000), strings.Repeat("y", 16<<10-1) + "\r\n.z\r\n", strings.Repeat("y", 16<<10-2) + "\r\n.z\r\n",
		"Subject: \xfc\xff 8-bit\r\n\r\n\x80\xfe\r\n",
	}
	for i, body := range bodies {
		got, err := c.Deliver(bg(), attempt(addr, body, "x@b.test", "no@b.test"))
		if err != nil || got[0].Reply.Code != 250 || got[1].Reply.String() != "550 5.1.1 no such user" {
			t.Fatalf("body %d: %s, %v", i, summary(got), err)
		}
		if m := b.messages(); len(m) != i+1 || !bytes.Equal(m[i].body, []byte(body)) {
			t.Fatalf("body %d of %d octets arrived as %d messages, %.100q", i, len(body), len(m), m[len(m)-1].body)
		}
	}
}

func TestSMTPUTF8IsAskedForWhereItIsOffered(t *testing.T) {
	b := &backend{}
	addr := smtpServer(t, b, nil)
	got, err := testClient(t, nil).Deliver(bg(), attempt(addr, "a\r\n", "ü@b.test"))
	if err != nil || got[0].Reply.Code != 250 || !b.messages()[0].utf8 || b.messages()[0].to[0] != "ü@b.test" {
		t.Errorf("got %s, %v, %+v", summary(got), err, b.messages())
	}
	s := newScript(t, hello)
	a := attempt(s.addr(), "a\r\n", "x@b.test")
	a.Envelope = &mail.Envelope{ReversePath: path("ü@a.test")}
	if got, err = testClient(t, nil).Deliver(bg(), a); err != nil || got[0].Reply.Status() != "5.6.7" || got[0].Reply.Cause == nil {
		t.Errorf("got %s, %v", summary(got), err)
	}
}

func TestTLSPolicies(t *testing.T) {
	cert, roots := certificate(t)
	tlsServer := func(t *testing.T) (string, *backend) {
		b := &backend{}
		return smtpServer(t, b, func(s *smtp.Server) { s.TLSConfig = &tls.Config{Certificates: []tls.Certificate{cert}} }), b
	}
	plainServer := func(t *testing.T) (string, *backend) {
		b := &backend{}
		return smtpServer(t, b, nil), b
	}
	broken := func(t *testing.T) (string, *backend) { // offers TLS, and its handshake fails
		b := &backend{}
		return smtpServer(t, b, func(s *smtp.Server) { s.TLSConfig = &tls.Config{} }), b
	}
	asLocalhost := func(addr string) string {
		_, port, _ := net.SplitHostPort(addr)
		return net.JoinHostPort("localhost", port)
	}
	for _, tt := range []struct {
		name   string
		server func(*testing.T) (string, *backend)
		policy config.TLS
		roots  *x509.CertPool
		host   func(string) string
		want   string // tls, clear, or the stage where it is out of reach
	}{
		{"none stays in clear", tlsServer, config.TLSNone, nil, nil, "clear"},
		{"may takes any certificate", tlsServer, config.TLSMay, nil, nil, "tls"},
		{"the empty policy is may", tlsServer, "", nil, nil, "tls"},
		{"may stays in clear where it is not offered", plainServer, config.TLSMay, nil, nil, "clear"},
		{"may falls back to a fresh connection in clear", broken, config.TLSMay, nil, nil, "clear"},
		{"encrypt takes any certificate", tlsServer, config.TLSEncrypt, nil, nil, "tls"},
		{"encrypt wants it offered", plainServer, config.TLSEncrypt, nil, nil, "starttls"},
		{"encrypt wants the handshake", broken, config.TLSEncrypt, nil, nil, "starttls"},
		{"verify refuses an unknown issuer", tlsServer, config.TLSVerify, x509.NewCertPool(), asLocalhost, "starttls"},
		{"verify refuses another name", tlsServer, config.TLSVerify, roots, nil, "starttls"},
		{"verify takes the right name", tlsServer, config.TLSVerify, roots, asLocalhost, "tls"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			addr, b := tt.server(t)
			c := testClient(t, func(o *Options) { o.RootCAs = tt.roots })
			if tt.host != nil {
				addr = tt.host(addr)
			}
			a := attempt(addr, "hello\r\n", "x@b.test")
			a.Transport.TLS = tt.policy
			for range 2 { // the second on the kept connection
				got, err := c.Deliver(bg(), a)
				var out *OutOfReach
				if errors.As(err, &out) {
					if out.Stage.String() != tt.want {
						t.Fatalf("out of reach: %v; want %s", err, tt.want)
					}
					continue
				}
				if err != nil || got[0].Reply.Code != 250 {
					t.Fatalf("got %s, %v", summary(got), err)
				}
				m := b.messages()
				if m[len(m)-1].tls != (tt.want == "tls") || tt.want == "starttls" {
					t.Errorf("arrived over TLS: %v; want %s", m[len(m)-1].tls, tt.want)
				}
			}
		})
	}
}

func TestWhatWasOfferedInClearCountsForNothingInsideTLS(t *testing.T) {
	cert, _ := certificate(t)
	s := newScript(t, "S: 220 a\nC: EHLO test.example\n"+`S: 250-a\r\n250-PIPELINING\r\n250-SIZE\r\n250-8BITMIME\r\n250 STARTTLS`+`
C: STARTTLS
S: 220 go
tls
C: EHLO test.example
S: 250 a
C: MAIL FROM:<from@a.test>
S: 250 ok
C: RCPT TO:<x@b.test>
S: 250 ok
C: DATA
S: 354 go
C: hello
C: .
S: 250 taken`)
	s.tls = &tls.Config{Certificates: []tls.Certificate{cert}}
	a := attempt(s.addr(), "hello\r\n", "x@b.test")
	a.Transport.TLS = config.TLSEncrypt
	a.Envelope.EightBit = true
	if got, err := testClient(t, nil).Deliver(bg(), a); err != nil || summary(got) != "dot 250 taken" {
		t.Errorf("got %s, %v", summary(got), err)
	}
}

func TestDataBehindTheReplyToStartTLSDropsTheConnection(t *testing.T) {
	s := newScript(t, "S: 220 a\nC: EHLO test.example\n"+`S: 250-a\r\n250 STARTTLS`+"\nC: STARTTLS\n"+`S: 220 go\r\n250 injected`+"\nhang")
	a := attempt(s.addr(), "hello\r\n", "x@b.test")
	a.Transport.TLS = config.TLSMay
	var out *OutOfReach
	if _, err := testClient(t, nil).Deliver(bg(), a); !errors.As(err, &out) || out.Stage != StageStartTLS || !errors.Is(err, ErrProtocol) {
		t.Errorf("got %v", err)
	}
	s.l.Close()
	if n := s.connections(); n != 1 {
		t.Errorf("%d connections: no second try in clear for what may be an attack", n)
	}
}

func TestStartTLSRefusedFallsBackToClear(t *testing.T) {
	s := newScript(t, "S: 220 a\nC: EHLO test.example\n"+`S: 250-a\r\n250 STARTTLS`+"\nC: STARTTLS\nS: 454 4.7.0 not now", hello+one)
	a := attempt(s.addr(), "hello\r\n", "x@b.test")
	a.Transport.TLS = config.TLSMay
	if got, err := testClient(t, nil).Deliver(bg(), a); err != nil || summary(got) != "dot 250 taken" {
		t.Errorf("got %s, %v", summary(got), err)
	}
}

func TestContextEndInTheHandshake(t *testing.T) {
	s := newScript(t, "S: 220 a\nC: EHLO test.example\n"+`S: 250-a\r\n250 STARTTLS`+"\nC: STARTTLS\nS: 220 go\nhang")
	a := attempt(s.addr(), "hello\r\n", "x@b.test")
	a.Transport.TLS = config.TLSMay
	ctx, cancel := context.WithTimeout(bg(), 50*time.Millisecond)
	defer cancel()
	if _, err := testClient(t, nil).Deliver(ctx, a); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("got %v", err)
	}
}
