package relay

import (
	"bytes"
	"encoding/base64"
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"

	"mailproxy/config"
)

var (
	errInClear   = errors.New("a password is not sent in clear")
	errNoLogin   = errors.New("a login is wanted, and neither AUTH PLAIN nor LOGIN is offered")
	errNoSecret  = errors.New("no secrets are there")
	errNoXClient = errors.New("XCLIENT is wanted and not offered")
)

// login says who we are (RFC 4954), inside TLS and nowhere else.
func (c *conn) login(o *Client) error {
	if c.nc == c.raw {
		return errInClear
	}
	if o.secret == nil {
		return errNoSecret
	}
	password, err := o.secret(c.hop.secret)
	if err != nil {
		return fmt.Errorf("secret %s: %w", c.hop.secret, err)
	}
	password = bytes.TrimRight(password, "\r\n") // of a file that an editor or echo has written
	switch {
	case slices.Contains(c.caps.auth, "PLAIN"): // RFC 4616
		return c.say("AUTH PLAIN "+encoded("\x00"+c.hop.user+"\x00"+string(password)), 235)
	case slices.Contains(c.caps.auth, "LOGIN"):
		for _, step := range []struct {
			line string
			code int
		}{{"AUTH LOGIN", 334}, {encoded(c.hop.user), 334}, {encoded(string(password)), 235}} {
			if err := c.say(step.line, step.code); err != nil {
				return err
			}
		}
		return nil
	}
	return errNoLogin
}

func encoded(s string) string { return base64.StdEncoding.EncodeToString([]byte(s)) }

// say sends a line of a login and wants a code.
func (c *conn) say(line string, code int) error {
	reply, err := c.ask(StageAuth, c.t.Mail, line)
	if err == nil && reply.Code != code {
		err = refusal(reply)
	}
	return err
}

// xclient tells the hop who our client is, as Postfix has it (XCLIENT_README); the session begins anew with another EHLO, which is the
// client's. For a message that was made here there is nobody to speak for.
func (c *conn) xclient(o *Client) error {
	if !c.hop.client.IsValid() {
		return nil
	}
	if len(c.caps.xclient) == 0 {
		return errNoXClient
	}
	line, name := "XCLIENT", "[UNAVAILABLE]"
	if isPlainName(c.hop.name) {
		name = c.hop.name
	}
	for _, attribute := range []struct{ name, value string }{
		{"NAME", name}, {"ADDR", xclientAddr(c.hop.client.Addr())}, {"PROTO", "ESMTP"},
	} {
		if slices.Contains(c.caps.xclient, attribute.name) {
			line += " " + attribute.name + "=" + attribute.value
		}
	}
	reply, err := c.ask(StageEhlo, c.t.Ehlo, line)
	if err == nil && reply.Code != 220 {
		err = refusal(reply)
	}
	if err != nil {
		return err
	}
	if isPlainName(c.hop.helo) {
		return c.ehlo(c.hop.helo)
	}
	return c.ehlo(o.hostname)
}

// isPlainName says whether a client's name can stand in a command as it is: a host name or an address literal.
func isPlainName(s string) bool {
	return s != "" && len(s) <= 255 && !strings.ContainsFunc(s, func(r rune) bool {
		return !('a' <= r && r <= 'z' || 'A' <= r && r <= 'Z' || '0' <= r && r <= '9' || strings.ContainsRune(".-_:[]", r))
	})
}

func xclientAddr(a netip.Addr) string {
	if a.Is4() {
		return a.String()
	}
	return "IPV6:" + a.WithZone("").String()
}

// proxySignature begins a header of the PROXY protocol, version 2 (HAProxy's proxy-protocol.txt §2.2).
const proxySignature = "\r\n\r\n\x00\r\nQUIT\n"

// proxyHeader says who our client is to a hop that is at to; a port that is not known is 0. For a message that was made here the header
// says so (LOCAL).
func proxyHeader(client, to netip.AddrPort) []byte {
	b := []byte(proxySignature)
	if !client.IsValid() {
		return append(b, 0x20, 0x00, 0, 0)
	}
	from, hop := client.Addr().WithZone(""), to.Addr().WithZone("")
	if from.Is4() && hop.Is4() {
		b = append(b, 0x21, 0x11, 0, 12) // PROXY, TCP over IPv4
	} else {
		b = append(b, 0x21, 0x21, 0, 36)
		a, h := from.As16(), hop.As16()
		from, hop = netip.AddrFrom16(a), netip.AddrFrom16(h)
	}
	b = append(append(b, from.AsSlice()...), hop.AsSlice()...)
	b = binary.BigEndian.AppendUint16(b, client.Port())
	return binary.BigEndian.AppendUint16(b, to.Port())
}

// introduce sends what goes before the greeting.
func (c *conn) introduce() error {
	if c.hop.tell != config.TellProxy {
		return nil
	}
	to, err := netip.ParseAddrPort(c.raw.RemoteAddr().String())
	if err != nil {
		return err
	}
	return c.write(proxyHeader(c.hop.client, netip.AddrPortFrom(to.Addr().Unmap(), to.Port())))
}
