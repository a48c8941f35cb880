package smtpd

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"
	"testing/iotest"
	"testing/synctest"
	"time"

	"mailproxy/config"
	"mailproxy/internal/mta"
)

// v2 makes a header of version 2: command, family, and what stands behind the fixed part.
func v2(command, family byte, rest string) string {
	return proxySignature + string([]byte{command, family, byte(len(rest) >> 8), byte(len(rest))}) + rest
}

const (
	v2four = "\xc0\x00\x02\x4d\xc6\x33\x64\x01\x10\x00\x00\x19" // 192.0.2.77 to 198.51.100.1, ports 4096 and 25
	v2six  = "\x20\x01\x0d\xb8\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x01" + "\x20\x01\x0d\xb8\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x02" + "\x10\x00\x00\x19"
	tlv    = "\x04\x00\x03abc"
)

// goodHeaders are headers and the address and port that each gives.
func goodHeaders() map[string]string {
	return map[string]string{
		"PROXY TCP4 192.0.2.77 198.51.100.1 4096 25\r\n":               "192.0.2.77:4096",
		"PROXY TCP4 0.0.0.0 255.255.255.255 0 65535\r\n":               "0.0.0.0:0",
		"PROXY TCP6 2001:db8::1 2001:db8::2 4096 25\r\n":               "[2001:db8::1]:4096",
		"PROXY TCP6 ::ffff:192.0.2.77 ::ffff:198.51.100.1 4096 25\r\n": "192.0.2.77:4096",
		"PROXY UNKNOWN\r\n":                             "",
		"PROXY UNKNOWN ffff::1 ffff::2 65535 65535\r\n": "",
		"PROXY UNKNOWN " + strings.Repeat("x", 107-len("PROXY UNKNOWN \r\n")) + "\r\n": "",
		v2(0x21, 0x11, v2four):         "192.0.2.77:4096",
		v2(0x21, 0x11, v2four+tlv+tlv): "192.0.2.77:4096",
		v2(0x21, 0x21, v2six):          "[2001:db8::1]:4096",
		v2(0x21, 0x00, ""):             "",
		v2(0x21, 0x00, "whatever"):     "",
		v2(0x20, 0x00, ""):             "",
		v2(0x20, 0x11, v2four):         "",
		v2(0x21, 0x11, v2four+"\x04\x03\xf1"+strings.Repeat("x", 1009)): "192.0.2.77:4096",
	}
}

func badHeaders() []string {
	return []string{
		"EHLO client.test\r\n", "PROXY  TCP4 1.1.1.1 1.1.1.1 1 1\r\n", "PROXY TCP4 192.0.2.77 198.51.100.1 4096\r\n", "proxy TCP4 1.1.1.1 1.1.1.1 1 1\r\n",
		"PROXY TCP4 192.0.2.77 198.51.100.1 4096 25\n", "PROXY TCP4 192.0.2.77 198.51.100.1 4096 25 \r\n", "PROXY TCP4 192.0.2.77 198.51.100.1 4096 025\r\n",
		"PROXY TCP4 192.0.2.77 198.51.100.1 4096 65536\r\n", "PROXY TCP4 192.0.2.77 198.51.100.1 -1 25\r\n", "PROXY TCP4 192.0.2.077 198.51.100.1 1 25\r\n",
		"PROXY TCP4 2001:db8::1 2001:db8::2 1 25\r\n", "PROXY TCP6 192.0.2.77 198.51.100.1 1 25\r\n", "PROXY TCP6 fe80::1%eth0 2001:db8::2 1 25\r\n",
		"PROXY TCP4 client.test 198.51.100.1 1 25\r\n", "PROXY UDP4 192.0.2.77 198.51.100.1 1 25\r\n", "PROXY TCP4 192.0.2.77\r198.51.100.1 1 25\r\n",
		"PROXY UNKNOWN " + strings.Repeat("x", 108-len("PROXY UNKNOWN \r\n")) + "\r\n", "PROXY " + strings.Repeat("x", 500),
		v2(0x11, 0x11, v2four), v2(0x22, 0x11, v2four), v2(0x21, 0x12, v2four), v2(0x21, 0x31, strings.Repeat("x", 216)), v2(0x21, 0x11, v2four[1:]),
		v2(0x21, 0x21, v2six[1:]), v2(0x21, 0x11, v2four+"\x04\x00"), v2(0x21, 0x11, v2four+"\x04\x00\x04abc"),
		v2(0x21, 0x11, v2four+"\x04\x03\xf2"+strings.Repeat("x", 1010)), "\r\n\r\n\x00\r\nQUIT\r",
	}
}

