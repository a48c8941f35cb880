package db

import (
	"context"
	"crypto/ed25519"
	"embed"
	"fmt"
	"io/fs"
	"sync"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"github.com/jackc/pgx/v5/pgxpool"
	"github.com/jackc/pgx/v5/stdlib"
	"github.com/pressly/goose/v3"
	"github.com/pressly/goose/v3/lock"
	"github.com/rs/zerolog"
)

//go:embed migrations/*.sql
var migrations embed.FS

// Options are what Open takes.
type Options struct {
	// DSN is a connection string of libpq's kind. Of several hosts the one that can be written is taken, at each connection anew.
	DSN string
	// RolePassword gives the passwords of the roles that peers log in as, on a server that wants one; nil: none.
	RolePassword func(role string) string
	// NodeKey reads this node's own key, which opens the secrets; it is asked each time, and only where there are any.
	NodeKey func() (ed25519.PrivateKey, error)
	Log     zerolog.Logger
}

// A DB is the node's PostgreSQL. Every method gives an error while the server is away, and works again when it is back. Methods may
// be called at once.
type DB struct {
	pool         *pgxpool.Pool
	rolePassword func(role string) string
	nodeKey      func() (ed25519.PrivateKey, error)
	log          zerolog.Logger
	doubt        time.Duration // how long a commit whose answer was lost is asked after
	large        int64         // see largeTable
	part         time.Duration // see partTime
	pushes       chan struct{} // held by each push; see keptConns

	mu     sync.Mutex
	loaded *loaded // what Load gave last; it is the base of the next
}

// Open prepares a DB and does not connect.
func Open(o Options) (*DB, error) {
	c, err := poolConfig(o.DSN)
	if err != nil {
		return nil, err
	}
	pool, err := pgxpool.NewWithConfig(context.Background(), c) // connects only when it is used
	if err != nil {
		return nil, fmt.Errorf("database: %w", err)
	}
	return &DB{
		pool: pool, rolePassword: o.RolePassword, nodeKey: o.NodeKey, log: o.Log, doubt: doubtBound, large: largeTable, part: partTime,
		pushes: make(chan struct{}, pushesOf(c.MaxConns)),
	}, nil
}

// Close ends all connections.
func (d *DB) Close() { d.pool.Close() }

// Ping says whether the server answers.
func (d *DB) Ping(ctx context.Context) error {
	if err := d.pool.Ping(ctx); err != nil {
		return fmt.Errorf("database: %w", err)
	}
	return nil
}

// OwnSchema is the newest migration that this program knows. A database that a later version has had may be further on.
func OwnSchema() int64 {
	var newest int64
	files, _ := migrations.ReadDir("migrations")
	for _, f := range files {
		if n, err := goose.NumericComponent(f.Name()); err == nil {
			newest = max(newest, n)
		}
	}
	return newest
}

// Migrate brings the schema up to this program's, and gives every table of config its triggers. A daemon and a command may do so at
// once. Files in extra, named as those in migrations are, come in their order among them.
func (d *DB) Migrate(ctx context.Context, extra ...fs.FS) error {
	own, err := fs.Sub(migrations, "migrations")
	if err != nil {
		return fmt.Errorf("migrate: %w", err)
	}
	if _, err := d.pool.Exec(ctx, "CREATE SCHEMA IF NOT EXISTS node"); err != nil && !isRace(err) {
		return fmt.Errorf("migrate: %w", err)
	}
	session, err := lock.NewPostgresSessionLocker(lock.WithLockTimeout(1, 120), lock.WithUnlockTimeout(1, 10))
	if err != nil {
		return fmt.Errorf("migrate: %w", err)
	}
	std := stdlib.OpenDB(*d.pool.Config().ConnConfig)
	defer std.Close()
	p, err := goose.NewProvider(goose.DialectPostgres, std, append(layers{own}, extra...),
		goose.WithSessionLocker(session), goose.WithTableName("node.migration"), goose.WithDisableGlobalRegistry(true))
	if err != nil {
		return fmt.Errorf("migrate: %w", err)
	}
	done, err := p.Up(ctx)
	if err != nil {
		return fmt.Errorf("migrate: %w", err)
	}
	if len(done) > 0 {
		d.log.Info().Int64("version", done[len(done)-1].Source.Version).Int("migrations", len(done)).Msg("db.migrated")
	}
	return d.attach(ctx)
}

// attach writes triggers and rights after migrations, once for each state of the schema, also where a migration's process was killed
// before it came to this.
func (d *DB) attach(ctx context.Context) error {
	hardened := true
	err := d.write(ctx, func(tx pgx.Tx) error {
		var attached, version int64
		err := tx.QueryRow(ctx, `SELECT p.attached, (SELECT max(version_id) FROM node.migration WHERE is_applied)
			FROM node.position p FOR UPDATE`).Scan(&attached, &version)
		if err != nil || attached == version {
			return err
		}
		if _, err := tx.Exec(ctx, "SELECT node.attach()"); err != nil {
			return err
		}
		if err := tx.QueryRow(ctx, "SELECT node.harden()").Scan(&hardened); err != nil {
			return err
		}
		if _, err := tx.Exec(ctx, "SELECT node.recount()"); err != nil {
			return err
		}
		_, err = tx.Exec(ctx, "UPDATE node.position SET attached = $1", version)
		return err
	})
	if err != nil {
		return fmt.Errorf("migrate: attach triggers: %w", err)
	}
	if !hardened {
		d.log.Warn().Str("reason", "not a superuser: large objects and advisory locks stay open to peers").Msg("db.unhardened")
	}
	return nil
}

// isRace says whether another session made the same schema at the same time.
func isRace(err error) bool {
	pg, ok := asPg(err)
	return ok && (pg.Code == "23505" || pg.Code == "42P06")
}

// write runs f in one transaction, and gives our own errors.
func (d *DB) write(ctx context.Context, f func(tx pgx.Tx) error) error {
	return mapError(pgx.BeginFunc(ctx, d.pool, f))
}

// readOnly is a transaction that sees one state.
var readOnly = pgx.TxOptions{IsoLevel: pgx.RepeatableRead, AccessMode: pgx.ReadOnly}

// read runs f in one transaction that sees one state.
func (d *DB) read(ctx context.Context, f func(tx pgx.Tx) error) error {
	return mapError(pgx.BeginTxFunc(ctx, d.pool, readOnly, f))
}

// querier is a transaction or a connection.
type querier interface {
	Exec(ctx context.Context, sql string, args ...any) (pgconn.CommandTag, error)
	Query(ctx context.Context, sql string, args ...any) (pgx.Rows, error)
	QueryRow(ctx context.Context, sql string, args ...any) pgx.Row
}

// layers shows the files of several directories as one.
type layers []fs.FS

// Open opens the file in the first layer that has it.
func (l layers) Open(name string) (fs.File, error) {
	for _, f := range l {
		if file, err := f.Open(name); err == nil {
			return file, nil
		}
	}
	return nil, &fs.PathError{Op: "open", Path: name, Err: fs.ErrNotExist}
}

// ReadDir lists the files of all layers.
func (l layers) ReadDir(name string) ([]fs.DirEntry, error) {
	var all []fs.DirEntry
	for _, f := range l {
		es, err := fs.ReadDir(f, name)
		if err != nil {
			return nil, err
		}
		all = append(all, es...)
	}
	return all, nil
}
