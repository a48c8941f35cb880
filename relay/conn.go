package relay

import (
	"bufio"
	"bytes"
	"context"
	"crypto/tls"
	"errors"
	"net"
	"strconv"
	"strings"
	"time"

	"mailproxy/config"
	"mailproxy/mail"
)

// capabilities are what the hop's EHLO reply offers, as far as it is used.
type capabilities struct {
	pipelining, eightBit, smtputf8, startTLS, size, dsn bool

	auth    []string // mechanisms, in capitals
	xclient []string // attributes, in capitals

	// RFC 9422 §4; 0: no limit is told.
	mailMax, rcptMax, rcptDomainMax int
}

// A conn is one connection to a hop, between transactions or in one. One goroutine at a time uses it; abort may be called by
// another.
type conn struct {
	hop  hop
	addr string   // IP address and port
	raw  net.Conn // what is closed
	nc   net.Conn // what is read and written: raw or TLS over it
	r    *bufio.Reader
	t    *Timeouts
	caps capabilities

	kept      bool // came out of the pool
	broken    bool // not to be used again
	dirty     bool // the hop may hold a transaction that RSET must end
	messages  int
	mails     int // MAIL commands sent
	idleSince time.Time
	seen      [stages]seenReply
}

// seenReply is the last one-line reply at a stage. Hops repeat themselves, and a Reply is immutable.
type seenReply struct {
	line  []byte
	reply *mail.Reply
}

func newConn(h hop, addr string, raw net.Conn, t *Timeouts) *conn {
	return &conn{hop: h, addr: addr, raw: raw, nc: raw, r: bufio.NewReaderSize(raw, 4096), t: t}
}

// abort ends the connection whatever is going on on it.
func (c *conn) abort() { c.raw.Close() }

// read reads one reply within d.
func (c *conn) read(stage Stage, d time.Duration) (*mail.Reply, error) {
	if c.r.Buffered() == 0 {
		if err := c.nc.SetReadDeadline(time.Now().Add(d)); err != nil {
			return nil, err
		}
	}
	line, err := readLine(c.r)
	if err != nil {
		return nil, err
	}
	s := &c.seen[stage]
	if s.reply != nil && bytes.Equal(s.line, line) {
		return s.reply, nil
	}
	if len(line) > 3 && line[3] == '-' {
		return readRest(c.r, line)
	}
	reply, err := readRest(c.r, line)
	if err == nil {
		s.line, s.reply = append(s.line[:0], line...), reply
	}
	return reply, err
}

// write writes within the deadline of one block.
func (c *conn) write(b []byte) error {
	if err := c.nc.SetWriteDeadline(time.Now().Add(c.t.Block)); err != nil {
		return err
	}
	_, err := c.nc.Write(b)
	return err
}

// ask sends one command and reads its reply.
func (c *conn) ask(stage Stage, d time.Duration, command string) (*mail.Reply, error) {
	if c.r.Buffered() > 0 {
		return nil, protocolError("reply without a command")
	}
	if err := c.write([]byte(command + "\r\n")); err != nil {
		return nil, err
	}
	return c.read(stage, d)
}

// connect opens a connection to the hop and brings it to where MAIL may be said. The error is *OutOfReach or the context's.
func (c *Client) connect(ctx context.Context, h hop) (*conn, error) {
	host, port, err := net.SplitHostPort(h.addr)
	if err != nil {
		return nil, &OutOfReach{Hop: h.addr, Stage: StageLookup, Err: err}
	}
	name := host
	if h.mx {
		name = rooted(host)
	}
	addrs, err := c.lookup.addresses(ctx, name)
	if err != nil {
		return nil, ended(ctx, &OutOfReach{Hop: h.addr, Stage: StageLookup, Err: err})
	}
	out := &OutOfReach{Hop: h.addr, Stage: StageConnect, Err: errNoHost}
	for _, a := range addrs {
		addr := net.JoinHostPort(a.String(), port)
		start := time.Now()
		if c.isOwn(a, port) {
			out.Err = errSelf
			continue
		}
		if c.down.has(addr, start) {
			if out.Err == errNoHost {
				out.Err = errRecentlyDown
			}
			continue
		}
		cn, failed := c.connectTo(ctx, h, host, addr)
		if failed == nil {
			return cn, nil
		}
		if !errors.Is(ctx.Err(), context.Canceled) { // a client that leaves early says nothing of the hop
			c.down.failed(addr, start, time.Now())
		}
		if ctx.Err() != nil {
			return nil, ctx.Err()
		}
		out = failed
	}
	return nil, out
}

