package main

import (
	"context"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"time"

	"github.com/rs/zerolog"

	"mailproxy/db"
)

const (
	largeRows   = 1_000_000
	largeRounds = 3
	largeEdits  = 20
	// largeMemory is what a daemon may have resident at most while it sends or receives the rows, in MB.
	largeMemory = 100
)

// largeTable makes a table of about 110 bytes a row in a schema.
const largeTable = `CREATE TABLE %s.entry (name text PRIMARY KEY, transport text NOT NULL DEFAULT '', hosts text[] NOT NULL DEFAULT '{}',
	comment text NOT NULL DEFAULT '')`

// largeFill fills it in some order, past the triggers that would write a history of it.
const largeFill = `SET session_replication_role = replica; TRUNCATE %[1]s.entry; INSERT INTO %[1]s.entry SELECT 'user' || i || '@d' || i %% 5000 || '.bench.test',
	'smarthost', ARRAY['10.0.' || i %% 256 || '.1:25'], 'moved here ' || i || ' in ' || md5(i::text) FROM generate_series(1, %[2]d) i ORDER BY %[3]s`

// A largeOrder is an order in which the rows lie.
type largeOrder struct {
	name  string // in the results' names
	by    string // ORDER BY
	joins goal   // for a join, of pg_dump's time
}

// largeOrders are those that are measured. Addresses that were added one by one lie in no order of their names. Where they do lie in it,
// copying into an indexed table costs least, and little is left to win (docs/SCALE.md): a join is to be no slower.
func largeOrders() []largeOrder {
	return []largeOrder{{"", "md5(i::text)", below(0.6)}, {"sorted_", "1", below(1)}}
}

// largeDiffer makes one row of a hundred at the slave another one: half of them by their content, a quarter are gone, a quarter are
// rows that the master does not have. The kept sums are made to know of it, as those of a node that was away for too long do.
const largeDiffer = `SET session_replication_role = replica;
	UPDATE config.entry SET comment = 'old' WHERE hashtext(name) %% 200 = 0;
	DELETE FROM config.entry WHERE hashtext(name) %% 400 = 1;
	INSERT INTO config.entry (name) SELECT 'old' || i FROM generate_series(1, %d) i;
	SELECT node.recount(); UPDATE node.position SET applied_digest = node.kept_digest()`

// largeEmpty brings a single node back to how a new one is.
const largeEmpty = `SET session_replication_role = replica; TRUNCATE config.entry, plain.entry; SELECT node.recount()`

// measureLarge pushes a table of a million rows to a node that joins, again as a merge, and one row of it; beside it pg_dump and psql copy
// the same rows through the same tunnel into the same indexed table, without triggers.
func measureLarge(ctx context.Context, b *bench) error {
	var nodes []*node
	for i, ip := range clusterIPs()[:2] {
		n, err := b.startNode(ctx, fmt.Sprintf("large%d", i+1), ip)
		if err != nil {
			return err
		}
		if err := n.sql(ctx, "CREATE SCHEMA plain", fmt.Sprintf(largeTable, "plain"), fmt.Sprintf(largeTable, "config"), "SELECT node.attach()"); err != nil {
			return err
		}
		nodes = append(nodes, n)
	}
	master, slave := nodes[0], nodes[1]
	if _, err := master.pmgcm(ctx, "create"); err != nil {
		return err
	}
	for i, order := range largeOrders() {
		err := master.sql(ctx, fmt.Sprintf(largeFill, "config", largeRows, order.by), fmt.Sprintf(largeFill, "plain", largeRows, order.by),
			"SELECT node.recount()", "UPDATE node.position SET applied_digest = NULL", "VACUUM ANALYZE")
		if err != nil {
			return err
		}
		l := largeRun{b: b, master: master, slave: slave}
		for round := range largeRounds {
			if err := l.round(ctx, i+round == 0); err != nil {
				return fmt.Errorf("round %d: %w", round+1, err)
			}
		}
		l.report(order.name, order.joins)
	}
	return nil
}

// report adds the results; those of the names' order are named by it.
func (l *largeRun) report(order string, joins goal) {
	l.b.addRounds("cluster.full_sync_1m."+order+"s", "s", goal{}, l.join)
	l.b.addRounds("cluster.merge_1m."+order+"s", "s", goal{}, l.merge)
	l.b.addRounds("cluster.pg_dump_1m."+order+"s", "s", goal{}, l.dump)
	l.b.addRounds("cluster.full_sync_1m."+order+"vs_pg_dump", "", joins, ratios(l.join, l.dump))
	l.b.addRounds("cluster.merge_1m."+order+"vs_pg_dump", "", below(0.9), ratios(l.merge, l.dump))
	l.b.addRounds("cluster.full_sync_1m."+order+"reader_waits_ms", "ms", below(50), l.joinWaits)
	l.b.addRounds("cluster.merge_1m."+order+"reader_waits_ms", "ms", below(50), l.mergeWaits)
	l.b.addRounds("cluster.pg_dump_1m."+order+"reader_waits_ms", "ms", goal{}, l.dumpWaits) // what the machine alone makes of it
	l.b.addRounds("cluster.full_sync_1m."+order+"master_mb", "MB", below(largeMemory), l.memory[0])
	l.b.addRounds("cluster.full_sync_1m."+order+"slave_mb", "MB", below(largeMemory), l.memory[1])
}