func TestPROXYHeaders(t *testing.T) {
	for header, want := range goodHeaders() {
		for _, slow := range []bool{false, true} {
			all := strings.NewReader(header + "EHLO client.test\r\n")
			r := io.Reader(all)
			if slow {
				r = iotest.OneByteReader(all)
			}
			got, itself, err := readProxyHeader(r)
			if err != nil || got != mustAddrPort(want) || itself != (len(header) > 12 && header[12] == 0x20) {
				t.Errorf("%q: %v, %v, want %s", header, got, err, want)
			}
			if rest, _ := io.ReadAll(all); string(rest) != "EHLO client.test\r\n" {
				t.Errorf("%q: %q is left", header, rest)
			}
		}
		for cut := range len(header) {
			if _, _, err := readProxyHeader(strings.NewReader(header[:cut])); !errors.Is(err, io.EOF) && !errors.Is(err, io.ErrUnexpectedEOF) {
				t.Fatalf("%q cut at %d: %v", header, cut, err)
			}
		}
	}
	for _, header := range badHeaders() {
		if got, _, err := readProxyHeader(strings.NewReader(header + strings.Repeat("\r\n", 2000))); !errors.Is(err, errProxyHeader) {
			t.Errorf("%q: %v, %v", header, got, err)
		}
	}
}

func mustAddrPort(s string) netip.AddrPort {
	if s == "" {
		return netip.AddrPort{}
	}
	return netip.MustParseAddrPort(s)
}

// FuzzPROXY: no more is read than the longest header has, and an address is a plain one.
func FuzzPROXY(f *testing.F) {
	for header := range goodHeaders() {
		f.Add([]byte(header))
	}
	for _, header := range badHeaders() {
		f.Add([]byte(header))
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		r := bytes.NewReader(b)
		from, itself, err := readProxyHeader(r)
		if n := len(b) - r.Len(); n > proxyFixed+proxyV2Max {
			t.Fatalf("read %d octets", n)
		}
		if err != nil {
			return
		}
		addr := from.Addr()
		if addr.Is4In6() || addr.Zone() != "" || itself && addr.IsValid() {
			t.Fatalf("%q gives %v", b, addr)
		}
		if head := b[:len(b)-r.Len()]; head[0] == 'P' && (!strings.HasSuffix(string(head), "\r\n") || len(head) > proxyV1Max) {
			t.Fatalf("%q is a header", head)
		}
	})
}

// behind has a rig take everybody from this host for a balancer.
func behind(t *testing.T, s *config.Snapshot, change func(*Options)) *rig {
	t.Helper()
	return newRig(t, with(s, "proxy_from", "127.0.0.0/8"), change)
}

// narrow trusts everybody from this host, and leaves a client little room; eight sessions of trusted clients are the most.
func narrow(s *config.Snapshot) *config.Snapshot {
	for _, side := range []string{"", "internal_"} {
		with(s, side+"max_sessions_per_address", "1", side+"max_sessions_per_network", "4", side+"max_connections_per_minute", "2")
	}
	with(s, "internal_max_sessions", "8")
	s.Networks = []config.Network{loopback}
	return s
}

// dialFor connects as a balancer does for a client.
func (g *rig) dialFor(client string) *peer {
	g.t.Helper()
	p := g.dial()
	p.send("PROXY TCP4 " + client + " 198.51.100.1 4096 25\r\n")
	return p
}

