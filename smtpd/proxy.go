package smtpd

import (
	"cmp"
	"encoding/binary"
	"errors"
	"io"
	"net/netip"
	"os"
	"strconv"
	"strings"
	"time"

	"mailproxy/mail"
)

// Bounds on what a balancer says in front of a session (the PROXY protocol of HAProxy, versions 1 and 2).
const (
	proxyTime  = 5 * time.Second // for all of the header to come
	proxyV1Max = 107             // octets of a header of version 1, with its CRLF
	proxyV2Max = 1024            // octets behind the fixed part of version 2: addresses and what else is said
	proxyFixed = 16              // octets of the fixed part
)

const proxySignature = "\r\n\r\n\x00\r\nQUIT\n"

var errProxyHeader = errors.New("bad PROXY header")

// headlessTime is how long a balancer that said no header is named.
const headlessTime = 5 * time.Minute

// A headless is the last balancer that said something else, or waited to be greeted. One that only connects, as checks do, is none.
type headless struct {
	addr netip.Addr
	at   time.Time
}

// Headless gives a listed balancer that has come without a PROXY header in the last 5 minutes; the zero Addr where there is none.
func (s *Server) Headless(now time.Time) netip.Addr {
	if h := s.balancer.Load(); h != nil && now.Sub(h.at) < headlessTime {
		return h.addr
	}
	return netip.Addr{}
}

// proxied reads what the balancer says of its client, and takes that client in. Without a header, in time, the session ends without a
// word: whoever is there is not known.
func (c *conn) proxied() bool {
	from, itself, err := netip.AddrPort{}, false, c.base.SetReadDeadline(time.Now().Add(proxyTime))
	if err == nil && !c.server.sessions.isDraining() { // in this order, as in fill
		from, itself, err = readProxyHeader(c.base)
	}
	if c.server.sessions.isDraining() { // which may be what woke us
		c.refused(replyDraining)
		return false
	}
	if err != nil {
		if errors.Is(err, errProxyHeader) || errors.Is(err, os.ErrDeadlineExceeded) {
			c.server.balancer.Store(&headless{c.client, time.Now()})
		}
		if n := c.server.headless.met(time.Now()); n > 0 { // a check that only connects comes every second
			c.log.Warn().Stringer("balancer", c.client).Uint64("count", n).Err(err).Msg("session.proxy_refused")
		}
		c.hangUp()
		return false
	}
	if itself {
		from = netip.AddrPortFrom(c.client, c.port)
	}
	rules := c.server.o.Rules()
	reply := replyNotReady
	if rules != nil {
		reply = c.server.reseat(c, from, rules)
	}
	if reply != nil {
		c.refused(reply)
		return false
	}
	c.opens()
	return true
}

// refused ends a session that is not taken with a reply in place of the greeting, unless the client waits for a TLS handshake.
func (c *conn) refused(reply *mail.Reply) {
	c.out = nil
	c.server.count.refused.Add(1)
	if c.kind.TLS {
		c.phase = phaseEnded
		return
	}
	c.linger = true
	c.end(reply)
}

// readProxyHeader reads one header and not an octet more. It gives the client's address and port; the zero AddrPort where the balancer does
// not know it (UNKNOWN, UNSPEC), and where it speaks for itself, as its health checks do (LOCAL). The former is nobody: what a balancer in
// our networks may do, its clients may not. Whatever is not exactly a header is errProxyHeader, or the error of r.
func readProxyHeader(r io.Reader) (from netip.AddrPort, itself bool, err error) {
	var b [proxyFixed + proxyV2Max]byte
	head := b[:len(proxySignature)] // no header of either version is shorter
	if _, err := io.ReadFull(r, head); err != nil {
		return from, false, err
	}
	if string(head) != proxySignature {
		from, err = readProxyV1(r, b[:len(head)])
		return from, false, err
	}
	if _, err := io.ReadFull(r, b[len(head):proxyFixed]); err != nil {
		return from, false, err
	}
	n := int(binary.BigEndian.Uint16(b[14:]))
	if n > proxyV2Max {
		return from, false, errProxyHeader
	}
	if _, err := io.ReadFull(r, b[proxyFixed:proxyFixed+n]); err != nil {
		return from, false, err
	}
	return parseProxyV2(b[12], b[13], b[proxyFixed:proxyFixed+n])
}

