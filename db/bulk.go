package db

import (
	"context"
	"encoding/json"
	"fmt"
	"slices"

	"mailproxy/config"
)

// bulkRows is how many rows go in one statement: each statement runs the triggers, and each run adds versions of the digests' rows that the
// next in the same transaction must pass.
const bulkRows = 10_000

// PutDomains is PutDomain for many, at the cost of a few statements. No name may stand twice.
func (t *Tx) PutDomains(ctx context.Context, domains []config.Domain) error {
	for part := range slices.Chunk(domains, bulkRows) {
		rows, err := json.Marshal(part)
		if err != nil {
			return fmt.Errorf("domains: %w", err)
		}
		err = t.exec(ctx, `INSERT INTO config.domain (name, transport, hosts, comment)
			SELECT d->>'name', coalesce(d->>'transport', ''),
				ARRAY(SELECT jsonb_array_elements_text(coalesce(d->'hosts', '[]'))), coalesce(d->>'comment', '')
			FROM jsonb_array_elements($1::jsonb) AS d
			ON CONFLICT (name) DO UPDATE SET transport = excluded.transport, hosts = excluded.hosts, comment = excluded.comment`, string(rows))
		if err != nil {
			return err
		}
	}
	return nil
}

// DeleteDomains is DeleteDomain for many; those that are not there are passed over.
func (t *Tx) DeleteDomains(ctx context.Context, names []string) error {
	for part := range slices.Chunk(names, bulkRows) {
		if err := t.exec(ctx, "DELETE FROM config.domain WHERE name = ANY($1)", part); err != nil {
			return err
		}
	}
	return nil
}