func TestBehindABalancerTheClientIsWhomItNames(t *testing.T) {
	h := newHop(t)
	s := narrow(snapshot("one.test", h.addr()))
	g := behind(t, s, nil)
	p := g.dialFor("192.0.2.77")
	p.want("220")
	p.ask("EHLO client.test", "250")
	p.begin("x@one.test")
	p.send("x\r\n.\r\n")
	p.want("250")
	if wire := h.messages()[0].wire; !strings.Contains(wire, "[192.0.2.77])") || strings.Contains(wire, "127.0.0.1") {
		t.Errorf("Received: %q", wire)
	}
	for _, want := range []string{`"client":"192.0.2.77","listener":"any","balancer":"127.0.0.1","message":"session.open"`, `"client":"192.0.2.77","reverse_path"`} {
		if log := g.log.String(); !strings.Contains(log, want) {
			t.Errorf("%s is not in the log:\n%s", want, log)
		}
	}
	// The balancer is in one of our networks, and its client is not.
	p.ask("MAIL FROM:<a@sender.test>", "250")
	p.ask("RCPT TO:<x@elsewhere.test>", "554 5.7.1")
	// Limits are each client's.
	g.dialFor("192.0.2.77").want("421 4.7.0 too many sessions from your address")
	others := []*peer{g.dialFor("192.0.2.78"), g.dialFor("192.0.2.79"), g.dialFor("192.0.2.80")}
	for _, p := range others {
		p.want("220")
	}
	others[0].ask("QUIT", "221")
	others[0].wantEnd()
	waitFor(t, "it has ended", func() bool { return g.server.Stats().Open == 3 })
	g.dialFor("192.0.2.78").want("220")
	// Sessions that were the balancer's for a moment are not counted as its own for ever.
	for n := range 10 {
		p := g.dialFor("198.51.100." + strconv.Itoa(n))
		p.want("220")
		p.ask("QUIT", "221")
		p.wantEnd()
	}
	// A balancer that looks whether we live speaks for itself.
	p = g.dial()
	p.send(v2(0x20, 0, ""))
	p.want("220")
}

func TestANetworkOfOursIsWhereTheClientIs(t *testing.T) {
	h := newHop(t)
	s := outbound(h.addr())
	s.Networks = []config.Network{{Prefix: netip.MustParsePrefix("192.0.2.0/24")}}
	g := behind(t, s, nil)
	p := g.dialFor("192.0.2.77")
	p.want("220")
	p.ask("EHLO client.test", "250")
	p.ask("MAIL FROM:<a@sender.test>", "250")
	p.ask("RCPT TO:<x@elsewhere.test>", "250")
	l := g.listen()
	g.serveKind(l, Kind{Purpose: Internal})
	for client, want := range map[string]string{"192.0.2.78": "220", "203.0.113.1": replyNotOurs.Error()[:3]} {
		p := dialTo(t, l.Addr().String())
		p.send("PROXY TCP4 " + client + " 198.51.100.1 4096 25\r\n")
		p.want(want)
	}
}

// A client whom the balancer does not know is not the balancer, which may be in one of our networks.
func TestAClientThatTheBalancerDoesNotKnowIsNobody(t *testing.T) {
	s := outbound(newHop(t).addr())
	s.Networks = []config.Network{loopback}
	g := behind(t, s, nil)
	internal := g.listen()
	g.serveKind(internal, Kind{Purpose: Internal})
	for header, relays := range map[string]bool{"PROXY UNKNOWN\r\n": false, v2(0x21, 0, ""): false, v2(0x20, 0, ""): true} {
		p := g.dial()
		p.send(header)
		p.want("220")
		p.ask("EHLO client.test", "250")
		p.ask("MAIL FROM:<a@sender.test>", "250")
		want := map[bool]string{false: "554 5.7.1", true: "250"}
		p.ask("RCPT TO:<x@elsewhere.test>", want[relays])
		p = dialTo(t, internal.Addr().String())
		p.send(header)
		p.want(map[bool]string{false: replyNotOurs.Error()[:3], true: "220"}[relays])
	}
}

func TestABalancerWithoutAHeaderIsNotServed(t *testing.T) {
	g := behind(t, snapshot(), nil)
	check := g.dial()
	_ = check.Close()
	waitFor(t, "a check has ended", func() bool { return strings.Contains(g.log.String(), "session.proxy_refused") })
	if a := g.server.Headless(time.Now()); a.IsValid() {
		t.Errorf("a check is named: %v", a)
	}
	for _, said := range []string{"EHLO client.test\r\n", "PROXY TCP4 1.2.3.4\r\n", v2(0x21, 0x11, "x"), "PROXY " + strings.Repeat("x", 200)} {
		p := g.dial()
		p.send(said)
		if got := p.read(); got != "EOF" && got != "RESET" {
			t.Errorf("%q: %q", said, got)
		}
	}
	waitFor(t, "they have ended", func() bool { return g.server.Stats().Open == 0 })
	if n := strings.Count(g.log.String(), `"message":"session.proxy_refused"`); n != 1 {
		t.Errorf("%d lines in the log", n)
	}
	if a, later := g.server.Headless(time.Now()), g.server.Headless(time.Now().Add(headlessTime)); !a.IsValid() || later.IsValid() {
		t.Errorf("named: %v, later %v", a, later)
	}
	// Who sends on behind the header has not waited for the greeting.
	p := g.dial()
	p.send("PROXY TCP4 192.0.2.77 198.51.100.1 4096 25\r\nEHLO client.test\r\n")
	p.want("554 5.5.0")
	p.wantEnd()
}

