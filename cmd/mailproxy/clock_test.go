package main

import (
	"os"
	"path/filepath"
	"testing"
	"time"
)

func TestClock(t *testing.T) {
	file := filepath.Join(t.TempDir(), "clock")
	off := func(now func() time.Time) time.Duration { return time.Until(now()).Round(time.Minute) }
	t.Setenv(clockVariable, "")
	now, err := clock()
	if err != nil || off(now) != 0 {
		t.Fatalf("without the variable: %v", err)
	}
	t.Setenv(clockVariable, file)
	if _, err := clock(); err == nil {
		t.Error("a file that is not there is taken")
	}
	write := func(text string) {
		t.Helper()
		if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	write("much\n")
	if _, err := clock(); err == nil {
		t.Error("a file without a number is taken")
	}
	write("+3600\n")
	if now, err = clock(); err != nil || off(now) != time.Hour {
		t.Fatalf("%v, %v", off(now), err)
	}
	write("-86400\n") // it jumps
	if got := off(now); got != -24*time.Hour {
		t.Errorf("after the jump: %v", got)
	}
}
