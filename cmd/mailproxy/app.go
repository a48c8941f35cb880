package main

import (
	"errors"
	"fmt"
	"io"
	"strings"

	"github.com/urfave/cli/v2"

	"mailproxy/config"
	"mailproxy/internal/manpage"
	"mailproxy/internal/version"
	"mailproxy/queue"
)

// configFlag is on the program and on every command, so that it may stand anywhere.
const configFlag = "config"

func newApp(stdin io.Reader, stdout, stderr io.Writer) *cli.App {
	app := &cli.App{
		Name:      "mailproxy",
		Usage:     "mail gateway that runs as a cluster",
		UsageText: "mailproxy [--config FILE] COMMAND [ARGUMENT...]",
		Description: "mailproxy serve is the daemon. The other commands make its node file, change the configuration (on any node) " +
			"and look at the queue of this node. The cluster's own commands are those of pmgcm(1).",
		Version:   version.String(),
		Reader:    stdin,
		Writer:    stdout,
		ErrWriter: stderr,
		Flags: []cli.Flag{&cli.StringFlag{Name: configFlag, Usage: "node `FILE`", Value: config.DefaultFile,
			EnvVars: []string{"MAILPROXY_CONFIG"}}},
		Commands: []*cli.Command{
			initCommand(), serveCommand(), configCommand(), domainCommand(), transportCommand(), networkCommand(), settingCommand(),
			tlsCommand(), secretCommand(), queueCommand(), spoolCommand(), lbCommand(), backupCommand(), restoreCommand(), manpage.Command(),
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
	c.OnUsageError = onUsageError
	c.HideHelpCommand = true
	if len(c.Subcommands) > 0 {
		c.Action = noCommand
		for _, sub := range c.Subcommands {
			finish(sub)
		}
		return
	}
	c.Flags = append(c.Flags, &cli.StringFlag{Name: configFlag, Usage: "node `FILE`", Hidden: true})
}

// noCommand is what a program or group does without a command: it shows its help, or says that there is no such command.
func noCommand(c *cli.Context) error {
	word := c.Args().First()
	if word == "" {
		if c.Command == nil || c.Command.Name == "" || c.Command.Name == c.App.Name {
			return cli.ShowAppHelp(c)
		}
		return cli.ShowSubcommandHelp(c)
	}
	return usagef("no such command: %s", strings.TrimSpace(commandName(c)+" "+word))
}

// commandName is "domain add"; empty for the program itself.
func commandName(c *cli.Context) string {
	if c.Command == nil {
		return ""
	}
	return strings.TrimSpace(strings.TrimPrefix(c.Command.HelpName, c.App.Name))
}

func onUsageError(c *cli.Context, err error, _ bool) error {
	text := err.Error()
	if flag, ok := strings.CutPrefix(text, "flag provided but not defined: "); ok {
		text = "no such flag: " + flag
	}
	if name := commandName(c); name != "" {
		text = name + ": " + text
	}
	return usagef("%s", text)
}

// usageError is exit code 2.
type usageError struct{ text string }

// Error is part of error.
func (e *usageError) Error() string { return e.text }

func usagef(format string, args ...any) error { return &usageError{fmt.Sprintf(format, args...)} }

// hintError is an error with the command to paste.
type hintError struct {
	error
	hint string
}

// Unwrap gives the error without its hint.
func (e *hintError) Unwrap() error { return e.error }

func withHint(err error, format string, args ...any) error {
	return &hintError{err, fmt.Sprintf(format, args...)}
}

// report writes how a command ended, and gives its exit code.
func report(stderr io.Writer, err error) int {
	if err == nil {
		return 0
	}
	for line := range strings.SplitSeq(err.Error(), "\n") {
		_, _ = fmt.Fprintf(stderr, "mailproxy: %s\n", line)
	}
	if h := hint(err); h != "" {
		_, _ = fmt.Fprintf(stderr, "hint: %s\n", h)
	}
	var usage *usageError
	switch {
	case errors.As(err, &usage):
		return 2
	case errors.Is(err, queue.ErrComing):
		return 3
	}
	return 1
}

// arguments checks how many arguments there are: at least low, at most high (high < 0: any number).
func arguments(c *cli.Context, low, high int) ([]string, error) {
	args := c.Args().Slice()
	switch {
	case len(args) < low:
		return nil, usagef("%s: %s is missing", commandName(c), c.Command.ArgsUsage)
	case high >= 0 && len(args) > high:
		return nil, usagef("%s: too many arguments: %s", commandName(c), strings.Join(args[high:], " "))
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

func jsonFlag() cli.Flag { return &cli.BoolFlag{Name: "json", Usage: "print JSON"} }
