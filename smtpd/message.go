package smtpd

import (
	"errors"
	"time"

	"mailproxy/mail"
)

// readMessage reads a message to its end. The reply refuses it; its end was found all the same. Where it gives false the session
// has ended.
func (c *conn) readMessage() (*content, *mail.Reply, bool) {
	v := &c.tx.settings
	message := newContent(c.server.o.TempDir, c.server.o.MinFree)
	start := time.Now()
	c.nameClient()
	if _, err := message.Write(c.appendReceived(nil, c.tx.id, start)); err != nil {
		return message, replyInternal, false
	}
	f := framer{out: message, limits: limits{
		maxMessage: v.MaxMessageSize, maxHeader: v.MaxHeaderSize, maxLine: v.MaxLineLength, refuseBare: v.RefuseBareNewlines,
	}}
	c.in.grow()
	for {
		n, done, err := f.feed(c.in.bytes())
		c.in.take(n)
		switch {
		case errors.Is(err, errBareNewline):
			c.abort(replyBareData)
			return message, nil, false
		case err != nil:
			c.abort(f.refused)
			return message, nil, false
		case done:
			if err := message.finish(); err != nil {
				f.refuse(noRoom(err))
			}
			return message, f.refused, true
		}
		if !c.fill(c.bodyDeadline(start, f.total, v.MinRate)) {
			return message, nil, false
		}
	}
}

func noRoom(err error) *mail.Reply {
	return &mail.Reply{Code: replyNoRoom.Code, Enhanced: replyNoRoom.Enhanced, Text: replyNoRoom.Text, Cause: err}
}

// bodyDeadline is until when the next octets of a message must come, and what is said otherwise: the earliest of the idle
// time-out, the minimum rate, and the session's age.
func (c *conn) bodyDeadline(start time.Time, octets int64, minRate int) (time.Time, *mail.Reply) {
	deadline, late := time.Now().Add(c.idle), replyIdle
	if t := start.Add(c.idle + time.Duration(octets/int64(minRate))*time.Second); t.Before(deadline) {
		deadline, late = t, replyTooSlow
	}
	if c.expiry.Before(deadline) {
		deadline, late = c.expiry, replyTooOld
	}
	return deadline, late
}
