package queue

import (
	"bytes"
	"cmp"
	"errors"
	"io"
	"slices"
	"strings"
	"time"

	"mailproxy/config"
	"mailproxy/mail"
	"mailproxy/spool"
)

// chunk is how many entries are looked at under one lock.
const chunk = 256

// Counted says how many items a Selection means.
type Counted struct {
	// Total counts all items of the queue, Matched those that are meant, with Bytes octets in all.
	Total   int   `json:"total"`
	Matched int   `json:"matched"`
	Bytes   int64 `json:"bytes"`
	// Others counts those of Matched that go to somebody else, too, than Selection.To means.
	Others int `json:"others,omitempty"`
}

// Each calls f for at most limit items that are meant, the oldest first; limit 0 is none, below that there is none. Items come and go
// meanwhile: nothing but their order stays in memory. The error is f's, or wraps ErrSelection.
func (q *Queue) Each(s Selection, limit int, f func(Item) error) (Counted, error) {
	m, err := s.matcher(q.o.Now())
	if err != nil {
		return Counted{}, err
	}
	entries, total := q.entries(s.IDs)
	c := Counted{Total: total}
	items := make([]Item, 0, chunk)
	for part := range slices.Chunk(entries, chunk) {
		items = items[:0]
		q.mu.Lock()
		for _, n := range part {
			match, others := m.matchLocked(n)
			if !match || q.items[n.id] != n {
				continue
			}
			c.Matched++
			c.Bytes += n.size
			if others {
				c.Others++
			}
			if limit < 0 || c.Matched <= limit {
				items = append(items, n.view())
			}
		}
		q.mu.Unlock()
		for _, i := range items {
			if err := f(i); err != nil {
				return c, err
			}
		}
	}
	return c, nil
}

// entries gives those of the IDs, or all, the oldest first, and how many items there are.
func (q *Queue) entries(ids []string) (entries []*entry, total int) {
	q.mu.Lock()
	total = len(q.items)
	if len(ids) > 0 {
		for _, id := range ids {
			if n := q.items[id]; n != nil {
				entries = append(entries, n)
			}
		}
	} else {
		entries = make([]*entry, 0, len(q.items))
		for _, n := range q.items {
			entries = append(entries, n)
		}
	}
	q.mu.Unlock()
	slices.SortFunc(entries, func(a, b *entry) int { return cmp.Or(a.created.Compare(b.created), strings.Compare(a.id, b.id)) })
	return slices.Compact(entries), total
}

// List gives all items, the oldest first.
func (q *Queue) List() []Item {
	out := []Item{}
	_, _ = q.Each(Selection{}, -1, func(i Item) error { out = append(out, i); return nil }) // neither can fail
	return out
}

// Ages are the ends of a Hop's age groups; what is older than the last is a group of its own.
var Ages = [...]time.Duration{10 * time.Minute, time.Hour, 4 * time.Hour, 24 * time.Hour}

// A Hop is what waits for one next hop.
type Hop struct {
	// Hop is the transport and its hosts, or "mx" and the domain where it goes by MX, which of the usual way out is all. Empty where there are too many: the rest of them.
	Hop    string `json:"hop"`
	Items  int    `json:"items"`
	OnHold int    `json:"on_hold"`
	Bytes  int64  `json:"bytes"`
	// Ages counts them by age, as the variable Ages has it.
	Ages   [len(Ages) + 1]int `json:"ages"`
	Oldest time.Time          `json:"oldest"`
	// LastReply is the last answer or error of the newest of them that has one.
	LastReply string `json:"last_reply,omitempty"`
}

// A Summary is the queue by next hop, the one with most items first. An item that waits for several counts at each.
type Summary struct {
	Counted
	OnHold int       `json:"on_hold"`
	Kept   int       `json:"kept"` // as Item.Kept, and not on hold
	Oldest time.Time `json:"oldest,omitzero"`
	Hops   []Hop     `json:"hops"`
}

// maxHops bounds a Summary.
const maxHops = 1000

// Summary counts what is meant.
func (q *Queue) Summary(s Selection) (Summary, error) {
	out := Summary{Hops: []Hop{}}
	now := q.o.Now()
	m, err := s.matcher(now)
	if err != nil {
		return out, err
	}
	hops := make(map[string]*Hop)
	entries, total := q.entries(s.IDs)
	out.Total = total
	var seen []*Hop
	for part := range slices.Chunk(entries, chunk) {
		q.mu.Lock()
		for _, n := range part {
			match, others := m.matchLocked(n)
			if !match || q.items[n.id] != n {
				continue
			}
			if out.Matched++; out.Matched == 1 {
				out.Oldest = n.created
			}
			if out.Bytes += n.size; others {
				out.Others++
			}
			switch {
			case n.hold != nil:
				out.OnHold++
			case n.kept():
				out.Kept++
			}
			seen = seen[:0]
			for i := range n.open {
				h := hops[q.hopName(n, n.open[i].path)]
				if h == nil {
					h = &Hop{Hop: q.hopName(n, n.open[i].path), Oldest: n.created}
					hops[h.Hop] = h
				}
				if !slices.Contains(seen, h) {
					seen = append(seen, h)
					h.add(n, i, now)
				}
			}
		}
		q.mu.Unlock()
	}
	for _, h := range hops {
		out.Hops = append(out.Hops, *h)
	}
	slices.SortFunc(out.Hops, func(a, b Hop) int { return cmp.Or(b.Items-a.Items, strings.Compare(a.Hop, b.Hop)) })
	if len(out.Hops) > maxHops {
		rest := Hop{Oldest: now}
		for _, h := range out.Hops[maxHops:] {
			rest.join(h)
		}
		out.Hops = append(out.Hops[:maxHops], rest)
	}
	return out, nil
}