// largeRun collects what the rounds gave, in seconds and milliseconds.
type largeRun struct {
	b                     *bench
	master, slave         *node
	dump, join, merge     []float64
	joinWaits, mergeWaits []float64
	dumpWaits             []float64
	memory                [2][]float64 // of master and slave, their peaks
}

// round makes the slave join, differ, and leave again.
func (l *largeRun) round(ctx context.Context, edits bool) error {
	for i, n := range []*node{l.master, l.slave} {
		if err := resetPeak(n.pid()); err != nil {
			return err
		}
		defer func() {
			if mb, err := peak(n.pid()); err == nil {
				l.memory[i] = append(l.memory[i], mb)
			}
		}()
	}
	cid, err := l.joinSlave(ctx)
	if err != nil {
		return err
	}
	if edits {
		if err := l.oneRow(ctx); err != nil {
			return err
		}
	}
	if err := l.mergeSlave(ctx, cid); err != nil {
		return err
	}
	if err := l.dumpSlave(ctx, cid); err != nil {
		return err
	}
	if _, err := l.slave.pmgcm(ctx, "leave", "--yes"); err != nil {
		return err
	}
	return l.slave.sql(ctx, largeEmpty, "CHECKPOINT")
}

// joinSlave makes the slave join and gives its CID. What counts is the push, as the master's log has it.
func (l *largeRun) joinSlave(ctx context.Context) (cid string, err error) {
	line, err := l.master.pmgcm(ctx, "join-cmd")
	if err != nil {
		return "", err
	}
	log, err := os.Open(l.master.log)
	if err != nil {
		return "", err
	}
	defer log.Close()
	if _, err := log.Seek(0, io.SeekEnd); err != nil {
		return "", err
	}
	wait, err := l.b.longestWait(ctx, l.slave, func() error {
		_, err := l.slave.pmgcm(ctx, strings.Fields(joinLine(line))[1:]...)
		return err
	})
	if err != nil {
		return "", err
	}
	l.joinWaits = append(l.joinWaits, wait)
	var pushes pushLog
	if err := pushes.read(log); err != nil {
		return "", err
	}
	for _, p := range pushes.all {
		if p.Full && p.Rows >= largeRows {
			l.join = append(l.join, p.TookMS/1000)
			return strconv.Itoa(p.Node), nil
		}
	}
	return "", fmt.Errorf("no push of %d rows in %s", largeRows, l.master.log)
}

// pushTook is how long the push of a sync took, as pmgcm says it.
var pushTook = regexp.MustCompile(`([0-9]+) ms\)`)

// mergeSlave makes rows of the slave differ and pushes to it. What counts is the push: before it the command sums all rows of the master
// anew.
func (l *largeRun) mergeSlave(ctx context.Context, cid string) error {
	if err := l.slave.sql(ctx, fmt.Sprintf(largeDiffer, largeRows/400), "CHECKPOINT"); err != nil {
		return err
	}
	var said string
	wait, err := l.b.longestWait(ctx, l.slave, func() (err error) {
		said, err = l.master.pmgcm(ctx, "sync", "--push", cid, "--yes")
		return err
	})
	if err != nil {
		return err
	}
	m := pushTook.FindStringSubmatch(said)
	if m == nil {
		return fmt.Errorf("sync --push said %q", said)
	}
	ms, err := strconv.ParseFloat(m[1], 64)
	l.merge, l.mergeWaits = append(l.merge, ms/1000), append(l.mergeWaits, wait)
	return err
}

// dumpSlave copies the rows by PostgreSQL's own programs, over the master's socket to the slave.
func (l *largeRun) dumpSlave(ctx context.Context, cid string) error {
	if err := l.slave.sql(ctx, "GRANT USAGE ON SCHEMA plain TO mailproxy_push", "GRANT INSERT ON plain.entry TO mailproxy_push", "CHECKPOINT"); err != nil {
		return err
	}
	wait, err := l.b.longestWait(ctx, l.slave, func() error {
		began := time.Now()
		_, err := l.b.output(ctx, nil, "bash", "-o", "pipefail", "-c", fmt.Sprintf("pg_dump -a -t plain.entry '%s' | psql -qX1 -v ON_ERROR_STOP=1 -h '%s' -U peer mailproxy",
			dsn(l.master.local), filepath.Join(l.master.local.RunDir, "peer", cid)))
		l.dump = append(l.dump, time.Since(began).Seconds())
		return err
	})
	l.dumpWaits = append(l.dumpWaits, wait)
	return err
}

