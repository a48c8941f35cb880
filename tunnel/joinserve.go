package tunnel

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"time"

	"golang.org/x/crypto/ssh"

	"mailproxy/config"
)

// serveJoin answers one join request on a connection that is good for nothing else, and ends it.
func (t *Tunnel) serveJoin(ctx context.Context, c *ssh.ServerConn, by who, channels <-chan ssh.NewChannel, requests <-chan *ssh.Request) {
	ctx, cancel := context.WithTimeout(ctx, t.timing.join)
	defer cancel()
	var own owned
	defer own.wait()
	defer c.Close() // closed twice at worst
	stop := context.AfterFunc(ctx, func() { c.Close() })
	defer stop()
	gone := make(chan struct{})
	own.spawn(func() { ssh.DiscardRequests(requests) })
	own.spawn(func() { c.Wait(); close(gone) }) //nolint:errcheck // any end is an end
	first := make(chan ssh.NewChannel, 1)
	own.spawn(func() { firstChannel(channels, first) })
	var n ssh.NewChannel
	select {
	case n = <-first:
	case <-gone:
		return
	}
	if n == nil {
		return
	}
	ch, channelRequests, err := n.Accept()
	if err != nil {
		return
	}
	s, err := newConn(ch, channelRequests, Addr{0, joinUser}, Addr{0, joinUser}, t.timing.linger, own.spawn, func(*conn) {})
	if err != nil {
		return
	}
	t.answerJoin(ctx, s, c, by)
	s.Close() // the peer closes too
	select {
	case <-gone: // the other side has its answer and hung up
	case <-ctx.Done():
	case <-time.After(t.timing.linger):
	}
}

// firstChannel passes on the first join channel, for which first has room, and refuses all others.
func firstChannel(channels <-chan ssh.NewChannel, first chan<- ssh.NewChannel) {
	defer close(first)
	taken := false
	for n := range channels {
		if taken || n.ChannelType() != joinChannel {
			n.Reject(ssh.Prohibited, "not allowed") //nolint:errcheck // the connection is gone, the loop ends
			continue
		}
		taken = true
		first <- n
	}
}

// answerJoin reads the request and writes the answer.
func (t *Tunnel) answerJoin(ctx context.Context, s io.ReadWriter, c ssh.ConnMetadata, by who) {
	began := time.Now()
	answer, request, err := t.join(ctx, s, c, by)
	if err != nil {
		answer = joinAnswer{Error: joinError(err)}
	}
	text, jerr := json.Marshal(answer)
	if jerr == nil && len(text) > maxReplyBytes {
		jerr = fmt.Errorf("reply of %d bytes, more than %d", len(text), maxReplyBytes)
	}
	if jerr != nil {
		err = jerr
		text, _ = json.Marshal(joinAnswer{Error: joinError(jerr)})
	}
	e := t.o.Log.Info()
	if err != nil {
		e = t.o.Log.Warn().Str("err", err.Error()).Str("reason", string(joinError(err).Code))
	}
	e.Str("client", c.RemoteAddr().String()).Str("name", request.Node.Name).Str("address", request.Node.Address).
		Bool("dry_run", request.DryRun).Int("node", int(answer.cid())).Int64("took_ms", time.Since(began).Milliseconds()).Msg("join.answered")
	s.Write(text) //nolint:errcheck // who has gone asks again
}

func (t *Tunnel) join(ctx context.Context, s io.Reader, c ssh.ConnMetadata, by who) (joinAnswer, JoinRequest, error) {
	var request JoinRequest
	if !t.joins.take(hostOf(c.RemoteAddr()), time.Now()) {
		return joinAnswer{}, request, &JoinError{Code: CodeTooMany, Text: "too many join attempts from this address; try again in a minute"}
	}
	if !t.joining.take("") {
		return joinAnswer{}, request, &JoinError{Code: CodeTooMany, Text: "too many nodes join at once; try again in a minute"}
	}
	defer t.joining.give("")
	data, err := io.ReadAll(io.LimitReader(s, maxRequestBytes+1))
	if err != nil {
		return joinAnswer{}, request, fmt.Errorf("read join request: %w", err)
	}
	if request, err = decodeRequest(data); err != nil {
		return joinAnswer{}, JoinRequest{}, err
	}
	key, err := parsePublic(request.Node.PublicKey)
	if err != nil || string(key.Marshal()) != by.key {
		return joinAnswer{}, request, &JoinError{Code: CodeBadRequest, Text: "the public key is not the one of this connection"}
	}
	request.Node.PublicKey = by.text
	request.Client = c.RemoteAddr().String()
	if request.DryRun {
		check, err := t.o.CheckJoin(ctx, request)
		return joinAnswer{Check: &check}, request, err
	}
	reply, err := t.o.Join(ctx, request)
	return joinAnswer{Reply: &reply}, request, err
}

// cid is the node's that the answer lets in, or would; 0: none.
func (a joinAnswer) cid() config.CID {
	switch {
	case a.Reply != nil:
		return a.Reply.CID
	case a.Check != nil:
		return a.Check.CID
	}
	return 0
}

// joinError makes any error one that may be told to a stranger.
func joinError(err error) *JoinError {
	var known *JoinError
	if errors.As(err, &known) {
		return known
	}
	for _, code := range []JoinCode{
		CodeTokenUnknown, CodeTokenUsed, CodeTokenExpired, CodeNotMaster, CodeNoCluster, CodeRevoked, CodeOtherIdentity, CodeTooMany,
	} {
		if errors.Is(err, code.sentinel()) {
			return &JoinError{Code: code, Text: code.sentinel().Error()}
		}
	}
	if errors.Is(err, ErrBadRequest) {
		return &JoinError{Code: CodeBadRequest, Text: cleaned(err.Error(), 500)}
	}
	return &JoinError{Code: CodeInternal, Text: "the other node could not do it; its log says why"}
}
