package db

import (
	"context"
	"fmt"

	"github.com/jackc/pgx/v5"
)

// CreateDatabase makes a database on d's server, as a copy of the one named by template (empty: the server's own).
func (d *DB) CreateDatabase(ctx context.Context, name, template string) error {
	if template == "" {
		template = "template0"
	}
	_, err := d.pool.Exec(ctx, "CREATE DATABASE "+pgx.Identifier{name}.Sanitize()+" TEMPLATE "+pgx.Identifier{template}.Sanitize())
	if pg, ok := asPg(err); ok && pg.Code == "42P04" {
		return fmt.Errorf("create database %s: %w", name, ErrDatabaseExists)
	}
	if err != nil {
		return fmt.Errorf("create database %s: %w", name, err)
	}
	return nil
}

// DropDatabase drops a database on d's server, ends its sessions, and drops the roles of its peers.
func (d *DB) DropDatabase(ctx context.Context, name string) error {
	if _, err := d.pool.Exec(ctx, "DROP DATABASE IF EXISTS "+pgx.Identifier{name}.Sanitize()+" WITH (FORCE)"); err != nil {
		return fmt.Errorf("drop database %s: %w", name, err)
	}
	var roles []string
	err := collect(ctx, d.pool, &roles, func(r pgx.Rows, s *string) error { return r.Scan(s) },
		`SELECT rolname FROM pg_roles WHERE rolname ~ '^(peer|push)_[0-9]+_' AND substring(rolname FROM '^[a-z]+_[0-9]+_(.*)$') = $1`, name)
	if err != nil {
		return fmt.Errorf("drop database %s: %w", name, err)
	}
	for _, r := range roles {
		if _, err := d.pool.Exec(ctx, "DROP ROLE IF EXISTS "+pgx.Identifier{r}.Sanitize()); err != nil {
			return fmt.Errorf("drop role %s: %w", r, err)
		}
	}
	return nil
}
