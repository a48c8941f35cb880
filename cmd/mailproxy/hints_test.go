package main

import (
	"fmt"
	"strings"
	"testing"

	"mailproxy/db"
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
