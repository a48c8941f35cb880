package main

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"

	"github.com/urfave/cli/v2"
	"golang.org/x/term"
)

// minPassphrase is the least length of a new passphrase, in octets: whoever has the file can try as long as they like.
const minPassphrase = 12

// maxPassphrase bounds what is read of a passphrase file.
const maxPassphrase = 1024

var errShortPassphrase = fmt.Errorf("the passphrase is too short: at least %d characters", minPassphrase)

// newPassphrase gives the passphrase of a new backup: that of the file that --passphrase-file names, or what was typed twice.
func newPassphrase(c *cli.Context) (string, error) {
	passphrase, err := passphrase(c, "passphrase for the backup: ")
	if err != nil {
		return "", err
	}
	if len(passphrase) < minPassphrase {
		return "", errShortPassphrase
	}
	if c.IsSet("passphrase-file") {
		return passphrase, nil
	}
	again, err := typed(c, "the same again: ")
	if err == nil && again != passphrase {
		err = withHint(errors.New("these were two passphrases, nothing was written"), "type the same one twice")
	}
	return passphrase, err
}

// passphrase gives the passphrase of a file or, once, of the terminal.
func passphrase(c *cli.Context, prompt string) (string, error) {
	if c.IsSet("passphrase-file") {
		return readPassphrase(c.String("passphrase-file"))
	}
	return typed(c, prompt)
}

func typed(c *cli.Context, prompt string) (string, error) {
	if !onTerminal(c) {
		return "", withHint(errors.New("there is no terminal to ask for the passphrase on"), "write it to a file of mode 0600 and add --passphrase-file FILE")
	}
	fmt.Fprint(c.App.ErrWriter, prompt)
	b, err := term.ReadPassword(int(c.App.Reader.(*os.File).Fd()))
	fmt.Fprintln(c.App.ErrWriter)
	if err != nil {
		return "", fmt.Errorf("read what is typed: %w", err)
	}
	return string(b), nil
}

// onTerminal says whether somebody can be asked, without that being shown.
func onTerminal(c *cli.Context) bool {
	in, ok := c.App.Reader.(*os.File)
	return ok && term.IsTerminal(int(in.Fd()))
}

// openPrivate opens a file that nobody else may read, for what is in it.
func openPrivate(file, what string) (*os.File, error) {
	f, err := os.Open(file)
	if err != nil {
		return nil, fmt.Errorf("read %s: %w", what, err)
	}
	info, err := f.Stat()
	if err != nil {
		_ = f.Close()
		return nil, fmt.Errorf("read %s: %w", what, err)
	}
	if mode := info.Mode().Perm(); mode&0o077 != 0 {
		_ = f.Close()
		return nil, withHint(fmt.Errorf("others can read the %s in %s: mode %04o", what, file, mode), "chmod 600 %s", shellQuote(file))
	}
	return f, nil
}

// readPassphrase reads the first line of a file that nobody else may read.
func readPassphrase(file string) (string, error) {
	f, err := openPrivate(file, "passphrase")
	if err != nil {
		return "", err
	}
	defer f.Close()
	b, err := io.ReadAll(io.LimitReader(f, maxPassphrase))
	if err != nil {
		return "", fmt.Errorf("read passphrase: %w", err)
	}
	line, _, _ := bytes.Cut(b, []byte{'\n'})
	if line = bytes.TrimSuffix(line, []byte{'\r'}); len(line) == 0 {
		return "", fmt.Errorf("the first line of %s is empty", file)
	}
	return string(line), nil
}