// readProxyV1 reads on to the end of a line, an octet at a time: what stands behind it is not ours to read.
func readProxyV1(r io.Reader, line []byte) (netip.AddrPort, error) {
	if !strings.HasPrefix(string(line), "PROXY ") {
		return netip.AddrPort{}, errProxyHeader
	}
	for line[len(line)-1] != '\n' {
		if len(line) == proxyV1Max {
			return netip.AddrPort{}, errProxyHeader
		}
		line = line[:len(line)+1]
		if _, err := io.ReadFull(r, line[len(line)-1:]); err != nil {
			return netip.AddrPort{}, err
		}
	}
	text, ok := strings.CutSuffix(string(line), "\r\n")
	if !ok || strings.ContainsAny(text, "\r\n") {
		return netip.AddrPort{}, errProxyHeader
	}
	return parseProxyV1(strings.TrimPrefix(text, "PROXY "))
}

// parseProxyV1 reads what stands behind "PROXY ": TCP4 or TCP6, source, destination and both ports; or UNKNOWN and anything.
func parseProxyV1(text string) (netip.AddrPort, error) {
	f := strings.Split(text, " ")
	if f[0] == "UNKNOWN" {
		return netip.AddrPort{}, nil
	}
	if len(f) != 5 || f[0] != "TCP4" && f[0] != "TCP6" {
		return netip.AddrPort{}, errProxyHeader
	}
	source, err := netip.ParseAddr(f[1])
	destination, err2 := netip.ParseAddr(f[2])
	port, err3 := parsePort(f[3])
	_, err4 := parsePort(f[4])
	v4 := f[0] == "TCP4"
	if cmp.Or(err, err2, err3, err4) != nil || source.Is4() != v4 || destination.Is4() != v4 || source.Zone() != "" || destination.Zone() != "" {
		return netip.AddrPort{}, errProxyHeader
	}
	return netip.AddrPortFrom(source.Unmap(), port), nil
}

func parsePort(s string) (uint16, error) {
	n, err := strconv.ParseUint(s, 10, 16)
	if err == nil && strconv.FormatUint(n, 10) != s {
		err = errProxyHeader
	}
	return uint16(n), err
}

// parseProxyV2 reads version and command, family, and what stands behind the fixed part.
func parseProxyV2(command, family byte, rest []byte) (from netip.AddrPort, itself bool, err error) {
	const local, proxy = 0x20, 0x21
	const unspecified, tcp4, tcp6 = 0x00, 0x11, 0x21
	if command == local {
		return from, true, nil // whatever else it says is to be ignored
	}
	length := map[byte]int{unspecified: 0, tcp4: 12, tcp6: 36}
	n, known := length[family]
	if command != proxy || !known || len(rest) < n || family != unspecified && !areTLVs(rest[n:]) {
		return from, false, errProxyHeader
	}
	switch family {
	case tcp4: // source, destination, and the ports of both
		from = netip.AddrPortFrom(netip.AddrFrom4([4]byte(rest)), binary.BigEndian.Uint16(rest[8:]))
	case tcp6:
		from = netip.AddrPortFrom(netip.AddrFrom16([16]byte(rest)).Unmap(), binary.BigEndian.Uint16(rest[32:]))
	}
	return from, false, nil
}

// areTLVs: type, length in two octets, value, again and again to the end.
func areTLVs(b []byte) bool {
	for len(b) > 0 {
		if len(b) < 3 {
			return false
		}
		n := 3 + int(binary.BigEndian.Uint16(b[1:]))
		if n > len(b) {
			return false
		}
		b = b[n:]
	}
	return true
}
