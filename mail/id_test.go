package mail

import (
	"testing"
	"time"
)

func TestIDsSortByTimeAndDiffer(t *testing.T) {
	now := time.Now()
	seen := map[string]bool{}
	last := ""
	for i := range 1000 {
		id := NewID(now.Add(time.Duration(i) * time.Millisecond))
		if len(id) != 16 || id <= last || seen[id] {
			t.Fatalf("%q behind %q", id, last)
		}
		last, seen[id] = id, true
	}
	for range 1000 {
		id := NewID(now)
		if seen[id] {
			t.Fatalf("%s twice", id)
		}
		seen[id] = true
	}
}

func TestIsID(t *testing.T) {
	for s, want := range map[string]bool{
		NewID(time.Now()): true, "": false, "../../../../xxxx": false, "0123456789BCDFG": false, "0123456789BCDFGHJ": false, "0123456789bcdfgh": false,
	} {
		if IsID(s) != want {
			t.Errorf("IsID(%q) is %v", s, !want)
		}
	}
}
