package queue

import (
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"mailproxy/config"
	"mailproxy/mail"
)

// ErrSelection is what every refusal of a Selection wraps.
var ErrSelection = errors.New("bad selection")

// A Selection says which items are meant: those of which everything holds that is set. An item is meant as a whole where one of its
// open forward-paths is. The zero Selection means all.
type Selection struct {
	// IDs are the items' own.
	IDs []string `json:"ids,omitempty"`
	// From is the reverse-path: an address, a domain, or <> for the null reverse-path.
	From string `json:"from,omitempty"`
	// To is a forward-path: an address, or a domain.
	To string `json:"to,omitempty"`
	// Older is how long ago it came, at least.
	Older time.Duration `json:"older,omitempty"`
	// Reason is the class of the last answer or error, or a part of its text in either case.
	Reason string `json:"reason,omitempty"`
	// OnHold means only those on hold.
	OnHold bool `json:"on_hold,omitempty"`
	// Kept means only those that Item.Kept is set for.
	Kept bool `json:"kept,omitempty"`
}

// Classes are the reason classes that Selection.Reason knows.
func Classes() []string {
	return []string{"route", "dns", "connect", "greeting", "tls", "auth", "mail", "rcpt", "data", "final"}
}

// MaxIDs is how many IDs a Selection may have.
const MaxIDs = 2000

// Check says what is wrong with a Selection; it wraps ErrSelection.
func (s Selection) Check() error {
	_, err := s.matcher(time.Time{})
	return err
}

// Bounded says whether anything but all is meant.
func (s Selection) Bounded() bool {
	return len(s.IDs) > 0 || s.From != "" || s.To != "" || s.Older != 0 || s.Reason != "" || s.OnHold || s.Kept
}

// A matcher is a Selection made ready.
type matcher struct {
	from, to *pathMatcher // nil: any
	before   time.Time    // zero: any
	class    string
	text     string
	onHold   bool
	kept     bool
}

// A pathMatcher is an address, or a domain where it has no local part.
type pathMatcher struct {
	path mail.Path
	any  bool // of the domain
}

func (s Selection) matcher(now time.Time) (m matcher, err error) {
	if len(s.IDs) > MaxIDs {
		return m, fmt.Errorf("%w: more than %d IDs", ErrSelection, MaxIDs)
	}
	if m.from, err = newPathMatcher("from", s.From); err != nil {
		return m, err
	}
	if m.to, err = newPathMatcher("to", s.To); err != nil {
		return m, err
	}
	if s.Older < 0 {
		return m, fmt.Errorf("%w: older: %v is in the future", ErrSelection, -s.Older)
	}
	if s.Older > 0 {
		m.before = now.Add(-s.Older)
	}
	if slices.Contains(Classes(), s.Reason) {
		m.class = s.Reason
	} else {
		m.text = strings.ToLower(s.Reason)
	}
	m.onHold, m.kept = s.OnHold, s.Kept
	return m, nil
}

func newPathMatcher(what, text string) (*pathMatcher, error) {
	switch text {
	case "":
		return nil, nil
	case "<>":
		return &pathMatcher{}, nil
	}
	text = strings.TrimSuffix(strings.TrimPrefix(text, "<"), ">")
	if domain := strings.TrimPrefix(text, "@"); !strings.Contains(domain, "@") {
		normal, err := config.NormalizeDomain(domain)
		if err != nil {
			return nil, fmt.Errorf("%w: %s: %q is neither an address nor a domain", ErrSelection, what, text)
		}
		return &pathMatcher{path: mail.Path{Domain: normal}, any: true}, nil
	}
	path, err := mail.ParsePath(text)
	if err != nil {
		return nil, fmt.Errorf("%w: %s: %w", ErrSelection, what, err)
	}
	path.Domain = normalDomain(path.Domain)
	return &pathMatcher{path: path}, nil
}

// normalDomain gives a domain with A-labels, so that both forms of one are equal.
func normalDomain(domain string) string {
	for i := range len(domain) {
		if domain[i] >= 0x80 {
			if normal, err := config.NormalizeDomain(domain); err == nil {
				return normal
			}
			break
		}
	}
	return domain
}

func (m *pathMatcher) matches(p mail.Path) bool {
	if m == nil {
		return true
	}
	return normalDomain(p.Domain) == m.path.Domain && (m.any || strings.EqualFold(p.Local, m.path.Local))
}

// matchLocked says whether an entry is meant, and whether it goes to others, too, than those that To means.
func (m *matcher) matchLocked(n *entry) (match, others bool) {
	if !m.from.matches(n.reverse) || m.onHold && n.hold == nil || m.kept && !n.kept() || !m.before.IsZero() && n.created.After(m.before) {
		return false, false
	}
	reason := m.class == "" && m.text == "" || m.reason(n.class, n.lastReply)
	to := m.to == nil
	for i := range n.open {
		if m.to != nil && m.to.matches(n.open[i].path) {
			to = true
		} else {
			others = m.to != nil
		}
		if last := n.open[i].last; !reason && last != nil {
			reason = m.reason(last.Class, last.reply().String())
		}
	}
	return to && reason, others
}

func (m *matcher) reason(class, text string) bool {
	if m.class != "" {
		return class == m.class
	}
	return strings.Contains(strings.ToLower(text), m.text)
}
