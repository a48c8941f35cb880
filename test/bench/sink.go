package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"strconv"
	"strings"
	"time"
)

// A sink is Debian's smtp-sink: it takes every message, throws it away, and counts.
type sink struct {
	*part
	addr string
}

// startSink starts one that counts into its log file.
func (b *bench) startSink(ctx context.Context, addr string) (*sink, error) {
	p, err := b.start("smtp-sink", nil, "smtp-sink", "-u", "nobody", "-c", "-m", "2000", addr, "1024")
	if err != nil {
		return nil, err
	}
	return &sink{p, addr}, p.answers(ctx, addr)
}

// received says how many messages have come in since the sink was started.
func (s *sink) received() (int, error) {
	f, err := os.Open(s.log)
	if err != nil {
		return 0, err
	}
	defer f.Close()
	const window = 256 // several counters
	var tail [window]byte
	size, err := f.Seek(0, io.SeekEnd)
	if err != nil {
		return 0, err
	}
	n, err := f.ReadAt(tail[:], max(0, size-window))
	if err != nil && !errors.Is(err, io.EOF) {
		return 0, err
	}
	return lastCount(string(tail[:n]))
}

// lastCount reads the last whole counter of smtp-sink -c: "sess=1 quit=1 mesg=10\r", again and again. None means no message yet.
func lastCount(s string) (int, error) {
	end := strings.LastIndexByte(s, '\r')
	at := strings.LastIndex(s[:max(end, 0)], "mesg=")
	if end < 0 || at < 0 {
		if strings.TrimSpace(s) != "" && !strings.HasPrefix(s, "sess=") {
			return 0, fmt.Errorf("smtp-sink: %s", strings.TrimSpace(s))
		}
		return 0, nil
	}
	return strconv.Atoi(s[at+len("mesg=") : end])
}

// drainTimeout bounds how long a queue may take for the messages of one round.
const drainTimeout = 60 * time.Second

// reaches waits until n messages have come in, and no more.
func (s *sink) reaches(ctx context.Context, n int) error {
	err := poll(ctx, drainTimeout, 2*time.Millisecond, func() error {
		got, err := s.received()
		if err == nil && got < n {
			err = fmt.Errorf("%d of %d messages reached the sink", got, n)
		}
		return err
	})
	if err != nil {
		return err
	}
	got, err := s.received()
	if err == nil && got > n {
		err = fmt.Errorf("%d messages reached the sink, only %d were sent", got, n)
	}
	return err
}
