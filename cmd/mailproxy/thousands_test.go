package main

import (
	"bufio"
	"context"
	"fmt"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"testing"
	"time"
)

// peakMemory gives the most resident memory that a process has had, in MB.
func peakMemory(t *testing.T, pid int) int {
	t.Helper()
	f, err := os.Open(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	for s := bufio.NewScanner(f); s.Scan(); {
		if rest, ok := strings.CutPrefix(s.Text(), "VmHWM:"); ok {
			kb, err := strconv.Atoi(strings.TrimSpace(strings.TrimSuffix(rest, "kB")))
			if err != nil {
				t.Fatal(err)
			}
			return kb >> 10
		}
	}
	t.Fatal("no VmHWM")
	return 0
}

// Postfix' smtp-source with thousands of sessions: all of them are served, what was answered with 250 has arrived once, and the daemon
// stays small.
func TestThousandsOfSessionsAtOnce(t *testing.T) {
	const sessions, messages, most = 2000, 4000, 300
	sink := newSink(t)
	n := newNode(t)
	n.start()
	n.waitHealthy()
	for _, s := range []string{"max_sessions", "max_sessions_per_address", "max_sessions_per_network"} {
		n.must("setting", "set", s, strconv.Itoa(sessions))
	}
	n.must("setting", "set", "max_connections_per_minute", "0")
	n.must("domain", "add", "example.test", "--to", sink.addr)
	eventually(t, func() error { return n.tryMail("first@example.test") })
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Minute)
	defer cancel()
	out, err := exec.CommandContext(ctx, "smtp-source", "-s", strconv.Itoa(sessions), "-m", strconv.Itoa(messages), "-l", "2000", "-S", "many",
		"-f", "a@sender.test", "-t", "to@example.test", "inet:"+n.smtp).CombinedOutput()
	if err != nil {
		t.Fatalf("smtp-source: %v: %s", err, out)
	}
	eventually(t, func() error { // what the queue took has gone on too
		if out := n.must("queue", "list", "--json"); !strings.Contains(out, `"total": 0`) {
			return fmt.Errorf("queue: %.200s", out)
		}
		return nil
	})
	sink.mu.Lock()
	got := sink.subjects["many"]
	sink.mu.Unlock()
	if got != messages {
		t.Errorf("%d messages have arrived, want %d", got, messages)
	}
	if mb := peakMemory(t, n.cmd.Process.Pid); mb > most {
		t.Errorf("the daemon took up to %d MB, want at most %d", mb, most)
	} else {
		t.Logf("up to %d MB", mb)
	}
	n.stop()
}
