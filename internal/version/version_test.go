package version

import (
	"strings"
	"testing"
)

func TestStringCarriesVersionAndCommit(t *testing.T) {
	got := String()
	if !strings.HasPrefix(got, Version+" (commit ") || !strings.HasSuffix(got, ")") {
		t.Errorf("String() = %q, want %q with a commit in brackets", got, Version)
	}
}
