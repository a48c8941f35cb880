package imports

import (
	"go/parser"
	"go/token"
	"io/fs"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
)

const module = "mailproxy"

// A rule says what a package of ours may import.
type rule struct {
	// ours are packages of this module, besides the leaves.
	ours []string
	// tests may be imported by the package's tests, too.
	tests []string
}

// leaves are small, import nothing of ours but each other, and may be imported by everyone but mail.
var leaves = []string{"internal/durable", "internal/version"}

// rules is the whole table: the mail path on the left, the cluster on the right, and only the programs see both.
func rules() map[string]rule {
	mailPath := []string{"mail", "config", "filter", "relay", "spool", "queue"}
	return map[string]rule{
		"mail":             {},
		"config":           {ours: []string{"mail"}},
		"filter":           {ours: []string{"mail", "config"}},
		"relay":            {ours: []string{"mail", "config"}},
		"spool":            {ours: []string{"mail"}},
		"queue":            {ours: []string{"mail", "config", "relay", "spool"}, tests: []string{"internal/mta"}},
		"smtpd":            {ours: mailPath, tests: []string{"internal/mta"}},
		"web":              {ours: []string{"mail", "config", "queue"}, tests: []string{"relay"}},
		"secret":           {},
		"db":               {ours: []string{"config", "secret"}, tests: []string{"mail", "internal/pgtest"}},
		"tunnel":           {ours: []string{"config"}, tests: []string{"db", "internal/pgtest"}},
		"cluster":          {ours: []string{"config", "db", "tunnel"}, tests: []string{"internal/farlink", "internal/pgtest", "test/history"}},
		"backup":           {ours: []string{"config", "db", "tunnel", "secret"}, tests: []string{"internal/pgtest"}},
		"cmd/mailproxy":    {ours: append([]string{"smtpd", "web", "db", "tunnel", "cluster", "backup", "secret", "internal/askpass", "internal/cliargs", "internal/manpage"}, mailPath...), tests: []string{"internal/testbin", "internal/pgtest", "internal/mta"}},
		"cmd/pmgcm":        {ours: []string{"config", "db", "tunnel", "cluster", "internal/askpass", "internal/cliargs", "internal/manpage"}, tests: []string{"internal/testbin", "internal/pgtest"}},
		"internal/askpass": {}, "internal/cliargs": {}, "internal/farlink": {}, "internal/durable": {}, "internal/imports": {}, "internal/manpage": {}, "internal/version": {},
		"internal/pgtest":  {ours: []string{"db"}},
		"internal/mta":     {},
		"internal/testbin": {},
		"test/lab":         {ours: []string{"config", "web"}, tests: []string{"internal/testbin"}},
		"test/lab/lab":     {ours: []string{"test/lab"}, tests: []string{"internal/testbin"}},
		"test/e2e":         {tests: []string{"config", "web", "internal/mta", "internal/testbin", "test/lab"}},
		"test/history":     {ours: []string{"config"}},
		"test/chaos":       {ours: []string{"config", "test/lab", "test/history"}},
		"test/crash":       {ours: []string{"test/lab"}},
		"test/bench":       {ours: []string{"config", "db", "internal/farlink", "internal/mta"}, tests: []string{"internal/pgtest", "internal/testbin"}},
	}
}

// A fence says which packages may import what begins with a path of others' code.
type fence struct {
	prefix string
	// code may; tests may, too.
	code, tests []string
}

func fences() []fence {
	return []fence{
		{"github.com/emersion/go-smtp", []string{"smtpd"}, []string{"relay", "queue", "web", "cmd/mailproxy"}},
		{"github.com/jackc/", []string{"db", "internal/pgtest"}, nil},
		{"github.com/pressly/goose", []string{"db", "internal/pgtest"}, nil},
		{"github.com/urfave/cli", []string{"cmd/mailproxy", "cmd/pmgcm", "internal/cliargs", "internal/manpage"}, nil},
		{"golang.org/x/crypto/ssh", []string{"tunnel"}, nil},
		{"golang.zx2c4.com/wireguard", []string{"tunnel"}, nil},
		{"gvisor.dev/", []string{"tunnel"}, nil}, // the version is WireGuard's own
		{"filippo.io/age", []string{"backup", "secret"}, nil},
		{"github.com/miekg/dns", []string{"relay"}, []string{"queue", "smtpd"}},
		{"github.com/BurntSushi/toml", []string{"config"}, []string{"cmd/mailproxy"}},
		{"github.com/prometheus/", []string{"web", "cmd/mailproxy"}, nil},
		{"github.com/coreos/go-systemd", []string{"cmd/mailproxy"}, nil},
		{"database/sql", []string{"db", "internal/pgtest"}, nil},
	}
}

