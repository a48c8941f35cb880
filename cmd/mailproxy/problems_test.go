package main

import (
	"fmt"
	"strings"
	"testing"

	"mailproxy/queue"
)

// Each thing that can be wrong with the spool has its own remedy.
func TestWhatIsWrongWithTheSpoolHasItsOwnRemedy(t *testing.T) {
	for _, c := range []struct {
		sick, damaged error
		want          []string
	}{
		{nil, nil, nil},
		{fmt.Errorf("%w: 1 MB free", queue.ErrFull), nil, []string{"make room on the disk of /s"}},
		{fmt.Errorf("%w: EIO", queue.ErrSick), nil, []string{"`dmesg`"}},
		{nil, queue.ErrDamaged, []string{"`mailproxy spool check`"}},
		{fmt.Errorf("%w: EIO", queue.ErrSick), queue.ErrDamaged, []string{"`dmesg`", "`mailproxy spool check`"}},
	} {
		got := spoolProblems(c.sick, c.damaged, "/s")
		if len(got) != len(c.want) {
			t.Errorf("%v, %v: %+v", c.sick, c.damaged, got)
			continue
		}
		for i, want := range c.want {
			if !strings.Contains(got[i].Remedy, want) {
				t.Errorf("%v, %v: remedy %q, want %q", c.sick, c.damaged, got[i].Remedy, want)
			}
		}
	}
}
