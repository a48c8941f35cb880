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
	// Params has what is known of each of ForwardPaths besides, in their order; nil where that is nothing of any.
	Params []RcptParams `json:"params,omitempty"`
	// Return is what MAIL said with RET (RFC 3461).
	Return Return `json:"ret,omitempty"`
	// EnvID is what MAIL said with ENVID, without its xtext (RFC 3461).
	EnvID string `json:"envid,omitempty"`
	// Client is the address that the message came from; the zero Addr for a message made here (a DSN).
	Client netip.Addr `json:"client"`
	// Port is the client's; 0 where it is not known.
	Port uint16 `json:"port,omitempty"`
	// Name is what the DNS calls the client, where that name has its address; empty where there is none, or none was found in time.
	Name string `json:"name,omitempty"`
	// Helo is the client's EHLO or HELO argument, as given.
	Helo string `json:"helo"`
	// SMTPUTF8 is set where MAIL carried SMTPUTF8 (RFC 6531).
	SMTPUTF8 bool `json:"smtputf8,omitempty"`
	// EightBit is set where MAIL carried BODY=8BITMIME (RFC 6152).
	EightBit bool `json:"eight_bit,omitempty"`
	// ReceivedAt is when MAIL came.
	ReceivedAt time.Time `json:"received_at"`
	// About is set for a DSN made here about an item of the queue.
	About *About `json:"about,omitempty"`
}

// An About says what a DSN tells, so that a start after a crash finds that it has been told.
type About struct {
	// Item is the ID of the item that it is about.
	Item string `json:"item"`
	// Recipients are indexes of that item's ForwardPaths.
	Recipients []int `json:"recipients"`
	// Delayed: they are still being tried; otherwise what it tells is the end of them.
	Delayed bool `json:"delayed,omitempty"`
}

// For gives the envelope with some of its recipients: indexes of ForwardPaths, in the order wanted.
func (e *Envelope) For(recipients []int) Envelope {
	some := *e
	some.ForwardPaths = make([]Path, len(recipients))
	for i, r := range recipients {
		some.ForwardPaths[i] = e.ForwardPaths[r]
	}
	if e.Params != nil {
		some.Params = make([]RcptParams, len(recipients))
		for i, r := range recipients {
			some.Params[i] = e.Params[r]
		}
	}
	return some
}

// Add appends a recipient.
func (e *Envelope) Add(to Path, params RcptParams) {
	if e.Params == nil && params != (RcptParams{}) {
		e.Params = make([]RcptParams, len(e.ForwardPaths), len(e.ForwardPaths)+1)
	}
	e.ForwardPaths = append(e.ForwardPaths, to)
	if e.Params != nil {
		e.Params = append(e.Params, params)
	}
}

// Param gives what is known of one of ForwardPaths besides.
func (e *Envelope) Param(recipient int) RcptParams {
	if recipient >= len(e.Params) {
		return RcptParams{}
	}
	return e.Params[recipient]
}

// Content is the bytes of one message: header, blank line and body with CRLF line ends only, neither dot-stuffed nor ended by
// the final dot. It is read-only and may be read by several at once. *bytes.Reader and *io.SectionReader are Contents.
type Content interface {
	io.ReaderAt
	// Size is in octets.
	Size() int64
}
