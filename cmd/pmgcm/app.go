package main

import (
	"crypto/ed25519"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/user"
	"slices"
	"strings"

	"github.com/rs/zerolog"
	"github.com/urfave/cli/v2"

	"mailproxy/cluster"
	"mailproxy/config"
	"mailproxy/db"
	"mailproxy/internal/manpage"
	"mailproxy/internal/version"
	"mailproxy/tunnel"
)

// configFlag is on the program and on every command, so that it may stand anywhere.
const configFlag = "config"

func newApp(stdin io.Reader, stdout, stderr io.Writer) *cli.App {
	app := &cli.App{
		Name:      "pmgcm",
		Usage:     "cluster toolkit of mailproxy",
		UsageText: "pmgcm [--config FILE] COMMAND [ARGUMENT...]",
		Description: "One node is the master: configuration is changed there and pushed to all others at once. Mail is taken by every node, " +
			"with or without the master. A new cluster begins with `pmgcm create` on its first node; `pmgcm join-cmd` there prints the line " +
			"to paste on each further node. `pmgcm status` shows how the nodes are and names the remedy for what is wrong; when the master " +
			"is lost, `pmgcm promote` on another node makes that the master.\n\n" +
			"Exit codes: 0 done, 1 failed, 2 usage, 3 asked and not in sync.",
		Version:   version.String(),
		Reader:    stdin,
		Writer:    stdout,
		ErrWriter: stderr,
		Flags: []cli.Flag{&cli.StringFlag{Name: configFlag, Usage: "node `FILE`", Value: config.DefaultFile,
			EnvVars: []string{"MAILPROXY_CONFIG"}}},
		Commands: []*cli.Command{
			statusCommand(), createCommand(), joinCommand(), joinCmdCommand(), syncCommand(), promoteCommand(), deleteCommand(),
			checkCommand(), drainCommand(), undrainCommand(), renameCommand(), setAddressCommand(), leaveCommand(),
			caCommand(), updateFingerprintsCommand(),
			journalCommand(), manpage.Command(),
		},
		EnableBashCompletion: true,
		HideHelpCommand:      true,
		Suggest:              true,
		ExitErrHandler:       func(*cli.Context, error) {}, // run says how it ended
		Action:               noCommand,
		OnUsageError:         onUsageError,
	}
	for _, c := range app.Commands {
		finish(c)
	}
	return app
}

// finish gives a command what all of them have.
func finish(c *cli.Command) {
	if c.OnUsageError == nil {
		c.OnUsageError = onUsageError
	}
	c.HideHelpCommand = true
	if len(c.Subcommands) > 0 {
		if c.Action == nil {
			c.Action = noCommand
		}
		for _, sub := range c.Subcommands {
			finish(sub)
		}
		return
	}
	c.Flags = append(c.Flags, &cli.StringFlag{Name: configFlag, Usage: "node `FILE`", Hidden: true})
}

// noCommand is what the program or a group does without a command: it shows its help, or says that there is no such command.
func noCommand(c *cli.Context) error {
	word := c.Args().First()
	switch {
	case word != "":
		return usagef("no such command: %s", word)
	case c.Command == nil || c.Command.Name == "" || c.Command.Name == c.App.Name:
		return cli.ShowAppHelp(c)
	}
	return cli.ShowSubcommandHelp(c)
}

func onUsageError(_ *cli.Context, err error, _ bool) error {
	return usagef("%s", strings.Replace(err.Error(), "flag provided but not defined: ", "no such flag: ", 1))
}

// usageError is exit code 2.
type usageError struct{ text string }

// Error is part of error.
func (e *usageError) Error() string { return e.text }

func usagef(format string, args ...any) error { return &usageError{fmt.Sprintf(format, args...)} }

