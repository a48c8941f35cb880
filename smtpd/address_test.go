package smtpd

import (
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"pgregory.net/rapid"

	"mailproxy/config"
	"mailproxy/internal/mta"
)

// An address as a client may write it, and as it has to arrive.
type writtenAddress struct{ wire, want string }

// written draws an address: octets of a local part, quoted where they must be or for no reason, a domain of ASCII or of U-labels in
// any case, perhaps a source route in front. without are octets that it is not to have.
func written(t *rapid.T, label, without string) writtenAddress {
	alphabet := rapid.SampledFrom([]string{`ab.Z0+_-`, ` "\@<>,;:()[]`, `é日\"a> `, "a=b SIZE=>9<", ".."})
	chars := slices.DeleteFunc([]rune(alphabet.Draw(t, label+" alphabet")), func(r rune) bool { return strings.ContainsRune(without, r) })
	local := rapid.StringOfN(rapid.SampledFrom(chars), 1, 12, 64).Draw(t, label)
	domain := rapid.SampledFrom([]string{
		"Example.TEST", "b\u00fccher.test", "\u65e5\u672c.Test", "xn--bcher-kva.test", "a-b.c_d.test", "[192.0.2.1]", "[ipv6:2001:db8::1]",
		strings.Repeat("x", 60) + "." + strings.Repeat("y", 60) + ".test",
	}).Draw(t, label+" domain")
	quoted := needsQuotes(local)
	want := local
	if quoted {
		want = quote(local, func(c byte) bool { return c == '"' || c == '\\' })
	}
	wire := want
	if quoted || rapid.Bool().Draw(t, label+" quoted without need") {
		wire = quote(local, func(c byte) bool {
			return c == '"' || c == '\\' || c < 0x80 && rapid.Bool().Draw(t, label+" quoted pair")
		})
	}
	route := rapid.SampledFrom([]string{"", "", "@relay.test:", "@a.test,@b.test:"}).Draw(t, label+" route")
	return writtenAddress{route + wire + "@" + domain, want + "@" + lower(domain)}
}

// needsQuotes: RFC 5321 §4.1.2, written a second time.
func needsQuotes(local string) bool {
	for atom := range strings.SplitSeq(local, ".") {
		if atom == "" || strings.ContainsAny(atom, ` "\@<>,;:()[]`) {
			return true
		}
	}
	return false
}

func quote(local string, pair func(byte) bool) string {
	var b strings.Builder
	for _, c := range []byte(local) {
		if pair(c) {
			b.WriteByte('\\')
		}
		b.WriteByte(c)
	}
	return `"` + b.String() + `"`
}

func lower(s string) string {
	return strings.Map(func(r rune) rune {
		if r >= 'A' && r <= 'Z' {
			r += 'a' - 'A'
		}
		return r
	}, s)
}

// outbound sends mail for everywhere to host, from our own networks.
func outbound(host string) *config.Snapshot {
	s := with(snapshot(), "outbound_transport", "out")
	s.Transports = []config.Transport{{Name: "out", Hosts: []string{host}, TLS: config.TLSNone}}
	s.Networks = []config.Network{loopback}
	return s
}

// TestAddressesArriveOctetForOctet carries random addresses from a client through us and the queue to a server that keeps the lines
// as they come, and through Debian's Postfix behind us to the same.
func TestAddressesArriveOctetForOctet(t *testing.T) {
	direct, behind := newHop(t), newHop(t)
	postfix := mta.StartPostfix(t, behind.addr())
	for name, way := range map[string]struct {
		host    string
		hop     *hop
		mangles string // what does not arrive through it when we have no part in it
	}{
		"to a server": {direct.addr(), direct, ""},
		// It takes a quoted @ in front for a source route.
		"to a server behind Postfix": {postfix.Addr, behind, "@"},
	} {
		t.Run(name, func(t *testing.T) {
			g := newRig(t, outbound(way.host), nil)
			g.runQueue()
			p := g.hello()
			taken := 0
			rapid.Check(t, func(rt *rapid.T) {
				from, to := written(rt, "from", way.mangles), written(rt, "to", way.mangles)
				_ = p.SetDeadline(time.Now().Add(patience))
				p.ask("MAIL FROM:<"+from.wire+"> SMTPUTF8 BODY=8BITMIME", "250")
				p.ask("RCPT TO:<"+to.wire+">", "250")
				p.ask("DATA", "354")
				p.send("Subject: x\r\n\r\nx\r\n.\r\n")
				p.want("250")
				taken++
				mta.Until(rt, func() error {
					if n := len(way.hop.messages()); n < taken {
						return fmt.Errorf("from <%s> to <%s> has not arrived; Postfix's log:\n%s", from.wire, to.wire, postfix.Log())
					}
					return nil
				})
				m := way.hop.messages()[taken-1]
				path, params, ok := splitAtBracket(m.from)
				if !ok || path != from.want || strings.Trim(params, "ABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789=:; ") != "" || len(m.to) != 1 || m.to[0] != to.want {
					rt.Fatalf("from <%s> to <%s> arrived as MAIL FROM:%s, RCPT TO:%q; want <%s>, <%s>\n%s", from.wire, to.wire, m.from, m.to, from.want, to.want, m.wire)
				}
			})
		})
	}
}

// splitAtBracket takes <path> params apart at the last bracket: parameters have none in them here.
func splitAtBracket(s string) (path, params string, ok bool) {
	end := strings.LastIndexByte(s, '>')
	if end < 1 || s[0] != '<' {
		return "", "", false
	}
	return s[1:end], s[end+1:], true
}
