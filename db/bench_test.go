package db_test

import (
	"context"
	"strconv"
	"testing"

	"mailproxy/config"
	"mailproxy/db"
)

const benchDomains = 100_000

// filled is a cluster of two with many domains, in sync.
func filled(b *testing.B) []*node {
	b.Helper()
	c := cluster(b, 2)
	c[0].sql(b, "INSERT INTO config.domain (name, hosts) SELECT 'domain' || i || '.example.test', ARRAY['10.0.0.1:25'] FROM generate_series(1, "+
		strconv.Itoa(benchDomains)+") i")
	push(b, c[0], c[1])
	return c
}

// One domain of 100,000 is changed: the commit, the push, and what both nodes load are measured apart.
func BenchmarkPushOneOf100k(b *testing.B) {
	c := filled(b)
	p := peer(b, c[1], 1)
	names(b, c[0].DB)
	names(b, c[1].DB)
	var bytes int64
	i := 0
	for b.Loop() {
		b.StopTimer()
		i++
		commit(b, c[0].DB, func(ctx context.Context, tx *db.Tx) error {
			return tx.PutDomain(ctx, config.Domain{Name: "domain77.example.test", Comment: strconv.Itoa(i)})
		})
		b.StartTimer()
		s, err := c[0].Push(context.Background(), p, nil)
		if err != nil || s.Full || s.Rows != 3 {
			b.Fatalf("%+v, %v", s, err)
		}
		bytes += s.Bytes
	}
	b.ReportMetric(float64(bytes)/float64(b.N), "bytes/push")
}

func BenchmarkCommitOneOf100k(b *testing.B) {
	c := filled(b)
	i := 0
	for b.Loop() {
		i++
		commit(b, c[0].DB, func(ctx context.Context, tx *db.Tx) error {
			return tx.PutDomain(ctx, config.Domain{Name: "domain77.example.test", Comment: strconv.Itoa(i)})
		})
	}
}

// The same with a check of the whole outcome, as the commands do it.
func BenchmarkCheckedCommitOneOf100k(b *testing.B) {
	c := filled(b)
	names(b, c[0].DB)
	i := 0
	for b.Loop() {
		i++
		_, err := c[0].Commit(context.Background(), author, func(ctx context.Context, tx *db.Tx) error {
			return tx.PutDomain(ctx, config.Domain{Name: "domain77.example.test", Comment: strconv.Itoa(i)})
		}, func(*config.Snapshot) error { return nil })
		if err != nil {
			b.Fatal(err)
		}
	}
}

func BenchmarkLoadOneOf100k(b *testing.B) {
	c := filled(b)
	names(b, c[0].DB)
	i := 0
	for b.Loop() {
		b.StopTimer()
		i++
		commit(b, c[0].DB, func(ctx context.Context, tx *db.Tx) error {
			return tx.PutDomain(ctx, config.Domain{Name: "domain77.example.test", Comment: strconv.Itoa(i)})
		})
		b.StartTimer()
		if _, err := c[0].Load(context.Background()); err != nil {
			b.Fatal(err)
		}
	}
}

func BenchmarkLoadAllOf100k(b *testing.B) {
	c := filled(b)
	for b.Loop() {
		if _, err := openDSN(b, c[0].dsn).Load(context.Background()); err != nil {
			b.Fatal(err)
		}
	}
}

func BenchmarkVerify100k(b *testing.B) {
	c := filled(b)
	for b.Loop() {
		if kept, rows, err := c[0].Verify(context.Background()); err != nil || kept != rows {
			b.Fatal(kept, rows, err)
		}
	}
}

// The first push of all of it, into an empty node.
func BenchmarkPushAllOf100k(b *testing.B) {
	for b.Loop() {
		b.StopTimer()
		c := cluster(b, 2)
		c[0].sql(b, "INSERT INTO config.domain (name) SELECT 'domain' || i || '.example.test' FROM generate_series(1, "+strconv.Itoa(benchDomains)+") i")
		b.StartTimer()
		s := push(b, c[0], c[1])
		b.ReportMetric(float64(s.Bytes), "bytes/push")
	}
}
