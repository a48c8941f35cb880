package cluster

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"sync"
	"time"

	"mailproxy/tunnel"
)

// checkPassword says whether a node comes with root's password on this host, and writes down who asked: from where, with which key, and
// how it ended. Whatever is wrong with a password or with root's account is ErrWrongPassword.
func (n *Node) checkPassword(ctx context.Context, req tunnel.JoinRequest) error {
	err := n.tryPassword(ctx, req)
	e, reason := n.o.Log.Info(), "right"
	if err != nil {
		e, reason = n.o.Log.Warn().Err(err), "refused"
	}
	fingerprint, _ := tunnel.Fingerprint(req.Node.PublicKey) // the tunnel has parsed it
	e.Str("client", req.Client).Str("fingerprint", fingerprint).Str("name", req.Node.Name).Bool("dry_run", req.DryRun).
		Str("reason", reason).Msg("join.password")
	if errors.Is(err, ErrPasswordUnchecked) {
		return ErrPasswordUnchecked // why is for our log
	}
	return err
}

func (n *Node) tryPassword(ctx context.Context, req tunnel.JoinRequest) error {
	s := n.o.Snapshot()
	if s == nil {
		return ErrPasswordsOff
	}
	if v, err := s.Values(); err != nil || !v.JoinPassword {
		return ErrPasswordsOff
	}
	if n.o.CheckPassword == nil {
		return ErrPasswordUnchecked
	}
	host := hostOf(req.Client)
	source := sourceOf(host)
	if wait := n.guesses.take(source, time.Now()); wait > 0 {
		return fmt.Errorf("%w: again in %v", ErrManyPasswords, wait)
	}
	err := n.o.CheckPassword(ctx, host, req.Password)
	if errors.Is(err, ErrWrongPassword) {
		n.guesses.wrong(source, time.Now())
		return err
	}
	n.guesses.giveBack(source, err == nil)
	if err != nil {
		return fmt.Errorf("%w: %w", ErrPasswordUnchecked, err)
	}
	return nil
}

// sourceOf is what the guesses of a host are counted by: its address, or the /64 of one of IPv6.
func sourceOf(host string) string {
	a, err := netip.ParseAddr(host)
	if err != nil {
		return host
	}
	if a = a.Unmap(); a.Is4() {
		return a.String()
	}
	return netip.PrefixFrom(a.WithZone(""), 64).Masked().String()
}

// How fast passwords may be guessed. Some wrong ones are free, then each doubles the wait before the next, from 2 s on; it begins anew
// after an hour without. That is some 250 a day from one address, and 1,500 in all.
const (
	freeBySource, longestBySource = 3, 15 * time.Minute
	freeInAll, longestInAll       = 10, time.Minute
	guessMemory                   = time.Hour
)

// guesses counts wrong passwords, by source and in all. It remembers no more sources than could guess within guessMemory: some 80.
type guesses struct {
	mu      sync.Mutex
	all     guess
	sources map[string]guess
}

// A guess is how many there were, and when the last one was.
type guess struct {
	count int
	at    time.Time
}

// wait is how long the next one has to, at least.
func (g guess) wait(now time.Time, free int, longest time.Duration) time.Duration {
	if g.count < free {
		return 0
	}
	pause := longest
	if doublings := g.count - free; doublings < 20 {
		pause = min(2*time.Second<<doublings, longest)
	}
	return max(0, pause-now.Sub(g.at))
}

// take counts an attempt, which is a wrong one until it is given back; or says how long to wait before the next, in seconds.
func (g *guesses) take(source string, now time.Time) time.Duration {
	g.mu.Lock()
	defer g.mu.Unlock()
	for k, old := range g.sources {
		if now.Sub(old.at) > guessMemory {
			delete(g.sources, k)
		}
	}
	if now.Sub(g.all.at) > guessMemory {
		g.all = guess{}
	}
	of := g.sources[source]
	wait := max(of.wait(now, freeBySource, longestBySource), g.all.wait(now, freeInAll, longestInAll))
	if wait > 0 {
		return (wait + time.Second - 1).Truncate(time.Second)
	}
	if g.sources == nil {
		g.sources = map[string]guess{}
	}
	g.sources[source] = guess{of.count + 1, now}
	g.all = guess{g.all.count + 1, now}
	return 0
}

// wrong says that the last attempt of a source was: the pause begins now, since PAM has taken its time.
func (g *guesses) wrong(source string, now time.Time) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.all.at = now
	if of, ok := g.sources[source]; ok {
		g.sources[source] = guess{of.count, now}
	}
}

// giveBack takes the last attempt of a source off the count: it was right, and then its earlier ones are forgiven too, or nobody
// knows.
func (g *guesses) giveBack(source string, right bool) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.all.count = max(0, g.all.count-1)
	of := g.sources[source]
	if of.count--; of.count < 1 || right {
		delete(g.sources, source)
		return
	}
	g.sources[source] = of
}
