package main

import (
	"errors"
	"fmt"
	"os"

	"github.com/urfave/cli/v2"

	"mailproxy/internal/askpass"
)

// minPassphrase is the least length of a new passphrase, in octets: whoever has the file can try as long as they like.
const minPassphrase = 12

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
	if !askpass.IsTerminal(c.App.Reader) {
		return "", withHint(errors.New("there is no terminal to ask for the passphrase on"), "write it to a file of mode 0600 and add --passphrase-file FILE")
	}
	line, err := askpass.Ask(c.Context, c.App.Reader, c.App.ErrWriter, prompt)
	if err != nil {
		return "", fmt.Errorf("read what is typed: %w", err)
	}
	return line, nil
}

// openPrivate opens a file that nobody else may read, for what is in it.
func openPrivate(file, what string) (*os.File, error) {
	f, err := askpass.OpenPrivate(file)
	if open, ok := errors.AsType[*askpass.ReadableError](err); ok {
		return nil, withHint(fmt.Errorf("others can read the %s in %s: mode %04o", what, file, open.Mode), "chmod 600 %s", shellQuote(file))
	}
	if err != nil {
		return nil, fmt.Errorf("read %s: %w", what, err)
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
	line, err := askpass.FirstLine(f)
	switch {
	case errors.Is(err, askpass.ErrEmpty):
		return "", fmt.Errorf("the first line of %s is empty", file)
	case err != nil:
		return "", fmt.Errorf("read passphrase: %w", err)
	}
	return line, nil
}
