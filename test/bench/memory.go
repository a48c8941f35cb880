package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"
	"time"
)

const (
	memoryIP     = "127.0.0.34"
	idleSessions = 9000
)

// measureMemory takes the resident memory of a node's daemon, without its PostgreSQL: idle, and with thousands of sessions that have
// said EHLO and wait.
func measureMemory(ctx context.Context, b *bench) error {
	n, err := b.startNode(ctx, "memory", memoryIP)
	if err != nil {
		return err
	}
	if err := n.relays(ctx, liveDomain, sinkAddr); err != nil {
		return err
	}
	for _, setting := range []string{"max_sessions", "max_sessions_per_network", "max_sessions_per_address"} {
		if _, err := n.mailproxy(ctx, "setting", "set", setting, strconv.Itoa(2*idleSessions)); err != nil {
			return err
		}
	}
	idle, err := settled(ctx, n.pid())
	if err != nil {
		return err
	}
	conns, err := openSessions(ctx, n.smtp())
	defer func() {
		for _, c := range conns {
			c.close()
		}
	}()
	if err != nil {
		return err
	}
	busy, err := settled(ctx, n.pid())
	if err != nil {
		return err
	}
	if p := conns[0]; p.takes(liveDomain) != nil || conns[idleSessions-1].takes(liveDomain) != nil {
		return errors.New("the sessions did not stay open")
	}
	b.add(result{Name: "memory.idle_mb", Value: idle, Unit: "MB", Goal: below(40)})
	b.add(result{Name: "memory.session_kb", Value: (busy - idle) * 1024 / idleSessions, Unit: "kB", Goal: below(20)})
	return nil
}

// openSessions opens them one after the other, each up to its EHLO. It gives those it opened also with an error; the limit on
// sessions of one address may just have been raised.
func openSessions(ctx context.Context, addr string) ([]*probe, error) {
	var all []*probe
	for range idleSessions {
		p := newProbe(addr)
		if err := poll(ctx, 5*time.Second, 50*time.Millisecond, p.open); err != nil {
			return all, fmt.Errorf("session %d: %w", len(all)+1, err)
		}
		all = append(all, p)
	}
	return all, nil
}

// settled gives a process' resident memory in MB (2^20) once it has not grown by more than 1% for three seconds.
func settled(ctx context.Context, pid int) (float64, error) {
	const steps, every = 3, time.Second
	var last float64
	still := 0
	err := poll(ctx, 30*time.Second, every, func() error {
		now, err := resident(pid)
		if err != nil {
			return final{err}
		}
		if still++; now > last*1.01 {
			still = 0
		}
		last = now
		if still < steps {
			return fmt.Errorf("memory of process %d still grows: %.1f MB", pid, now)
		}
		return nil
	})
	return last, err
}

// resident gives a process' resident memory in MB.
func resident(pid int) (float64, error) { return memoryOf(pid, "VmRSS:") }

// memoryOf reads a line of /proc/PID/status, in MB.
func memoryOf(pid int, line string) (float64, error) {
	f, err := os.Open(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		return 0, err
	}
	defer f.Close()
	for s := bufio.NewScanner(f); s.Scan(); {
		if rest, ok := strings.CutPrefix(s.Text(), line); ok {
			kb, err := strconv.Atoi(strings.TrimSpace(strings.TrimSuffix(rest, "kB")))
			return float64(kb) / 1024, err
		}
	}
	return 0, fmt.Errorf("no %s in %s", line, f.Name())
}
