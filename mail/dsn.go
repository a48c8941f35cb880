package mail

import (
	"errors"
	"strconv"
	"strings"
	"unicode/utf8"
)

// ErrParameter is what every refusal of a parameter of the DSN extension (RFC 3461) wraps.
var ErrParameter = errors.New("bad DSN parameter")

type parameterError string

func (e parameterError) Error() string        { return string(e) }
func (e parameterError) Is(target error) bool { return target == ErrParameter }

// Limits of RFC 3461 §4.2 and §4.4, in octets.
const (
	maxEnvID    = 100
	maxOriginal = 500
)

// RcptParams is what RCPT said of a recipient besides its path, and what we know of it.
type RcptParams struct {
	// Notify is of what the sender wants to hear.
	Notify Notify `json:"notify,omitempty"`
	// Original is the address that the sender gave it first, as a DSN shows it: "rfc822;a@b.test", "utf-8;ü@b.test". Empty where
	// it was not said.
	Original string `json:"original,omitempty"`
	// Unverified: it was taken from outside our networks, and no next hop, nor list, said that it exists.
	Unverified bool `json:"unverified,omitempty"`
}

// Return is how much of a message that failed is to come back in its DSN (RFC 3461 §4.3); empty where the sender did not say.
type Return string

// The values of RET.
const (
	ReturnFull   Return = "FULL"
	ReturnHeader Return = "HDRS"
)

// ParseReturn reads the value of RET. The error wraps ErrParameter.
func ParseReturn(s string) (Return, error) {
	switch r := Return(strings.ToUpper(s)); r {
	case ReturnFull, ReturnHeader:
		return r, nil
	}
	return "", parameterError("RET is neither FULL nor HDRS")
}

// Notify is of what a sender wants to hear about a recipient (RFC 3461 §4.1). The zero Notify: it did not say.
type Notify uint8

// The values of NOTIFY. NotifyNever stands alone.
const (
	NotifyNever Notify = 1 << iota
	NotifySuccess
	NotifyFailure
	NotifyDelay
)

var notifyNames = [...]string{"NEVER", "SUCCESS", "FAILURE", "DELAY"}

// Success says whether the sender wants to hear of success. It has to ask for that.
func (n Notify) Success() bool { return n&NotifySuccess != 0 }

// Failure says whether the sender wants to hear of failure: also where it did not say.
func (n Notify) Failure() bool { return n == 0 || n&NotifyFailure != 0 }

// Delay says whether the sender wants to hear of delay: also where it did not say.
func (n Notify) Delay() bool { return n == 0 || n&NotifyDelay != 0 }

// String gives the value of NOTIFY; of the zero Notify, nothing.
func (n Notify) String() string {
	var b strings.Builder
	for i, name := range notifyNames {
		if n&(1<<i) != 0 {
			if b.Len() > 0 {
				b.WriteByte(',')
			}
			b.WriteString(name)
		}
	}
	return b.String()
}

// MarshalText gives String.
func (n Notify) MarshalText() ([]byte, error) { return []byte(n.String()), nil }

// UnmarshalText reads what String gives.
func (n *Notify) UnmarshalText(b []byte) (err error) {
	if *n = 0; len(b) > 0 {
		*n, err = ParseNotify(string(b))
	}
	return err
}

// ParseNotify reads the value of NOTIFY: NEVER, or a list of the others without repetition. The error wraps ErrParameter.
func ParseNotify(s string) (Notify, error) {
	var n Notify
next:
	for word := range strings.SplitSeq(s, ",") {
		for i, name := range notifyNames {
			if bit := Notify(1 << i); strings.EqualFold(word, name) && n&bit == 0 {
				n |= bit
				continue next
			}
		}
		return 0, parameterError("NOTIFY has an unknown value, or one twice")
	}
	if n&NotifyNever != 0 && n != NotifyNever {
		return 0, parameterError("NOTIFY has NEVER and others")
	}
	return n, nil
}

// ParseEnvID reads the value of ENVID, and gives it without its xtext: up to 100 octets of printable ASCII. The error wraps
// ErrParameter.
func ParseEnvID(s string) (string, error) {
	id, err := ParseXtext(s)
	switch {
	case err != nil:
		return "", err
	case id == "" || len(id) > maxEnvID || !isPrintable(id):
		return "", parameterError("ENVID is not 1 to 100 octets of printable ASCII")
	}
	return id, nil
}

