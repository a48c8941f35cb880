// Package testbin builds this module's programs for tests that run the real ones.
package testbin

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

// dirVariable holds where the programs are, for Path and for processes that a test starts.
const dirVariable = "MAILPROXY_TESTBIN"

// Main builds programs ("mailproxy", "pmgcm"), runs the tests of a package and gives the exit code for os.Exit. A test binary's
// TestMain is to call it. The programs go when the tests have ended.
func Main(m *testing.M, programs ...string) int {
	dir, err := Build(programs...)
	if err != nil {
		fmt.Fprintln(os.Stderr, "testbin:", err)
		return 1
	}
	defer func() { _ = os.RemoveAll(dir) }()
	if err := os.Setenv(dirVariable, dir); err != nil {
		fmt.Fprintln(os.Stderr, "testbin:", err)
		return 1
	}
	return m.Run()
}

// Build builds programs into a new directory that everyone may enter, and gives that.
func Build(programs ...string) (dir string, err error) { return BuildWith(nil, programs...) }

// BuildWith is Build with more flags for the Go command.
func BuildWith(flags []string, programs ...string) (dir string, err error) {
	root, err := moduleRoot()
	if err != nil {
		return "", err
	}
	if dir, err = os.MkdirTemp("", "mailproxy-testbin-"); err != nil {
		return "", err
	}
	defer func() {
		if err != nil {
			_ = os.RemoveAll(dir)
		}
	}()
	if err = os.Chmod(dir, 0o755); err != nil {
		return "", err
	}
	args := append([]string{"build", "-o", dir + string(filepath.Separator)}, flags...)
	for _, p := range programs {
		args = append(args, "./cmd/"+p)
	}
	build := exec.Command("go", args...)
	build.Dir = root
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		return "", fmt.Errorf("build %s: %w\n%s", strings.Join(programs, " "), err, out)
	}
	return dir, nil
}

func moduleRoot() (string, error) {
	out, err := exec.Command("go", "env", "GOMOD").Output()
	if err != nil {
		return "", fmt.Errorf("find the module: %w", err)
	}
	return filepath.Dir(strings.TrimSpace(string(out))), nil
}

// Dir is where Main put the programs.
func Dir() string { return os.Getenv(dirVariable) }

// Path gives the path of a program that Main built.
func Path(t testing.TB, program string) string {
	t.Helper()
	path := filepath.Join(Dir(), program)
	if _, err := os.Stat(path); Dir() == "" || err != nil {
		t.Fatalf("%s was not built: TestMain must call testbin.Main(m, %q)", program, program)
	}
	return path
}
