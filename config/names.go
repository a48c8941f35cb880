package config

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"strconv"
	"strings"
	"unicode/utf8"

	"golang.org/x/net/idna"
)

// domainProfile maps what a person types to A-labels, and lets underscores pass, which are seen in the wild.
var domainProfile = idna.New(idna.MapForLookup(), idna.Transitional(false), idna.BidiRule(), idna.StrictDomainName(false))

// NormalizeDomain gives a mail domain as A-labels in lower case, without a final dot. It refuses address literals and IP
// addresses.
func NormalizeDomain(s string) (string, error) {
	name := strings.TrimSuffix(strings.TrimSpace(s), ".")
	if !isLowerHost(name, true) {
		ascii, err := domainProfile.ToASCII(name)
		if err != nil || !isLowerHost(ascii, true) || !utf8.ValidString(name) {
			return "", fmt.Errorf("%q is not a domain name", s)
		}
		name = ascii
	}
	if c := name[len(name)-1]; '0' <= c && c <= '9' && isIP(name) {
		return "", fmt.Errorf("%q is an IP address, not a domain name", s)
	}
	return name, nil
}

// ASCIIDomain gives a domain's A-labels where it has U-labels, so that both forms of one domain are equal; any other domain, and
// what is none, is given back as it is.
func ASCIIDomain(name string) string {
	for i := 0; i < len(name); i++ {
		if name[i] >= utf8.RuneSelf {
			if ascii, err := NormalizeDomain(name); err == nil {
				return ascii
			}
			return name
		}
	}
	return name
}

// NormalizeHost gives host:port in lower case, IPv6 in brackets, with port where s has none.
func NormalizeHost(s, port string) (string, error) {
	host := strings.TrimSpace(s)
	bare := host
	if strings.HasPrefix(host, "[") && strings.HasSuffix(host, "]") {
		bare = host[1 : len(host)-1]
	}
	if addr, err := netip.ParseAddr(bare); err == nil && addr.Zone() == "" {
		return net.JoinHostPort(addr.Unmap().String(), port), nil
	}
	if strings.Contains(host, ":") {
		var err error
		if host, port, err = net.SplitHostPort(host); err != nil {
			return "", fmt.Errorf("%q is not host:port", s)
		}
	}
	if err := checkPort(port, 1); err != nil {
		return "", fmt.Errorf("%q: %w", s, err)
	}
	if addr, err := netip.ParseAddr(host); err == nil && addr.Zone() == "" {
		return net.JoinHostPort(addr.Unmap().String(), port), nil
	}
	name, err := NormalizeDomain(host)
	if err != nil {
		return "", fmt.Errorf("%q is neither a host name nor an IP address", host)
	}
	return net.JoinHostPort(name, port), nil
}

func checkPort(port string, low int) error {
	n, err := strconv.Atoi(port)
	if err != nil || n < low || n > 65535 || strconv.Itoa(n) != port {
		return fmt.Errorf("port %q is not a number from %d to 65535", port, low)
	}
	return nil
}

// isLowerHost: labels of a-z, 0-9 and hyphens inside, at most 63 octets each and 253 in all (RFC 1035 §2.3.4); underscores
// where they are allowed.
func isLowerHost(s string, underscores bool) bool {
	if s == "" || len(s) > 253 {
		return false
	}
	start := 0
	for i := 0; i <= len(s); i++ {
		if i < len(s) && s[i] != '.' {
			c := s[i]
			if !('a' <= c && c <= 'z' || '0' <= c && c <= '9' || c == '-' || c == '_' && underscores) {
				return false
			}
			continue
		}
		if label := s[start:i]; label == "" || len(label) > 63 || label[0] == '-' || label[len(label)-1] == '-' {
			return false
		}
		start = i + 1
	}
	return true
}

// checkComment: one line of text, for people.
func checkComment(s string) error {
	if utf8.RuneCountInString(s) > 500 {
		return errors.New("comment is longer than 500 characters")
	}
	if !utf8.ValidString(s) || strings.ContainsFunc(s, func(r rune) bool { return r < ' ' || r == 0x7f }) {
		return errors.New("comment has control characters in it")
	}
	return nil
}
