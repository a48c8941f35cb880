package db

import (
	"context"
	"fmt"

	"github.com/jackc/pgx/v5"

	"mailproxy/config"
)

// ForgetTrimmed drops what was kept of trimmed commits up to a position of the epoch in force here, which every member holds.
func (d *DB) ForgetTrimmed(ctx context.Context, held config.Position) error {
	err := d.write(ctx, func(tx pgx.Tx) error {
		_, err := tx.Exec(ctx, "SELECT node.forget_trimmed($1, $2, $3)", held.Epoch.N, held.Epoch.Owner, held.Serial)
		return err
	})
	if err != nil {
		return fmt.Errorf("forget trimmed commits: %w", err)
	}
	return nil
}
