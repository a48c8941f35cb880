package main

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strconv"
	"time"

	"mailproxy/test/lab"
)

// A storm lasts so long, at most.
const storm = 20 * time.Second

func main() { lab.Main(chaos) }

// settings are what the variables say.
type settings struct {
	time  time.Duration
	seed  uint64
	nodes int
}

func readSettings() (settings, error) {
	s := settings{time: 2 * time.Minute, seed: rand.Uint64N(1_000_000), nodes: 3}
	var errs []error
	read := func(name string, parse func(string) error) {
		if v := os.Getenv(name); v != "" {
			if err := parse(v); err != nil {
				errs = append(errs, fmt.Errorf("%s: %w", name, err))
			}
		}
	}
	read("CHAOS_TIME", func(v string) (err error) { s.time, err = time.ParseDuration(v); return err })
	read("CHAOS_SEED", func(v string) (err error) { s.seed, err = strconv.ParseUint(v, 10, 64); return err })
	read("CHAOS_NODES", func(v string) (err error) {
		if s.nodes, err = strconv.Atoi(v); err == nil && (s.nodes < 2 || s.nodes > 20) {
			err = fmt.Errorf("%d is not from 2 to 20", s.nodes)
		}
		return err
	})
	return s, errors.Join(errs...)
}

// chaos gives the exit code.
func chaos() int {
	s, err := readSettings()
	if err != nil {
		fmt.Fprintln(os.Stderr, "chaos:", err)
		return 2
	}
	fmt.Printf("chaos: %d nodes for %v; again with CHAOS_SEED=%d\n", s.nodes, s.time, s.seed)
	r, err := newRun(s)
	if err == nil {
		err = r.all()
	}
	if r != nil {
		fmt.Println(r.counts())
	}
	if err != nil {
		fmt.Fprintf(os.Stderr, "chaos: seed %d: %v\n", s.seed, err)
		return 1
	}
	return 0
}

// newRun brings the cluster up.
func newRun(s settings) (*run, error) {
	self, err := os.Executable()
	if err != nil {
		return nil, err
	}
	dir := filepath.Join(lab.Dir(), "l")
	if err := os.Mkdir(dir, 0o755); err != nil {
		return nil, err
	}
	l, err := lab.New(dir, filepath.Dir(self))
	if err != nil {
		return nil, err
	}
	r := &run{
		settings: s, began: time.Now(), lab: l, sink: lab.NewSink(), plan: newPlan(s.seed, s.nodes),
		ran: map[string]int{}, accepted: map[string]bool{}, pending: map[string]*command{},
	}
	if _, err := r.sink.Listen(); err != nil {
		return nil, err
	}
	var hosts []*lab.Host
	for i := range s.nodes {
		id := fmt.Sprintf("n%d", i+1)
		h, err := l.Add(lab.HostOptions{ID: id, Name: id + "." + lab.Domain, Disk: "512m"})
		if err != nil {
			return nil, err
		}
		hosts = append(hosts, h)
		r.nodes = append(r.nodes, &node{Host: h, number: i})
	}
	if err := lab.Form(hosts...); err != nil {
		return nil, err
	}
	if _, err := hosts[0].Must("mailproxy", "domain", "add", mailDomain, "--to", r.sink.Address); err != nil {
		return nil, err
	}
	return r, nil
}

// all goes through rounds until the time is over. The first that is broken ends it.
func (r *run) all() error {
	r.began = time.Now()
	if err := r.beginFacts(); err != nil {
		return err
	}
	if err := r.rest(); err != nil {
		return err
	}
	for number := 1; number == 1 || time.Since(r.began) < r.time; number++ {
		r.say("round %d: storm", number)
		r.storm(min(storm, r.time/4))
		r.say("round %d: calm", number)
		calmed := r.calm()
		if err := r.judge(calmed); err != nil {
			return err
		}
		r.rounds++
	}
	_ = r.file.Close()
	return os.Remove(r.file.Name())
}

// say writes a line with the time since the start.
func (r *run) say(format string, args ...any) {
	fmt.Printf("%7.1f s  %s\n", time.Since(r.began).Seconds(), fmt.Sprintf(format, args...))
}

// storm lets faults come, and everybody work, for a while.
func (r *run) storm(d time.Duration) {
	ctx, cancel := context.WithTimeout(context.Background(), d)
	defer cancel()
	workers := []func(context.Context){r.faults, r.operate}
	for _, n := range r.nodes {
		workers = append(workers, func(ctx context.Context) { r.commits(ctx, n) }, func(ctx context.Context) { r.observe(ctx, n) })
	}
	for range 4 {
		workers = append(workers, r.mail)
	}
	together(ctx, workers)
}
