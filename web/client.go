package web

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"net/http"
	"strings"
	"syscall"
	"time"
)

// Bounds of what a client reads at once.
const (
	maxAnswer  = 16 << 20
	maxProblem = 64 << 10
)

// Client asks a daemon through its control socket. Its methods may be called by several at once.
type Client struct {
	http   *http.Client // for a short answer
	stream *http.Client // for one that begins at once and takes as long as it takes
	gives  *http.Client // where the daemon has to write much before it answers
	// silence is how long the daemon may take to begin its answer.
	silence time.Duration
}

// silence is how long a daemon may take to begin its answer: it answers out of its memory.
const silence = 10 * time.Second

// Control gives a client for the daemon behind a control socket.
func Control(socket string) *Client { return newClient(socket, silence) }

// Peer gives a client for a peer behind the socket that leads to it: one that is dead costs 2 seconds.
func Peer(socket string) *Client { return newClient(socket, peerPatience) }

func newClient(socket string, silence time.Duration) *Client {
	var d net.Dialer
	transport := func(silence time.Duration) *http.Transport {
		return &http.Transport{
			ResponseHeaderTimeout: silence,
			DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
				return d.DialContext(ctx, "unix", socket)
			},
			DisableKeepAlives:      true,
			MaxResponseHeaderBytes: maxHeaderBytes,
		}
	}
	return &Client{silence: silence,
		http:   &http.Client{Timeout: time.Minute, Transport: transport(silence)},
		stream: &http.Client{Transport: transport(silence)}, gives: &http.Client{Transport: transport(givePatience)},
	}
}

// givePatience is how long a daemon may take to answer once it has all of an item: it is synced then.
const givePatience = 2 * time.Minute

// Health asks for the checks.
func (c *Client) Health(ctx context.Context) (Health, error) {
	var h Health
	return h, c.do(ctx, http.MethodGet, "/health", &h)
}

// Hops asks for the next hops that are out of reach or connected.
func (c *Client) Hops(ctx context.Context, v any) error {
	return c.do(ctx, http.MethodGet, "/hops", v)
}

// Status asks for what the node knows of itself.
func (c *Client) Status(ctx context.Context, v any) error {
	return c.do(ctx, http.MethodGet, "/status", v)
}

func (c *Client) do(ctx context.Context, method, path string, v any) error {
	resp, err := c.send(ctx, c.http, method, path, nil)
	if err != nil {
		return err
	}
	defer func() { _ = resp.Body.Close() }()
	if v == nil {
		return nil
	}
	if err := json.NewDecoder(io.LimitReader(resp.Body, maxAnswer)).Decode(v); err != nil {
		return fmt.Errorf("%s %s: %w", method, path, err)
	}
	return nil
}

// send sends a request and gives an answer that is one; else the error says why not.
func (c *Client) send(ctx context.Context, client *http.Client, method, path string, body io.Reader) (*http.Response, error) {
	r, err := http.NewRequestWithContext(ctx, method, "http://daemon"+path, body)
	if err != nil {
		return nil, err
	}
	resp, err := client.Do(r)
	if err != nil {
		if errors.Is(err, fs.ErrNotExist) || errors.Is(err, syscall.ECONNREFUSED) {
			return nil, fmt.Errorf("%w: %w", ErrNotRunning, errors.Unwrap(err))
		}
		if timeout := net.Error(nil); errors.As(err, &timeout) && timeout.Timeout() && ctx.Err() == nil {
			return nil, fmt.Errorf("%w: nothing came in %v", ErrSilent, c.silence)
		}
		return nil, err
	}
	switch {
	case resp.StatusCode/100 == 2:
		return resp, nil
	case resp.StatusCode == http.StatusServiceUnavailable && path == "/health": // its answer is the same, with a failed check
		return resp, nil
	}
	defer func() { _ = resp.Body.Close() }()
	switch resp.StatusCode {
	case http.StatusNotFound:
		return nil, ErrNoSuch
	case http.StatusBadGateway: // the tunnel's own word
		why, _ := io.ReadAll(io.LimitReader(resp.Body, maxProblem)) // what there is of it
		return nil, fmt.Errorf("%w: %s", ErrSilent, strings.TrimSpace(string(why)))
	}
	return nil, problemOf(resp)
}

// problemOf is what an answer that is none says.
func problemOf(resp *http.Response) error {
	var p problem
	if json.NewDecoder(io.LimitReader(resp.Body, maxProblem)).Decode(&p) != nil || p.Error == "" {
		return fmt.Errorf("%s %s: %s", resp.Request.Method, resp.Request.URL.Path, resp.Status)
	}
	return &ProblemError{resp.StatusCode, p.Error}
}
