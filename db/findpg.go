package db

import (
	"context"
	"fmt"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"time"
)

// debianPostgres is where Debian puts each major version's programs.
const debianPostgres = "/usr/lib/postgresql/*/bin"

// versionText finds the major version in what `postgres --version` says.
var versionText = regexp.MustCompile(`\(PostgreSQL\) (\d+)`)

// FindPostgres gives the directory of PostgreSQL's programs and their major version: bin, or where that is empty Debian's newest.
// ErrNoPostgres says what to install.
func FindPostgres(bin string) (dir string, version int, err error) {
	dirs := []string{bin}
	if bin == "" {
		dirs, err = filepath.Glob(debianPostgres)
		if err != nil {
			return "", 0, fmt.Errorf("find PostgreSQL: %w", err)
		}
	}
	for _, d := range dirs {
		if v, verr := postgresVersion(d); verr != nil {
			err = verr
		} else if v > version {
			dir, version = d, v
		}
	}
	switch {
	case version > 0:
		return dir, version, nil
	case bin != "":
		return "", 0, fmt.Errorf("%w in %s (%v): install Debian's package postgresql-15, or set [database] bin", ErrNoPostgres, bin, err)
	}
	return "", 0, fmt.Errorf("%w: install Debian's package postgresql-15", ErrNoPostgres)
}

func postgresVersion(dir string) (int, error) {
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	out, err := exec.CommandContext(ctx, filepath.Join(dir, "postgres"), "--version").Output()
	if err != nil {
		return 0, err
	}
	m := versionText.FindSubmatch(out)
	if m == nil {
		return 0, fmt.Errorf("%s/postgres --version says %q", dir, out)
	}
	return strconv.Atoi(string(m[1]))
}
