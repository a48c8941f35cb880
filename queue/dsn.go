package queue

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/base32"
	"fmt"
	"mime/quotedprintable"
	"slices"
	"strings"
	"time"

	"mailproxy/mail"
	"mailproxy/relay"
	"mailproxy/spool"
)

// A failure is one forward-path to be reported as not delivered.
type failure struct {
	path    mail.Path
	outcome outcome
	expired bool // given up, after temporary outcomes only
}

// DSN spools a DSN to the envelope's reverse-path for those results that are not positive, and gives its item's ID. For a null
// reverse-path, or where all results are positive, there is none: the ID is "". The error is Put's.
func (q *Queue) DSN(ctx context.Context, e *mail.Envelope, results []relay.Result, c mail.Content) (string, error) {
	if err := ctx.Err(); err != nil {
		return "", refusal(err)
	}
	var failed []failure
	now := q.o.Now()
	for _, r := range results {
		if r.Reply.Positive() {
			continue
		}
		failed = append(failed, failure{path: r.Path, outcome: *outcomeOf(r, now)})
	}
	if len(failed) == 0 || e.ReversePath.IsNull() {
		return "", nil
	}
	id := mail.NewID(now)
	if err := q.spoolDSN(id, e, failed, c); err != nil {
		return "", refusal(err)
	}
	q.log.Info().Str("session", e.Session).Str("item", id).Stringer("forward_path", e.ReversePath).Msg("dsn.queued")
	return id, nil
}

// report spools the DSN of an item, before the item's paths are closed; false where that was not possible. Its ID comes from
// the item's and the paths, so that doing it again after a crash finds the DSN there.
func (t *trial) report(m *spool.Message, failed []failure) bool {
	n := t.n
	if n.reverse.IsNull() {
		// RFC 5321 §4.5.5: nobody is told; the log is.
		for _, f := range failed {
			t.log.Warn().Str("item", n.id).Stringer("forward_path", f.path).Str("reply", f.outcome.reply().String()).
				Str("reason", "null reverse-path").Msg("dsn.none")
		}
		return true
	}
	id := dsnID(n.id, failed)
	t.mu.Lock()
	_, there := t.items[id]
	t.mu.Unlock()
	if there {
		return true
	}
	if err := t.spoolDSN(id, m.Envelope, failed, m.Content); err != nil {
		t.log.Error().Str("item", n.id).AnErr("err", err).Msg("dsn.refused")
		return false
	}
	t.log.Info().Str("item", id).Str("reason", n.id).Stringer("forward_path", n.reverse).Msg("dsn.queued")
	return true
}

// dsnEncoding is that of mail.NewID.
var dsnEncoding = base32.NewEncoding("0123456789BCDFGHJKLMNPQRSTVWXYZ_").WithPadding(base32.NoPadding)

func dsnID(item string, failed []failure) string {
	h := sha256.New()
	h.Write([]byte(item))
	for _, f := range failed {
		h.Write([]byte("\x00" + f.path.String()))
	}
	return item[:8] + dsnEncoding.EncodeToString(h.Sum(nil)[:5])
}

func (q *Queue) spoolDSN(id string, e *mail.Envelope, failed []failure, c mail.Content) error {
	header, err := readHeader(c)
	if err != nil {
		return err
	}
	now := q.o.Now()
	utf8 := !e.ReversePath.IsASCII() || slices.ContainsFunc(failed, func(f failure) bool { return !f.path.IsASCII() })
	b := (&dsn{
		id: id, hostname: q.o.Hostname, now: now, envelope: e, failed: failed, header: header, utf8: utf8, life: q.o.Life(),
	}).bytes()
	d := Draft{
		Envelope: mail.Envelope{
			Session: e.Session, ForwardPaths: []mail.Path{e.ReversePath}, SMTPUTF8: utf8, EightBit: utf8, ReceivedAt: now,
		},
		Content: bytes.NewReader(b),
	}
	// No MinFree: the room is there so that what was accepted can be ended.
	if err := q.put([]string{id}, []Draft{d}, false, int64(len(b)), 0); err != nil {
		return err
	}
	q.mu.Lock()
	q.counts.DSNs++
	q.mu.Unlock()
	return nil
}

