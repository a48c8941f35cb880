package main

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"slices"
	"syscall"
	"time"

	"github.com/rs/zerolog"

	"mailproxy/config"
	"mailproxy/db"
)

const (
	handOvers   = 5
	awayCommits = 10_000
)

// measureHandOver promotes one slave after the other, with the master alive and many domains, and takes the time from the begin of the
// command until the new master has taken a commit.
func measureHandOver(ctx context.Context, b *bench) error {
	nodes, err := b.startDomainCluster(ctx)
	if err != nil {
		return err
	}
	var rounds []float64
	for i := range handOvers {
		took, err := b.promote(ctx, nodes[(i+1)%len(nodes)], i)
		if err != nil {
			return fmt.Errorf("hand-over %d: %w", i, err)
		}
		rounds = append(rounds, milliseconds(took))
	}
	b.add(result{Name: "cluster.handover_ms", Value: slices.Max(rounds), Unit: "ms", Goal: below(1000), Rounds: rounds})
	return nil
}

// measureForced does the same with --force and the two other nodes dead: frozen, as a host that hangs, and killed.
func measureForced(ctx context.Context, b *bench) error {
	nodes, err := b.startDomainCluster(ctx)
	if err != nil {
		return err
	}
	var rounds []float64
	for i := range nodes {
		to := nodes[(i+1)%len(nodes)]
		death := syscall.SIGSTOP
		if i == len(nodes)-1 {
			death = syscall.SIGKILL
		}
		for _, n := range nodes {
			if n != to {
				if err := n.cmd.Process.Signal(death); err != nil {
					return err
				}
			}
		}
		took, err := b.promote(ctx, to, i, "--force")
		for _, n := range nodes {
			if n != to && death == syscall.SIGSTOP {
				err = errors.Join(err, n.cmd.Process.Signal(syscall.SIGCONT))
			}
		}
		if err == nil && death == syscall.SIGSTOP {
			err = b.inSync(ctx, to)
		}
		if err != nil {
			return fmt.Errorf("promote %d: %w", i, err)
		}
		rounds = append(rounds, milliseconds(took))
	}
	b.add(result{Name: "cluster.forced_promote_ms", Value: slices.Max(rounds), Unit: "ms", Goal: below(2000), Rounds: rounds})
	return nil
}

// startDomainCluster is startCluster with all the domains on every node.
func (b *bench) startDomainCluster(ctx context.Context) ([]*node, error) {
	if _, err := b.startSink(ctx, sinkAddr); err != nil {
		return nil, err
	}
	nodes, err := b.startCluster(ctx, clusterIPs())
	if err != nil {
		return nil, err
	}
	_, err = loadDomains(ctx, b, nodes)
	return nodes, err
}

// promote runs pmgcm promote on a node and gives the time from then until that node took a commit.
func (b *bench) promote(ctx context.Context, n *node, i int, args ...string) (time.Duration, error) {
	d, err := openCommitter(ctx, n)
	if err != nil {
		return 0, err
	}
	defer d.Close()
	began := time.Now()
	done := make(chan error, 1)
	go func() {
		_, err := n.pmgcm(ctx, append([]string{"promote"}, args...)...)
		done <- err
	}()
	err = poll(ctx, 30*time.Second, 5*time.Millisecond, func() error {
		return d.commit(ctx, config.Domain{Name: fmt.Sprintf("promote%d.bench.test", i), Hosts: []string{sinkAddr}})
	})
	took := time.Since(began)
	return took, errors.Join(err, <-done)
}

// commitMany makes n commits on a node as a session of psql may, each of one domain.
func (b *bench) commitMany(ctx context.Context, n *node, from, count int) error {
	_, err := b.output(ctx, nil, "psql", "-XAtq", "-h", n.local.PostgresSocketDir(), "-U", "mailproxy", "-d", "mailproxy", "-v", "ON_ERROR_STOP=1",
		"-c", fmt.Sprintf(`DO $$ BEGIN FOR i IN %d..%d LOOP
			INSERT INTO config.domain (name, hosts) VALUES (format('away%%s.bench.test', i), '{%s}')
				ON CONFLICT (name) DO UPDATE SET comment = coalesce(domain.comment, '') || '.';
			COMMIT; END LOOP; END $$`, from, from+count-1, sinkAddr))
	return err
}

// measureAway stops a slave, commits many times more than the history keeps, and takes the time from the start of its daemon until its
// database holds the last of it.
func measureAway(ctx context.Context, b *bench) error {
	nodes, err := b.startCluster(ctx, clusterIPs()[:2])
	if err != nil {
		return err
	}
	master, err := db.Open(db.Options{DSN: dsn(nodes[0].local), Log: zerolog.Nop()})
	if err != nil {
		return err
	}
	defer master.Close()
	if err := nodes[1].stop(); err != nil {
		return err
	}
	began := time.Now()
	const atOnce = 1000
	for i := 0; i < awayCommits; i += atOnce {
		// A master that is left alone may be without its lease for a moment.
		if err := poll(ctx, time.Minute, time.Second, func() error { return b.commitMany(ctx, nodes[0], i, atOnce) }); err != nil {
			return err
		}
	}
	b.say("  %d commits took %s", awayCommits, time.Since(began).Round(time.Second))
	want, err := master.State(ctx)
	if err != nil {
		return err
	}
	slave, err := db.Open(db.Options{DSN: dsn(nodes[1].local), Log: zerolog.Nop()})
	if err != nil {
		return err
	}
	defer slave.Close()
	began = time.Now()
	if nodes[1].part, err = b.start(nodes[1].name, nodes[1].env(), filepath.Join(b.bin, "mailproxy"), "serve"); err != nil {
		return err
	}
	err = poll(ctx, 2*time.Minute, 10*time.Millisecond, func() error {
		is, err := slave.State(ctx)
		if err == nil && is.Position != want.Position {
			err = fmt.Errorf("it is at %v, the master at %v", is.Position, want.Position)
		}
		return err
	})
	if err != nil {
		return err
	}
	b.add(result{Name: "cluster.away_10000_commits_s", Value: time.Since(began).Seconds(), Unit: "s", Goal: below(2)})
	return nil
}
