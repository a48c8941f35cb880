package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"strings"

	"github.com/urfave/cli/v2"

	"mailproxy/config"
	"mailproxy/db"
	"mailproxy/internal/askpass"
)

// maxSecret bounds a secret: a chain of certificates with its key has some kB.
const maxSecret = 64 << 10

func secretCommand() *cli.Command {
	return &cli.Command{
		Name: "secret", Usage: "passwords and private keys of the whole cluster",
		Description: "A secret is stored sealed, for the members alone, and sealed anew when one of them is deleted. It stands in no history " +
			"and no text of the configuration, and no command shows it again.",
		Subcommands: []*cli.Command{
			{Name: "set", Usage: "store a secret, or change it", ArgsUsage: "NAME", Action: secretSet,
				Flags: []cli.Flag{&cli.StringFlag{Name: "file", Usage: "take the bytes of `FILE`, which only its owner may read, as they are; - is standard input"}},
				Description: "Without --file the value is asked for twice on the terminal, and not shown. It is never an argument. " +
					"Example: mailproxy secret set smtp-password"},
			{Name: "remove", Usage: "forget secrets", ArgsUsage: "NAME...", Action: onMaster(secretRemove),
				Description: "Refused while a transport logs in with it, and for the key of a certificate. What was removed is in no history; a backup from before still has it."},
			{Name: "list", Usage: "show which secrets there are", Flags: []cli.Flag{jsonFlag()}, Action: secretList,
				Description: "One line each, by name, without the value. STATE is sealed where this node can open it, clear where a version before " +
					"this one has stored it (setting any secret seals it), or unreadable, with the reason."},
		},
	}
}

func secretSet(c *cli.Context) error {
	args, err := arguments(c, 1, 1)
	if err != nil {
		return err
	}
	name := args[0]
	if err := config.CheckSecretName(name); err != nil {
		return usagef("secret set: %v", err)
	}
	value, err := secretValue(c, name)
	if err != nil {
		return err
	}
	var slave bool
	err = withStore(c, func(ctx context.Context, s *store) (err error) {
		if slave, err = s.isSlave(ctx); err == nil && slave {
			err = s.carry(c, config.Command{Args: []string{"secret", "set", name, "--file", "-"}, Secret: value})
			if err == nil {
				err = s.takenUp(c, name, value)
			}
		}
		return err
	})
	if err != nil || slave {
		return err
	}
	at, err := edit(c, func(ctx context.Context, tx *db.Tx, _ *config.Snapshot) error { return tx.PutSecret(ctx, name, value) })
	if err != nil {
		return err
	}
	if err := withStore(c, func(_ context.Context, s *store) error { return s.takenUp(c, name, value) }); err != nil {
		return err
	}
	return done(c, at, "secret %s set", name)
}

// secretValue gives what --file names, or what was typed twice.
func secretValue(c *cli.Context, name string) ([]byte, error) {
	if c.IsSet("file") {
		return readSecret(c, c.String("file"))
	}
	if !askpass.IsTerminal(c.App.Reader) {
		return nil, withHint(errors.New("there is no terminal to ask for the value on"), "add --file FILE, or --file - for standard input")
	}
	value, err := typed(c, "value of "+name+": ")
	if err != nil {
		return nil, err
	}
	again, err := typed(c, "the same again: ")
	switch {
	case err != nil:
		return nil, err
	case again != value:
		return nil, withHint(errors.New("these were two values, nothing was stored"), "type the same one twice")
	case value == "":
		return nil, errEmptySecret
	}
	return []byte(value), nil
}

var errEmptySecret = errors.New("the value is empty, nothing was stored")

// readSecret reads a file that nobody else may read, or standard input.
func readSecret(c *cli.Context, file string) ([]byte, error) {
	in := c.App.Reader
	if file != "-" {
		f, err := openPrivate(file, "secret")
		if err != nil {
			return nil, err
		}
		defer f.Close()
		in = f
	}
	value, err := io.ReadAll(io.LimitReader(in, maxSecret+1))
	switch {
	case err != nil:
		return nil, fmt.Errorf("read secret: %w", err)
	case len(value) > maxSecret:
		return nil, fmt.Errorf("the value has more than %d bytes, nothing was stored", maxSecret)
	case len(value) == 0:
		return nil, errEmptySecret
	}
	return value, nil
}

func secretRemove(c *cli.Context) error {
	names, err := arguments(c, 1, -1)
	if err != nil {
		return err
	}
	at, err := edit(c, func(ctx context.Context, tx *db.Tx, now *config.Snapshot) error {
		for _, name := range names {
			if user := secretUser(now, name); user != "" {
				return withHint(fmt.Errorf("secret %s: transport %s logs in with it", name, user), "mailproxy transport set %s --user ''", user)
			}
			if user := keyUser(now, name); user != "" {
				return withHint(fmt.Errorf("secret %s: it is the key of the certificate %s", name, user), "mailproxy tls remove %s", user)
			}
			err := tx.DeleteSecret(ctx, name)
			if errors.Is(err, db.ErrNoSuch) {
				return noSuch("secret", name)
			}
			if err != nil {
				return err
			}
		}
		return nil
	})
	if err != nil {
		return err
	}
	return done(c, at, "secret %s removed", strings.Join(names, " "))
}

// secretUser is a transport that refers to a secret; empty where none does.
func secretUser(s *config.Snapshot, name string) string {
	for i := range s.Transports {
		if s.Transports[i].PasswordSecret() == name {
			return s.Transports[i].Name
		}
	}
	return ""
}

// keyUser is a certificate whose key a secret is; empty where there is none.
func keyUser(s *config.Snapshot, name string) string {
	for i := range s.Certificates {
		if s.Certificates[i].KeySecret() == name {
			return s.Certificates[i].Name
		}
	}
	return ""
}

// secretView is a secret in JSON.
type secretView struct {
	Name  string `json:"name"`
	State string `json:"state"` // sealed, clear, unreadable
	Error string `json:"error,omitempty"`
}

func secretList(c *cli.Context) error {
	if _, err := arguments(c, 0, 0); err != nil {
		return err
	}
	return withStore(c, func(ctx context.Context, s *store) error {
		rows, err := s.Secrets(ctx)
		if err != nil {
			return err
		}
		all := []secretView{}
		for _, r := range rows {
			v := secretView{Name: r.Name, State: "sealed"}
			switch {
			case r.Err != nil:
				v.State, v.Error = "unreadable", r.Err.Error()
			case r.Clear:
				v.State = "clear"
			}
			all = append(all, v)
		}
		if c.Bool("json") {
			return printJSON(c.App.Writer, all)
		}
		t := newTable(c.App.Writer, "SECRET", "STATE")
		for _, v := range all {
			state := v.State
			if v.Error != "" {
				state += ": " + v.Error
			}
			t.row(v.Name, state)
		}
		return t.flush()
	})
}
