package smtpd

import (
	"crypto/tls"
	"testing"

	"mailproxy/config"
)

func TestADomainsMailIsTakenByTLSOnly(t *testing.T) {
	h := newHop(t)
	s := snapshot("one.test", h.addr())
	s.TLSSenders = []config.TLSSender{{Domain: "xn--bcher-kva.test"}, {Domain: "bank.test"}}
	g := newRig(t, s, func(o *Options) { o.TLS = selfSigned(t) })
	p := g.hello()
	for _, from := range []string{"a@bank.test", "A@BANK.Test", "a@xn--bcher-kva.test"} {
		p.ask("MAIL FROM:<"+from+">", "530 5.7.0")
	}
	p.ask("MAIL FROM:<a@b\u00fccher.test> SMTPUTF8", "530 5.7.0")
	p.ask("RCPT TO:<x@one.test>", "503")
	for _, from := range []string{"", "a@sub.bank.test", "a@other.test"} {
		p.ask("MAIL FROM:<"+from+">", "250")
		p.ask("RSET", "250")
	}
	p.startTLS(&tls.Config{InsecureSkipVerify: true})
	p.ask("EHLO client.test", "250")
	p.ask("MAIL FROM:<a@bank.test>", "250")
}

func TestOurNetworksMayHaveToUseTLS(t *testing.T) {
	s := with(snapshot(), "internal_require_tls", "yes")
	s.Networks = []config.Network{loopback}
	g := newRig(t, s, func(o *Options) { o.TLS = selfSigned(t) })
	p := g.hello()
	p.ask("MAIL FROM:<a@b.test>", "530 5.7.0")
	p.startTLS(&tls.Config{InsecureSkipVerify: true})
	p.ask("EHLO client.test", "250")
	p.ask("MAIL FROM:<a@b.test>", "250")
	g.use(with(snapshot(), "internal_require_tls", "yes"))
	p = g.hello() // a stranger now
	p.ask("MAIL FROM:<a@b.test>", "250")
}
