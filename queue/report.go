package queue

import (
	"bytes"
	"fmt"
	"mime/quotedprintable"
	"strings"
	"time"
	"unicode/utf8"

	"mailproxy/mail"
)

// maxReturned is up to which size a message comes back whole (RFC 3461 §4.3); of a larger one the header does.
const maxReturned = 128 << 10 // octets

// A dsn is a delivery status notification being written: RFC 3464 in the multipart/report of RFC 6522. For a reverse-path in ASCII it
// is ASCII throughout, with other addresses in the form of RFC 6533 §3 for that, but for a message that comes back whole. For
// another it is UTF-8. No line is over 998 octets.
type dsn struct {
	b        bytes.Buffer
	id       string
	hostname string
	now      time.Time
	envelope *mail.Envelope
	action   action
	told     []news
	header   []byte
	whole    []byte // the message, where it comes back whole
	utf8     bool
	eightBit bool // set by bytes
}

// title is what people read first.
func (a action) title() string {
	switch a {
	case actionDelayed:
		return "Delayed Mail (still being tried)"
	case actionRelayed:
		return "Mail Passed On"
	}
	return "Undelivered Mail Returned to Sender"
}

// says is what it is about, line by line.
func (a action) says() []string {
	switch a {
	case actionDelayed:
		return []string{
			"Your message could not yet be delivered to one or more recipients.",
			"You need not do anything: it is tried again and again, until the time below.",
		}
	case actionRelayed:
		return []string{
			"Your message was passed on for one or more recipients to a mail system that does not tell",
			"when it has been delivered. Unless that system tells you otherwise, it is there.",
		}
	}
	return []string{
		"Your message could not be delivered to one or more recipients.",
		"No further attempts will be made for them.",
	}
}

func (d *dsn) line(parts ...string) {
	for _, p := range parts {
		d.b.WriteString(p)
	}
	d.b.WriteString("\r\n")
}

// boundary cannot stand in a part: quoted-printable has no "=_" (RFC 2045 §6.7), the others are written here, and a message that has it
// does not come back whole.
func (d *dsn) boundary() string { return "=_" + d.id }

func (d *dsn) bytes() []byte {
	if d.whole != nil && !d.mayReturn() {
		d.whole = nil
	}
	d.eightBit = d.utf8 || !isASCII(d.whole)
	d.line("From: Mail Delivery System <MAILER-DAEMON@", d.hostname, ">")
	d.line("To: <", d.envelope.ReversePath.String(), ">")
	d.line("Subject: ", d.action.title())
	d.line("Date: ", d.now.Format(time.RFC1123Z))
	d.line("Message-ID: <", d.id, ".dsn@", d.hostname, ">")
	d.line("Auto-Submitted: auto-replied") // RFC 3834 §5
	d.line("MIME-Version: 1.0")
	d.line("Content-Type: multipart/report; report-type=delivery-status;")
	d.line("\tboundary=\"", d.boundary(), "\"")
	if d.eightBit {
		d.line("Content-Transfer-Encoding: 8bit")
	}
	d.line()
	d.line("This is a MIME-encapsulated message.")
	d.line()
	d.text()
	d.line("--", d.boundary())
	d.line("Content-Description: Delivery report")
	if d.utf8 {
		d.line("Content-Type: message/global-delivery-status")
		d.line("Content-Transfer-Encoding: 8bit")
	} else {
		d.line("Content-Type: message/delivery-status")
	}
	d.line()
	d.status()
	d.line("--", d.boundary())
	if d.whole != nil {
		d.message()
	} else {
		d.original()
	}
	d.line("--", d.boundary(), "--")
	return d.b.Bytes()
}

// text is the part for people.
func (d *dsn) text() {
	d.line("--", d.boundary())
	d.line("Content-Description: Notification")
	b := d.prose()
	switch {
	case isASCII(b):
		d.line("Content-Type: text/plain; charset=us-ascii")
		d.line()
		d.b.Write(b)
	case d.utf8:
		d.line("Content-Type: text/plain; charset=utf-8")
		d.line("Content-Transfer-Encoding: 8bit")
		d.line()
		d.b.Write(b)
	default:
		d.line("Content-Type: text/plain; charset=utf-8")
		d.quoted(b)
	}
}