// report writes how a command ended, and gives its exit code.
func report(stderr io.Writer, err error) int {
	if err == nil {
		return 0
	}
	var shown *shownError
	if !errors.As(err, &shown) {
		_, _ = fmt.Fprintf(stderr, "pmgcm: %v\n", err)
		if h := hint(err); h != "" {
			_, _ = fmt.Fprintf(stderr, "hint: %s\n", h)
		}
	}
	var usage *usageError
	var checked *checkError
	switch {
	case errors.As(err, &usage):
		return 2
	case errors.As(err, &checked):
		return checked.level.code()
	case errors.Is(err, cluster.ErrNotInSync):
		return 3
	}
	return 1
}

// A shownError is one whose text the command's own output says already.
type shownError struct{ error }

// Unwrap gives the error for the exit code.
func (e *shownError) Unwrap() error { return e.error }

// arguments checks that there are exactly as many as names.
func arguments(c *cli.Context, names ...string) ([]string, error) {
	args := c.Args().Slice()
	switch {
	case len(args) < len(names):
		return nil, usagef("%s: %s is missing", c.Command.Name, names[len(args)])
	case len(args) > len(names):
		return nil, usagef("%s: too many arguments: %s", c.Command.Name, strings.Join(args[len(names):], " "))
	}
	return args, nil
}

// configFile is what --config says, where it stands first or last, or MAILPROXY_CONFIG, or the default.
func configFile(c *cli.Context) string {
	for _, ctx := range c.Lineage() {
		if ctx.Command != nil && ctx.IsSet(configFlag) {
			return ctx.String(configFlag)
		}
	}
	return config.DefaultFile
}

// withOperator runs do on the node that --config names. command is what the history shall say; it holds no secret.
func withOperator(c *cli.Context, command string, do func(o *cluster.Operator) error) error {
	local, err := config.LoadLocal(configFile(c))
	if err != nil {
		return err
	}
	nodeKey := func() (ed25519.PrivateKey, error) { return tunnel.PrivateKey(local.KeyDir()) }
	d, err := db.Open(db.Options{DSN: databaseDSN(local), NodeKey: nodeKey, Log: zerolog.Nop()})
	if err != nil {
		return err
	}
	defer d.Close()
	return do(&cluster.Operator{
		Local: local, DB: d, Version: version.Version, Author: db.Author{Who: whoAmI(), Command: command},
		Say: func(line string) { _, _ = fmt.Fprintln(c.App.Writer, line) },
	})
}

// databaseDSN is the node file's, or that of the private PostgreSQL, which lets root in.
func databaseDSN(l *config.Local) string {
	if l.Database.DSN != "" {
		return l.Database.DSN
	}
	return db.NewInstance(db.InstanceOptions{
		DataDir: l.PostgresDataDir(), SocketDir: l.PostgresSocketDir(), Bin: l.Database.Bin, User: l.User, Log: zerolog.Nop(),
	}).DSN()
}

// whoAmI is who typed the command, also under sudo.
func whoAmI() string {
	if who := os.Getenv("SUDO_USER"); who != "" {
		return who
	}
	if u, err := user.Current(); err == nil {
		return u.Username
	}
	return fmt.Sprintf("uid %d", os.Getuid())
}

// asked shows a question and says whether the answer is yes. No answer is no.
func asked(c *cli.Context, format string, args ...any) bool {
	_, _ = fmt.Fprintf(c.App.Writer, format+" (yes/no)? ", args...)
	line := readLine(c.App.Reader)
	return slices.Contains([]string{"y", "yes"}, strings.ToLower(strings.TrimSpace(line)))
}

// readLine reads one line, and nothing behind it: another question may follow.
func readLine(r io.Reader) string {
	var line []byte
	for b := make([]byte, 1); len(line) < 1000; {
		if n, err := r.Read(b); n == 0 && err != nil || n == 1 && b[0] == '\n' {
			break
		} else if n == 1 {
			line = append(line, b[0])
		}
	}
	return string(line)
}

// printJSON writes v for programs.
func printJSON(w io.Writer, v any) error {
	e := json.NewEncoder(w)
	e.SetEscapeHTML(false)
	e.SetIndent("", "  ")
	return e.Encode(v)
}

func jsonFlag() cli.Flag { return &cli.BoolFlag{Name: "json", Usage: "print JSON"} }
