package mail

import (
	"errors"
	"strings"
	"unicode"
	"unicode/utf8"
)

// ErrPath is what every refusal of an address wraps.
var ErrPath = errors.New("bad address")

type pathError string

func (e pathError) Error() string        { return string(e) }
func (e pathError) Is(target error) bool { return target == ErrPath }

// Limits of RFC 5321 §4.5.3.1, in octets.
const (
	maxLocal  = 64
	maxDomain = 255
	maxPath   = 254 // without the angle brackets: 256 less two
)

// A Path is a reverse-path or a forward-path (RFC 5321 §4.1.2) without its source route. The zero Path is the null
// reverse-path; a Path without Domain is <postmaster>. Paths made by this package are valid and comparable with ==.
type Path struct {
	// Local is the local part without quoting: the octets that it stands for.
	Local string
	// Domain has ASCII letters in lower case and is otherwise as it was written, in A-labels or in U-labels; or an address literal
	// with its brackets.
	Domain string
}

// ParsePath reads an address as it stands between the angle brackets on the wire: `a@b`, `"a b"@c`, `@relay:a@b` (the source
// route is dropped, RFC 5321 appendix C), `postmaster`, or nothing for the null reverse-path. The error wraps ErrPath.
func ParsePath(s string) (Path, error) {
	if s == "" {
		return Path{}, nil
	}
	if s[0] == '@' {
		colon := strings.IndexByte(s, ':')
		if colon < 0 {
			return Path{}, pathError("source route without an address")
		}
		s = s[colon+1:]
	}
	if strings.EqualFold(s, "postmaster") {
		return Path{Local: "postmaster"}, nil
	}
	local, rest, err := parseLocal(s)
	if err != nil {
		return Path{}, err
	}
	if rest == "" || rest[0] != '@' {
		return Path{}, pathError("no @ behind the local part")
	}
	return newPath(local, rest[1:])
}

// parseLocal reads a dot-string or quoted string (RFC 5321 §4.1.2) and gives it without quoting, and what follows.
func parseLocal(s string) (local, rest string, err error) {
	if s == "" || s[0] != '"' {
		at := strings.IndexByte(s, '@')
		if at < 0 {
			return "", "", pathError("no @ in the address")
		}
		if !isDotString(s[:at]) {
			return "", "", pathError("local part is neither a dot-string nor quoted")
		}
		return s[:at], s[at:], nil
	}
	var b strings.Builder
	for i := 1; i < len(s); i++ {
		switch c := s[i]; c {
		case '"':
			return b.String(), s[i+1:], nil
		case '\\':
			i++
			if i == len(s) {
				return "", "", pathError("quoted local part ends in a backslash")
			}
			b.WriteByte(s[i])
		default:
			b.WriteByte(c)
		}
	}
	return "", "", pathError("quoted local part does not end")
}

func newPath(local, domain string) (Path, error) {
	switch {
	case local == "":
		return Path{}, pathError("empty local part")
	case len(local) > maxLocal:
		return Path{}, pathError("local part over 64 octets")
	case len(domain) > maxDomain:
		return Path{}, pathError("domain over 255 octets")
	case !utf8.ValidString(local) || !utf8.ValidString(domain):
		return Path{}, pathError("address is not UTF-8")
	}
	if strings.ContainsFunc(local, isControl) {
		return Path{}, pathError("control character in the local part")
	}
	if domain = lowerASCII(domain); !isDomain(domain) {
		return Path{}, pathError("bad domain")
	}
	p := Path{Local: local, Domain: domain}
	if len(p.String()) > maxPath {
		return Path{}, pathError("address over 254 octets")
	}
	return p, nil
}