func (d *dsn) prose() []byte {
	p := &dsn{}
	p.line("This is the mail system at host ", d.hostname, ".")
	p.line()
	for _, l := range d.action.says() {
		p.line(l)
	}
	p.line()
	for i := range d.told {
		n := &d.told[i]
		p.line("<", n.path.String(), ">:")
		switch {
		case n.expired:
			p.line("    given up after ", lifeText(n.life), "; the last attempt ended with:")
		case d.action == actionDelayed:
			p.line("    tried until ", n.until.Format(time.RFC1123Z), "; the last attempt ended with:")
		}
		for _, l := range fold(n.outcome.said(), 70) {
			p.line("    ", l)
		}
		p.line()
	}
	return p.b.Bytes()
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
	if d.envelope.EnvID != "" {
		d.line("Original-Envelope-Id: ", d.envelope.EnvID)
	}
	d.line("Reporting-MTA: dns; ", d.hostname)
	if !d.envelope.ReceivedAt.IsZero() {
		d.line("Arrival-Date: ", d.envelope.ReceivedAt.Format(time.RFC1123Z))
	}
	for i := range d.told {
		n := &d.told[i]
		d.line()
		if kind, address, ok := strings.Cut(n.params.Original, ";"); ok {
			d.address("Original-Recipient: ", kind, address)
		}
		kind := "rfc822"
		if !n.path.IsASCII() {
			kind = "utf-8" // RFC 6533 §3
		}
		d.address("Final-Recipient: ", kind, n.path.String())
		d.line("Action: ", string(d.action))
		d.line("Status: ", n.status())
		d.diagnostic(&n.outcome)
		d.line("Last-Attempt-Date: ", n.outcome.At.Format(time.RFC1123Z))
		if d.action == actionDelayed {
			d.line("Will-Retry-Until: ", n.until.Format(time.RFC1123Z))
		}
	}
	d.line()
}

// address is a field with an address, in ASCII unless d is UTF-8.
func (d *dsn) address(field, kind, address string) {
	if kind == "utf-8" && !d.utf8 {
		address = string(mail.AppendUTF8Xtext(nil, address))
	}
	d.line(field, kind, "; ", address)
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
func (n *news) status() string {
	if n.expired {
		return "5.4.7" // RFC 3463 §3.5: delivery time expired
	}
	return n.outcome.reply().Status()
}

// mayReturn says whether the message can stand in a part as it is: message/rfc822 may not be encoded (RFC 2046 §5.2.1).
func (d *dsn) mayReturn() bool {
	for line := range bytes.SplitSeq(d.whole, []byte("\r\n")) {
		if len(line) > 998 || bytes.IndexByte(line, 0) >= 0 || bytes.HasPrefix(line, []byte("--"+d.boundary())) {
			return false
		}
	}
	return true
}

// message is the message itself.
func (d *dsn) message() {
	d.line("Content-Description: Undelivered message")
	if d.envelope.SMTPUTF8 && !isASCII(d.header) {
		d.line("Content-Type: message/global") // RFC 6532 §3.7
	} else {
		d.line("Content-Type: message/rfc822")
	}
	if !isASCII(d.whole) {
		d.line("Content-Transfer-Encoding: 8bit")
	}
	d.line()
	d.b.Write(d.whole)
	d.endPart()
}

// original is the header of the message, encoded where it is not ASCII or has long lines (RFC 6522 §4). A message/global-headers
// part may be 8-bit.
func (d *dsn) original() {
	d.line("Content-Description: Header of the message")
	if d.utf8 || d.envelope.SMTPUTF8 && !isASCII(d.header) {
		d.line("Content-Type: message/global-headers")
	} else {
		d.line("Content-Type: text/rfc822-headers")
	}
	switch {
	case !plain(d.header, d.utf8):
		d.quoted(d.header)
	case d.utf8:
		d.line("Content-Transfer-Encoding: 8bit")
		fallthrough
	default:
		d.line()
		d.b.Write(d.header)
	}
	d.endPart()
}

// quoted ends a part's header and gives its content in quoted-printable.
func (d *dsn) quoted(b []byte) {
	d.line("Content-Transfer-Encoding: quoted-printable")
	d.line()
	w := quotedprintable.NewWriter(&d.b)
	_, _ = w.Write(b) // to memory
	_ = w.Close()
}

func (d *dsn) endPart() {
	if !bytes.HasSuffix(d.b.Bytes(), []byte("\r\n")) {
		d.line()
	}
	d.line()
}

func isASCII(b []byte) bool {
	for _, c := range b {
		if c >= utf8.RuneSelf {
			return false
		}
	}
	return true
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
