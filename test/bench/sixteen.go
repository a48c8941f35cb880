package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"
	"time"
)

const (
	sixteen        = 16
	sixteenCommits = 50
	// idleWindow is longer than anything that a node does from time to time while it is idle.
	idleWindow = 65 * time.Second
	// tickHz is the unit of /proc/PID/stat, USER_HZ, the same on every Linux that Go runs on.
	tickHz = 100
)

// measureSixteen makes a cluster of 16 nodes and takes what it costs while nothing happens, and how long one commit takes to all of them.
func measureSixteen(ctx context.Context, b *bench) error {
	if _, err := b.startSink(ctx, sinkAddr); err != nil {
		return err
	}
	var ips []string
	for i := range sixteen {
		ips = append(ips, fmt.Sprintf("127.0.0.%d", 101+i))
	}
	nodes, err := b.startCluster(ctx, ips)
	if err != nil {
		return err
	}
	if err := b.inSync(ctx, nodes[0]); err != nil {
		return err
	}
	if err := b.addIdle(ctx, nodes); err != nil {
		return err
	}
	d, err := openCommitter(ctx, nodes[0])
	if err != nil {
		return err
	}
	defer d.Close()
	changes, err := commitOften(ctx, d, nodes[1:], 0, sixteenCommits+1)
	if err != nil {
		return err
	}
	var until []float64
	for _, c := range changes[1:] { // the first finds connections cold
		until = append(until, milliseconds(c.commit+c.until))
	}
	b.add(result{Name: "cluster.16.commit_to_all.p50_ms", Value: percentile(until, 50), Unit: "ms"})
	b.add(result{Name: "cluster.16.commit_to_all_ms", Value: percentile(until, 100), Unit: "ms", Goal: below(500)})
	return nil
}

// inSync waits until a node's pmgcm says that all nodes are.
func (b *bench) inSync(ctx context.Context, n *node) error {
	_, err := n.pmgcm(ctx, "status", "--wait", "--timeout", "120s")
	return err
}

// addIdle takes the processor time of the daemons, without their PostgreSQLs, and all that passes the loopback interface meanwhile, in
// both directions and with the headers of TCP and IP. PostgreSQL is spoken to over Unix sockets, so that is the tunnels' traffic, and
// whatever else uses the interface; scripts/bench gives the run a network namespace of its own.
func (b *bench) addIdle(ctx context.Context, nodes []*node) error {
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-time.After(10 * time.Second): // what the joins have begun comes to its end
	}
	began := time.Now()
	cpu, err := processorTime(nodes)
	if err != nil {
		return err
	}
	bytes, err := loopbackBytes()
	if err != nil {
		return err
	}
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-time.After(idleWindow):
	}
	cpuAfter, err := processorTime(nodes)
	if err != nil {
		return err
	}
	bytesAfter, err := loopbackBytes()
	if err != nil {
		return err
	}
	took := time.Since(began)
	b.add(result{Name: "cluster.16.cpu_percent", Value: 100 * float64(cpuAfter-cpu) / float64(took), Unit: "% of a core", Goal: below(5)})
	b.add(result{Name: "cluster.16.tunnel_bytes_per_s", Value: float64(bytesAfter-bytes) / took.Seconds(), Unit: "B/s", Goal: below(10_000)})
	return nil
}

// processorTime is what the daemons have used in user and kernel mode since their start.
func processorTime(nodes []*node) (time.Duration, error) {
	var ticks int64
	for _, n := range nodes {
		text, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", n.pid()))
		if err != nil {
			return 0, err
		}
		used, err := ticksOf(string(text))
		if err != nil {
			return 0, fmt.Errorf("process %d: %w", n.pid(), err)
		}
		ticks += used
	}
	return time.Duration(ticks) * time.Second / tickHz, nil
}

// ticksOf reads utime and stime from the text of /proc/PID/stat (proc(5)).
func ticksOf(stat string) (int64, error) {
	fields := strings.Fields(stat[strings.LastIndex(stat, ")")+1:]) // behind the program's name, from the third field on
	if len(fields) < 13 {
		return 0, fmt.Errorf("not a stat line: %q", stat)
	}
	user, err := strconv.ParseInt(fields[11], 10, 64)
	system, err2 := strconv.ParseInt(fields[12], 10, 64)
	return user + system, errors.Join(err, err2)
}

// loopbackBytes is how many bytes have passed the loopback interface.
func loopbackBytes() (int64, error) {
	text, err := os.ReadFile("/proc/self/net/dev")
	if err != nil {
		return 0, err
	}
	return bytesOf(string(text))
}

// bytesOf reads what the loopback interface has received, which is what it has sent, from the text of /proc/net/dev.
func bytesOf(dev string) (int64, error) {
	for line := range strings.SplitSeq(dev, "\n") {
		if name, rest, _ := strings.Cut(line, ":"); strings.TrimSpace(name) == "lo" {
			if fields := strings.Fields(rest); len(fields) > 0 {
				return strconv.ParseInt(fields[0], 10, 64)
			}
		}
	}
	return 0, errors.New("no interface lo in /proc/net/dev")
}
