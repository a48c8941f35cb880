package config

import (
	"fmt"
	"slices"
	"strings"
	"unicode/utf8"

	"mailproxy/mail"
)

// Everyone is a local part that stands for all of a domain.
const Everyone = "*"

// A RecipientList has all recipients of a domain: its next hop is not asked about them.
type RecipientList struct {
	Domain string   `json:"domain"`
	Locals []string `json:"locals"` // local parts in lower case, without quoting, sorted; or Everyone
}

// ParseRecipient reads local@domain, where local may be *, and gives both in their normal forms.
func ParseRecipient(s string) (local, domain string, err error) {
	s = strings.TrimSpace(s)
	if rest, ok := strings.CutPrefix(s, Everyone+"@"); ok {
		domain, err = NormalizeDomain(rest)
		return Everyone, domain, err
	}
	p, err := mail.ParsePath(s)
	if err != nil {
		return "", "", fmt.Errorf("%q is not an address: %w", s, err)
	}
	if p.IsNull() || p.Domain == "" {
		return "", "", fmt.Errorf("%q is not an address: it has no domain", s)
	}
	domain, err = NormalizeDomain(p.Domain)
	return strings.ToLower(p.Local), domain, err
}

// checkRecipients passes over the lists that sound has too, where their domains are still there.
func checkRecipients(c *collector, sound, s *Snapshot) {
	gone := sound.Domains.missing(s.Domains)
	rest := sound.Recipients
	for i := range s.Recipients {
		r := &s.Recipients[i]
		if i > 0 && s.Recipients[i-1].Domain >= r.Domain {
			c.add(recipientsObject(r.Domain), "stands there twice, or not in order")
		}
		for len(rest) > 0 && rest[0].Domain < r.Domain {
			rest = rest[1:]
		}
		known := len(rest) > 0 && rest[0].Domain == r.Domain && sameMemory(rest[0].Locals, r.Locals)
		if known && !gone[r.Domain] {
			continue
		}
		if err := checkList(r, s.Domains); err != nil {
			c.add(recipientsObject(r.Domain), "%v", err)
		}
	}
}

// checkList finds what a list cannot have: names that are not normal, or twice, or out of order.
func checkList(r *RecipientList, domains Domains) error {
	if domains.Get(r.Domain) == nil {
		return fmt.Errorf("no such domain: %s", r.Domain)
	}
	for i, local := range r.Locals {
		if err := checkLocal(local); err != nil {
			return err
		}
		if i > 0 && r.Locals[i-1] >= local {
			return fmt.Errorf("%q stands there twice, or not in order", local)
		}
	}
	return nil
}

// checkLocal: as ParseRecipient gives it.
func checkLocal(local string) error {
	ascii := true
	for i := 0; i < len(local); i++ {
		switch c := local[i]; {
		case c < ' ' || c == 0x7f:
			return fmt.Errorf("%q has control characters in it", local)
		case 'A' <= c && c <= 'Z':
			return fmt.Errorf("%q is not in lower case", local)
		case c >= utf8.RuneSelf:
			ascii = false
		}
	}
	switch {
	case local == "" || len(local) > 64: // RFC 5321 §4.5.3.1.1
		return fmt.Errorf("%q is no local part: it has 1 to 64 octets", local)
	case !ascii && (!utf8.ValidString(local) || strings.ToLower(local) != local):
		return fmt.Errorf("%q is not UTF-8 in lower case", local)
	}
	return nil
}

// PutRecipients gives lists that are sorted by domain with one more, or with another in its place, or, where locals are none, without
// that domain's.
func PutRecipients(lists []RecipientList, domain string, locals []string) []RecipientList {
	at, found := slices.BinarySearchFunc(lists, domain, func(r RecipientList, name string) int { return strings.Compare(r.Domain, name) })
	all := slices.Clone(lists)
	switch {
	case len(locals) == 0 && found:
		return slices.Delete(all, at, at+1)
	case len(locals) == 0:
		return all
	case found:
		all[at].Locals = locals
		return all
	}
	return slices.Insert(all, at, RecipientList{Domain: domain, Locals: locals})
}

// RecipientsOf gives the list of a domain, of lists that are sorted by domain; nil where it has none.
func RecipientsOf(lists []RecipientList, domain string) []string {
	at, found := slices.BinarySearchFunc(lists, domain, func(r RecipientList, name string) int { return strings.Compare(r.Domain, name) })
	if !found {
		return nil
	}
	return lists[at].Locals
}

// diffRecipients compares by domain, and counts what differs: a list may be long.
func diffRecipients(a, b []RecipientList) (all []Difference) {
	for len(a)+len(b) > 0 {
		switch {
		case len(a) == 0 || len(b) > 0 && b[0].Domain < a[0].Domain:
			all = append(all, Difference{Op: "+", Object: recipientsObject(b[0].Domain), New: countAddresses(len(b[0].Locals))})
			b = b[1:]
		case len(b) == 0 || a[0].Domain < b[0].Domain:
			all = append(all, Difference{Op: "-", Object: recipientsObject(a[0].Domain), Old: countAddresses(len(a[0].Locals))})
			a = a[1:]
		default:
			if added, removed := compareSorted(a[0].Locals, b[0].Locals); added+removed > 0 {
				all = append(all, Difference{Op: "~", Object: recipientsObject(a[0].Domain), Old: countAddresses(len(a[0].Locals)),
					New: fmt.Sprintf("%s, %d added, %d removed", countAddresses(len(b[0].Locals)), added, removed)})
			}
			a, b = a[1:], b[1:]
		}
	}
	return all
}

func recipientsObject(domain string) string { return "recipients " + domain }

func countAddresses(n int) string {
	if n == 1 {
		return "1 address"
	}
	return fmt.Sprintf("%d addresses", n)
}

// compareSorted counts what b has and a has not, and the other way round.
func compareSorted(a, b []string) (added, removed int) {
	for len(a) > 0 && len(b) > 0 {
		switch c := strings.Compare(a[0], b[0]); {
		case c < 0:
			removed++
			a = a[1:]
		case c > 0:
			added++
			b = b[1:]
		default:
			a, b = a[1:], b[1:]
		}
	}
	return added + len(b), removed + len(a)
}
