package db

import (
	"context"
	"fmt"
	"time"

	"github.com/jackc/pgx/v5"

	"mailproxy/config"
)

// State says who a node is and how far its configuration is: its row of node.position.
type State struct {
	CID        config.CID      `json:"cid"`
	ClusterID  string          `json:"cluster_id"`
	Position   config.Position `json:"position"`
	Promised   config.Epoch    `json:"promised"`    // the highest epoch; lower ones are refused
	PushedAt   time.Time       `json:"pushed_at"`   // last push that was applied or found nothing to do; zero: none
	JournalLen int             `json:"journal_len"` // commits set aside and not yet dealt with
	rewrites   int64           // counts changes of rows that config.change does not list
}

// IsMaster says whether the node may commit: it owns the epoch in force and has promised no other. A single node does.
func (s State) IsMaster() bool {
	return s.Position.Epoch.Owner == s.CID && s.Promised == s.Position.Epoch
}

// State reads the node's state; cheap.
func (d *DB) State(ctx context.Context) (State, error) {
	s, err := readState(ctx, d.pool)
	if err != nil {
		return State{}, fmt.Errorf("read state: %w", err)
	}
	return s, nil
}

const stateColumns = `cid, cluster_id, epoch_n, epoch_owner, serial, digest, promised_n, promised_owner, pushed_at, journal_len, rewrites`

func readState(ctx context.Context, q querier) (State, error) {
	return scanState(q.QueryRow(ctx, "SELECT "+stateColumns+" FROM node.state()"))
}

// scanState reads stateColumns, and what more was asked for.
func scanState(row pgx.Row, more ...any) (State, error) {
	var s State
	var digest []byte
	var pushed *time.Time
	p := &s.Position
	err := row.Scan(append([]any{&s.CID, &s.ClusterID, &p.Epoch.N, &p.Epoch.Owner, &p.Serial, &digest,
		&s.Promised.N, &s.Promised.Owner, &pushed, &s.JournalLen, &s.rewrites}, more...)...)
	if err != nil {
		return State{}, mapError(err)
	}
	if pushed != nil {
		s.PushedAt = *pushed
	}
	if copy(p.Digest[:], digest) != len(p.Digest) {
		return State{}, fmt.Errorf("digest of %d bytes", len(digest))
	}
	return s, nil
}

// Verify computes the digest from the rows and gives it beside the kept one. Where they differ, rows were changed with the triggers
// off; the kept sums are then set right, so that State shows it and the master's next push repairs it.
func (d *DB) Verify(ctx context.Context) (kept, rows config.Digest, err error) {
	return d.verify(ctx, d.read)
}

// VerifyAside is Verify that takes its time: mail and changes go first.
func (d *DB) VerifyAside(ctx context.Context) (kept, rows config.Digest, err error) {
	return d.verify(ctx, d.readAside)
}

func (d *DB) verify(ctx context.Context, read func(context.Context, func(pgx.Tx) error) error) (kept, rows config.Digest, err error) {
	err = read(ctx, func(tx pgx.Tx) error {
		var k, r []byte
		if err := tx.QueryRow(ctx, "SELECT node.kept_digest(), node.row_digest()").Scan(&k, &r); err != nil {
			return err
		}
		copy(kept[:], k)
		copy(rows[:], r)
		return nil
	})
	if err != nil {
		return kept, rows, fmt.Errorf("verify: %w", err)
	}
	if kept == rows {
		return kept, rows, nil
	}
	err = d.write(ctx, func(tx pgx.Tx) error {
		// What the digest should be is kept, so that it is known from then on that rows were changed, also where a commit put them there.
		_, err := tx.Exec(ctx, "UPDATE node.position SET applied_digest = node.kept_digest() WHERE applied_digest IS NULL")
		if err != nil {
			return err
		}
		_, err = tx.Exec(ctx, "SELECT node.recount()")
		return err
	})
	if err != nil {
		return kept, rows, fmt.Errorf("verify: set the sums right: %w", err)
	}
	return kept, rows, nil
}

// Drifted says whether rows are known to have been changed with the triggers off, since the last commit, push or adoption here. Verify
// looks for that.
func (d *DB) Drifted(ctx context.Context) (bool, error) {
	var drifted bool
	err := d.pool.QueryRow(ctx, "SELECT coalesce(applied_digest <> node.kept_digest(), false) FROM node.position").Scan(&drifted)
	if err != nil {
		return false, fmt.Errorf("read digest: %w", mapError(err))
	}
	return drifted, nil
}
