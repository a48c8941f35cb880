// Command crash sends messages with unique subjects through a real node whose daemon is killed at random moments, and whose next hops come
// and go. Every message that was answered with 250 must reach each of its next hops; once, or once more for each window that is
// known: an attempt that was cut or not answered, which the node's log names, and a client that was cut off before it had its answer.
//
// CRASH_TIME is how long (2m), CRASH_SEED repeats an order of faults. The last line has the counts.
package main

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strconv"
	"sync"
	"time"

	"mailproxy/test/lab"
)

func main() { lab.Main(crash) }

// senders is how many clients send at once.
const senders = 12

// A run is one run of crash.
type run struct {
	seed  uint64
	time  time.Duration
	began time.Time
	lab   *lab.Lab
	host  *lab.Host
	hops  [2]*hop

	mu       sync.Mutex // guards the rest
	messages []*message
	kills    int // of the daemon
	failures int // of the whole host
	stops    int // in order
	errs     []error
}

// A hop is a next hop; the mail of its domain goes to it.
type hop struct {
	*lab.Sink
	domain string
	stop   func() // nil while it is away
}

// crash gives the exit code.
func crash() int {
	r, err := newRun()
	if err != nil {
		fmt.Fprintln(os.Stderr, "crash:", err)
		return 2
	}
	fmt.Printf("crash: for %v; again with CRASH_SEED=%d\n", r.time, r.seed)
	err = r.all()
	fmt.Println(r.counts())
	if err != nil {
		fmt.Fprintf(os.Stderr, "crash: seed %d: %v\n", r.seed, err)
		return 1
	}
	return 0
}

// newRun reads the variables and brings the node up.
func newRun() (*run, error) {
	r := &run{time: 2 * time.Minute, seed: rand.Uint64N(1_000_000), hops: [2]*hop{{domain: "steady.test"}, {domain: "fickle.test"}}}
	var err error
	if v := os.Getenv("CRASH_TIME"); v != "" {
		if r.time, err = time.ParseDuration(v); err != nil {
			return nil, fmt.Errorf("CRASH_TIME: %w", err)
		}
	}
	if v := os.Getenv("CRASH_SEED"); v != "" {
		if r.seed, err = strconv.ParseUint(v, 10, 64); err != nil {
			return nil, fmt.Errorf("CRASH_SEED: %w", err)
		}
	}
	self, err := os.Executable()
	if err != nil {
		return nil, err
	}
	dir := filepath.Join(lab.Dir(), "c")
	if err := os.Mkdir(dir, 0o755); err != nil {
		return nil, err
	}
	if r.lab, err = lab.New(dir, filepath.Dir(self)); err != nil {
		return nil, err
	}
	if r.host, err = r.lab.Add(lab.HostOptions{ID: "n1", Name: "n1." + lab.Domain}); err != nil {
		return nil, err
	}
	return r, r.prepare()
}

// prepare starts the next hops and the node, and makes them known to it.
func (r *run) prepare() error {
	if err := r.host.Start(); err != nil {
		return err
	}
	for _, h := range r.hops {
		h.Sink = lab.NewSink()
		if err := h.up(); err != nil {
			return err
		}
		err := lab.Poll(func() error {
			_, err := r.host.Must("mailproxy", "domain", "add", h.domain, "--to", h.Address)
			return err
		})
		if err != nil {
			return err
		}
	}
	return lab.Poll(func() error {
		_, err := r.host.Send("to@"+r.hops[1].domain, "first", 0)
		return err
	})
}

func (h *hop) up() (err error) {
	if h.stop == nil {
		h.stop, err = h.Listen()
	}
	return err
}

func (h *hop) down() {
	if h.stop != nil {
		h.stop()
		h.stop = nil
	}
}

// all lets everybody work until the time is over, then waits for what is queued, and judges.
func (r *run) all() error {
	r.began = time.Now()
	ctx, cancel := context.WithTimeout(context.Background(), r.time)
	defer cancel()
	var all sync.WaitGroup
	worker := func(number uint64, work func(context.Context, *rand.Rand)) {
		all.Go(func() { work(ctx, rand.New(rand.NewPCG(r.seed, number))) })
	}
	worker(0, r.breakNode)
	for i, h := range r.hops {
		worker(uint64(1+i), func(ctx context.Context, dice *rand.Rand) { r.breakHop(ctx, dice, h) })
	}
	for i := range senders {
		worker(uint64(100+i), r.sendOn)
	}
	all.Wait()
	return errors.Join(append(r.errs, r.calm(), r.judge())...)
}

// breakNode kills the daemon again and again: most of all soon after it has started, which is when it finds what it was killed in before.
func (r *run) breakNode(ctx context.Context, dice *rand.Rand) {
	for pause(ctx, time.Duration(dice.Int64N(int64(2500*time.Millisecond)))) {
		var err error
		switch dice.IntN(10) {
		case 0:
			err = r.host.Kill()
			r.count(&r.failures)
		case 1:
			err = r.host.Stop()
			r.count(&r.stops)
		default:
			r.host.KillDaemon()
			r.count(&r.kills)
		}
		if err == nil {
			err = r.host.Start()
		}
		if err != nil {
			r.broken(fmt.Errorf("the node: %w", err))
			return
		}
	}
}

// breakHop cuts a next hop's connections and leaves it away for a while; the steady one is back at once.
func (r *run) breakHop(ctx context.Context, dice *rand.Rand, h *hop) {
	for pause(ctx, time.Duration(dice.Int64N(int64(4*time.Second)))) {
		h.down()
		if h == r.hops[1] {
			pause(ctx, time.Duration(dice.Int64N(int64(3*time.Second))))
		}
		if err := h.up(); err != nil {
			r.broken(fmt.Errorf("a next hop: %w", err))
			return
		}
	}
}

func (r *run) count(what *int) {
	r.mu.Lock()
	defer r.mu.Unlock()
	*what++
}

func (r *run) broken(err error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.errs = append(r.errs, err)
}

// pause waits; false when ctx has ended.
func pause(ctx context.Context, d time.Duration) bool {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-ctx.Done():
		return false
	case <-t.C:
		return true
	}
}
