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
	"net/url"
	"syscall"
	"time"
)

// maxAnswer bounds what a client reads: 10,000 items of the queue take a tenth of it.
const maxAnswer = 256 << 20

// Client asks a daemon through its control socket. Its methods may be called by several at once.
type Client struct {
	http *http.Client
}

// silence is how long a daemon may take to begin its answer: it answers out of its memory.
const silence = 10 * time.Second

// Control gives a client for the daemon behind a control socket, or for a peer behind the socket that leads to it.
func Control(socket string) *Client {
	var d net.Dialer
	return &Client{http: &http.Client{
		Timeout: time.Minute,
		Transport: &http.Transport{
			ResponseHeaderTimeout: silence,
			DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
				return d.DialContext(ctx, "unix", socket)
			},
			DisableKeepAlives:      true,
			MaxResponseHeaderBytes: maxHeaderBytes,
		},
	}}
}

// Health asks for the checks.
func (c *Client) Health(ctx context.Context) (Health, error) {
	var h Health
	return h, c.do(ctx, http.MethodGet, "/health", &h)
}

// Queue asks for the queue.
func (c *Client) Queue(ctx context.Context) (QueueList, error) {
	var l QueueList
	return l, c.do(ctx, http.MethodGet, "/queue", &l)
}

// Item asks for one item; ErrNoSuch where there is none.
func (c *Client) Item(ctx context.Context, id string) (QueueItem, error) {
	var i QueueItem
	return i, c.do(ctx, http.MethodGet, "/queue/"+url.PathEscape(id), &i)
}

// Flush makes all items due and says how many.
func (c *Client) Flush(ctx context.Context) (int, error) {
	var f Flushed
	return f.Items, c.do(ctx, http.MethodPost, "/queue/flush", &f)
}

// Delete removes an item without a DSN; ErrNoSuch where there is none.
func (c *Client) Delete(ctx context.Context, id string) error {
	return c.do(ctx, http.MethodDelete, "/queue/"+url.PathEscape(id), nil)
}

// Status asks for what the node knows of itself.
func (c *Client) Status(ctx context.Context, v any) error {
	return c.do(ctx, http.MethodGet, "/status", v)
}

func (c *Client) do(ctx context.Context, method, path string, v any) error {
	r, err := http.NewRequestWithContext(ctx, method, "http://daemon"+path, nil)
	if err != nil {
		return err
	}
	resp, err := c.http.Do(r)
	if err != nil {
		if errors.Is(err, fs.ErrNotExist) || errors.Is(err, syscall.ECONNREFUSED) {
			return fmt.Errorf("%w: %w", ErrNotRunning, errors.Unwrap(err))
		}
		if timeout := net.Error(nil); errors.As(err, &timeout) && timeout.Timeout() && ctx.Err() == nil {
			return fmt.Errorf("%w: nothing came in %v", ErrSilent, silence)
		}
		return err
	}
	defer func() { _ = resp.Body.Close() }()
	body := io.LimitReader(resp.Body, maxAnswer)
	switch {
	case resp.StatusCode == http.StatusNotFound:
		return ErrNoSuch
	case resp.StatusCode == http.StatusServiceUnavailable && path == "/health": // its answer is the same, with a failed check
	case resp.StatusCode/100 != 2:
		var p problem
		if json.NewDecoder(body).Decode(&p) != nil || p.Error == "" {
			p.Error = resp.Status
		}
		return fmt.Errorf("%s %s: %s", method, path, p.Error)
	}
	if v == nil {
		return nil
	}
	if err := json.NewDecoder(body).Decode(v); err != nil {
		return fmt.Errorf("%s %s: %w", method, path, err)
	}
	return nil
}
