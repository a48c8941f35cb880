package mail

import (
	"io"
	"net/netip"
	"time"
)

// An Envelope says from whom and to whom a message goes, and how it came to us.
type Envelope struct {
	// Session is the ID of the session that the message came in, for the log.
	Session string `json:"session"`
	// ReversePath is where DSNs go; the zero Path is the null reverse-path.
	ReversePath Path `json:"reverse_path"`
	// ForwardPaths are the recipients, in the order in which they were accepted.
	ForwardPaths []Path `json:"forward_paths"`
	// Client is the address that the message came from; the zero Addr for a message made here (a DSN).
	Client netip.Addr `json:"client"`
	// Helo is the client's EHLO or HELO argument, as given.
	Helo string `json:"helo"`
	// SMTPUTF8 is set where MAIL carried SMTPUTF8 (RFC 6531).
	SMTPUTF8 bool `json:"smtputf8,omitempty"`
	// EightBit is set where MAIL carried BODY=8BITMIME (RFC 6152).
	EightBit bool `json:"eight_bit,omitempty"`
	// ReceivedAt is when MAIL came.
	ReceivedAt time.Time `json:"received_at"`
}

// For gives the envelope with some of its recipients: indexes of ForwardPaths, in the order wanted.
func (e *Envelope) For(recipients []int) Envelope {
	some := *e
	some.ForwardPaths = make([]Path, len(recipients))
	for i, r := range recipients {
		some.ForwardPaths[i] = e.ForwardPaths[r]
	}
	return some
}

// Content is the bytes of one message: header, blank line and body with CRLF line ends only, neither dot-stuffed nor ended by
// the final dot. It is read-only and may be read by several at once. *bytes.Reader and *io.SectionReader are Contents.
type Content interface {
	io.ReaderAt
	// Size is in octets.
	Size() int64
}
