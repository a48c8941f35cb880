package db_test

import (
	"io"
	"strings"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
)

func TestTheRowsOfAPushThatComesInAreCounted(t *testing.T) {
	c := cluster(t, 2)
	if rows, _, err := c[0].Incoming(t.Context()); err != nil || rows != 0 {
		t.Fatalf("at rest: %d rows, %v", rows, err)
	}
	conn, err := pgx.Connect(t.Context(), c[0].dsn)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close(t.Context())
	if _, err := conn.Exec(t.Context(), "CREATE TEMP TABLE staging (a text)"); err != nil {
		t.Fatal(err)
	}
	r, w := io.Pipe()
	copied := make(chan error, 1)
	go func() {
		_, err := conn.PgConn().CopyFrom(t.Context(), r, "COPY staging FROM STDIN")
		copied <- err
	}()
	if _, err := w.Write([]byte(strings.Repeat(strings.Repeat("x", 99)+"\n", 10_000))); err != nil { // more than the driver keeps back
		t.Fatal(err)
	}
	deadline := time.Now().Add(30 * time.Second)
	for {
		rows, bytes, err := c[0].Incoming(t.Context())
		if err != nil || time.Now().After(deadline) {
			t.Fatalf("%d rows, %d bytes, %v", rows, bytes, err)
		}
		if rows > 0 && bytes > rows {
			break
		}
	}
	_ = w.Close()
	if err := <-copied; err != nil {
		t.Fatal(err)
	}
	if rows, schema, err := c[0].Size(t.Context()); err != nil || rows < 3 || schema < 9 {
		t.Errorf("%d rows, schema %d, %v", rows, schema, err)
	}
}
