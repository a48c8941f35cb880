package db

import (
	"context"
	"fmt"
	"time"

	"github.com/jackc/pgx/v5"

	"mailproxy/config"
)

// LeaseTerm is how long a master takes configuration after a majority of the nodes was last heard to stand behind it.
const LeaseTerm = 10 * time.Second

// RenewLease lets this node, while it is the master of epoch e, take configuration until LeaseTerm after a time that lies age back: then a
// majority of the members was heard, or, without majority, all that could be asked was asked. What a forced promote waived it waives
// until a majority is heard that knows of it: one that was heard in another epoch ends nothing.
func (d *DB) RenewLease(ctx context.Context, e config.Epoch, age time.Duration, majority bool) error {
	err := d.write(ctx, func(tx pgx.Tx) error {
		_, err := tx.Exec(ctx, "SELECT node.renew_lease($1, $2, $3, $4, $5)", e.N, e.Owner, age, LeaseTerm, majority)
		return err
	})
	if err != nil {
		return fmt.Errorf("renew lease: %w", err)
	}
	return nil
}

// EndLease takes the lease away at once, and a waiver of it.
func (d *DB) EndLease(ctx context.Context) error {
	err := d.write(ctx, func(tx pgx.Tx) error {
		_, err := tx.Exec(ctx, "SELECT node.end_lease()")
		return err
	})
	if err != nil {
		return fmt.Errorf("end lease: %w", err)
	}
	return nil
}

// HasLease says whether this node may write, if it is the master: it holds the lease, needs none since it has no other members, or a
// forced promote has waived it.
func (d *DB) HasLease(ctx context.Context) (bool, error) {
	var has bool
	if err := d.pool.QueryRow(ctx, "SELECT node.has_lease()").Scan(&has); err != nil {
		return false, fmt.Errorf("read lease: %w", mapError(err))
	}
	return has, nil
}
