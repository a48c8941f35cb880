package config

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"

	"mailproxy/internal/durable"
)

// ErrOwnLine is given by SetLocal for a file in which a key does not stand by itself in a line.
var ErrOwnLine = errors.New("does not stand in a line of its own")

// SetLocal gives a key of a node file's top level (name, address) another value, durably. The rest of the file, comments too, stays as it
// is. A file that would not be right afterwards is left alone.
func SetLocal(file, key, value string) error {
	path, err := filepath.EvalSymlinks(file)
	if err != nil {
		return fmt.Errorf("read node file: %w", err)
	}
	info, err := os.Stat(path)
	if err != nil {
		return fmt.Errorf("read node file: %w", err)
	}
	before, err := os.ReadFile(path)
	if err != nil {
		return fmt.Errorf("read node file: %w", err)
	}
	after, err := setLine(string(before), key, value)
	if err == nil {
		_, err = ParseLocal([]byte(after))
	}
	if err != nil {
		return inFile(file, err)
	}
	if after == string(before) {
		return nil
	}
	if err := durable.WriteFile(path, []byte(after), info.Mode().Perm()); err != nil {
		return fmt.Errorf("write node file: %w", err)
	}
	return nil
}

// setLine replaces the value in the line of a key.
func setLine(text, key, value string) (string, error) {
	lines := strings.SplitAfter(text, "\n")
	n := indexLines(text).line(key, 0)
	assign := regexp.MustCompile(`^(\s*` + regexp.QuoteMeta(key) + `\s*=\s*)("[^"\\]*"|'[^']*')`)
	if n < 1 || n > len(lines) || !assign.MatchString(lines[n-1]) {
		return "", &Problem{Object: key, Reason: ErrOwnLine.Error(), Line: n}
	}
	parts := assign.FindStringSubmatchIndex(lines[n-1])
	lines[n-1] = lines[n-1][:parts[3]] + strconv.Quote(value) + lines[n-1][parts[5]:]
	return strings.Join(lines, ""), nil
}