// connectTo connects to one address. Where TLS is only wished for and its handshake fails, a fresh connection stays in clear.
func (c *Client) connectTo(ctx context.Context, h hop, host, addr string) (*conn, *OutOfReach) {
	cn, out := c.open(ctx, h, host, addr, h.tls)
	if out == nil || h.tls != config.TLSMay || ctx.Err() != nil {
		return cn, out
	}
	var refused *noTLSError
	if !errors.As(out, &refused) {
		return nil, out
	}
	if n, ok := c.clear.allow(time.Now()); ok {
		c.log.Warn().Str("hop", h.addr).AnErr("err", refused.err).Int("count", n).Msg("tls.fallback")
	}
	return c.open(ctx, h, host, addr, config.TLSNone)
}

// noTLSError is a STARTTLS that was offered and then refused, or its handshake that failed.
type noTLSError struct{ err error }

func (e *noTLSError) Error() string { return e.err.Error() }
func (e *noTLSError) Unwrap() error { return e.err }

func (c *Client) open(ctx context.Context, h hop, host, addr string, policy config.TLS) (*conn, *OutOfReach) {
	dialer := net.Dialer{Timeout: c.t.Connect}
	raw, err := dialer.DialContext(ctx, "tcp", addr)
	if err != nil {
		return nil, &OutOfReach{Hop: h.addr, Stage: StageConnect, Err: err}
	}
	cn := newConn(h, addr, raw, &c.t)
	stop := context.AfterFunc(ctx, cn.abort)
	stage, err := cn.hello(c, host, policy)
	if !stop() && err == nil {
		err = ctx.Err() // the context has ended and closed it
	}
	if err != nil {
		raw.Close()
		return nil, &OutOfReach{Hop: h.addr, Stage: stage, Err: err}
	}
	return cn, nil
}

// hello reads the greeting, says EHLO and starts TLS by the policy; the stage is where an error happened.
func (c *conn) hello(o *Client, host string, policy config.TLS) (Stage, error) {
	if err := c.introduce(); err != nil {
		return StageGreeting, err
	}
	reply, err := c.read(StageGreeting, c.t.Greeting)
	if err == nil && reply.Code != 220 {
		err = refusal(reply)
	}
	if err != nil {
		return StageGreeting, err
	}
	if err = c.ehlo(o.hostname); err != nil {
		return StageEhlo, err
	}
	if stage, err := c.secure(o, host, policy); err != nil {
		return stage, err
	}
	if c.hop.tell == config.TellXClient {
		if err = c.xclient(o); err != nil {
			return StageEhlo, err
		}
	}
	if c.hop.user != "" {
		if err = c.login(o); err != nil {
			return StageAuth, err
		}
	}
	return 0, nil
}

// secure starts TLS by the policy.
func (c *conn) secure(o *Client, host string, policy config.TLS) (Stage, error) {
	switch {
	case policy == config.TLSNone, policy == config.TLSMay && !c.caps.startTLS:
		return 0, nil
	case !c.caps.startTLS:
		return StageStartTLS, errTLSNotOffered
	}
	if err := c.startTLS(o, host, policy); err != nil {
		return StageStartTLS, err
	}
	// What was offered in clear counts for nothing (RFC 3207 §4.2).
	return StageEhlo, c.ehlo(o.hostname)
}

// refusal is a reply as an error; one that is positive is out of place.
func refusal(reply *mail.Reply) error {
	if reply.Code < 400 {
		return protocolError("unexpected reply " + reply.String())
	}
	return reply
}

