package main

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"

	"mailproxy/config"
	"mailproxy/test/history"
	"mailproxy/test/lab"
)

// faults carries out the plan until ctx ends.
func (r *run) faults(ctx context.Context) {
	for {
		s := r.plan.next()
		if !pause(ctx, s.wait) {
			for _, n := range r.nodes {
				r.broken(n.Resume()) // who waits for a frozen host would wait for ever
			}
			return
		}
		r.say("  %v", s)
		if err := r.apply(s); err != nil {
			r.broken(fmt.Errorf("%v: %w", s, err))
		}
		if _, fault := opposite()[s.what]; fault {
			r.count("fault")
		}
	}
}

func (r *run) apply(s step) error {
	n := r.nodes[s.host]
	switch s.what {
	case "cut":
		if s.with < 0 {
			return r.lab.Isolate(n.Host)
		}
		return r.lab.Cut(n.Host, r.nodes[s.with].Host)
	case "join":
		if s.with < 0 {
			return r.lab.Rejoin(n.Host)
		}
		return r.lab.Join(n.Host, r.nodes[s.with].Host)
	case "slow":
		return n.Slow(time.Duration(s.much) * time.Millisecond)
	case "fast":
		return n.Slow(0)
	case "kill":
		return n.Kill()
	case "kill-daemon":
		n.KillDaemon()
		return nil
	case "kill-postgres":
		n.KillPostgres()
		return nil
	case "start":
		return n.Launch()
	case "pause":
		return n.Pause()
	case "resume":
		return n.Resume()
	case "skew":
		return n.SetSkew(time.Duration(s.much) * time.Second)
	case "clock-right":
		return n.SetSkew(0)
	case "disk-full":
		return n.FillDisk()
	case "disk-free":
		return n.FreeDisk()
	case "rollback":
		return r.rollback(n)
	}
	return errors.New("no such fault")
}

// rollback puts the database back to what it was at the end of the last calm. What was acknowledged before is not spoken of again.
func (r *run) rollback(n *node) error {
	n.database.Lock()
	defer n.database.Unlock()
	err := n.Rollback()
	r.mu.Lock()
	defer r.mu.Unlock()
	r.rollbacks++
	r.acks, r.where = nil, map[config.CID]config.Position{}
	r.noteLocked(history.Fact{Node: n.CID(), Reset: &history.Mark{Why: "rolled back"}})
	return err
}

var committed = regexp.MustCompile(`\(configuration (\d+)\.(\d+)/(\d+)\)`)

// commits changes the configuration on a node, again and again; a slave carries it to the master.
func (r *run) commits(ctx context.Context, n *node) {
	for i := 0; pause(ctx, time.Duration(100+rand.IntN(500))*time.Millisecond); i++ {
		domain := fmt.Sprintf("c%d-%d-%d.test", r.round(), n.number+1, i/2)
		if i%2 == 0 {
			r.commit(ctx, n, "domain", "add", domain, "--to", r.sink.Address)
		} else {
			r.commit(ctx, n, "domain", "remove", domain)
		}
	}
}

func (r *run) round() int { return r.rounds }

// commit makes one change, and notes it where it is acknowledged, for the master that made it.
func (r *run) commit(ctx context.Context, n *node, args ...string) bool {
	r.mu.Lock()
	rollbacks := r.rollbacks
	r.mu.Unlock()
	out, _, code, err := n.RunContext(ctx, "mailproxy", args...)
	r.broken(err)
	found := committed.FindStringSubmatch(out)
	if code != 0 || found == nil {
		return false
	}
	number := func(i int) int64 { v, _ := strconv.ParseInt(found[i], 10, 64); return v }
	epoch := config.Epoch{N: number(1), Owner: config.CID(number(2))}
	f := history.Fact{Node: epoch.Owner, Ack: &history.Ack{Position: config.Position{Epoch: epoch, Serial: number(3)}}}
	r.mu.Lock()
	defer r.mu.Unlock()
	r.ran["commit"]++
	if rollbacks == r.rollbacks {
		r.noteLocked(f)
		r.acks = append(r.acks, f)
	}
	return true
}