// A dsn is a delivery status notification being written (RFC 3464 in the multipart/report of RFC 6522). It is ASCII throughout
// but for addresses that are not (RFC 6533), and no line is over 998 octets.
type dsn struct {
	b        bytes.Buffer
	id       string
	hostname string
	now      time.Time
	envelope *mail.Envelope
	failed   []failure
	header   []byte
	utf8     bool
	life     time.Duration
}

func (d *dsn) line(parts ...string) {
	for _, p := range parts {
		d.b.WriteString(p)
	}
	d.b.WriteString("\r\n")
}

// boundary cannot stand in a part: quoted-printable has no "=_" (RFC 2045 §6.7) and the others are written here.
func (d *dsn) boundary() string { return "=_" + d.id }

func (d *dsn) bytes() []byte {
	report, suffix := "delivery-status", "rfc822-headers"
	if d.utf8 {
		report, suffix = "global-delivery-status", "global-headers"
	}
	d.line("From: Mail Delivery System <MAILER-DAEMON@", d.hostname, ">")
	d.line("To: <", d.envelope.ReversePath.String(), ">")
	d.line("Subject: Undelivered Mail Returned to Sender")
	d.line("Date: ", d.now.Format(time.RFC1123Z))
	d.line("Message-ID: <", d.id, ".dsn@", d.hostname, ">")
	d.line("Auto-Submitted: auto-replied") // RFC 3834 §5
	d.line("MIME-Version: 1.0")
	d.line("Content-Type: multipart/report; report-type=delivery-status;")
	d.line("\tboundary=\"", d.boundary(), "\"")
	d.line()
	d.line("This is a MIME-encapsulated message.")
	d.line()
	d.text()
	d.line("--", d.boundary())
	d.line("Content-Description: Delivery report")
	d.line("Content-Type: message/", report)
	if d.utf8 {
		d.line("Content-Transfer-Encoding: 8bit")
	}
	d.line()
	d.status()
	d.line("--", d.boundary())
	d.line("Content-Description: Header of the undelivered message")
	if suffix == "global-headers" {
		d.line("Content-Type: message/", suffix)
	} else {
		d.line("Content-Type: text/", suffix)
	}
	d.original()
	d.line("--", d.boundary(), "--")
	return d.b.Bytes()
}

// text is the part for people.
func (d *dsn) text() {
	d.line("--", d.boundary())
	d.line("Content-Description: Notification")
	if d.utf8 {
		d.line("Content-Type: text/plain; charset=utf-8")
		d.line("Content-Transfer-Encoding: 8bit")
	} else {
		d.line("Content-Type: text/plain; charset=us-ascii")
	}
	d.line()
	d.line("This is the mail system at host ", d.hostname, ".")
	d.line()
	d.line("Your message could not be delivered to one or more recipients.")
	d.line("No further attempts will be made for them.")
	d.line()
	for _, f := range d.failed {
		d.line("<", f.path.String(), ">:")
		if f.expired {
			d.line("    given up after ", lifeText(d.life), "; the last attempt ended with:")
		}
		for _, l := range fold(f.outcome.said(), 70) {
			d.line("    ", l)
		}
		d.line()
	}
}

// lifeText is a length of time as people write it: "5 days", "1 day 12 hours".
func lifeText(life time.Duration) string {
	var parts []string
	for _, unit := range []struct {
		name   string
		length time.Duration
	}{{"day", 24 * time.Hour}, {"hour", time.Hour}, {"minute", time.Minute}, {"second", time.Second}} {
		n := life / unit.length
		life -= n * unit.length
		switch {
		case n == 1:
			parts = append(parts, "1 "+unit.name)
		case n > 1:
			parts = append(parts, fmt.Sprintf("%d %ss", n, unit.name))
		}
	}
	return strings.Join(parts, " ")
}