// hopName is the next hop of an entry's forward-path, as a group's key has it.
func (q *Queue) hopName(n *entry, p mail.Path) string {
	t, refused := q.wayOf(n.via, p)
	if refused != nil {
		return "none: " + refused.String()
	}
	key, _ := groupKey(t, p)
	if t.Name == "mx" { // the usual way out
		key = strings.TrimPrefix(key, "mx ")
	}
	return key
}

// add counts an entry, one of whose open forward-paths goes by this hop.
func (h *Hop) add(n *entry, path int, now time.Time) {
	h.Items++
	h.Bytes += n.size
	if n.hold != nil {
		h.OnHold++
	}
	group := 0
	for group < len(Ages) && now.Sub(n.created) >= Ages[group] {
		group++
	}
	h.Ages[group]++
	if o := n.open[path].last; o != nil {
		h.LastReply = o.reply().String()
	} else if len(n.open) == 1 && n.lastReply != "" { // else it may be another hop's
		h.LastReply = n.lastReply
	}
}

func (h *Hop) join(o Hop) {
	h.Items += o.Items
	h.Bytes += o.Bytes
	h.OnHold += o.OnHold
	for i := range h.Ages {
		h.Ages[i] += o.Ages[i]
	}
	if o.Oldest.Before(h.Oldest) {
		h.Oldest = o.Oldest
	}
}

// A Recipient is a forward-path of a Story, and its last answer.
type Recipient struct {
	ForwardPath mail.Path `json:"forward_path"`
	// Done: it was delivered, or reported to the reverse-path.
	Done bool `json:"done,omitempty"`
	// At, Hop, Class and Reply are of its last attempt.
	At    time.Time `json:"at,omitzero"`
	Hop   string    `json:"hop,omitempty"`
	Class string    `json:"class,omitempty"`
	Reply string    `json:"reply,omitempty"`
}

// A Story is all that the queue knows of an item.
type Story struct {
	Item     Item          `json:"item"`
	Envelope mail.Envelope `json:"envelope"`
	// Recipients are those of the envelope.
	Recipients []Recipient `json:"recipients"`
	// Expires is when the last of its recipients is given up, by their transports; zero while it is on hold, when that does not count down.
	Expires time.Time `json:"expires,omitzero"`
	// Header is the message's, up to 64 kB.
	Header string `json:"header"`
}

// Story gives one item's story. The error is ErrNoSuch, or wraps ErrDamaged, or is the disk's.
func (q *Queue) Story(id string) (Story, error) {
	q.mu.Lock()
	n := q.items[id]
	if n == nil {
		q.mu.Unlock()
		return Story{}, ErrNoSuch
	}
	story := Story{Item: n.view(), Expires: q.expiresLocked(n)}
	open := make(map[int]*outcome, len(n.open))
	for i := range n.open {
		open[n.open[i].index] = n.open[i].last
	}
	q.mu.Unlock()
	m, err := q.spool.Open(id)
	if errors.Is(err, spool.ErrNoSuch) { // delivered in between
		return Story{}, ErrNoSuch
	}
	if err != nil {
		return story, err
	}
	defer m.Close()
	story.Envelope = *m.Envelope
	for i, p := range m.Envelope.ForwardPaths {
		o, waits := open[i]
		r := Recipient{ForwardPath: p, Done: !waits}
		if o != nil {
			r.At, r.Hop, r.Class, r.Reply = o.At, o.Hop, o.Class, o.reply().String()
		}
		story.Recipients = append(story.Recipients, r)
	}
	header, err := readHeader(m.Content)
	story.Header = string(header)
	return story, err
}

func (q *Queue) expiresLocked(n *entry) (last time.Time) {
	if n.hold != nil {
		return last
	}
	for i := range n.open {
		t, _ := q.wayOf(n.via, n.open[i].path)
		if end := n.bornAt().Add(q.lifeBy(t)); end.After(last) {
			last = end
		}
	}
	return last
}

// Message calls f with the content of an item, checked. The error is f's, ErrNoSuch, or wraps ErrDamaged, or is the disk's.
func (q *Queue) Message(id string, f func(mail.Content) error) error {
	m, err := q.spool.Open(id)
	if errors.Is(err, spool.ErrNoSuch) {
		return ErrNoSuch
	}
	if err != nil {
		return err
	}
	defer m.Close()
	if err := m.Check(); err != nil {
		return err
	}
	return f(m.Content)
}

// readHeader gives the header with its last line end, without the blank line; of a longer one the first 64 kB.
func readHeader(c mail.Content) ([]byte, error) {
	b := make([]byte, min(c.Size(), maxShownHeader))
	n, err := c.ReadAt(b, 0)
	if err != nil && err != io.EOF {
		return nil, err
	}
	b = b[:n]
	if bytes.HasPrefix(b, []byte("\r\n")) {
		return nil, nil
	}
	if i := bytes.Index(b, []byte("\r\n\r\n")); i >= 0 {
		b = b[:i+2]
	}
	return b, nil
}

// wayOf gives the transport for a forward-path: the one that an operator has ordered for its item, or the usual one.
func (q *Queue) wayOf(via string, p mail.Path) (config.Transport, *mail.Reply) {
	if via == "" {
		return q.o.Route(p)
	}
	if t, ok := q.transport(via); ok {
		return t, nil
	}
	return config.Transport{}, &mail.Reply{Code: 451, Enhanced: [3]int{4, 3, 5}, Text: "ordered to go by transport " + via + ", which is not there any more"}
}

func (q *Queue) transport(name string) (config.Transport, bool) {
	if q.o.Transport == nil {
		return config.Transport{}, false
	}
	return q.o.Transport(name)
}
