package smtpd

import (
	"bufio"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"io"
	"math/big"
	"strings"
	"syscall"
	"testing"
	"time"
)

func selfSigned(t testing.TB) *tls.Config {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{SerialNumber: big.NewInt(1), DNSNames: []string{"mx.test"}, NotAfter: time.Now().Add(time.Hour)}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	return &tls.Config{Certificates: []tls.Certificate{{Certificate: [][]byte{der}, PrivateKey: key}}}
}

// startTLS goes over to TLS.
func (p *peer) startTLS(cfg *tls.Config) *tls.Conn {
	p.t.Helper()
	p.ask("STARTTLS", "220")
	c := tls.Client(p.Conn, cfg)
	if err := c.Handshake(); err != nil {
		p.t.Fatal(err)
	}
	p.Conn, p.r = c, bufio.NewReader(c)
	return c
}

func TestStartTLS(t *testing.T) {
	h := newHop(t)
	g := newRig(t, snapshot("one.test", h.addr()), func(o *Options) { o.TLS = selfSigned(t) })
	cache := tls.NewLRUClientSessionCache(10)
	cfg := &tls.Config{InsecureSkipVerify: true, ServerName: "mx.test", ClientSessionCache: cache}
	for range 2 {
		p := g.dial()
		p.want("220")
		p.ask("STARTTLS", "503")
		if got := p.ask("EHLO client.test", "250"); !strings.Contains(got, "250-STARTTLS") {
			t.Errorf("not offered: %s", got)
		}
		p.ask("STARTTLS now", "501")
		p.ask("MAIL FROM:<before@sender.test>", "250")
		p.ask("RCPT TO:<before@one.test>", "250")
		c := p.startTLS(cfg)
		if c.ConnectionState().DidResume {
			t.Error("resumed: session tickets are on")
		}
		p.ask("MAIL FROM:<a@sender.test>", "503 5.5.1 EHLO first") // all that was said in clear is forgotten
		if got := p.ask("EHLO client.test", "250"); strings.Contains(got, "STARTTLS") || strings.Contains(got, "CHUNKING") {
			t.Errorf("offered again: %s", got)
		}
		p.ask("STARTTLS", "503")
		p.begin("x@one.test")
		p.send("x\r\n.\r\nQUIT\r\n")
		p.want("250")
		p.want("221")
		p.wantEnd()
	}
	m := h.messages()
	if len(m) != 2 || len(m[0].to) != 1 || m[0].from != "<a@sender.test>" || !strings.Contains(m[0].wire, " with ESMTPS id ") ||
		!strings.Contains(m[0].wire, "\r\n\t(TLS 1.3 TLS_") {
		t.Errorf("%+v", m)
	}
}

func TestTextBehindSTARTTLSIsRefused(t *testing.T) {
	g := newRig(t, snapshot(), func(o *Options) { o.TLS = selfSigned(t) })
	p := g.hello()
	p.send("STARTTLS\r\nMAIL FROM:<evil@test>\r\n")
	p.want("554 5.5.0")
	p.wantEnd()
}

func TestFailedHandshakeEndsTheSession(t *testing.T) {
	g := newRig(t, snapshot(), func(o *Options) {
		o.TLS = selfSigned(t)
		o.TLS.MinVersion = tls.VersionTLS10
	})
	p := g.hello()
	p.ask("STARTTLS", "220")
	p.send("MAIL FROM:<evil@test>\r\nNOOP\r\nNOOP\r\n")
	if said, err := io.ReadAll(p.r); err != nil && !errors.Is(err, syscall.ECONNRESET) || strings.Contains(string(said), "250") {
		t.Errorf("goes on: %q, %v", said, err)
	}
	waitFor(t, "it is counted", func() bool { return g.server.Stats().TLSFailed == 1 })
	old := g.hello()
	old.ask("STARTTLS", "220")
	if err := tls.Client(old.Conn, &tls.Config{InsecureSkipVerify: true, MinVersion: tls.VersionTLS10, MaxVersion: tls.VersionTLS11}).Handshake(); err == nil {
		t.Error("TLS 1.1 is spoken")
	}
}

func TestClientGoneBeforeTheDotIsSeenUnderTLSToo(t *testing.T) {
	h := newHop(t)
	h.holdData = make(chan struct{})
	g := newRig(t, snapshot("one.test", h.addr()), func(o *Options) { o.TLS = selfSigned(t) })
	p := g.hello()
	p.startTLS(&tls.Config{InsecureSkipVerify: true})
	p.ask("EHLO client.test", "250")
	p.begin("x@one.test")
	p.send("x\r\n.\r\n")
	<-h.dataSeen
	p.Close()
	waitFor(t, "the message is dropped", func() bool { return g.server.Stats().Gone == 1 })
	close(h.holdData)
	waitFor(t, "the next hop sees no dot", func() bool { return h.cuts() == 1 })
}
