package main

import (
	"cmp"
	"context"
	"errors"
	"strconv"
	"time"
)

// messageBytes is the body that smtp-source sends where nothing else is said; it adds a header of its own.
const messageBytes = 4096

// A load is what one run of Debian's smtp-source sends.
type load struct {
	addr     string
	to       string
	messages int
	sessions int
	// kept sends all messages of a session over one connection; otherwise each has one of its own.
	kept bool
	// distinct gives each message a forward-path of its own.
	distinct bool
	size     int // of the body, in octets; 0: messageBytes
	paths    int // forward-paths of each message; 0: one
}

// send sends and gives the time until the last message was answered with 250. Any other answer is an error.
func (b *bench) send(ctx context.Context, l load) (time.Duration, error) {
	argv := []string{"smtp-source", "-4", "-s", strconv.Itoa(l.sessions), "-m", strconv.Itoa(l.messages),
		"-l", strconv.Itoa(cmp.Or(l.size, messageBytes)), "-r", strconv.Itoa(cmp.Or(l.paths, 1)), "-M", "client.bench.test", "-f", "sender@client.bench.test", "-t", l.to}
	if l.kept {
		argv = append(argv, "-d")
	}
	if l.distinct {
		argv = append(argv, "-N")
	}
	ctx, cancel := context.WithTimeout(ctx, 2*time.Minute)
	defer cancel()
	began := time.Now()
	said, err := b.output(ctx, nil, append(argv, l.addr)...)
	took := time.Since(began)
	if err == nil && said != "" {
		err = errors.New(said)
	}
	return took, err
}

// rate gives messages a second.
func rate(messages int, took time.Duration) float64 { return float64(messages) / took.Seconds() }
