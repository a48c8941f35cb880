package main

import (
	"fmt"
	"strings"
	"testing"

	"mailproxy/db"
	"mailproxy/queue"
)

// "here" is where the hint is read: a promote by force is for the master that is left alone, and never for the slave where a command was typed.
func TestAHintFitsTheNodeWhereItIsRead(t *testing.T) {
	err := fmt.Errorf("commit: %w", db.ErrNoLease)
	if h := hintFor(0, err); !strings.Contains(h, "promote --force") {
		t.Errorf("on the master: %s", h)
	}
	if h := hintFor(2, err); strings.Contains(h, "--force") || !strings.Contains(h, `"pmgcm promote" here`) {
		t.Errorf("on a slave: %s", h)
	}
}

// What another order has under way is neither done nor failed: a script can tell.
func TestAnItemThatAnotherOrderHasIsToldByItsExitCode(t *testing.T) {
	var out strings.Builder
	code := report(&out, fmt.Errorf("item x: %w", refusedError(queue.ErrComing.Error())))
	if want := "mailproxy: item x: another order about it is under way at that node just now\nhint: wait until that has ended, "; code != 3 || !strings.HasPrefix(out.String(), want) {
		t.Errorf("exit code %d: %s", code, out.String())
	}
}
