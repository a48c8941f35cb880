package main

import (
	"fmt"
	"strings"
	"time"

	"github.com/urfave/cli/v2"

	"mailproxy/cluster"
	"mailproxy/internal/askpass"
)

// defaultTTL is how long a join token is good for.
const defaultTTL = time.Hour

// Bounds of --ttl: under a minute nobody can paste it, and past a month it is a standing door.
const (
	minTTL = time.Minute
	maxTTL = 30 * 24 * time.Hour
)

func joinCommand() *cli.Command {
	return &cli.Command{
		Name:      "join",
		Usage:     "make this node a member of a master's cluster",
		ArgsUsage: "MASTER_IP[:PORT]",
		Description: "Paste the line that `pmgcm join-cmd` prints on the master. The configuration of this node is destroyed and filled from the " +
			"master; queued mail stays. Says \"joined\" only once the data is there. Killed at any point it can be run again.\n\n" +
			"Without --fingerprint the master's key is shown and asked about; nothing secret is asked for or sent before the answer.\n\n" +
			"Without --token the password of root on the master is asked for, on the terminal, which does not show it. The master takes it where " +
			"`systemctl enable --now mailproxy-pam.socket` was run there, unless the setting join_password is no. After some wrong ones it wants " +
			"longer and longer pauses.",
		Flags: []cli.Flag{
			&cli.StringFlag{Name: "fingerprint", Usage: "the master's key as `SHA256:…`"},
			&cli.StringFlag{Name: "token", Usage: "the one-time `TOKEN` that join-cmd printed"},
			&cli.StringFlag{Name: "password-file", Usage: "read the master's root password from the first line of `FILE`, which only its owner may read; - is standard input"},
			&cli.BoolFlag{Name: "dry-run", Usage: "make all checks on both sides, say what would be destroyed, and change nothing; a token stays unused"},
		},
		Action: func(c *cli.Context) error {
			args, err := arguments(c, "MASTER_IP")
			if err != nil {
				return err
			}
			p := cluster.JoinParams{Address: args[0], Fingerprint: c.String("fingerprint"), Token: c.String("token")}
			if err := checkPasswordFlags(c, p); err != nil {
				return err
			}
			if p.Fingerprint != "" && !strings.HasPrefix(p.Fingerprint, "SHA256:") {
				return usagef("join: --fingerprint must begin with SHA256:")
			}
			p.Confirm = func(fingerprint string) bool {
				_, _ = fmt.Fprintf(c.App.Writer, "The authenticity of host '%s' can't be established.\nIts key fingerprint is %s.\n", p.Address, fingerprint)
				return asked(c, "Are you sure you want to continue connecting")
			}
			p.Password = func() (string, error) { return rootPassword(c, p.Address) }
			return withOperator(c, "pmgcm join", func(o *cluster.Operator) error {
				if c.Bool("dry-run") {
					out, err := o.CheckJoin(c.Context, p)
					if err != nil {
						return err
					}
					_, err = fmt.Fprint(c.App.Writer, outlookText(out, p.Token != ""))
					return err
				}
				if _, err := o.Join(c.Context, p); err != nil {
					return err
				}
				_, err := fmt.Fprintln(c.App.Writer, "joined")
				return err
			})
		},
	}
}

// checkPasswordFlags refuses, before anybody is asked anything, where there is no way to a password, or more than one.
func checkPasswordFlags(c *cli.Context, p cluster.JoinParams) error {
	file := c.IsSet("password-file")
	switch {
	case file && p.Token != "":
		return usagef("join: one of --token and --password-file")
	case file && c.String("password-file") == "-" && p.Fingerprint == "":
		return usagef("join: --password-file - wants --fingerprint: standard input cannot answer for the master's key too")
	case p.Token == "" && !file && !askpass.IsTerminal(c.App.Reader):
		return usagef("join: --token is missing; `pmgcm join-cmd` on the master prints the whole command. Without it the master's root password " +
			"is asked for, and there is no terminal; --password-file FILE has it too")
	}
	return nil
}

// rootPassword reads the password of root on the master.
func rootPassword(c *cli.Context, address string) (password string, err error) {
	switch file := c.String("password-file"); file {
	case "":
		password, err = askpass.Ask(c.Context, c.App.Reader, c.App.Writer, fmt.Sprintf("password of root on %s: ", address))
	case "-":
		password, err = askpass.FirstLine(c.App.Reader)
	default:
		password, err = askpass.ReadFile(file)
	}
	if err != nil {
		return "", fmt.Errorf("read the password: %w", err)
	}
	return password, nil
}

// outlookText says what a join would do; with a token that it can still be used.
func outlookText(o cluster.JoinOutlook, token bool) string {
	own, left := o.Own, ""
	if token {
		left = ", and the token can still be used"
	}
	return fmt.Sprintf("the master would take this node in as number %d, beside %s, in cluster %s\n"+
		"it would push its configuration %v, about %s\n"+
		"destroyed here: %s, %s, and the history of %s\n"+
		"kept here: queued mail, the node file, the node's key\n"+
		"dry run: nothing was changed%s\n",
		o.CID, count(o.Members, "member"), o.ClusterID, o.Position, count(int(o.Rows), "row"),
		own.Counts(), count(o.Secrets, "secret"), count(int(own.Position.Serial), "commit"), left)
}

// count is a number of things: "1 domain", "2 domains".
func count(n int, thing string) string {
	if n == 1 {
		return "1 " + thing
	}
	return fmt.Sprintf("%d %ss", n, thing)
}

func joinCmdCommand() *cli.Command {
	return &cli.Command{
		Name:    "join-cmd",
		Aliases: []string{"join_cmd"},
		Usage:   "print the command to paste on a new node",
		Description: "Run it on the master. Each call makes a fresh token that is good for one node and for an hour, or for --ttl. Only the token's " +
			"hash is kept.",
		Flags: []cli.Flag{&cli.DurationFlag{Name: "ttl", Usage: "how long the token is good, `1h`", Value: defaultTTL}},
		Action: func(c *cli.Context) error {
			if _, err := arguments(c); err != nil {
				return err
			}
			ttl := c.Duration("ttl")
			if ttl < minTTL || ttl > maxTTL {
				return usagef("join-cmd: --ttl must be between %s and %s", ttlText(minTTL), ttlText(maxTTL))
			}
			return withOperator(c, "pmgcm join-cmd", func(o *cluster.Operator) error {
				line, err := o.JoinCommand(c.Context, ttl)
				if err != nil {
					return err
				}
				_, err = fmt.Fprintln(c.App.Writer, line)
				return err
			})
		},
	}
}

// ttlText is a duration without its zero parts: "1h", "720h", "90m".
func ttlText(d time.Duration) string {
	if d%time.Hour == 0 {
		return fmt.Sprintf("%dh", d/time.Hour)
	}
	return fmt.Sprintf("%dm", d/time.Minute)
}
