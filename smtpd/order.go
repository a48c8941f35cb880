package smtpd

import (
	"strconv"

	"mailproxy/mail"
)

// What go-smtp is handed: it sees fixed text only.
var (
	handEhlo = []byte("EHLO client\r\n")
	handHelo = []byte("HELO client\r\n")
	handMail = []byte("MAIL FROM:<>\r\n")
	handRcpt = []byte("RCPT TO:<recipient@client>\r\n")
	handData = []byte("DATA\r\n")
	handRset = []byte("RSET\r\n")
	handNoop = []byte("NOOP\r\n")
	handQuit = []byte("QUIT\r\n")
)

// nextCommand answers commands until there is one for go-smtp, and gives that; nil where the session has ended.
func (c *conn) nextCommand() []byte {
	if c.phase == phaseGreeting && !c.greet() {
		return nil
	}
	for c.phase == phaseCommand {
		line := c.readLine()
		if line == nil {
			return nil
		}
		verb, rest := splitVerb(string(line[:len(line)-2]))
		if isForeign(verb, rest) {
			c.hangUp()
			return nil
		}
		if !c.mayFollow(verb) {
			if c.in.len() > 0 {
				c.abort(replyOutOfStep)
				return nil
			}
			c.mustWait()
		}
		hand, reply := c.command(verb, rest)
		if hand != nil {
			c.answer = reply
			return hand
		}
		if reply != nil {
			if reply.Cause != nil {
				c.log.Debug().Int("code", reply.Code).Err(reply.Cause).Msg("session.refused_command")
			}
			c.put(reply)
		}
	}
	return nil
}

// greet lets the greeting go out, which is held: behind a balancer's PROXY header, and where TLS comes first, behind the handshake.
func (c *conn) greet() bool {
	if c.name == nil && !c.proxied() {
		return false
	}
	if c.kind.TLS && !c.handshake() {
		return false
	}
	c.phase = phaseCommand
	return true
}

// mayFollow says whether a client may send on behind this command without waiting for its reply (RFC 2920 §3.1, RFC 4954 §3).
func (c *conn) mayFollow(verb string) bool {
	switch verb {
	case "QUIT":
		return true // nothing behind it is read
	case "EHLO", "HELO", "DATA", "STARTTLS", "BDAT", "VRFY", "EXPN", "NOOP", "TURN", "AUTH":
		return false
	}
	return c.esmtp
}

// command gives the line to hand to go-smtp and the reply to put if it agrees, or no line and the reply to put, or neither.
func (c *conn) command(verb, rest string) (hand []byte, reply *mail.Reply) {
	switch verb {
	case "EHLO", "HELO":
		return c.hello(verb, rest)
	case "MAIL":
		return c.mail(rest)
	case "RCPT":
		return c.rcpt(rest)
	case "DATA":
		return c.data(rest)
	case "RSET":
		return bare(rest, handRset, replyOK)
	case "QUIT":
		return handQuit, replyBye
	case "NOOP":
		return handNoop, replyOK
	case "VRFY":
		if rest == "" {
			return nil, replySyntax
		}
		return nil, replyVrfy
	case "STARTTLS":
		return nil, c.startTLS(rest)
	case "XCLIENT":
		return nil, c.xclient(rest)
	case "BDAT":
		// Its chunk would follow as commands.
		c.abort(replyNotImplemented)
		return nil, nil
	case "EXPN", "HELP", "AUTH", "ETRN", "TURN", "SEND", "SOML", "SAML":
		return nil, replyNotImplemented
	}
	return nil, replyUnknown
}

func bare(rest string, hand []byte, reply *mail.Reply) ([]byte, *mail.Reply) {
	if rest != "" {
		return nil, replyNoParameters
	}
	return hand, reply
}

func (c *conn) hello(verb, rest string) ([]byte, *mail.Reply) {
	word, ok := helloArgument(rest)
	if !ok {
		return nil, replySyntax
	}
	c.helo, c.esmtp = word, verb == "EHLO"
	if c.said.helo != nil && *c.said.helo != "" {
		c.helo = *c.said.helo
	}
	if !c.esmtp {
		return handHelo, &mail.Reply{Code: 250, Text: c.server.o.Hostname}
	}
	text := c.server.o.Hostname + "\nPIPELINING\nSIZE "
	rules := c.server.o.Rules()
	if rules == nil {
		c.end(replyNotReady)
		return nil, nil
	}
	v := rules.Settings()
	text += strconv.FormatInt(v.MaxMessageSize, 10)
	if c.server.tls != nil && c.tls == nil {
		text += "\nSTARTTLS"
	}
	if rules.Frontend(c.connected()) {
		text += "\nXCLIENT " + xclientAttributes
	}
	text += "\nENHANCEDSTATUSCODES\n8BITMIME\nSMTPUTF8\nDSN\nLIMITS RCPTMAX=" + strconv.Itoa(v.MaxRecipients)
	return handEhlo, &mail.Reply{Code: 250, Text: text}
}

func (c *conn) mail(rest string) ([]byte, *mail.Reply) {
	switch {
	case c.helo == "":
		return nil, replyHelloFirst
	case c.tx != nil:
		return nil, replyNested
	}
	cmd, refused := parseMail(rest)
	if refused != nil {
		return nil, refused
	}
	c.next = cmd
	return handMail, nil // the session answers
}

func (c *conn) rcpt(rest string) (hand []byte, reply *mail.Reply) {
	if c.tx == nil {
		return nil, replyMailFirst
	}
	cmd, refused := parseRcpt(rest, c.tx.envelope.SMTPUTF8)
	if refused != nil {
		return nil, refused
	}
	c.next = cmd
	if len(c.tx.envelope.ForwardPaths) > 0 { // go-smtp has heard of one, which is all that it needs
		_ = session{c}.Rcpt("", nil) // what it says is the answer
		reply, c.answer = c.answer, nil
		return nil, reply
	}
	return handRcpt, nil
}

func (c *conn) data(rest string) ([]byte, *mail.Reply) {
	switch {
	case rest != "":
		return nil, replyNoParameters
	case c.tx == nil:
		return nil, replyMailFirst
	case len(c.tx.envelope.ForwardPaths) == 0:
		return nil, replyNoRecipients
	}
	return handData, nil
}