// lines are what is run of pmgcm, as often as they stand here.
func lines() [][]string {
	return [][]string{
		{"promote"}, {"promote"}, {"promote"}, {"promote", "--force"}, {"sync"}, {"sync"}, {"sync", "--pull", "--yes"},
		{"status"}, {"status", "--json"}, {"journal", "list"}, {"join-cmd"},
	}
}

// operate runs pmgcm here and there, and kills some of it.
func (r *run) operate(ctx context.Context) {
	for pause(ctx, time.Duration(300+rand.IntN(2000))*time.Millisecond) {
		n, line := r.nodes[rand.IntN(len(r.nodes))], lines()[rand.IntN(len(lines()))]
		if slices.Contains(line, "--pull") && r.rolled() {
			continue // who pulls from a master that was rolled back has ordered that the rest is forgotten, and no rule stands that
		}
		bound := 20 * time.Second
		if rand.IntN(3) == 0 {
			bound = time.Duration(20+rand.IntN(1500)) * time.Millisecond
		}
		short, cancel := context.WithTimeout(ctx, bound)
		r.pmgcm(short, n, line...)
		cancel()
	}
}

// rolled says whether a database was rolled back in this storm.
func (r *run) rolled() bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.rollbacks > r.settled
}

var promoted = regexp.MustCompile(`this node is master now, epoch (\d+)\.(\d+)`)

// pmgcm runs a command and notes how it ended.
func (r *run) pmgcm(ctx context.Context, n *node, args ...string) {
	line := "pmgcm " + strings.Join(args, " ")
	forced, pull := line == "pmgcm promote --force", strings.Contains(line, "--pull")
	if pull { // the position may go back meanwhile
		n.database.Lock()
		defer n.database.Unlock()
	} else {
		n.database.RLock()
		defer n.database.RUnlock()
	}
	if forced {
		r.note(history.Fact{Node: n.CID(), Promote: &history.Promote{Forced: true}})
	}
	out, errs, code, err := n.RunContext(ctx, "pmgcm", args...)
	r.broken(err)
	if pull {
		r.note(history.Fact{Node: n.CID(), Pull: &history.Mark{Why: line}})
	}
	c := history.Command{Line: line, Outcome: history.Done}
	switch {
	case code < 0:
		c.Outcome = history.Killed
	case code == 1 && strings.Contains(errs, "\nhint: "):
		c.Outcome, c.Error = history.Refused, errs
	case code != 0 && (code != 3 || args[0] != "status"):
		c.Outcome, c.Error = history.Failed, errs
	}
	r.note(history.Fact{Node: n.CID(), Command: &c})
	r.count("command")
	if found := promoted.FindStringSubmatch(out); found != nil {
		r.count("promote")
		r.say("  n%d: %s", n.number+1, found[0])
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	key := fmt.Sprint(n.number, " ", line)
	delete(r.pending, key)
	if c.Outcome == history.Killed {
		r.ran["killed"]++
		r.pending[key] = &command{n, args}
	}
}

// mail sends messages, each with a subject of its own, here and there.
func (r *run) mail(ctx context.Context) {
	for pause(ctx, time.Duration(10+rand.IntN(100))*time.Millisecond) {
		n, subject := r.nodes[rand.IntN(len(r.nodes))], fmt.Sprintf("m%d", rand.Uint64())
		if _, err := send(ctx, n.Host, subject); err == nil {
			r.mu.Lock()
			r.accepted[subject] = true
			r.mu.Unlock()
		}
	}
}

// send gives up on a host that is frozen when ctx ends: what it may still answer is not waited for.
func send(ctx context.Context, h *lab.Host, subject string) (string, error) {
	type answer struct {
		reply string
		err   error
	}
	answered := make(chan answer, 1)
	go func() { // ends by its own deadline
		reply, err := h.Send("to@"+mailDomain, subject, 2<<10)
		answered <- answer{reply, err}
	}()
	select {
	case a := <-answered:
		return a.reply, a.err
	case <-ctx.Done():
		return "", ctx.Err()
	}
}