// ehlo says EHLO, or HELO where that is refused (RFC 5321 §3.2), and notes what is offered.
func (c *conn) ehlo(hostname string) error {
	c.caps = capabilities{}
	reply, err := c.ask(StageEhlo, c.t.Ehlo, "EHLO "+hostname)
	if err != nil {
		return err
	}
	if reply.Permanent() {
		reply, err = c.ask(StageEhlo, c.t.Ehlo, "HELO "+hostname)
		if err == nil && reply.Code != 250 {
			err = refusal(reply)
		}
		return err
	}
	if reply.Code != 250 {
		return refusal(reply)
	}
	first := true
	for line := range strings.SplitSeq(reply.Text, "\n") {
		if first {
			first = false
			continue
		}
		keyword, rest, _ := strings.Cut(strings.ToUpper(line), " ")
		switch keyword {
		case "PIPELINING":
			c.caps.pipelining = true
		case "8BITMIME":
			c.caps.eightBit = true
		case "SMTPUTF8":
			c.caps.smtputf8 = true
		case "STARTTLS":
			c.caps.startTLS = true
		case "SIZE":
			c.caps.size = true
		case "DSN":
			c.caps.dsn = true
		case "AUTH":
			c.caps.auth = strings.Fields(rest)
		case "XCLIENT":
			c.caps.xclient = strings.Fields(rest)
		case "LIMITS":
			c.caps.limits(rest)
		}
	}
	return nil
}

// limits notes what the hop says that it takes (RFC 9422 §3); what is no number of its form, or not known, is no limit.
func (c *capabilities) limits(text string) {
	for _, limit := range strings.Fields(text) {
		name, value, _ := strings.Cut(limit, "=")
		n, err := strconv.ParseUint(value, 10, 20)
		if err != nil || len(value) > 6 {
			continue
		}
		switch name {
		case "MAILMAX":
			c.mailMax = int(n)
		case "RCPTMAX":
			c.rcptMax = int(n)
		case "RCPTDOMAINMAX":
			c.rcptDomainMax = int(n)
		}
	}
}

// startTLS turns the connection into TLS. An error of *noTLSError's kind leaves the way open to try in clear.
func (c *conn) startTLS(o *Client, host string, policy config.TLS) error {
	reply, err := c.ask(StageStartTLS, c.t.Ehlo, "STARTTLS")
	if err != nil {
		return err
	}
	if reply.Code != 220 {
		return &noTLSError{refusal(reply)}
	}
	if c.r.Buffered() > 0 {
		// Said in clear, it would be taken for a reply from inside TLS.
		return protocolError("data behind the reply to STARTTLS")
	}
	conf := &tls.Config{ServerName: strings.TrimSuffix(host, "."), RootCAs: o.roots, MinVersion: tls.VersionTLS12}
	if policy != config.TLSVerify {
		conf.InsecureSkipVerify = true // opportunistic: any encryption is better than none (RFC 7435)
	}
	tc := tls.Client(c.raw, conf)
	if err := c.raw.SetDeadline(time.Now().Add(c.t.TLS)); err != nil {
		return err
	}
	if err := tc.Handshake(); err != nil {
		return &noTLSError{err}
	}
	if err := c.raw.SetDeadline(time.Time{}); err != nil {
		return err
	}
	c.nc = tc
	c.r.Reset(tc)
	c.seen = [stages]seenReply{}
	return nil
}

// appendMail appends the MAIL command with the parameters that the hop offers.
func (c *conn) appendMail(b []byte, e *mail.Envelope, reverse string, size int64, utf8 bool) []byte {
	b = append(append(append(b, "MAIL FROM:<"...), reverse...), '>')
	if c.caps.size && size > 0 {
		b = strconv.AppendInt(append(b, " SIZE="...), size, 10)
	}
	if c.caps.eightBit && (e.EightBit || utf8) {
		b = append(b, " BODY=8BITMIME"...)
	}
	if utf8 {
		b = append(b, " SMTPUTF8"...)
	}
	if c.caps.dsn {
		b = appendMailDSN(b, e)
	}
	return append(b, "\r\n"...)
}
