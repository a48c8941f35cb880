// Package askpass reads a password or passphrase where nobody else sees it: from a terminal that does not show it, or from a file that
// nobody else may read. It is never an argument or an environment variable, which others can see.
package askpass

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"

	"golang.org/x/term"
)

// maxLine bounds what is read of a secret, in octets.
const maxLine = 1024

var (
	// ErrNoTerminal: there is nobody to ask.
	ErrNoTerminal = errors.New("there is no terminal to ask on")
	// ErrReadable: others may read the file.
	ErrReadable = errors.New("others can read it")
	// ErrEmpty: there is no first line, or nothing in it.
	ErrEmpty = errors.New("the first line is empty")
)

// A ReadableError is ErrReadable of a file.
type ReadableError struct {
	File string
	Mode fs.FileMode
}

func (e *ReadableError) Error() string {
	return fmt.Sprintf("%s: %v: mode %04o", e.File, ErrReadable, e.Mode)
}

// Unwrap makes it an ErrReadable.
func (e *ReadableError) Unwrap() error { return ErrReadable }

// IsTerminal says whether a secret can be asked for on in.
func IsTerminal(in io.Reader) bool {
	f, ok := in.(*os.File)
	return ok && term.IsTerminal(int(f.Fd()))
}

// Ask shows a prompt and gives the line that is typed, which the terminal does not show. The end of ctx ends it too, with the terminal
// as it was; the goroutine that reads the terminal then lasts as long as the process. ErrNoTerminal.
func Ask(ctx context.Context, in io.Reader, show io.Writer, prompt string) (string, error) {
	if !IsTerminal(in) {
		return "", ErrNoTerminal
	}
	fd := int(in.(*os.File).Fd())
	before, err := term.GetState(fd)
	if err != nil {
		return "", err
	}
	fmt.Fprint(show, prompt)
	defer fmt.Fprintln(show)
	type typed struct {
		line []byte
		err  error
	}
	done := make(chan typed, 1)
	go func() {
		line, err := term.ReadPassword(fd)
		done <- typed{line, err}
	}()
	select {
	case t := <-done:
		return string(t.line), t.err
	case <-ctx.Done():
		return "", errors.Join(ctx.Err(), term.Restore(fd, before))
	}
}

// OpenPrivate opens a file that only its owner may read: *ReadableError.
func OpenPrivate(file string) (*os.File, error) {
	f, err := os.Open(file)
	if err != nil {
		return nil, err
	}
	info, err := f.Stat()
	if err == nil && info.Mode().Perm()&0o077 != 0 {
		err = &ReadableError{file, info.Mode().Perm()}
	}
	if err != nil {
		_ = f.Close()
		return nil, err
	}
	return f, nil
}

// ReadFile gives the first line of a file that only its owner may read: ErrReadable, ErrEmpty.
func ReadFile(file string) (string, error) {
	f, err := OpenPrivate(file)
	if err != nil {
		return "", err
	}
	defer f.Close()
	line, err := FirstLine(f)
	if err != nil {
		return "", fmt.Errorf("%s: %w", file, err)
	}
	return line, nil
}

// FirstLine gives the first line of r, without its end: ErrEmpty.
func FirstLine(r io.Reader) (string, error) {
	b, err := io.ReadAll(io.LimitReader(r, maxLine))
	if err != nil {
		return "", err
	}
	line, _, _ := bytes.Cut(b, []byte{'\n'})
	if line = bytes.TrimSuffix(line, []byte{'\r'}); len(line) == 0 {
		return "", ErrEmpty
	}
	return string(line), nil
}
