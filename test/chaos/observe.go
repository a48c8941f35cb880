package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"time"

	"mailproxy/config"
	"mailproxy/test/history"
)

// commitSQL is a commit as JSON, from a row of config.history or node.journal. The node that is noted there is where the administrator
// was, from which a change is carried to the master; here that goes into who.
const commitSQL = `json_build_object('epoch', json_build_object('n', epoch_n, 'owner', epoch_owner), 'serial', serial, 'node', epoch_owner,
	'at', at, 'who', who || ' on node ' || node, 'command', command)`

// stateSQL is what a node knows, read at one instant, and how long a reader of configuration has been waiting there, in seconds.
const stateSQL = `SELECT json_build_object('cid', s.cid, 'waited', (SELECT coalesce(max(extract(epoch FROM clock_timestamp() - l.waitstart)), 0)
		FROM pg_locks l JOIN pg_class c ON c.oid = l.relation JOIN pg_namespace n ON n.oid = c.relnamespace AND n.nspname = 'config'
		WHERE NOT l.granted AND l.mode = 'AccessShareLock'),
	'state', json_build_object('position', json_build_object('epoch', json_build_object('n', s.epoch_n, 'owner', s.epoch_owner),
			'serial', s.serial, 'digest', encode(s.digest, 'hex')),
		'promised', json_build_object('n', s.promised_n, 'owner', s.promised_owner), %s
		'log', json_build_object(
			'above', (SELECT CASE WHEN count(*) >= 1000 THEN min(serial) - 1 ELSE 0 END FROM config.history),
			'history', (SELECT coalesce(json_agg(%[2]s ORDER BY serial), '[]') FROM config.history),
			'journal', (SELECT coalesce(json_agg(%[2]s ORDER BY id), '[]') FROM node.journal))))
	FROM node.state() s`

// observe notes what a node's database says, each time that it is something else.
func (r *run) observe(ctx context.Context, n *node) {
	for pause(ctx, 200*time.Millisecond) {
		n.database.RLock()
		r.look(n)
		n.database.RUnlock()
	}
}

// seen is what stateSQL gives.
type seen struct {
	CID    config.CID
	Waited float64
	State  history.State
}

// read asks a node's database; rows says whether the digest is to be computed from its rows, too.
func read(n *node, rows string) (seen, string, error) {
	began := time.Now()
	out, err := n.SQL(fmt.Sprintf(stateSQL, rows, commitSQL))
	if err != nil {
		return seen{}, "", fmt.Errorf("n%d: %w: %s", n.number+1, err, out)
	}
	var s seen
	if err := json.Unmarshal([]byte(out), &s); err != nil {
		return seen{}, "", fmt.Errorf("n%d: %w: %s", n.number+1, err, out)
	}
	s.State.Began = began
	s.State.Log.Above = max(s.State.Log.Above, 0)
	return s, fmt.Sprint(s.State.Position, s.State.Promised, len(s.State.Log.Journal)), nil
}

// look notes what a node's database says, where it answers and that is something else than last time.
func (r *run) look(n *node) {
	s, said, err := read(n, "")
	if err != nil {
		return // it is down
	}
	n.mu.Lock()
	again := said == n.last
	n.cid, n.last = s.CID, said
	n.mu.Unlock()
	if s.Waited > 0 && !n.troubled() {
		r.note(history.Fact{Node: s.CID, Reader: &history.Reader{What: "a reader of config", Took: time.Duration(s.Waited * float64(time.Second))}})
	}
	if !again {
		r.note(history.Fact{Node: s.CID, State: &s.State})
	}
	r.majorities(s)
}

// troubled says whether a host is, or was a moment ago, such that anything on it may take long.
func (n *node) troubled() bool { return n.Paused() || n.DiskFull() || !n.Runs() }

// majorities notes which acknowledged commits a majority has: every node in the commit's epoch and as far got it from its master.
func (r *run) majorities(s seen) {
	r.mu.Lock()
	r.where[s.CID] = s.State.Position
	var left, held []history.Fact
	for _, f := range r.acks {
		at, has := f.Ack.Position, 0
		for _, p := range r.where {
			if p.Epoch == at.Epoch && p.Serial >= at.Serial {
				has++
			}
		}
		if has > len(r.nodes)/2 {
			held = append(held, f)
		} else {
			left = append(left, f)
		}
	}
	r.acks = left
	r.mu.Unlock()
	for _, f := range held {
		r.note(history.Fact{Node: f.Node, Ack: &history.Ack{Position: f.Ack.Position, Majority: true}})
	}
}

// lookAtRows notes a state with the digest computed from the rows.
func (r *run) lookAtRows(n *node, inSync bool) error {
	s, _, err := read(n, "'rows', encode(node.row_digest(), 'hex'),")
	if err != nil {
		return err
	}
	if s.State.Rows == nil {
		return errors.New("no digest of the rows")
	}
	s.State.InSync = inSync
	r.note(history.Fact{Node: s.CID, State: &s.State})
	return nil
}
