package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"github.com/rs/zerolog"

	"mailproxy/config"
	"mailproxy/db"
)

const (
	domainCount = 100_000
	commitCount = 1000
)

// clusterIPs are the master's and the slaves' addresses.
func clusterIPs() []string { return []string{"127.0.0.21", "127.0.0.22", "127.0.0.23"} }

// measureCluster makes a cluster of three, gives it many domains, and commits one more again and again.
func measureCluster(ctx context.Context, b *bench) error {
	if _, err := b.startSink(ctx, sinkAddr); err != nil {
		return err
	}
	nodes, err := b.startCluster(ctx, clusterIPs())
	if err != nil {
		return err
	}
	slaves := nodes[1:]
	took, err := loadDomains(ctx, b, nodes)
	if err != nil {
		return err
	}
	b.add(result{Name: "cluster.apply_100k_domains_s", Value: took.Seconds(), Unit: "s"})
	d, err := openCommitter(ctx, nodes[0])
	if err != nil {
		return err
	}
	defer d.Close()
	log, err := os.Open(nodes[0].log)
	if err != nil {
		return err
	}
	defer log.Close()
	if _, err := commitAndWait(ctx, d, slaves, 0); err != nil { // the first change finds connections cold
		return err
	}
	if _, err := log.Seek(0, io.SeekEnd); err != nil {
		return err
	}
	changes, err := commitOften(ctx, d, slaves, 1, commitCount)
	if err != nil {
		return err
	}
	var until, commits []float64
	for _, c := range changes {
		until = append(until, milliseconds(c.until))
		commits = append(commits, milliseconds(c.commit))
	}
	b.add(result{Name: "cluster.commit_to_slave.p50_ms", Value: percentile(until, 50), Unit: "ms"})
	b.add(result{Name: "cluster.commit_to_slave.p99_ms", Value: percentile(until, 99), Unit: "ms", Goal: below(100)})
	b.add(result{Name: "cluster.commit.p50_ms", Value: percentile(commits, 50), Unit: "ms"})
	if err := b.addBytes(ctx, log, len(slaves)); err != nil {
		return err
	}
	mb, err := resident(slaves[0].pid())
	if err != nil {
		return err
	}
	b.add(result{Name: "memory.slave_100k_domains_mb", Value: mb, Unit: "MB"})
	return nil
}

// A committer changes the configuration as a daemon does: what is read and checked is kept for the next change.
type committer struct {
	*db.DB
	sound *config.Snapshot
}

func openCommitter(ctx context.Context, n *node) (*committer, error) {
	d, err := db.Open(db.Options{DSN: dsn(n.local), Log: zerolog.Nop()})
	if err != nil {
		return nil, err
	}
	if _, err := d.Load(ctx); err != nil {
		d.Close()
		return nil, err
	}
	return &committer{DB: d}, nil
}

func (c *committer) commit(ctx context.Context, domain config.Domain) error {
	_, err := c.Commit(ctx, db.Author{Who: "bench", Command: "domain add " + domain.Name},
		func(ctx context.Context, tx *db.Tx) error { return tx.PutDomain(ctx, domain) },
		func(s *config.Snapshot) error {
			err := config.ValidateAfter(c.sound, s)
			if err == nil {
				c.sound = s
			}
			return err
		})
	return err
}

// commitOften makes count changes one after the other, numbered from first.
func commitOften(ctx context.Context, d *committer, slaves []*node, first, count int) ([]change, error) {
	var all []change
	for i := first; i < first+count; i++ {
		c, err := commitAndWait(ctx, d, slaves, i)
		if err != nil {
			return nil, fmt.Errorf("commit %d: %w", i, err)
		}
		all = append(all, c)
	}
	return all, nil
}

func milliseconds(d time.Duration) float64 { return float64(d) / float64(time.Millisecond) }

// startCluster starts a node at each address and joins them, as an administrator does: the lines of join-cmd are pasted.
func (b *bench) startCluster(ctx context.Context, ips []string) ([]*node, error) {
	var nodes []*node
	for i, ip := range ips {
		n, err := b.startNode(ctx, fmt.Sprintf("node%d", i+1), ip)
		if err != nil {
			return nil, err
		}
		nodes = append(nodes, n)
	}
	return nodes, b.join(ctx, nodes)
}

// join makes nodes a cluster.
func (b *bench) join(ctx context.Context, nodes []*node) error {
	if _, err := nodes[0].pmgcm(ctx, "create"); err != nil {
		return err
	}
	if err := nodes[0].unlimited(ctx); err != nil {
		return err
	}
	for _, n := range nodes[1:] {
		line, err := nodes[0].pmgcm(ctx, "join-cmd")
		if err != nil {
			return err
		}
		args := strings.Fields(joinLine(line))
		if len(args) == 0 {
			return fmt.Errorf("no line with pmgcm join in what join-cmd said: %s", line)
		}
		// All come from one address, which may try to join so often at once and then every 2 s.
		if err := poll(ctx, time.Minute, time.Second, func() error { _, err := n.pmgcm(ctx, args[1:]...); return err }); err != nil {
			return err
		}
	}
	return nil
}