// String gives the address as it stands between the angle brackets, quoted where it must be. The null reverse-path is "".
func (p Path) String() string {
	if p == (Path{}) {
		return ""
	}
	local := p.Local
	if !isDotString(local) {
		var b strings.Builder
		b.Grow(len(local) + 4)
		b.WriteByte('"')
		for i := 0; i < len(local); i++ {
			if c := local[i]; c == '"' || c == '\\' {
				b.WriteByte('\\')
			}
			b.WriteByte(local[i])
		}
		b.WriteByte('"')
		local = b.String()
	}
	if p.Domain == "" {
		return local
	}
	return local + "@" + p.Domain
}

// MarshalText gives String.
func (p Path) MarshalText() ([]byte, error) { return []byte(p.String()), nil }

// UnmarshalText reads what ParsePath reads.
func (p *Path) UnmarshalText(b []byte) (err error) {
	*p, err = ParsePath(string(b))
	return err
}

// IsNull says whether p is the null reverse-path.
func (p Path) IsNull() bool { return p == Path{} }

// IsPostmaster says whether p is postmaster, in any case, at any domain or at none (RFC 5321 §4.5.1).
func (p Path) IsPostmaster() bool { return strings.EqualFold(p.Local, "postmaster") }

// IsASCII says whether p can be sent without SMTPUTF8 (RFC 6531).
func (p Path) IsASCII() bool { return isASCII(p.Local) && isASCII(p.Domain) }

// isControl: no terminal, log or header may be led astray by an address. Besides the controls of ASCII and those above it, line and
// paragraph separators and what turns the direction of writing.
func isControl(r rune) bool {
	return unicode.IsControl(r) || r >= utf8.RuneSelf && unicode.In(r, unicode.Zl, unicode.Zp, unicode.Bidi_Control)
}

// lowerASCII leaves all but A to Z as it is: what else is the same domain is for IDNA to say, where domains are compared.
func lowerASCII(s string) string {
	return strings.Map(func(r rune) rune {
		if 'A' <= r && r <= 'Z' {
			return r + 'a' - 'A'
		}
		return r
	}, s)
}

func isASCII(s string) bool {
	for i := 0; i < len(s); i++ {
		if s[i] >= utf8.RuneSelf {
			return false
		}
	}
	return true
}

// isDotString: atoms joined by single dots (RFC 5321 §4.1.2; RFC 6531 §3.3 adds UTF-8).
func isDotString(s string) bool {
	atom := false
	for i := 0; i < len(s); i++ {
		switch c := s[i]; {
		case c == '.':
			if !atom {
				return false
			}
			atom = false
		case isAtext(c):
			atom = true
		default:
			return false
		}
	}
	return atom
}

func isAtext(c byte) bool {
	switch {
	case 'a' <= c && c <= 'z', 'A' <= c && c <= 'Z', '0' <= c && c <= '9', c >= utf8.RuneSelf:
		return true
	}
	return strings.IndexByte("!#$%&'*+-/=?^_`{|}~", c) >= 0
}

// isDomain: labels of letters, digits, hyphens, underscores (seen in the wild) or UTF-8, or an address literal.
func isDomain(s string) bool {
	if strings.HasPrefix(s, "[") {
		if len(s) < 3 || s[len(s)-1] != ']' {
			return false
		}
		for _, c := range []byte(s[1 : len(s)-1]) {
			if c <= ' ' || c >= 0x7f || c == '[' || c == ']' || c == '\\' || c == '<' || c == '>' {
				return false
			}
		}
		return true
	}
	if strings.ContainsFunc(s, func(r rune) bool { return isControl(r) || unicode.IsSpace(r) }) {
		return false
	}
	for label := range strings.SplitSeq(s, ".") {
		// RFC 1035 §2.3.4 bounds a label of ASCII; that of a U-label holds for its A-label (RFC 5890 §2.3.2.1).
		if label == "" || len(label) > 63 && isASCII(label) || label[0] == '-' || label[len(label)-1] == '-' {
			return false
		}
		for i := 0; i < len(label); i++ {
			c := label[i]
			if !('a' <= c && c <= 'z' || '0' <= c && c <= '9' || c == '-' || c == '_' || c >= utf8.RuneSelf) {
				return false
			}
		}
	}
	return true
}
