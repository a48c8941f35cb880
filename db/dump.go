package db

import (
	"context"
	"fmt"

	"github.com/jackc/pgx/v5"

	"mailproxy/secret"
)

// A Table is one table of a backup.
type Table struct {
	Name    string   `json:"name"` // with its schema: "config.domain"
	Columns []string `json:"columns"`
	Rows    int64    `json:"rows"`
	Bytes   int64    `json:"bytes"` // of the rows as JSON objects, a line each, with the line feeds
}

// A Dump says what a backup holds of the database, and where the node was then.
type Dump struct {
	State  State   `json:"state"`
	Schema int64   `json:"schema"` // the newest migration
	Tables []Table `json:"tables"` // by name
	// Wraps are of the secrets' data key: who can open what the backup holds. None where nothing is sealed.
	Wraps []secret.Wrap `json:"-"`
}

// Logs says whether a backup holds what happened to mail.
type Logs int

// Without logs a backup is of configuration and journal alone, and of commits that are trimmed and may have to go there.
const (
	WithoutLogs Logs = iota
	WithLogs
)

// Dump reads what a backup holds, all as of one moment and while commits go on: every table of config, the journal, trimmed commits, and with the logs every
// table of mail. head is told what comes, then row is given each row in the order of the tables, a JSON object on one line without
// its line feed; it is valid until row returns. An error of either ends it.
func (d *DB) Dump(ctx context.Context, logs Logs, head func(Dump) error, row func(t Table, row []byte) error) error {
	err := d.read(ctx, func(tx pgx.Tx) error {
		dump, err := readDump(ctx, tx, logs)
		if err != nil {
			return err
		}
		if err := head(dump); err != nil {
			return err
		}
		for _, t := range dump.Tables {
			if err := dumpRows(ctx, tx, t, row); err != nil {
				return fmt.Errorf("%s: %w", t.Name, err)
			}
		}
		return nil
	})
	if err != nil {
		return fmt.Errorf("read database: %w", err)
	}
	return nil
}

// readDump finds the tables and counts what they hold.
func readDump(ctx context.Context, tx pgx.Tx, logs Logs) (Dump, error) {
	var dump Dump
	if _, err := tx.Exec(ctx, textSettings); err != nil {
		return dump, err
	}
	var err error
	if dump.State, err = readState(ctx, tx); err != nil {
		return dump, err
	}
	if dump.Schema, err = schemaVersion(ctx, tx); err != nil {
		return dump, err
	}
	if dump.Tables, err = backupTables(ctx, tx, logs); err != nil {
		return dump, err
	}
	if dump.Wraps, err = readWraps(ctx, tx); err != nil {
		return dump, err
	}
	for i, t := range dump.Tables {
		err := tx.QueryRow(ctx, fmt.Sprintf("SELECT count(*), coalesce(sum(octet_length(to_jsonb(r)::text) + 1), 0)::bigint FROM %s r", t.sql())).
			Scan(&dump.Tables[i].Rows, &dump.Tables[i].Bytes)
		if err != nil {
			return dump, fmt.Errorf("%s: %w", t.Name, err)
		}
	}
	return dump, nil
}

func schemaVersion(ctx context.Context, q querier) (int64, error) {
	var v int64
	err := q.QueryRow(ctx, "SELECT max(version_id) FROM node.migration WHERE is_applied").Scan(&v)
	return v, err
}

// backupTables lists the tables that belong into a backup, with their columns. What is partitioned is one table.
func backupTables(ctx context.Context, q querier, logs Logs) ([]Table, error) {
	var all []Table
	err := collect(ctx, q, &all, func(r pgx.Rows, t *Table) error { return r.Scan(&t.Name, &t.Columns) },
		`SELECT n.nspname || '.' || c.relname, (SELECT array_agg(a.attname::text ORDER BY a.attname COLLATE "C") FROM pg_attribute a
			WHERE a.attrelid = c.oid AND a.attnum > 0 AND NOT a.attisdropped AND a.attgenerated = '') AS columns
		FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
		WHERE c.relkind IN ('r', 'p') AND NOT c.relispartition AND (n.nspname = 'config' OR n.nspname = 'mail' AND $1
			OR n.nspname = 'node' AND c.relname IN ('journal', 'journal_change', 'trimmed', 'trimmed_change'))
		ORDER BY (n.nspname || '.' || c.relname) COLLATE "C"`, logs == WithLogs)
	return all, err
}

// sql is the table's name in a statement.
func (t Table) sql() string { return pgx.Identifier(splitName(t.Name)).Sanitize() }

func dumpRows(ctx context.Context, tx pgx.Tx, t Table, row func(Table, []byte) error) error {
	rows, err := tx.Query(ctx, fmt.Sprintf("SELECT to_jsonb(r)::text FROM %s r", t.sql()))
	if err != nil {
		return err
	}
	defer rows.Close()
	for rows.Next() {
		if err := row(t, rows.RawValues()[0]); err != nil {
			return err
		}
	}
	return rows.Err()
}
