package main

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"

	"mailproxy/config"
	"mailproxy/test/history"
	"mailproxy/test/lab"
)

// calm puts everything right and sees that the cluster comes to rest.
func (r *run) calm() error {
	r.plan.calm()
	if err := r.repair(); err != nil {
		return err
	}
	r.note(history.Fact{Calm: &history.Mark{Why: "all was put right"}})
	calm := time.Now()
	if err := r.takesConfiguration(); err != nil {
		return err
	}
	r.say("  configuration is taken after %.1f s", time.Since(calm).Seconds())
	if err := r.settle(); err != nil {
		return err
	}
	r.say("  all are in sync after %.1f s", time.Since(calm).Seconds())
	r.runAgain()
	if err := errors.Join(r.settle(), r.mailArrives()); err != nil {
		return err
	}
	if rand.IntN(2) == 0 {
		if err := r.deleteOne(); err != nil {
			return err
		}
	}
	r.note(history.Fact{Storm: &history.Mark{}})
	return r.rest()
}

// repair ends every fault.
func (r *run) repair() error {
	err := r.lab.Heal()
	for _, n := range r.nodes {
		err = errors.Join(err, n.Resume(), n.FreeDisk(), n.SetSkew(0))
		if !n.Runs() {
			err = errors.Join(err, n.Launch())
		}
	}
	return err
}

// takesConfiguration waits until somebody does. Rule 5 says how long that may take; the facts are judged later.
func (r *run) takesConfiguration() error {
	i := 0
	return lab.Poll(func() error {
		for _, n := range r.nodes {
			i++
			ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
			done := r.commit(ctx, n, "domain", "add", fmt.Sprintf("calm%d-%d.test", r.rounds, i), "--to", r.sink.Address)
			cancel()
			if done {
				return nil
			}
		}
		_ = r.inSync() // a remedy is followed
		return errors.New("nobody takes configuration")
	})
}

var promoteOn = regexp.MustCompile("`pmgcm promote` on node (\\d+)")

// inSync gives nil where every node says that all are. What status says to do about a master that was rolled back is done.
func (r *run) inSync() error {
	for _, n := range r.nodes {
		out, errs, code, err := n.Run("pmgcm", "status")
		if err != nil {
			return err
		}
		if found := promoteOn.FindStringSubmatch(out); found != nil {
			cid, _ := strconv.Atoi(found[1])
			r.followRemedy(config.CID(cid))
		}
		if code != 0 {
			return fmt.Errorf("n%d: exit code %d\n%s%s", n.number+1, code, out, errs)
		}
	}
	return nil
}

func (r *run) followRemedy(cid config.CID) {
	for _, n := range r.nodes {
		if n.CID() == cid {
			r.say("  remedy: promote on n%d", n.number+1)
			ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
			defer cancel()
			r.pmgcm(ctx, n, "promote")
		}
	}
}

// settle waits until all are in sync, and looks at everything, the rows too.
func (r *run) settle() error {
	if err := lab.Poll(r.inSync); err != nil {
		return fmt.Errorf("the cluster does not come to rest: %w", err)
	}
	for _, n := range r.nodes {
		r.look(n)
	}
	_, err := r.nodes[0].Must("pmgcm", "status", "--verify")
	for _, n := range r.nodes {
		err = errors.Join(err, r.lookAtRows(n, err == nil))
	}
	return err
}

// runAgain runs what was killed once more.
func (r *run) runAgain() {
	r.mu.Lock()
	var again []*command
	for _, c := range r.pending {
		again = append(again, c)
	}
	clear(r.pending)
	r.mu.Unlock()
	for _, c := range again {
		ctx, cancel := context.WithTimeout(context.Background(), lab.Patience)
		r.pmgcm(ctx, c.node, c.args...)
		cancel()
	}
}

// mailArrives waits until everything that was accepted has arrived.
func (r *run) mailArrives() error {
	for _, n := range r.nodes {
		if _, err := n.Must("mailproxy", "queue", "flush"); err != nil {
			return err
		}
	}
	return lab.Poll(func() error {
		r.mu.Lock()
		defer r.mu.Unlock()
		if missing := r.missing(); len(missing) > 0 {
			return fmt.Errorf("%d messages that were answered with 250 have not arrived, %s among them", len(missing), missing[0])
		}
		return nil
	})
}

// deleteOne deletes a slave, which then tries to come in for a while, and enters again as a new node.
func (r *run) deleteOne() error {
	var master, gone *node
	report, err := r.nodes[0].Report()
	if err != nil {
		return err
	}
	for _, row := range report.Nodes {
		i := slices.IndexFunc(r.nodes, func(n *node) bool { return int(n.CID()) == row.CID })
		if i >= 0 && row.Role == "master" {
			master = r.nodes[i]
		}
	}
	if master == nil {
		return fmt.Errorf("no master in %+v", report)
	}
	for _, i := range rand.Perm(len(r.nodes)) {
		if r.nodes[i] != master {
			gone = r.nodes[i]
		}
	}
	r.say("  delete n%d", gone.number+1)
	cid := gone.CID()
	if _, err := master.Must("pmgcm", "delete", strconv.Itoa(int(cid)), "--yes"); err != nil {
		return err
	}
	r.note(history.Fact{Node: cid, Deleted: &history.Mark{}})
	r.count("delete")
	for end := time.Now().Add(2500 * time.Millisecond); time.Now().Before(end); {
		for _, n := range r.nodes {
			if n == gone {
				continue
			}
			_, err := gone.PeerSQL(int(n.CID()), "SELECT 1", "-U", "any")
			r.note(history.Fact{Node: cid, Tunnel: &history.Tunnel{To: n.CID(), Opened: err == nil, Read: err == nil}})
		}
	}
	if err := r.enterAnew(master, gone); err != nil {
		return err
	}
	return r.settle()
}

// enterAnew makes a deleted node one that was never in a cluster, and a member again.
func (r *run) enterAnew(master, n *node) error {
	n.database.Lock()
	defer n.database.Unlock()
	if err := n.Stop(); err != nil {
		return err
	}
	s := n.Local.StateDir
	if _, err := n.Must("rm", "-r", filepath.Join(s, "keys"), filepath.Join(s, "pg"), filepath.Join(s, "pg.made")); err != nil {
		return err
	}
	if err := n.Start(); err != nil {
		return err
	}
	if err := lab.Poll(func() error { _, err := n.SQL("SELECT 1 FROM node.position"); return err }); err != nil {
		return err
	}
	args, err := master.JoinArgs()
	if err != nil {
		return err
	}
	if out, err := n.Must("pmgcm", args...); err != nil || !strings.HasSuffix(out, "\njoined\n") {
		return errors.Join(err, fmt.Errorf("n%d: pmgcm join: %s", n.number+1, out))
	}
	s2, _, err := read(n, "")
	n.mu.Lock()
	n.cid = s2.CID
	n.mu.Unlock()
	r.mu.Lock()
	r.where, r.acks = map[config.CID]config.Position{}, nil
	r.mu.Unlock()
	return err
}

// rest copies every database, for a rollback in the next storm.
func (r *run) rest() error {
	var err error
	for _, n := range r.nodes {
		r.look(n)
		err = errors.Join(err, n.Snapshot())
	}
	return err
}
