package smtpd

import (
	"cmp"
	"net/netip"
	"strings"

	"mailproxy/mail"
)

// maxHello bounds the name that a client gives itself (RFC 5321 §4.5.3.1.2).
const maxHello = 255

// xclientAttributes are what XCLIENT may say here, as EHLO offers them. The command is Postfix's (its XCLIENT_README); PORT, LOGIN and the
// destination say nothing that is used.
const xclientAttributes = "NAME ADDR PROTO HELO"

// An xclient is what a host that stands in front of us says of its client. Nil fields were not said.
type xclient struct {
	name  *string     // forward-confirmed name in the DNS; "" for none
	addr  *netip.Addr // the zero Addr where it is not known
	proto *string     // SMTP or ESMTP
	helo  *string     // "" where it is not known
}

// connected is who has the connection, as far as a balancer's PROXY header says: XCLIENT changes nothing in it.
func (c *conn) connected() netip.Addr {
	if c.front.IsValid() {
		return c.front
	}
	return c.client
}

// xclient goes over to the client that a listed host speaks for, and begins anew: the reply is the greeting, or refuses.
func (c *conn) xclient(rest string) *mail.Reply {
	rules := c.server.o.Rules()
	switch {
	case rules == nil:
		c.end(replyNotReady)
		return nil
	case !rules.Frontend(c.connected()):
		return replyXclient
	case c.tx != nil:
		return replyNested
	}
	x, ok := parseXclient(rest)
	if !ok {
		return replySyntax
	}
	if x.addr != nil {
		c.front = c.connected()
		if reply := c.server.reseat(c, netip.AddrPortFrom(*x.addr, 0), rules); reply != nil {
			c.abort(reply)
			return nil
		}
	}
	if x.name != nil {
		c.name = named(*x.name)
	}
	c.said.add(x)
	c.log.Info().Stringer("client", c.client).Stringer("frontend", c.connected()).Msg("session.client")
	// As at the beginning; go-smtp is told by the EHLO that nextCommand wants first.
	c.helo, c.esmtp = "", false
	return c.greeting()
}

// add keeps what was said before where x says nothing of it.
func (x *xclient) add(y xclient) {
	x.name, x.addr, x.proto, x.helo = cmp.Or(y.name, x.name), cmp.Or(y.addr, x.addr), cmp.Or(y.proto, x.proto), cmp.Or(y.helo, x.helo)
}

// parseXclient reads the attributes: NAME=value, separated by blanks, values in xtext (RFC 3461 §4). Each at most once.
func parseXclient(rest string) (x xclient, ok bool) {
	for attribute := range strings.FieldsSeq(rest) {
		name, text, _ := strings.Cut(attribute, "=")
		value, err := mail.ParseXtext(text)
		if err != nil || !x.set(strings.ToUpper(name), value) {
			return x, false
		}
	}
	return x, x != xclient{}
}

// set notes one attribute; false where it is none, is wrong, or was said before.
func (x *xclient) set(name, value string) bool {
	unknown := strings.EqualFold(value, "[UNAVAILABLE]") || name == "NAME" && strings.EqualFold(value, "[TEMPUNAVAIL]")
	if unknown {
		value = ""
	}
	switch {
	case name == "NAME" && x.name == nil && (unknown || isHostName(value)):
		x.name = &value
	case name == "ADDR" && x.addr == nil:
		addr, ok := xclientAddr(value)
		x.addr = &addr
		return ok || unknown
	case name == "PROTO" && x.proto == nil && (strings.EqualFold(value, "SMTP") || strings.EqualFold(value, "ESMTP")):
		value = strings.ToUpper(value)
		x.proto = &value
	case name == "HELO" && x.helo == nil && (unknown || value != "" && len(value) <= maxHello):
		value = printable(value)
		x.helo = &value
	default:
		return false
	}
	return true
}

// xclientAddr reads an IPv4 address, or one of IPv6 behind "IPV6:".
func xclientAddr(value string) (netip.Addr, bool) {
	const prefix = "IPV6:"
	text, v6 := value, len(value) > len(prefix) && strings.EqualFold(value[:len(prefix)], prefix)
	if v6 {
		text = value[len(prefix):]
	}
	addr, err := netip.ParseAddr(text)
	if err != nil || addr.Zone() != "" || addr.Is6() != v6 {
		return netip.Addr{}, false
	}
	return addr.Unmap(), true
}

// printable is a word of ASCII: xtext can have anything in it, and so can what clients call themselves.
func printable(s string) string {
	return strings.Map(func(r rune) rune {
		if r <= ' ' || r >= 0x7f {
			return '?'
		}
		return r
	}, s)
}

// isHostName: labels of letters, digits, hyphens and underscores, at most 253 octets in all. Whatever else a name out of the DNS has
// in it must not come into a header.
func isHostName(s string) bool {
	if s == "" || len(s) > 253 {
		return false
	}
	for label := range strings.SplitSeq(s, ".") {
		if label == "" || len(label) > 63 || strings.Trim(label, "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-_") != "" {
			return false
		}
	}
	return true
}
