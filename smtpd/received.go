package smtpd

import (
	"cmp"
	"crypto/tls"
	"strings"
	"time"
)

// maxHops is how many Received fields a message may have when it comes (RFC 5321 §6.3 wants at least 100 to be possible in
// theory; 50 is what others use, and more than any honest way has).
const maxHops = 50

// appendReceived appends the Received field for this transaction (RFC 5321 §4.4), with its CRLF.
func (c *conn) appendReceived(b []byte, id string, now time.Time) []byte {
	b = append(b, "Received: from "...)
	b = appendHost(b, c.helo)
	b = append(b, " ("...)
	b = append(b, cmp.Or(c.tx.envelope.Name, "unknown")...)
	if c.client.IsValid() { // a host in front of us may not know it
		b = append(b, ' ')
		b = append(b, addressLiteral(c.client.String(), c.client.Is6())...)
	}
	b = append(b, ")\r\n\tby "...)
	b = append(b, c.server.o.Hostname...)
	b = append(b, " with "...)
	b = append(b, c.protocol()...)
	b = append(b, " id "...)
	b = append(b, id...)
	if c.tls != nil {
		b = append(b, "\r\n\t("...)
		b = append(b, tls.VersionName(c.tls.Version)...)
		b = append(b, ' ')
		b = append(b, tls.CipherSuiteName(c.tls.CipherSuite)...)
		b = append(b, ')')
	}
	if to := c.tx.envelope.ForwardPaths; len(to) == 1 && to[0].IsASCII() {
		b = append(b, "\r\n\tfor <"...)
		b = append(b, to[0].String()...)
		b = append(b, '>')
	}
	b = append(b, ";\r\n\t"...)
	b = now.AppendFormat(b, time.RFC1123Z)
	return append(b, '\r', '\n')
}

// protocol is the "with" (RFC 3848, RFC 6531 §4.3).
func (c *conn) protocol() string {
	switch {
	case c.tx.envelope.SMTPUTF8 && c.tls != nil:
		return "UTF8SMTPS"
	case c.tx.envelope.SMTPUTF8:
		return "UTF8SMTP"
	case c.tls != nil:
		return "ESMTPS"
	case c.said.proto != nil:
		return *c.said.proto
	case c.esmtp:
		return "ESMTP"
	}
	return "SMTP"
}

// appendHost appends what a client called itself; whatever is not a letter, a digit or of "-._:[]" becomes a question mark.
func appendHost(b []byte, helo string) []byte {
	for i := 0; i < len(helo); i++ {
		x := helo[i]
		if 'a' <= x && x <= 'z' || 'A' <= x && x <= 'Z' || '0' <= x && x <= '9' || strings.IndexByte("-._:[]", x) >= 0 {
			b = append(b, x)
		} else {
			b = append(b, '?')
		}
	}
	return b
}

// addressLiteral is RFC 5321 §4.1.3.
func addressLiteral(addr string, v6 bool) string {
	if v6 {
		return "[IPv6:" + addr + "]"
	}
	return "[" + addr + "]"
}
