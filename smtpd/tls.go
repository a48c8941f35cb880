package smtpd

import (
	"context"
	"crypto/tls"
	"time"

	"mailproxy/mail"
)

const handshakeTime = time.Minute

// startTLS goes over to TLS on this connection (RFC 3207). Whatever was said before is forgotten; a handshake that does not come
// off ends the session. The reply refuses.
func (c *conn) startTLS(rest string) *mail.Reply {
	switch {
	case rest != "":
		return replyNoParameters
	case c.tls != nil:
		return replyTLSAlready
	case c.server.tls == nil:
		return replyNoTLS
	case !c.esmtp:
		return replyHelloFirst
	}
	// Nothing is in c.in: nextCommand has ended the session of a client that sent on in clear.
	c.put(replyStartTLS)
	c.flush()
	if c.phase == phaseEnded {
		return nil
	}
	if c.handshake() {
		// go-smtp keeps what it knows of the session before; it is reset by the EHLO that nextCommand wants first.
		c.helo, c.esmtp, c.tx = "", false, nil
	}
	return nil
}

// handshake goes over to TLS. One that does not come off ends the session.
func (c *conn) handshake() bool {
	stream := tls.Server(c.base, c.server.tls)
	ctx, cancel := context.WithTimeout(c.ctx, handshakeTime)
	defer cancel()
	_ = c.base.SetDeadline(time.Time{})
	if err := stream.HandshakeContext(ctx); err != nil {
		c.server.count.tlsFailed.Add(1)
		c.log.Debug().Err(err).Msg("session.tls_failed")
		c.out = nil
		c.phase = phaseEnded
		return false
	}
	c.server.count.tlsStarted.Add(1)
	state := stream.ConnectionState()
	c.stream, c.tls = stream, &state
	return true
}