// A file is one Go file: its package's folder, whether it is a test, what it imports.
type file struct {
	path, folder string
	test         bool
	imports      []string
}

func readFiles(t *testing.T) []file {
	t.Helper()
	root := filepath.Join("..", "..")
	var files []file
	err := filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		name := d.Name()
		if d.IsDir() && path != root && (strings.HasPrefix(name, ".") || name == "bin" || name == "testdata" || name == "scripts") {
			return filepath.SkipDir
		}
		if d.IsDir() || !strings.HasSuffix(name, ".go") {
			return nil
		}
		parsed, err := parser.ParseFile(token.NewFileSet(), path, nil, parser.ImportsOnly)
		if err != nil {
			return err
		}
		rel, err := filepath.Rel(root, path)
		if err != nil {
			return err
		}
		f := file{path: rel, folder: filepath.ToSlash(filepath.Dir(rel)), test: strings.HasSuffix(name, "_test.go")}
		for _, spec := range parsed.Imports {
			p, err := strconv.Unquote(spec.Path.Value)
			if err != nil {
				return err
			}
			f.imports = append(f.imports, p)
		}
		files = append(files, f)
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return files
}

// forbidden gives every import of a file that the tables do not allow.
func forbidden(f file) []string {
	var bad []string
	r, known := rules()[f.folder]
	if !known {
		return []string{"package " + f.folder + " is not in the table"}
	}
	for _, p := range f.imports {
		if own, ok := strings.CutPrefix(p, module+"/"); ok && own != f.folder {
			allowed := slices.Contains(r.ours, own) || slices.Contains(leaves, own) && f.folder != "mail" || f.test && slices.Contains(r.tests, own)
			if !allowed {
				bad = append(bad, p)
			}
		}
		for _, fence := range fences() {
			if strings.HasPrefix(p, fence.prefix) && !slices.Contains(fence.code, f.folder) && (!f.test || !slices.Contains(fence.tests, f.folder)) {
				bad = append(bad, p)
			}
		}
	}
	return bad
}

func TestPackagesImportOnlyWhatTheTableAllows(t *testing.T) {
	seen := map[string]bool{}
	for _, f := range readFiles(t) {
		seen[f.folder] = true
		for _, p := range forbidden(f) {
			t.Errorf("%s: must not import %s", f.path, p)
		}
	}
	for folder := range rules() {
		if !seen[folder] {
			t.Errorf("%s is in the table and has no Go files", folder)
		}
	}
}

func TestTheTableRefuses(t *testing.T) {
	cases := []struct {
		name string
		file file
		want bool
	}{
		{"the mail path using the cluster", file{folder: "smtpd", imports: []string{"mailproxy/cluster"}}, true},
		{"the cluster using the mail path", file{folder: "cluster", imports: []string{"mailproxy/queue"}}, true},
		{"mail using anything of ours", file{folder: "mail", imports: []string{"mailproxy/internal/version"}}, true},
		{"SQL outside of db", file{folder: "cluster", imports: []string{"github.com/jackc/pgx/v5"}}, true},
		{"SQL in a test outside of db", file{folder: "cluster", test: true, imports: []string{"github.com/jackc/pgx/v5"}}, true},
		{"go-smtp in relay's code", file{folder: "relay", imports: []string{"github.com/emersion/go-smtp"}}, true},
		{"a test's helper in code", file{folder: "db", imports: []string{"mailproxy/internal/pgtest"}}, true},
		{"a package that nobody entered here", file{folder: "newroom"}, true},
		{"go-smtp in relay's tests", file{folder: "relay", test: true, imports: []string{"github.com/emersion/go-smtp"}}, false},
		{"an external test using its own package", file{folder: "db", test: true, imports: []string{"mailproxy/db", "mailproxy/internal/pgtest"}}, false},
		{"smtpd using filter", file{folder: "smtpd", imports: []string{"mailproxy/filter", "net"}}, false},
	}
	for _, c := range cases {
		t.Run(c.name, func(t *testing.T) {
			if got := len(forbidden(c.file)) > 0; got != c.want {
				t.Errorf("refused: %v, want %v", got, c.want)
			}
		})
	}
}
