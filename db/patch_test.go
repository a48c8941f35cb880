package db_test

import (
	"context"
	"errors"
	"net/netip"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"

	"mailproxy/config"
	"mailproxy/db"
)

func TestUndoGivesWhatWasAfterACommit(t *testing.T) {
	d := open(t)
	edit := func(f func(ctx context.Context, tx *db.Tx) error) (int64, *config.Snapshot) {
		t.Helper()
		at := commit(t, d, f)
		s, err := d.Load(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		return at.Serial, s
	}
	domain := func(name, comment string) config.Domain {
		return config.Domain{Name: name, Hosts: []string{"192.0.2.1:25"}, Comment: comment}
	}
	type point struct {
		serial int64
		was    *config.Snapshot
	}
	var points []point
	for _, f := range []func(ctx context.Context, tx *db.Tx) error{
		func(ctx context.Context, tx *db.Tx) error { return tx.PutDomain(ctx, domain("a.test", "")) },
		func(ctx context.Context, tx *db.Tx) error {
			return errors.Join(tx.PutDomain(ctx, domain("b.test", "first")), tx.PutSetting(ctx, config.Setting{Name: "max_errors", Value: "7"}))
		},
		func(ctx context.Context, tx *db.Tx) error {
			return errors.Join(tx.PutNetwork(ctx, config.Network{Prefix: netip.MustParsePrefix("10.0.0.0/8"), Comment: "ours"}),
				tx.PutTransport(ctx, config.Transport{Name: "t", Hosts: []string{"192.0.2.9:25"}, Order: config.OrderRoundRobin,
					TLS: config.TLSVerify, User: "us", Password: "secret:x", Tell: config.TellXClient, QueueLife: config.Duration(time.Hour)}))
		},
		func(ctx context.Context, tx *db.Tx) error {
			return errors.Join(tx.DeleteDomain(ctx, "a.test"), tx.PutDomain(ctx, domain("b.test", "second")),
				tx.PutRecipients(ctx, "b.test", []string{"two", "one"}))
		},
		func(ctx context.Context, tx *db.Tx) error {
			return errors.Join(tx.SetRecipients(ctx, "b.test", []string{"one", "three"}), tx.PutRecipients(ctx, "c.test", []string{"*"}),
				tx.PutTLSSender(ctx, config.TLSSender{Domain: "a.test", Comment: "x"}), tx.PutCertificate(ctx, config.Certificate{Name: "mx.test", Chain: "c", Key: "secret:k"}))
		},
		func(ctx context.Context, tx *db.Tx) error {
			return errors.Join(tx.DeleteTLSSender(ctx, "a.test"), tx.PutCertificate(ctx, config.Certificate{Name: "mx.test", Chain: "d", Key: "secret:k"}))
		},
		func(ctx context.Context, tx *db.Tx) error {
			return errors.Join(tx.PutDomain(ctx, domain("a.test", "again")), tx.DeleteSetting(ctx, "max_errors"),
				tx.DeleteNetwork(ctx, netip.MustParsePrefix("10.0.0.0/8")), tx.DeleteTransport(ctx, "t"), tx.DeleteDomain(ctx, "b.test"))
		},
	} {
		serial, was := edit(f)
		points = append(points, point{serial, was})
	}
	for _, p := range points {
		now, then, err := d.Undo(t.Context(), 0, p.serial)
		if err != nil {
			t.Fatal(err)
		}
		if differences := config.Diff(p.was, then); len(differences) > 0 {
			t.Errorf("after commit %d: %v", p.serial, differences)
		}
		then.Position = p.was.Position
		if d := cmp.Diff(string(p.was.Text()), string(then.Text())); d != "" {
			t.Errorf("after commit %d, as a text: %s", p.serial, d)
		}
		last := points[len(points)-1].was
		if d := cmp.Diff(last, now, cmpopts.EquateComparable(netip.Prefix{}), cmpopts.EquateEmpty(), cmp.Transformer("list", config.Domains.List)); d != "" {
			t.Errorf("now: %s", d)
		}
	}
	for _, c := range []struct{ epoch, serial int64 }{{0, 99}, {3, points[0].serial}, {0, -1}} {
		if _, _, err := d.Undo(t.Context(), c.epoch, c.serial); !errors.Is(err, db.ErrNoSuch) {
			t.Errorf("%+v: %v, want ErrNoSuch", c, err)
		}
	}
	// Rows that were changed by hand become a commit, which has no images.
	byHand := commit(t, d, func(ctx context.Context, tx *db.Tx) error { return tx.Renew(ctx) })
	if _, _, err := d.Undo(t.Context(), 0, points[0].serial); !errors.Is(err, db.ErrByHand) {
		t.Errorf("past a commit by hand: %v, want ErrByHand", err)
	}
	if _, _, err := d.Undo(t.Context(), 0, byHand.Serial); err != nil {
		t.Errorf("to that commit: %v", err)
	}
}
