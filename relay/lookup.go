package relay

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"net/netip"
	"slices"
	"strings"
	"time"

	"golang.org/x/net/idna"

	"mailproxy/mail"
)

// Bounds on what a DNS answer can make us do.
const (
	maxHosts     = 10 // MX hosts tried for one attempt
	maxAddresses = 6  // addresses tried of one host
)

// A lookup asks the DNS for hosts and addresses.
type lookup struct {
	resolver *net.Resolver
	timeout  time.Duration
}

// A mxHost is a host of a domain's MX records.
type mxHost struct {
	name       string // without a final dot
	preference uint16
}

// mx gives the hosts that take mail for the domain, in the order to be tried (RFC 5321 §5.1). A reply is the DNS's permanent answer that
// there are none; an error is temporary.
func (l *lookup) mx(ctx context.Context, domain, own string) ([]mxHost, *mail.Reply, error) {
	if literal, ok := strings.CutPrefix(domain, "["); ok {
		return literalHost(strings.TrimSuffix(literal, "]"))
	}
	name, err := idna.Lookup.ToASCII(domain)
	if err != nil {
		// Underscores and the like are seen in the wild and are not idna's business.
		if name = domain; !isASCIIName(domain) {
			return nil, noDomain(domain, err), nil
		}
	}
	ctx, cancel := context.WithTimeout(ctx, l.timeout)
	defer cancel()
	name = strings.TrimSuffix(name, ".") + "." // as rooted has it, and numbers are no address here
	records, err := l.resolver.LookupMX(ctx, name)
	switch {
	case len(records) > 0: // with an error beside it where some records were bad: the good ones count
	case isNotFound(err):
		return l.implicit(ctx, name, domain)
	case err != nil:
		return nil, nil, err
	}
	if len(records) == 1 && (records[0].Host == "." || records[0].Host == "") {
		// RFC 7505 §4.1
		return nil, &mail.Reply{Code: 556, Enhanced: [3]int{5, 1, 10}, Text: domain + " does not take mail"}, nil
	}
	hosts, self := order(records, own)
	if len(hosts) == 0 && self {
		return nil, loopReply(domain), nil
	}
	if len(hosts) == 0 {
		return nil, nil, fmt.Errorf("no usable MX record for %s", domain)
	}
	return hosts, nil, nil
}

// loopReply is for a domain whose mail comes back to this node.
func loopReply(domain string) *mail.Reply {
	return &mail.Reply{Code: 554, Enhanced: [3]int{5, 4, 6}, Text: "mail for " + string(appendClean(nil, []byte(domain))) + " loops back to this host"}
}

// implicit is the domain itself as its own host, where it has an address and no MX (RFC 5321 §5.1).
func (l *lookup) implicit(ctx context.Context, name, domain string) ([]mxHost, *mail.Reply, error) {
	_, err := l.resolver.LookupNetIP(ctx, "ip", name)
	switch {
	case isNotFound(err):
		return nil, noDomain(domain, err), nil
	case err != nil:
		return nil, nil, err
	}
	return []mxHost{{name: strings.TrimSuffix(name, ".")}}, nil, nil
}

func literalHost(literal string) ([]mxHost, *mail.Reply, error) {
	if len(literal) > 5 && strings.EqualFold(literal[:5], "ipv6:") {
		literal = literal[5:]
	}
	addr, err := netip.ParseAddr(literal)
	if err != nil || addr.Zone() != "" {
		return nil, &mail.Reply{Code: 550, Enhanced: [3]int{5, 1, 2}, Text: "address literal is not understood", Cause: err}, nil
	}
	return []mxHost{{name: addr.String()}}, nil, nil
}

func noDomain(domain string, cause error) *mail.Reply {
	clean := string(appendClean(nil, []byte(domain)))
	return &mail.Reply{Code: 550, Enhanced: [3]int{5, 1, 2}, Text: "no such domain: " + clean, Cause: cause}
}

func isASCIIName(s string) bool {
	return strings.IndexFunc(s, func(r rune) bool { return r >= 0x80 }) < 0
}

// isNotFound: the name does not exist or has no such record, as the DNS says, not as a server out of reach does.
func isNotFound(err error) bool {
	var e *net.DNSError
	return errors.As(err, &e) && e.IsNotFound
}

// order sorts by preference, at random inside one. Hosts not better than ourselves are left out, or mail would go in circles;
// self says that we were among them.
func order(records []*net.MX, own string) (hosts []mxHost, self bool) {
	records = slices.Clone(records)
	rand.Shuffle(len(records), func(i, j int) { records[i], records[j] = records[j], records[i] })
	slices.SortStableFunc(records, func(a, b *net.MX) int { return cmp.Compare(a.Pref, b.Pref) })
	limit := 1 << 16
	for _, r := range records {
		if strings.EqualFold(strings.TrimSuffix(r.Host, "."), own) {
			limit, self = int(r.Pref), true
			break
		}
	}
	for _, r := range records {
		host := strings.TrimSuffix(r.Host, ".")
		if int(r.Pref) >= limit || len(hosts) == maxHosts {
			break
		}
		if host != "" {
			hosts = append(hosts, mxHost{host, r.Pref})
		}
	}
	return hosts, self
}

// rooted is the name of a host out of the DNS as it is to be looked up: the search list of resolv.conf is for people.
func rooted(name string) string {
	if _, err := netip.ParseAddr(name); err == nil {
		return name
	}
	return strings.TrimSuffix(name, ".") + "."
}

// addresses gives a host's addresses in the order to be tried: the resolver's own (RFC 6724) with the two families taking
// turns, so that one that leads nowhere costs one connect.
func (l *lookup) addresses(ctx context.Context, host string) ([]netip.Addr, error) {
	if a, err := netip.ParseAddr(host); err == nil {
		return []netip.Addr{a}, nil
	}
	ctx, cancel := context.WithTimeout(ctx, l.timeout)
	defer cancel()
	found, err := l.resolver.LookupNetIP(ctx, "ip", host)
	if err != nil {
		return nil, err
	}
	for i, a := range found {
		found[i] = a.Unmap()
	}
	return takeTurns(found), nil
}

func takeTurns(found []netip.Addr) []netip.Addr {
	var a, b []netip.Addr // a has the family of the first
	for _, addr := range found {
		if addr.Is4() == found[0].Is4() {
			a = append(a, addr)
		} else {
			b = append(b, addr)
		}
	}
	out := make([]netip.Addr, 0, len(found))
	for i := 0; len(out) < min(len(found), maxAddresses); i++ {
		if i < len(a) {
			out = append(out, a[i])
		}
		if i < len(b) {
			out = append(out, b[i])
		}
	}
	return out
}
