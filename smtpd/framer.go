package smtpd

import (
	"bytes"
	"errors"
	"io"

	"mailproxy/mail"
)

var (
	errBareNewline = errors.New("bare CR or LF")
	errEndless     = errors.New("no end of the message within bounds")
)

// limits bound one message; octets, lines without their CRLF.
type limits struct {
	maxMessage, maxHeader int64
	maxLine               int
	refuseBare            bool
}

// drainBytes is how much of a message that is refused already is read in search of its end, past the limit.
const drainBytes = 16 << 20

// A framer finds the end of a message in what the client sends: CRLF.CRLF and nothing else (RFC 5321 §4.1.1.4). On the way it
// removes dot-stuffing, turns a bare LF into CRLF and a bare CR into a blank, and enforces the limits. It works on stretches of
// any length and gives the same for every way to split them.
//
//	line start -> [dot] -> octets -> CR -> LF: line start
//	                                  \-> anything else: the CR was a bare one
type framer struct {
	limits
	out io.Writer // gets the message's octets

	inLine  bool // something of this line has been read, be it only its dot
	afterLF bool // this line began behind a bare LF: a dot means nothing there
	dot     bool // the line began with a dot, which was dropped
	cr      bool // the last octet was a CR that is not judged yet
	line    int  // octets of this line, without the dot
	total   int64
	inBody  bool // the header has ended

	refused *mail.Reply // why the message is not taken; the rest is read and dropped
}

// feed takes a stretch and says how much of it belongs to the message; done when its end was in it. An error is a doubt about
// framing: nothing more may be read.
func (f *framer) feed(p []byte) (n int, done bool, err error) {
	for n < len(p) {
		if f.cr {
			if p[n] == '\n' {
				n++
				if f.dot && f.line == 0 {
					return n, true, nil
				}
				f.endLine(false)
				continue
			}
			if err := f.bare(); err != nil {
				return n, false, err
			}
			f.cr = false
			f.emit(blank)
			f.inLine = true
			continue
		}
		if !f.inLine && !f.afterLF && p[n] == '.' {
			f.dot, f.inLine = true, true
			n++
			continue
		}
		m := f.stretch(p[n:])
		f.emit(p[n : n+m])
		f.inLine = f.inLine || m > 0
		if n += m; n == len(p) {
			break
		}
		switch p[n] {
		case '\r':
			f.cr = true
		default:
			if err := f.bare(); err != nil {
				return n, false, err
			}
			f.endLine(true)
		}
		n++
		if f.total > f.maxMessage+drainBytes {
			return n, false, errEndless
		}
	}
	if f.total > f.maxMessage+drainBytes {
		return n, false, errEndless
	}
	return n, false, nil
}

var (
	blank = []byte{' '}
	crlf  = []byte{'\r', '\n'}
)

// stretch is the number of octets before the next CR or LF.
func (f *framer) stretch(p []byte) int {
	if i := bytes.IndexByte(p, '\n'); i >= 0 {
		p = p[:i]
	}
	if i := bytes.IndexByte(p, '\r'); i >= 0 {
		return i
	}
	return len(p)
}

func (f *framer) bare() error {
	if f.refuseBare {
		return errBareNewline
	}
	return nil
}

// emit passes octets of a line on.
func (f *framer) emit(p []byte) {
	if len(p) == 0 {
		return
	}
	f.line += len(p)
	f.total += int64(len(p))
	if f.line > f.maxLine {
		f.refuse(replyBodyLineTooLong)
	}
	f.pass(p)
}

// endLine passes a line's end on.
func (f *framer) endLine(bareLF bool) {
	if f.line == 0 {
		f.inBody = true
	}
	f.total += 2
	f.pass(crlf)
	f.line, f.dot, f.cr, f.inLine, f.afterLF = 0, false, false, false, bareLF
}

func (f *framer) pass(p []byte) {
	switch {
	case f.total > f.maxMessage:
		f.refuse(replyTooBig)
	case !f.inBody && f.total > f.maxHeader:
		f.refuse(replyHeaderTooBig)
	}
	if f.refused != nil {
		return
	}
	if _, err := f.out.Write(p); err != nil {
		f.refuse(noRoom(err))
	}
}

func (f *framer) refuse(reply *mail.Reply) {
	if f.refused == nil {
		f.refused = reply
	}
}
