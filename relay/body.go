package relay

import (
	"errors"
	"io"
	"time"

	"mailproxy/mail"
)

// loneDot ends a DATA that was let through with no recipient (RFC 2920 §3.1). What is answered to it is of no use to anyone.
func (x *transaction) loneDot() {
	x.out = append(x.out, ".\r\n"...)
	if x.flush() != nil {
		x.conn.broken = true
		return
	}
	if reply, err := x.conn.read(StageDot, x.conn.t.Data); err != nil || reply.Code == 421 {
		x.conn.broken = true
	}
}

// flush writes the buffer out.
func (x *transaction) flush() error {
	if len(x.out) == 0 {
		return nil
	}
	err := x.conn.write(x.out)
	x.out = x.out[:0]
	return err
}

// localError is one of our own, such as a read of the content: the hop has no part in it.
type localError struct{ err error }

func (e *localError) Error() string { return "read the content: " + e.err.Error() }
func (e *localError) Unwrap() error { return e.err }

// body sends the content dot-stuffed, ends its last line, and leaves the end of it in the buffer.
func (x *transaction) body() error {
	content, size := x.a.Content, x.a.Content.Size()
	x.conn.messages++
	start, last := true, byte('\n')
	for off := int64(0); off < size; {
		n, err := content.ReadAt(x.in[:min(int64(len(x.in)), size-off)], off)
		if n == 0 {
			if err == nil || err == io.EOF {
				err = io.ErrUnexpectedEOF
			}
			return &localError{err}
		}
		off += int64(n)
		x.out, start = appendStuffed(x.out, x.in[:n], start)
		last = x.in[n-1]
		if len(x.out) >= flushSize {
			if err := x.flush(); err != nil {
				return err
			}
		}
	}
	switch {
	case last == '\r':
		x.out = append(x.out, '\n')
	case !start:
		x.out = append(x.out, "\r\n"...)
	}
	return nil
}

// earlyEnd files what ended the body before its dot.
func (x *transaction) earlyEnd(err error) {
	x.conn.broken = true
	var local *localError
	if errors.As(err, &local) {
		x.fail(StageData, &mail.Reply{Code: 451, Enhanced: [3]int{4, 3, 0}, Text: "local error", Cause: err})
		return
	}
	// A hop that has had enough may have said why before it closed.
	_ = x.conn.nc.SetReadDeadline(time.Now().Add(time.Second))
	reply, rerr := x.conn.read(StageData, time.Second)
	switch {
	case rerr != nil:
		x.fail(StageData, lost(err))
	case reply.Code >= 400:
		x.fail(StageData, passedOn(reply))
	default:
		x.fail(StageData, nonsense(refusal(reply)))
	}
}

var errEarly = errors.New("the hop spoke or closed before the final dot")

// dot sends the final dot, with what is left of the body, and waits for its answer.
func (x *transaction) dot() error {
	if !x.conn.quiet() {
		// Whatever it is, it is no answer to a dot that was not sent: a 2xx would be believed, and the message lost.
		x.earlyEnd(errEarly)
		return nil
	}
	x.out = append(x.out, ".\r\n"...)
	if err := x.flush(); err != nil {
		// A write that was cut has not carried its last octets, the dot.
		x.conn.broken = true
		x.fail(StageData, lost(err))
		return nil
	}
	reply, err := x.conn.read(StageDot, x.conn.t.Dot)
	switch {
	case errors.Is(err, ErrProtocol):
		x.conn.broken = true
		x.answer(StageDot, nonsense(err))
		return ErrNoAnswer
	case err != nil:
		x.conn.broken = true
		x.answer(StageDot, lost(err))
		return ErrNoAnswer
	case reply.Code == 421:
		x.conn.broken = true
		reply = passedOn(reply)
	case reply.Code < 400 && !reply.Positive():
		x.conn.broken = true
		x.answer(StageDot, nonsense(refusal(reply)))
		return ErrNoAnswer
	}
	for i := range x.results {
		if r := &x.results[i]; r.Reply.Positive() {
			r.Reply, r.Stage = reply, StageDot
		}
	}
	return nil
}