// Who is waiting for a balancer's header when the node is drained hears of that, and the balancer is not blamed.
func TestADrainBeforeTheHeaderIsNotTheBalancersFault(t *testing.T) {
	g := behind(t, snapshot(), nil)
	p := g.dial()
	waitFor(t, "it is there", func() bool { return g.server.Stats().Open == 1 })
	g.server.Pause()
	p.want("421 4.3.2")
	p.wantEnd()
	if a := g.server.Headless(time.Now()); a.IsValid() || strings.Contains(g.log.String(), "session.proxy_refused") {
		t.Errorf("named: %v", a)
	}
}

func TestAHeaderThatDoesNotComeIsNotWaitedFor(t *testing.T) {
	g := behind(t, snapshot(), nil)
	synctest.Test(t, func(t *testing.T) {
		near, far := net.Pipe()
		defer far.Close()
		c := newConn(g.server, loopbackConn{near}, Kind{}, g.rules.Load())
		var wg sync.WaitGroup
		wg.Go(func() { // an octet now and then, until the connection ends
			for range 100 {
				if _, err := far.Write([]byte("P")); err != nil {
					return
				}
				time.Sleep(time.Second)
			}
		})
		start := time.Now()
		if c.proxied() || c.phase != phaseEnded || time.Since(start) != proxyTime {
			t.Errorf("after %v in phase %d", time.Since(start), c.phase)
		}
		_ = c.Close()
		wg.Wait()
	})
}

type loopbackConn struct{ net.Conn }

func (loopbackConn) RemoteAddr() net.Addr { return &net.TCPAddr{IP: net.IPv4(127, 0, 0, 1)} }

const haproxyConfig = `global
	maxconn 100
defaults
	mode tcp
	timeout connect 5s
	timeout client 60s
	timeout server 60s
frontend first
	bind %s
	default_backend first
frontend second
	bind %s
	default_backend second
backend first
	server node %s send-proxy
backend second
	server node %[3]s send-proxy-v2 check inter 100ms
`

// TestHAProxyInFront: Debian's, with both versions of its header, and its health check.
func TestHAProxyInFront(t *testing.T) {
	h := newHop(t)
	g := behind(t, snapshot("one.test", h.addr()), nil)
	first, second := mta.FreeAddr(t), mta.FreeAddr(t)
	conf := filepath.Join(t.TempDir(), "haproxy.cfg")
	if err := os.WriteFile(conf, []byte(fmt.Sprintf(haproxyConfig, first, second, g.addr)), 0o600); err != nil {
		t.Fatal(err)
	}
	mta.Start(t, first, "haproxy", "-db", "-f", conf)
	for n, addr := range []string{first, second} {
		client := fmt.Sprintf("127.0.0.%d", 20+n)
		from := net.Dialer{LocalAddr: &net.TCPAddr{IP: net.ParseIP(client)}}
		var p *peer
		mta.Until(t, func() error { // a server is down until it was looked at
			c, err := from.Dial("tcp", addr)
			if err != nil {
				return err
			}
			p = newPeer(t, c)
			if got := p.read(); !strings.HasPrefix(got, "220") {
				c.Close()
				return errors.New(got)
			}
			return nil
		})
		p.ask("EHLO client.test", "250")
		p.begin("x@one.test")
		p.send("x\r\n.\r\n")
		p.want("250")
		if wire := h.messages()[n].wire; !strings.Contains(wire, "["+client+"])") {
			t.Errorf("Received: %q", wire)
		}
	}
	waitFor(t, "health checks speak for themselves", func() bool {
		return strings.Contains(g.log.String(), `"client":"127.0.0.1","listener":"any","message":"session.open"`)
	})
}
