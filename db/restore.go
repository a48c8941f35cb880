package db

import (
	"bufio"
	"bytes"
	"context"
	"crypto/ed25519"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
	"time"

	"github.com/jackc/pgx/v5"

	"mailproxy/config"
)

// RestoreParams say what is brought back.
type RestoreParams struct {
	// Dump is what the backup holds.
	Dump Dump
	// MadeAt is when the backup was made.
	MadeAt time.Time
	// NodeKey is the key of the node that the backup is of: it opens the secrets in it. nil where the backup has none.
	NodeKey ed25519.PrivateKey
	// Author is who restores, for the history of a single node.
	Author Author
}

// A Feed gives rows to put, in any order, as Dump gave them.
type Feed func(put func(table string, row []byte) error) error

// RestoreSingle gives a single node the configuration, its history and the journal of a backup in place of its own, in one
// transaction; what the backup knows of its cluster is left out, and its secrets are sealed anew for this node alone. ErrExists where the
// node is in a cluster, ErrNewerBackup, ErrNoDataKey.
func (d *DB) RestoreSingle(ctx context.Context, p RestoreParams, feed Feed) (config.Position, error) {
	at, err := d.marked(ctx, func(tx pgx.Tx) (mark, error) {
		if err := d.restoreIn(ctx, tx, p, feed); err != nil {
			return mark{}, err
		}
		return markNow(ctx, tx)
	})
	if err != nil {
		return config.Position{}, fmt.Errorf("restore: %w", err)
	}
	return at, nil
}

func (d *DB) restoreIn(ctx context.Context, tx pgx.Tx, p RestoreParams, feed Feed) error {
	if err := begin(ctx, tx, p.Author); err != nil {
		return err
	}
	var apart []string
	err := collect(ctx, tx, &apart, func(r pgx.Rows, t *string) error { return r.Scan(t) },
		"SELECT 'config.' || t FROM node.tables() t WHERE node.of_cluster(t) UNION VALUES ('node.trimmed'), ('node.trimmed_change')")
	if err != nil {
		return err
	}
	tabs, err := stageBackup(ctx, tx, p.Dump, apart, feed)
	if err != nil {
		return err
	}
	if _, err := tx.Exec(ctx, "SELECT node.restore_single($1, $2)", tabs, p.Dump.State.Position.Serial); err != nil {
		return err
	}
	k := d.ownKeyring()
	k.open = func() (ed25519.PrivateKey, error) {
		if p.NodeKey == nil {
			return nil, fmt.Errorf("%w: the backup has no key of its node", ErrNoDataKey)
		}
		return p.NodeKey, nil
	}
	return (&Tx{tx: tx, db: d}).entitle(ctx, k)
}

// RestoreIdentity makes a single node the member of the cluster that the backup is of, in one transaction: at position 0.0/0, without a
// vote, until a master has pushed to it. The same again is no error before that. The keys are the caller's to put back, and then
// KeysRestored is. ErrExists where the node is in a cluster, ErrNewerBackup.
func (d *DB) RestoreIdentity(ctx context.Context, p RestoreParams, feed Feed) error {
	err := d.write(ctx, func(tx pgx.Tx) error {
		tabs, err := stageBackup(ctx, tx, p.Dump, nil, feed)
		if err != nil {
			return err
		}
		st := p.Dump.State
		_, err = tx.Exec(ctx, "SELECT node.restore_identity($1, $2, $3, $4, $5, $6, $7, $8, $9)", tabs, p.MadeAt, st.ClusterID, st.CID,
			st.Position.Epoch.N, st.Position.Epoch.Owner, st.Position.Serial, st.Promised.N, st.Promised.Owner)
		return err
	})
	if err != nil {
		return fmt.Errorf("restore: %w", err)
	}
	return nil
}

// KeysRestored is the end of a RestoreIdentity: the keys are in their place. The daemon is woken to read them.
func (d *DB) KeysRestored(ctx context.Context) error {
	if _, err := d.pool.Exec(ctx, "SELECT node.keys_restored()"); err != nil {
		return fmt.Errorf("restore: %w", mapError(err))
	}
	return nil
}

// A Restored says from which backup a node was brought back with its identity.
type Restored struct {
	MadeAt   time.Time
	Position config.Position // without a digest
	Keys     bool            // whether the keys were put back too; if not, the restore was cut off
}