// ParseOriginal reads the value of ORCPT, an address type and an address in xtext, and gives it as RcptParams.Original. UTF-8 as it
// is may stand in it where MAIL carried SMTPUTF8 (RFC 6533 §3). An address that would be longer in ASCII than a next hop must take is
// as one that was not said. The error wraps ErrParameter.
func ParseOriginal(s string, smtputf8 bool) (string, error) {
	kind, coded, ok := strings.Cut(s, ";")
	switch {
	case !ok || coded == "" || len(s) > maxOriginal:
		return "", parameterError("ORCPT is not a type and an address, of up to 500 octets")
	case !isAddressType(kind):
		return "", parameterError("ORCPT has a bad address type")
	case !smtputf8 && !isASCII(coded):
		return "", parameterError("ORCPT with UTF-8, without SMTPUTF8")
	}
	kind = strings.ToLower(kind)
	if kind == "utf-8" {
		address, err := unquoteUTF8(coded)
		original := "utf-8;" + address
		if len(AppendOriginal(nil, original)) > maxOriginal {
			return "", err
		}
		return original, err
	}
	address, err := ParseXtext(coded)
	if err == nil && !isPrintable(address) {
		err = parameterError("ORCPT's address is not printable ASCII")
	}
	return kind + ";" + address, err
}

// AppendXtext appends s, printable ASCII, in xtext (RFC 3461 §4).
func AppendXtext(b []byte, s string) []byte {
	const digits = "0123456789ABCDEF"
	for i := 0; i < len(s); i++ {
		if c := s[i]; isXchar(c) {
			b = append(b, c)
		} else {
			b = append(b, '+', digits[c>>4], digits[c&15])
		}
	}
	return b
}

// AppendOriginal appends RcptParams.Original as the value of ORCPT, in ASCII: a hop that does not offer SMTPUTF8 may have it too.
func AppendOriginal(b []byte, original string) []byte {
	kind, address, _ := strings.Cut(original, ";")
	b = append(append(b, kind...), ';')
	if kind == "utf-8" {
		return AppendUTF8Xtext(b, address)
	}
	return AppendXtext(b, address)
}

// AppendUTF8Xtext appends an address in utf-8-addr-xtext, which is ASCII (RFC 6533 §3).
func AppendUTF8Xtext(b []byte, address string) []byte {
	for _, r := range address {
		if r < utf8.RuneSelf && isXchar(byte(r)) && r != '\\' {
			b = append(b, byte(r))
			continue
		}
		b = append(b, '\\', 'x', '{')
		b = append(b, strings.ToUpper(strconv.FormatInt(int64(r), 16))...)
		b = append(b, '}')
	}
	return b
}

// ParseXtext reads xtext (RFC 3461 §4): printable ASCII without "+" and "=", and octets as "+" and two digits.
func ParseXtext(s string) (string, error) {
	if strings.IndexByte(s, '+') < 0 {
		for i := 0; i < len(s); i++ {
			if !isXchar(s[i]) {
				return "", parameterError("not xtext")
			}
		}
		return s, nil
	}
	b := make([]byte, 0, len(s))
	for i := 0; i < len(s); i++ {
		switch c := s[i]; {
		case c == '+':
			if i+2 >= len(s) || !isUpperHex(s[i+1]) || !isUpperHex(s[i+2]) {
				return "", parameterError("xtext with a + and no two digits behind it")
			}
			n, _ := strconv.ParseUint(s[i+1:i+3], 16, 8) // two digits are no error
			b = append(b, byte(n))
			i += 2
		case isXchar(c):
			b = append(b, c)
		default:
			return "", parameterError("not xtext")
		}
	}
	return string(b), nil
}

// unquoteUTF8 reads utf-8-addr-xtext and utf-8-addr-unitext (RFC 6533 §3): characters as they are, or as \x{HEX}.
func unquoteUTF8(s string) (string, error) {
	var b strings.Builder
	for len(s) > 0 {
		if rest, ok := strings.CutPrefix(s, `\x{`); ok {
			digits, behind, ok := strings.Cut(rest, "}")
			r, err := strconv.ParseUint(digits, 16, 32)
			if !ok || err != nil || len(digits) < 2 || len(digits) > 6 || strings.ToUpper(digits) != digits || !isCharacter(rune(r)) {
				return "", parameterError(`ORCPT with a bad \x{}`)
			}
			b.WriteRune(rune(r))
			s = behind
			continue
		}
		r, size := utf8.DecodeRuneInString(s)
		if r == utf8.RuneError || r < utf8.RuneSelf && (!isXchar(byte(r)) || r == '\\') || !isCharacter(r) {
			return "", parameterError("ORCPT's address has a bad character")
		}
		b.WriteRune(r)
		s = s[size:]
	}
	return b.String(), nil
}

// isCharacter: neither a control character nor half of one.
func isCharacter(r rune) bool {
	return r >= ' ' && r != 0x7f && (r < 0x80 || r > 0x9f) && utf8.ValidRune(r) && r != utf8.RuneError
}

// isAddressType: those that IANA lists are words; "=" and "+" cannot stand in a parameter.
func isAddressType(s string) bool {
	return isDotString(s) && isASCII(s) && !strings.ContainsAny(s, "=+")
}

func isXchar(c byte) bool { return c > ' ' && c < 0x7f && c != '+' && c != '=' }

func isUpperHex(c byte) bool { return '0' <= c && c <= '9' || 'A' <= c && c <= 'F' }

func isPrintable(s string) bool {
	for i := 0; i < len(s); i++ {
		if s[i] < ' ' || s[i] > '~' {
			return false
		}
	}
	return true
}
