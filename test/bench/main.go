package main

import (
	"context"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"strings"
	"syscall"
	"time"
)

// A measurement is one part of the run; its results' names begin with one of its prefixes.
type measurement struct {
	prefix string
	run    func(ctx context.Context, b *bench) error
}

// measurements lists all of them in their order: what leaves a queue behind comes after what must not be disturbed by one.
func measurements() []measurement {
	return []measurement{
		{"memory", measureMemory},
		{"memory.bodies", measureBodies},
		{"smtp.latency", measureLatency},
		{"smtp.cutthrough", measureCutThrough},
		{"smtp.flat", measureFlat},
		{"smtp.spool", measureSpool},
		{"smtp.drain", measureDrain},
		{"cluster", measureCluster},
		{"cluster.commit_to_slave.rtt100", measureFar},
		{"cluster.handover_ms", measureHandOver},
		{"cluster.forced_promote_ms", measureForced},
		{"cluster.away_10000_commits_s", measureAway},
		{"cluster.16", measureSixteen},
		{"cluster.full_sync_1m", measureLarge},
	}
}

// wanted says whether BENCH_ONLY, a prefix of a result's or measurement's name, leaves a measurement in. A result is of the measurement
// with the longest prefix of its name.
func wanted(prefix, only string) bool {
	if strings.HasPrefix(prefix, only) {
		return true
	}
	longest := ""
	for _, m := range measurements() {
		if strings.HasPrefix(only+".", m.prefix+".") && len(m.prefix) > len(longest) {
			longest = m.prefix
		}
	}
	return prefix == longest
}

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	code := run(ctx, os.Getenv("BENCH_ONLY"), os.Getenv("JSON"))
	stop()
	os.Exit(code)
}

// run does the measurements that are wanted and gives the exit code.
func run(ctx context.Context, only, jsonFile string) int {
	b, err := newBench()
	if err != nil {
		fmt.Fprintf(os.Stderr, "bench: %v\n", err)
		return 1
	}
	began := time.Now()
	b.say("%s", machine(b.root))
	before := loadAverage()
	var failed []string
	ran := 0
	for _, m := range measurements() {
		if !wanted(m.prefix, only) || ctx.Err() != nil {
			continue
		}
		ran++
		if err := b.do(ctx, m); err != nil {
			failed = append(failed, m.prefix)
			fmt.Fprintf(os.Stderr, "bench: %s: %v\n", m.prefix, err)
		}
	}
	b.close()
	fmt.Print(b.table(only))
	fmt.Printf("\nload average at the start %s, at the end %s; took %s\n", before, loadAverage(), time.Since(began).Round(time.Second))
	if err := b.writeJSON(jsonFile, only); err != nil {
		failed = append(failed, "JSON")
		fmt.Fprintf(os.Stderr, "bench: %v\n", err)
	}
	switch {
	case ctx.Err() != nil:
		fmt.Fprintln(os.Stderr, "bench: interrupted")
		return 1
	case ran == 0:
		fmt.Fprintf(os.Stderr, "bench: BENCH_ONLY=%s names no measurement\n", only)
		return 2
	case len(failed) > 0:
		fmt.Fprintf(os.Stderr, "bench: not measured: %s\n", strings.Join(failed, ", "))
		return 1
	}
	return 0
}

// do runs one measurement and ends the parts that it started, last first.
func (b *bench) do(ctx context.Context, m measurement) error {
	b.say("%s ...", m.prefix)
	began := time.Now()
	b.dir = filepath.Join(b.root, m.prefix)
	err := os.Mkdir(b.dir, 0o755)
	if err == nil {
		err = m.run(ctx, b)
	}
	if stopErr := b.stopParts(); err == nil {
		err = stopErr
	}
	b.say("%s: %s", m.prefix, time.Since(began).Round(100*time.Millisecond))
	return err
}
