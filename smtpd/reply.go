package smtpd

import (
	"errors"
	"strconv"
	"strings"

	"github.com/emersion/go-smtp"

	"mailproxy/mail"
)

// maxReplyText bounds one line's text (RFC 5321 §4.5.3.1.5: 512 octets a line with the codes); maxReplyLines the lines.
const (
	maxReplyText  = 480
	maxReplyLines = 50
)

// r makes a reply; enhanced is three digits as a number: 510 is 5.1.0 (subjects and details here are below 10).
func r(code, enhanced int, text string) *mail.Reply {
	return &mail.Reply{Code: code, Enhanced: [3]int{enhanced / 100, enhanced / 10 % 10, enhanced % 10}, Text: text}
}

// The replies that need nothing of the moment. They are never changed.
var (
	replyOK                = r(250, 200, "OK")
	replyMailOK            = r(250, 210, "OK")
	replyRcptOK            = r(250, 215, "OK")
	replyVrfy              = r(252, 250, "will take the message and try")
	replyBye               = r(221, 200, "bye")
	replyStart             = r(354, 0, "end with <CRLF>.<CRLF>")
	replyStartTLS          = r(220, 200, "ready to start TLS")
	replyNotReady          = r(421, 432, "not ready yet, try again later")
	replyDraining          = r(421, 432, "not taking mail now, try again later")
	replyTooManySessions   = r(421, 432, "too many sessions, try again later")
	replyTooManyFromClient = r(421, 470, "too many sessions from your address")
	replyNotOurs           = r(554, 571, "no service for your address here")
	replyTooManyErrors     = r(421, 470, "too many errors")
	replyPanic             = r(421, 430, "local error, try again later")
	replyGone              = r(421, 442, "you have closed the connection, the message was dropped")
	replyIdle              = r(421, 442, "idle for too long")
	replyTooOld            = r(421, 442, "session lasts too long")
	replyTooSlow           = r(421, 442, "too slow")
	replyInternal          = r(451, 430, "local error, try again later")
	replyOutOfStep         = r(554, 550, "input before it was asked for")
	replyLineTooLong       = r(500, 552, "line too long")
	replyBareLine          = r(500, 552, "line must end with CRLF")
	replyBareData          = r(521, 552, "bare CR or LF in the message")
	replyUnknown           = r(500, 551, "unknown command")
	replySyntax            = r(501, 554, "syntax error in parameters")
	replyNoParameters      = r(501, 554, "no parameters allowed")
	replyUnknownParameter  = r(555, 554, "parameter not known here")
	replyNotImplemented    = r(502, 551, "not implemented")
	replyHelloFirst        = r(503, 551, "EHLO first")
	replyNested            = r(503, 551, "a transaction is open already")
	replyMailFirst         = r(503, 551, "MAIL first")
	replyNoRecipients      = r(554, 551, "no valid recipients")
	replyBadAddress        = r(501, 513, "bad address")
	replyBadSender         = r(501, 517, "bad address")
	replyNeedsUTF8         = r(553, 567, "internationalized address without SMTPUTF8")
	replyTooManyRcpt       = r(452, 453, "too many recipients")
	replyTooBig            = r(552, 534, "message is too big")
	replyHeaderTooBig      = r(552, 534, "header of the message is too big")
	replyBodyLineTooLong   = r(554, 560, "line of the message is too long")
	replyNoRoom            = r(452, 431, "insufficient storage, try again later")
	replyLoop              = r(554, 546, "routing loop: too many hops")
	replyNoTLS             = r(502, 551, "TLS is not available")
	replyXclient           = r(550, 570, "not from you")
	replyTLSAlready        = r(503, 551, "TLS is on already")
)

// appendReply appends the reply as it goes on the wire, with the codes on every line (RFC 2034 §4).
func appendReply(dst []byte, reply *mail.Reply) []byte {
	text := reply.Text
	for n := 1; ; n++ {
		line, rest, more := strings.Cut(text, "\n")
		more = more && n < maxReplyLines
		dst = strconv.AppendInt(dst, int64(reply.Code), 10)
		if more {
			dst = append(dst, '-')
		} else {
			dst = append(dst, ' ')
		}
		if reply.Enhanced != [3]int{} {
			dst = append(dst, reply.Status()...)
			dst = append(dst, ' ')
		}
		if len(line) > maxReplyText {
			line = line[:maxReplyText]
		}
		for i := 0; i < len(line); i++ {
			if c := line[i]; c >= ' ' && c <= '~' {
				dst = append(dst, c)
			} else {
				dst = append(dst, '?')
			}
		}
		dst = append(dst, '\r', '\n')
		if !more {
			return dst
		}
		text = rest
	}
}

// door is the one way from an error to the wire: a *mail.Reply is itself; anything else is 451 4.3.0, and the error itself goes to
// the log only. It keeps the reply for conn to write, and gives what makes go-smtp go on as the reply wants it: nil for 2xx.
func (c *conn) door(reply *mail.Reply, err error) error {
	if err != nil {
		var known *mail.Reply
		if errors.As(err, &known) {
			reply = known
		} else {
			reply = internal(err)
			c.log.Error().Err(err).Msg("session.error")
		}
	}
	c.answer = reply
	if reply.Positive() {
		return nil
	}
	return &smtp.SMTPError{Code: reply.Code, EnhancedCode: smtp.EnhancedCode(reply.Enhanced), Message: "refused"}
}

// internal is the reply for a cause of our own.
func internal(cause error) *mail.Reply {
	return &mail.Reply{Code: replyInternal.Code, Enhanced: replyInternal.Enhanced, Text: replyInternal.Text, Cause: cause}
}

// fallback is the reply for a code of go-smtp's own, where no reply of ours is at hand: a panic, or a check of its own. It is
// never positive.
func fallback(code int) *mail.Reply {
	switch {
	case code == replyPanic.Code:
		return replyPanic
	case code/100 == 5:
		return &mail.Reply{Code: code, Enhanced: [3]int{5, 5, 0}, Text: "refused"}
	}
	return replyInternal
}

// withID is the reply with the ID that the log knows the message by.
func withID(reply *mail.Reply, id string) *mail.Reply {
	text := strings.TrimSpace(reply.Text)
	if len(text) > 4*maxReplyText {
		text = text[:4*maxReplyText]
	}
	last := len(text) - (strings.LastIndexByte(text, '\n') + 1)
	if room := maxReplyText - len(id) - 3; last > room {
		text = text[:len(text)-last+room]
	}
	return &mail.Reply{Code: reply.Code, Enhanced: reply.Enhanced, Text: text + " (" + id + ")", Cause: reply.Cause}
}
