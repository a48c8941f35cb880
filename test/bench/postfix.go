package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"os/user"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	"mailproxy/internal/mta"
)

// A postfix is a private instance: own configuration, queue and log, none of the system's.
type postfix struct {
	dir  string
	addr string
	bin  *bench
}

// postfixFavour are settings that take what is in Postfix's favour: all twenty connections from the first message on, connections to the
// next hop kept. Mail for one domain goes to another next hop.
const postfixFavour = `default_process_limit = 100
smtpd_client_connection_count_limit = 0
initial_destination_concurrency = 20
default_destination_concurrency_limit = 20
smtp_connection_cache_destinations = [%[1]s]:%[2]s
transport_maps = inline:{ %[3]s=smtp:[%[4]s]:%[5]s }`

// startPostfix starts an instance that relays all mail to sink, and that for downDomain to a port where nobody listens.
func (b *bench) startPostfix(ctx context.Context, addr, sink, down string) (*postfix, error) {
	p := &postfix{dir: filepath.Join(b.dir, "postfix"), addr: addr, bin: b}
	for _, d := range []string{"etc", "queue", "data"} {
		if err := os.MkdirAll(filepath.Join(p.dir, d), 0o755); err != nil {
			return nil, err
		}
	}
	if err := chownTo("postfix", filepath.Join(p.dir, "data")); err != nil {
		return nil, err
	}
	sinkHost, sinkPort, err := net.SplitHostPort(sink)
	if err != nil {
		return nil, err
	}
	downHost, downPort, err := net.SplitHostPort(down)
	if err != nil {
		return nil, err
	}
	files, err := mta.PostfixFiles(p.dir, addr, sink, fmt.Sprintf(postfixFavour, sinkHost, sinkPort, downDomain, downHost, downPort))
	if err != nil {
		return nil, err
	}
	for name, text := range files {
		if err := os.WriteFile(filepath.Join(p.dir, "etc", name), []byte(text), 0o644); err != nil {
			return nil, err
		}
	}
	b.parts = append(b.parts, p)
	if out, err := b.output(ctx, nil, "postfix", "-c", p.etc(), "start"); err != nil {
		return nil, fmt.Errorf("%w%s%s", err, out, p.logTail())
	}
	return p, poll(ctx, 20*time.Second, 20*time.Millisecond, func() error {
		c, err := net.DialTimeout("tcp", addr, time.Second)
		if err != nil {
			return fmt.Errorf("postfix: %w\n%s", err, p.logTail())
		}
		return c.Close()
	})
}

func (p *postfix) etc() string { return filepath.Join(p.dir, "etc") }

func (p *postfix) logTail() string { return (&part{log: filepath.Join(p.dir, "log")}).tail() }

// stop ends the master and with it all that it started, and waits until it is gone.
func (p *postfix) stop() error {
	pid, err := p.pid()
	if errors.Is(err, fs.ErrNotExist) {
		return nil // it never came up
	}
	if err != nil {
		return err
	}
	if syscall.Kill(pid, 0) != nil {
		return nil
	}
	ctx, cancel := context.WithTimeout(context.Background(), stopTimeout)
	defer cancel()
	if _, err := p.bin.output(ctx, nil, "postfix", "-c", p.etc(), "stop"); err != nil {
		return err
	}
	return poll(ctx, stopTimeout, 20*time.Millisecond, func() error {
		if syscall.Kill(pid, 0) == nil {
			return fmt.Errorf("postfix: master %d is still there", pid)
		}
		return nil
	})
}

func (p *postfix) pid() (int, error) {
	text, err := os.ReadFile(filepath.Join(p.dir, "queue", "pid", "master.pid"))
	if err != nil {
		return 0, err
	}
	return strconv.Atoi(strings.TrimSpace(string(text)))
}

// queued counts the messages in some of the instance's queues.
func (p *postfix) queued(queues ...string) (int, error) {
	n := 0
	for _, q := range queues {
		err := filepath.WalkDir(filepath.Join(p.dir, "queue", q), func(_ string, d fs.DirEntry, err error) error {
			if errors.Is(err, fs.ErrNotExist) {
				return nil // it went on to another queue while we looked
			}
			if err == nil && d.Type().IsRegular() {
				n++
			}
			return err
		})
		if err != nil {
			return 0, err
		}
	}
	return n, nil
}

// quiet waits until the instance has tried every message that it took.
func (p *postfix) quiet(ctx context.Context) error {
	return poll(ctx, drainTimeout, 20*time.Millisecond, func() error {
		n, err := p.queued("maildrop", "incoming", "active")
		if err == nil && n > 0 {
			err = fmt.Errorf("postfix: %d messages have not been tried", n)
		}
		return err
	})
}

// chownTo gives files to a user and its group.
func chownTo(name string, files ...string) error {
	u, err := user.Lookup(name)
	if err != nil {
		return err
	}
	uid, err := strconv.Atoi(u.Uid)
	if err != nil {
		return err
	}
	gid, err := strconv.Atoi(u.Gid)
	if err != nil {
		return err
	}
	for _, f := range files {
		if err := os.Chown(f, uid, gid); err != nil {
			return err
		}
	}
	return nil
}