// joinLine finds the line to paste.
func joinLine(text string) string {
	for line := range strings.SplitSeq(text, "\n") {
		if line = strings.TrimSpace(line); strings.HasPrefix(line, "pmgcm join ") {
			return line
		}
	}
	return ""
}

// loadDomains applies a configuration with all the domains on the master, and gives the time until each slave answers for the last
// of them.
func loadDomains(ctx context.Context, b *bench, nodes []*node) (time.Duration, error) {
	var s config.Snapshot
	// A domain that is not there yet is refused, and a probe asks until it is.
	s.Settings = append(unlimited(), config.Setting{Name: "max_errors", Value: "10000"})
	domains := benchDomains(domainCount)
	s.Domains = config.NewDomains(domains)
	file := filepath.Join(b.dir, "domains.toml")
	if err := os.WriteFile(file, s.Text(), 0o644); err != nil {
		return 0, err
	}
	began := time.Now()
	if _, err := nodes[0].mailproxy(ctx, "config", "apply", "--yes", file); err != nil {
		return 0, err
	}
	for _, n := range nodes[1:] {
		p := newProbe(n.smtp())
		err := poll(ctx, 2*time.Minute, 20*time.Millisecond, func() error { return p.takes(domains[domainCount-1].Name) })
		p.close()
		if err != nil {
			return 0, err
		}
	}
	return time.Since(began), nil
}

// benchDomains makes so many domains.
func benchDomains(count int) []config.Domain {
	var all []config.Domain
	for i := range count {
		all = append(all, config.Domain{Name: fmt.Sprintf("d%06d.bench.test", i), Hosts: []string{sinkAddr}})
	}
	return all
}

// dsn leads to a node's private PostgreSQL.
func dsn(l *config.Local) string {
	return db.NewInstance(db.InstanceOptions{SocketDir: l.PostgresSocketDir(), Log: zerolog.Nop()}).DSN()
}

// A change is what one commit took.
type change struct {
	commit time.Duration // from its begin to its return
	until  time.Duration // from its return until the last slave answered by it
}

// commitAndWait adds one domain and asks each slave for it until it is taken.
func commitAndWait(ctx context.Context, d *committer, slaves []*node, i int) (change, error) {
	domain := config.Domain{Name: fmt.Sprintf("change%d.bench.test", i), Hosts: []string{sinkAddr}}
	probes := make([]*probe, len(slaves))
	for k, n := range slaves {
		probes[k] = newProbe(n.smtp())
		defer probes[k].close()
		if err := probes[k].takes(domain.Name); err == nil {
			return change{}, fmt.Errorf("%s took %s before it was committed", n.name, domain.Name)
		}
	}
	began := time.Now()
	err := d.commit(ctx, domain)
	committed := time.Now()
	if err != nil {
		return change{}, err
	}
	var wait sync.WaitGroup
	errs := make([]error, len(probes))
	for k, p := range probes {
		wait.Go(func() {
			errs[k] = poll(ctx, 30*time.Second, time.Millisecond, func() error { return p.takes(domain.Name) })
		})
	}
	wait.Wait()
	return change{committed.Sub(began), time.Since(committed)}, errors.Join(errs...)
}

// addBytes reads from the master's log what the pushes of the measured commits sent to each slave.
func (b *bench) addBytes(ctx context.Context, log io.Reader, slaves int) error {
	var l pushLog
	err := poll(ctx, 10*time.Second, 100*time.Millisecond, func() error { // the last event is written after the slave has answered
		if err := l.read(log); err != nil {
			return final{err}
		}
		if len(l.bytes) < commitCount*slaves {
			return fmt.Errorf("%d push.done events for %d commits and %d slaves", len(l.bytes), commitCount, slaves)
		}
		return nil
	})
	if err != nil {
		return err
	}
	b.add(result{Name: "cluster.bytes_per_change.p50", Value: percentile(l.bytes, 50), Unit: "B"})
	b.add(result{Name: "cluster.bytes_per_change.max", Value: percentile(l.bytes, 100), Unit: "B", Goal: below(1 << 20)})
	b.add(result{Name: "cluster.full_pushes", Value: float64(l.full)})
	return nil
}

// A pushLog is what the push.done events of a daemon's log say.
type pushLog struct {
	all   []pushed
	bytes []float64 // of each push
	full  int       // how many sent whole tables
	rest  []byte    // the begin of a line that is not whole yet
}

// pushed is one push.done event.
type pushed struct {
	Message string  `json:"message"`
	Node    int     `json:"node"`
	Bytes   float64 `json:"bytes"`
	Rows    int64   `json:"rows"`
	Full    bool    `json:"full"`
	TookMS  float64 `json:"took_ms"`
}

// read takes in what the log has had added.
func (l *pushLog) read(log io.Reader) error {
	added, err := io.ReadAll(log)
	if err != nil {
		return err
	}
	l.rest = append(l.rest, added...)
	for {
		line, rest, whole := bytes.Cut(l.rest, []byte("\n"))
		if !whole {
			return nil
		}
		l.rest = rest
		var e pushed
		if json.Unmarshal(line, &e) != nil || e.Message != "push.done" {
			continue // other programs' lines, and other events
		}
		l.all = append(l.all, e)
		l.bytes = append(l.bytes, e.Bytes)
		if e.Full {
			l.full++
		}
	}
}
