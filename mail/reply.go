package mail

import "strconv"

// A Reply is one SMTP reply (RFC 5321 §4.2) and, where it refuses, an error: Text is for the peer, Cause is for the log
// and never goes to the wire. A Reply is immutable once it has been made.
type Reply struct {
	// Code is the three-digit reply code.
	Code int
	// Enhanced is the status code of RFC 3463; all zero when there is none.
	Enhanced [3]int
	// Text is one or more lines separated by "\n", printable, without the codes.
	Text string
	// Cause says why, for the log; nil where Text says it all.
	Cause error
}

// Positive says whether the reply is 2xx.
func (r *Reply) Positive() bool { return r.Code/100 == 2 }

// Temporary says whether the reply is 4xx: the same may succeed later.
func (r *Reply) Temporary() bool { return r.Code/100 == 4 }

// Permanent says whether the reply is 5xx: trying again is of no use.
func (r *Reply) Permanent() bool { return r.Code/100 == 5 }

// Error gives the reply as one line: "550 5.1.1 no such user".
func (r *Reply) Error() string { return r.String() }

// String gives the reply as one line: "550 5.1.1 no such user". Line ends in Text become blanks.
func (r *Reply) String() string {
	b := make([]byte, 0, 16+len(r.Text))
	b = strconv.AppendInt(b, int64(r.Code), 10)
	if r.Enhanced != [3]int{} {
		b = append(b, ' ')
		b = append(b, r.Status()...)
	}
	if r.Text != "" {
		b = append(b, ' ')
		for i := 0; i < len(r.Text); i++ {
			c := r.Text[i]
			if c == '\n' || c == '\r' {
				c = ' '
			}
			b = append(b, c)
		}
	}
	return string(b)
}

// Status gives the enhanced status code as "5.1.1"; where the reply has none, the general one of its class ("5.0.0").
func (r *Reply) Status() string {
	e := r.Enhanced
	if e == [3]int{} {
		e[0] = r.Code / 100
	}
	b := make([]byte, 0, 8)
	b = strconv.AppendInt(b, int64(e[0]), 10)
	b = append(b, '.')
	b = strconv.AppendInt(b, int64(e[1]), 10)
	b = append(b, '.')
	return string(strconv.AppendInt(b, int64(e[2]), 10))
}

// Unwrap gives the cause.
func (r *Reply) Unwrap() error { return r.Cause }
