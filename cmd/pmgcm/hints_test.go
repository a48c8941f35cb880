package main

import (
	"errors"
	"fmt"
	"go/ast"
	"go/parser"
	"go/token"
	"io"
	"io/fs"
	"maps"
	"slices"
	"strings"
	"testing"

	"mailproxy/cluster"
)

// names gives the identifiers beginning with Err in a file that pick accepts.
func errNames(t *testing.T, file string, pick func(n ast.Node) *ast.Ident) map[string]bool {
	t.Helper()
	f, err := parser.ParseFile(token.NewFileSet(), file, nil, 0)
	if err != nil {
		t.Fatal(err)
	}
	found := map[string]bool{}
	ast.Inspect(f, func(n ast.Node) bool {
		if id := pick(n); id != nil && strings.HasPrefix(id.Name, "Err") {
			found[id.Name] = true
		}
		return true
	})
	return found
}

func TestEverySentinelOfClusterHasAHint(t *testing.T) {
	sentinels := errNames(t, "../../cluster/errors.go", func(n ast.Node) *ast.Ident {
		if v, ok := n.(*ast.ValueSpec); ok {
			return v.Names[0]
		}
		return nil
	})
	hinted := errNames(t, "hints.go", func(n ast.Node) *ast.Ident {
		if s, ok := n.(*ast.SelectorExpr); ok {
			if pkg, ok := s.X.(*ast.Ident); ok && pkg.Name == "cluster" {
				return s.Sel
			}
		}
		return nil
	})
	if len(sentinels) < 20 {
		t.Fatalf("found only %d sentinels", len(sentinels))
	}
	for _, name := range slices.Sorted(maps.Keys(sentinels)) {
		if !hinted[name] {
			t.Errorf("cluster.%s has no hint", name)
		}
	}
	for _, h := range hints {
		if h.hint == "" || strings.HasSuffix(h.hint, ".") {
			t.Errorf("hint of %q: %q", h.err, h.hint)
		}
	}
}

func TestReportGivesTextHintAndExitCode(t *testing.T) {
	for _, c := range []struct {
		name string
		err  error
		code int
		want string
	}{
		{"done", nil, 0, ""},
		{"failed, with its remedy", fmt.Errorf("x: %w", cluster.ErrAlreadyMaster), 1,
			"pmgcm: x: this node is already master\nhint: nothing to do; \"pmgcm status\" shows the nodes\n"},
		{"usage", usagef("no such command: x"), 2, "pmgcm: no such command: x\nhint: pmgcm --help\n"},
		{"not in sync, and the output says so", &shownError{cluster.ErrNotInSync}, 3, ""},
		{"not in sync", cluster.ErrNotInSync, 3, "pmgcm: not in sync\nhint: \"pmgcm status\" shows who is behind and why\n"},
		{"no remedy known", errors.New("odd"), 1, "pmgcm: odd\n"},
		{"root needs not be told to be root", fs.ErrPermission, 1, "pmgcm: permission denied\n"}, // tests are
		{"the innermost remedy that is listed first", fmt.Errorf("%w: %w", cluster.ErrNoDaemon, io.EOF), 1,
			"pmgcm: the local daemon is not running: EOF\nhint: start it: \"systemctl start mailproxy\"; \"journalctl -u mailproxy\" says why it ended\n"},
	} {
		t.Run(c.name, func(t *testing.T) {
			var b strings.Builder
			if code := report(&b, c.err); code != c.code || b.String() != c.want {
				t.Errorf("report = %d, %q; want %d, %q", code, b.String(), c.code, c.want)
			}
		})
	}
}