// Restored gives what is known of the backup that this node was brought back from; nil where there was none, or where a master has
// pushed to the node since.
func (d *DB) Restored(ctx context.Context) (*Restored, error) {
	var r Restored
	p := &r.Position
	err := d.pool.QueryRow(ctx, `SELECT made_at, r.epoch_n, r.epoch_owner, r.serial, keys FROM node.restored r, node.position p
		WHERE p.cid <> 0 AND p.epoch_n = 0`).Scan(&r.MadeAt, &p.Epoch.N, &p.Epoch.Owner, &p.Serial, &r.Keys)
	if errors.Is(err, pgx.ErrNoRows) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("read what was restored: %w", mapError(err))
	}
	return &r, nil
}

// stageBackup puts a backup's rows into the staging table, but for the tables that stay apart, and gives the columns of each table.
func stageBackup(ctx context.Context, tx pgx.Tx, dump Dump, apart []string, feed Feed) (tabs map[string][]string, err error) {
	if err := fitsHere(ctx, tx, dump); err != nil {
		return nil, err
	}
	if _, err := tx.Exec(ctx, "SELECT node.stage()"); err != nil {
		return nil, err
	}
	tabs = map[string][]string{}
	for _, t := range dump.Tables {
		if !slices.Contains(apart, t.Name) {
			tabs[t.Name] = t.Columns
		}
	}
	if err := copyFeed(ctx, tx, tabs, feed); err != nil {
		return nil, err
	}
	_, err = tx.Exec(ctx, renumberJournal)
	return tabs, err
}

// renumberJournal gives staged entries of the journal numbers behind those that are here, but for entries that are here already, since
// the same restore was run before.
const renumberJournal = `WITH theirs AS MATERIALIZED (
		SELECT r.id, coalesce((SELECT j.id FROM node.journal j WHERE (j.epoch_n, j.epoch_owner, j.serial, j.at, j.set_aside_at) =
			(r.epoch_n, r.epoch_owner, r.serial, r.at, r.set_aside_at) ORDER BY j.id LIMIT 1), r.id + (SELECT coalesce(max(id), 0) FROM node.journal)) AS number
		FROM pg_temp.staging s CROSS JOIN LATERAL jsonb_populate_record(NULL::node.journal, s.row) r WHERE s.tab = 'node.journal'
	)
	UPDATE pg_temp.staging s SET row = jsonb_set(s.row, '{id}', to_jsonb(t.number)) FROM theirs t
		WHERE s.tab IN ('node.journal', 'node.journal_change') AND s.row->'id' = to_jsonb(t.id)`

// fitsHere refuses a backup that holds what this schema does not have.
func fitsHere(ctx context.Context, tx pgx.Tx, dump Dump) error {
	schema, err := schemaVersion(ctx, tx)
	if err != nil {
		return err
	}
	if dump.Schema > schema {
		return fmt.Errorf("%w: schema %d, here %d", ErrNewerBackup, dump.Schema, schema)
	}
	here, err := backupTables(ctx, tx, WithLogs)
	if err != nil {
		return err
	}
	for _, t := range dump.Tables {
		at := slices.IndexFunc(here, func(h Table) bool { return h.Name == t.Name })
		if at < 0 {
			return fmt.Errorf("%w: no table %s here", ErrNewerBackup, t.Name)
		}
		for _, c := range t.Columns {
			if !slices.Contains(here[at].Columns, c) {
				return fmt.Errorf("%w: no column %s in %s here", ErrNewerBackup, c, t.Name)
			}
		}
	}
	return nil
}

// copyFeed copies the rows that feed puts into the staging table.
func copyFeed(ctx context.Context, tx pgx.Tx, tabs map[string][]string, feed Feed) error {
	r, w := io.Pipe()
	fed := make(chan error, 1)
	go func() {
		out := bufio.NewWriterSize(w, copyBuffer)
		err := feed(func(table string, row []byte) error {
			if tabs[table] == nil {
				return nil
			}
			_, err := fmt.Fprintf(out, "%s\tu\t%s\n", table, copyEscape(row))
			return err
		})
		if err == nil {
			err = out.Flush()
		}
		_ = w.CloseWithError(err) // never fails
		fed <- err
	}()
	_, err := tx.Conn().PgConn().CopyFrom(ctx, r, "COPY pg_temp.staging (tab, op, row) FROM STDIN")
	_ = r.CloseWithError(errGaveUp) // never fails
	if feedErr := <-fed; feedErr != nil && !errors.Is(feedErr, errGaveUp) {
		return feedErr
	}
	return err
}

// copyEscape writes a value as the text form of COPY has it (SQL COPY, "Text Format"). JSON on one line holds no control characters.
func copyEscape(row []byte) []byte { return bytes.ReplaceAll(row, []byte(`\`), []byte(`\\`)) }

// splitName splits "config.domain".
func splitName(name string) []string { return strings.SplitN(name, ".", 2) }