// oneRow changes one row of the million again and again, and waits until the slave has it.
func (l *largeRun) oneRow(ctx context.Context) error {
	here, err := db.Open(db.Options{DSN: dsn(l.master.local), Log: zerolog.Nop()})
	if err != nil {
		return err
	}
	defer here.Close()
	there, err := db.Open(db.Options{DSN: dsn(l.slave.local), Log: zerolog.Nop()})
	if err != nil {
		return err
	}
	defer there.Close()
	log, err := os.Open(l.master.log)
	if err != nil {
		return err
	}
	defer log.Close()
	if _, err := log.Seek(0, io.SeekEnd); err != nil {
		return err
	}
	var took []float64
	for i := range largeEdits {
		if err := l.master.sql(ctx, fmt.Sprintf("UPDATE config.entry SET comment = 'edit %d' WHERE name = 'user77@d77.bench.test'", i)); err != nil {
			return err
		}
		began := time.Now() // psql has ended by then: what it took to end is not counted as waiting
		at, err := here.State(ctx)
		if err != nil {
			return err
		}
		err = poll(ctx, 10*time.Second, time.Millisecond, func() error {
			s, err := there.State(ctx)
			if err == nil && s.Position != at.Position {
				err = fmt.Errorf("the slave is at %v, not %v", s.Position, at.Position)
			}
			return err
		})
		if err != nil {
			return err
		}
		took = append(took, milliseconds(time.Since(began)))
	}
	var pushes pushLog
	err = poll(ctx, 10*time.Second, 100*time.Millisecond, func() error { // the last event is written after the slave has answered
		if err := pushes.read(log); err != nil {
			return final{err}
		}
		if len(pushes.all) < largeEdits {
			return fmt.Errorf("%d push.done events for %d changes", len(pushes.all), largeEdits)
		}
		return nil
	})
	if err != nil {
		return err
	}
	var bytes, ms []float64
	for _, p := range pushes.all {
		bytes = append(bytes, p.Bytes)
		ms = append(ms, p.TookMS)
	}
	l.b.add(result{Name: "cluster.one_row_in_1m.bytes", Value: percentile(bytes, 100), Unit: "B", Goal: below(100_000)})
	l.b.add(result{Name: "cluster.one_row_in_1m.ms", Value: max(percentile(ms, 100), percentile(took, 100)), Unit: "ms", Goal: below(300)})
	return nil
}

// sql runs statements on the node's server as its superuser, each in a transaction of its own.
func (n *node) sql(ctx context.Context, statements ...string) error {
	args := []string{"psql", "-qX", "-v", "ON_ERROR_STOP=1"}
	for _, s := range statements {
		args = append(args, "-c", s)
	}
	_, err := n.b.output(ctx, nil, append(args, dsn(n.local))...)
	return err
}

// tookText is psql's line after a statement.
var tookText = regexp.MustCompile(`(?m)^Time: ([0-9.]+) ms`)

// longestWait reads one row of the large table at a node again and again while f runs, and gives how long the longest read took, in ms.
func (b *bench) longestWait(ctx context.Context, n *node, f func() error) (float64, error) {
	cmd := exec.CommandContext(ctx, "psql", "-qXAt", dsn(n.local))
	var out strings.Builder
	cmd.Stdout, cmd.Stderr = &out, &out
	cmd.Stdin = strings.NewReader("\\timing on\nSELECT count(*) FROM config.entry WHERE name = 'user77@d77.bench.test' \\watch 0.005\n")
	if err := cmd.Start(); err != nil {
		return 0, err
	}
	err := f()
	_ = cmd.Process.Signal(os.Interrupt) // it ends by that
	_ = cmd.Wait()
	var longest float64
	reads := tookText.FindAllStringSubmatch(out.String(), -1)
	for _, m := range reads {
		ms, _ := strconv.ParseFloat(m[1], 64) // matched
		longest = max(longest, ms)
	}
	if err == nil && (len(reads) < 20 || strings.Contains(out.String(), "ERROR")) {
		err = fmt.Errorf("%d reads: %.500s", len(reads), out.String())
	}
	return longest, err
}

// resetPeak makes the peak of a process' resident memory what it is now (proc(5), clear_refs).
func resetPeak(pid int) error {
	return os.WriteFile(fmt.Sprintf("/proc/%d/clear_refs", pid), []byte("5"), 0)
}

// peak gives the most that a process had resident, in MB.
func peak(pid int) (float64, error) { return memoryOf(pid, "VmHWM:") }
