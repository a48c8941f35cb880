package db_test

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"testing"

	"mailproxy/config"
	"mailproxy/db"
)

func TestManyDomainsAreOneCommitAndReadAsIfPutOneByOne(t *testing.T) {
	bulk, single := open(t), open(t)
	domains := []config.Domain{{Name: "a.test", Hosts: []string{"a:25", "[::1]:25"}}, {Name: "b.test", Transport: "smart", Comment: "it's \"b\""}}
	for i := range 300 {
		domains = append(domains, config.Domain{Name: fmt.Sprintf("d%03d.test", i), Hosts: []string{"h:25"}})
	}
	changed := slices.Clone(domains)
	changed[0].Hosts, changed[1].Comment = []string{"b:25"}, ""
	at := commit(t, bulk, func(ctx context.Context, tx *db.Tx) error {
		return errors.Join(tx.PutDomains(ctx, domains), tx.PutDomains(ctx, changed), tx.DeleteDomains(ctx, []string{"d000.test", "none.test"}))
	})
	want := commit(t, single, func(ctx context.Context, tx *db.Tx) error {
		for _, d := range append(domains, changed...) {
			if err := tx.PutDomain(ctx, d); err != nil {
				return err
			}
		}
		return tx.DeleteDomain(ctx, "d000.test")
	})
	if at.Serial != 1 || want.Serial != 1 {
		t.Errorf("serials %d and %d", at.Serial, want.Serial)
	}
	a, err := bulk.Load(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	b, err := single.Load(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if d := config.Diff(a, b); len(d) > 0 || a.Domains.Len() != len(domains)-1 {
		t.Errorf("%d domains, differ by %v", a.Domains.Len(), d)
	}
	if kept, rows, err := bulk.Verify(t.Context()); err != nil || kept != rows {
		t.Errorf("digest %v, of the rows %v, %v", kept, rows, err)
	}
}