// said is the outcome as people read it.
func (o *outcome) said() string {
	switch {
	case o.Source == fromNobody:
		return "could not reach host " + o.Text
	case o.Hop == "":
		return o.reply().String()
	case o.Source == fromHere:
		return "not passed on to host " + o.Hop + ": " + o.reply().String()
	}
	return "host " + o.Hop + " said: " + o.reply().String()
}

// status is the part for machines (RFC 3464 §2).
func (d *dsn) status() {
	d.line("Reporting-MTA: dns; ", d.hostname)
	if !d.envelope.ReceivedAt.IsZero() {
		d.line("Arrival-Date: ", d.envelope.ReceivedAt.Format(time.RFC1123Z))
	}
	for _, f := range d.failed {
		d.line()
		kind := "rfc822; "
		if !f.path.IsASCII() {
			kind = "utf-8; " // RFC 6533 §3
		}
		d.line("Final-Recipient: ", kind, f.path.String())
		d.line("Action: failed")
		d.line("Status: ", f.status())
		d.diagnostic(&f.outcome)
		d.line("Last-Attempt-Date: ", f.outcome.At.Format(time.RFC1123Z))
	}
	d.line()
}

// diagnostic is a hop's own answer; RFC 3464 §2.3.5 and §2.3.6 have no room for another's words.
func (d *dsn) diagnostic(o *outcome) {
	if o.Hop == "" || o.Source != fromHop {
		return
	}
	host := o.Hop
	if i := strings.LastIndexByte(host, ':'); i > 0 {
		host = host[:i]
	}
	d.line("Remote-MTA: dns; ", host)
	for i, l := range fold("smtp; "+o.reply().String(), 900) {
		if i == 0 {
			d.line("Diagnostic-Code: ", l)
		} else {
			d.line("\t", l)
		}
	}
}

// status is 5.x.x: an expired path's last outcome was temporary, and it is no longer.
func (f *failure) status() string {
	if f.expired {
		return "5.4.7" // RFC 3463 §3.5: delivery time expired
	}
	return f.outcome.reply().Status()
}

// original is the header of the message, encoded where it is not ASCII or has long lines (RFC 6522 §4). A message/global-headers
// part may be 8-bit.
func (d *dsn) original() {
	if plain(d.header, d.utf8) {
		if d.utf8 {
			d.line("Content-Transfer-Encoding: 8bit")
		}
		d.line()
		d.b.Write(d.header)
	} else {
		d.line("Content-Transfer-Encoding: quoted-printable")
		d.line()
		w := quotedprintable.NewWriter(&d.b)
		_, _ = w.Write(d.header) // to memory
		_ = w.Close()
	}
	if !bytes.HasSuffix(d.b.Bytes(), []byte("\r\n")) {
		d.line()
	}
	d.line()
}

// plain says whether b can stand in a part as it is: lines of up to 998 octets that do not look like a boundary, ASCII unless
// eightBit.
func plain(b []byte, eightBit bool) bool {
	for line := range bytes.SplitSeq(b, []byte("\r\n")) {
		if len(line) > 998 || bytes.HasPrefix(line, []byte("--")) {
			return false
		}
		for _, c := range line {
			if c >= 0x80 && !eightBit || c == 0 || c == '\r' || c == '\n' {
				return false
			}
		}
	}
	return true
}

// fold cuts a text into lines of at most width octets, at blanks where there are any.
func fold(s string, width int) (lines []string) {
	for len(s) > width {
		i := strings.LastIndexByte(s[:width], ' ')
		if i < width/2 {
			i = width
		}
		lines = append(lines, strings.TrimRight(s[:i], " "))
		s = strings.TrimLeft(s[i:], " ")
	}
	return append(lines, s)
}
