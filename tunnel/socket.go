package tunnel

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strconv"
	"sync"
	"time"

	"mailproxy/config"
)

// maxSocketPath is what sockaddr_un takes, less the final zero.
const maxSocketPath = 107

// socketPath is where a peer's service is found: as libpq wants it for postgres, "<service>.sock" for the others.
func socketPath(dir, service string) (string, error) {
	name := service + ".sock"
	if service == ServicePostgres {
		name = ".s.PGSQL.5432"
	}
	path := filepath.Join(dir, name)
	if len(path) > maxSocketPath {
		return "", fmt.Errorf("%s: %w", path, ErrPathTooLong)
	}
	return path, nil
}

// clearSockets removes directories of peers that an earlier daemon left; those of present peers are made anew.
func (t *Tunnel) clearSockets() {
	if t.o.PeerDir == nil {
		return
	}
	above := filepath.Dir(t.o.PeerDir(1))
	entries, err := os.ReadDir(above)
	if err != nil {
		return
	}
	for _, e := range entries {
		if n, err := strconv.ParseInt(e.Name(), 10, 32); err == nil && n > 0 && e.IsDir() {
			t.removeSockets(config.CID(n))
		}
	}
}

func (t *Tunnel) removeSockets(cid config.CID) {
	dir := t.o.PeerDir(cid)
	for _, service := range t.serviceNames() {
		if path, err := socketPath(dir, service); err == nil {
			os.Remove(path) // not there, most likely
		}
	}
	os.Remove(dir) // what others put there keeps it
}

// serveSockets serves the peer's services on Unix sockets until ctx ends, then removes them.
func (t *Tunnel) serveSockets(ctx context.Context, p *peer) {
	defer t.removeSockets(p.cid)
	var served sync.WaitGroup
	defer served.Wait()
	for _, service := range t.serviceNames() {
		l, err := t.openSocket(p.cid, service)
		if err != nil {
			t.mu.Lock()
			t.socketErr[p.cid] = err
			t.mu.Unlock()
			t.o.Log.Error().Int("node", int(p.cid)).Str("err", err.Error()).Msg("tunnel.socket_failed")
			continue
		}
		served.Go(func() { t.serveSocket(ctx, l, p.cid, service) })
	}
	<-ctx.Done()
}

// openSocket makes the socket anew: the node's one daemon holds a lock, so what lies there is stale.
func (t *Tunnel) openSocket(cid config.CID, service string) (net.Listener, error) {
	dir := t.o.PeerDir(cid)
	path, err := socketPath(dir, service)
	if err != nil {
		return nil, err
	}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, err
	}
	if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, err
	}
	l, err := net.Listen("unix", path)
	if err != nil {
		return nil, err
	}
	if err := os.Chmod(path, 0o600); err != nil {
		l.Close() // the first error counts
		return nil, err
	}
	return l, nil
}

func (t *Tunnel) serveSocket(ctx context.Context, l net.Listener, cid config.CID, service string) {
	stop := context.AfterFunc(ctx, func() { l.Close() }) // closed twice at worst
	defer stop()
	var served sync.WaitGroup
	defer served.Wait()
	room := make(chan struct{}, maxSocketConnections)
	for {
		c, err := l.Accept()
		if errors.Is(err, net.ErrClosed) {
			return
		}
		if err != nil {
			t.complain(fmt.Errorf("accept: %w", err))
			select {
			case <-time.After(100 * time.Millisecond):
				continue
			case <-ctx.Done():
				return
			}
		}
		select {
		case room <- struct{}{}:
		default:
			c.Close() // nothing was said
			continue
		}
		served.Go(func() {
			defer func() { <-room }()
			t.serveLocal(ctx, c, cid, service)
		})
	}
}

// serveLocal connects one local client with the peer's service.
func (t *Tunnel) serveLocal(ctx context.Context, local net.Conn, cid config.CID, service string) {
	defer local.Close()                                      // closed twice at worst
	stop := context.AfterFunc(ctx, func() { local.Close() }) // as above
	defer stop()
	remote, err := t.Dial(ctx, cid, service)
	if err != nil {
		explain(local, service, err)
		return
	}
	pipe(ctx, local, remote)
}

// explain says to a local client, in the words of the protocol that it speaks, why there is no connection, and closes.
func explain(local net.Conn, service string, err error) {
	defer local.Close()                                // nothing is left to say
	local.SetDeadline(time.Now().Add(2 * time.Second)) //nolint:errcheck // a closed conn fails below
	text := cleaned(err.Error(), 500)
	switch service {
	case ServicePostgres:
		local.Write(errorResponse("08001", text)) //nolint:errcheck // who does not listen learns nothing
	case ServiceControl: // its head is read first: a client takes an answer to nothing for a fault
		if _, err := http.ReadRequest(bufio.NewReader(io.LimitReader(local, 64<<10))); err != nil {
			return
		}
		fmt.Fprintf(local, "HTTP/1.1 502 Bad Gateway\r\nContent-Type: text/plain\r\nContent-Length: %d\r\nConnection: close\r\n\r\n%s\n",
			len(text)+1, text) // as above
	}
	if half, ok := local.(*net.UnixConn); ok && half.CloseWrite() == nil {
		// Until the client closes: else its unread request makes our answer a reset.
		io.Copy(io.Discard, io.LimitReader(local, 64<<10)) //nolint:errcheck // as above
	}
}
