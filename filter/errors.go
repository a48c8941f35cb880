package filter

import (
	"errors"

	"mailproxy/config"
)

// ErrCompile is what every error of Compile wraps.
var ErrCompile = errors.New("configuration does not compile")

// A CompileError is one object of a snapshot that the mail path cannot use. It wraps ErrCompile.
type CompileError struct {
	// Object is what it is about, as the commands call it: "domain example.test".
	Object string
	// Reason says what is wrong with it.
	Reason string
}

// Error gives "domain example.test: no such transport: x".
func (e *CompileError) Error() string { return e.Object + ": " + e.Reason }

// Unwrap gives ErrCompile.
func (e *CompileError) Unwrap() error { return ErrCompile }

// fromProblems turns what config found wrong into CompileErrors.
func fromProblems(err error) []error {
	var out []error
	for _, p := range config.Problems(err) {
		out = append(out, &CompileError{Object: p.Object, Reason: p.Reason})
	}
	if err != nil && len(out) == 0 {
		out = append(out, &CompileError{Object: "settings", Reason: err.Error()})
	}
	return out
}
