package main

import (
	"errors"
	"fmt"
	"io"
	"strconv"
	"strings"

	"github.com/urfave/cli/v2"

	"mailproxy/cluster"
	"mailproxy/config"
)

func syncCommand() *cli.Command {
	return &cli.Command{
		Name:  "sync",
		Usage: "bring nodes to the master's configuration now",
		Description: "Pushes need no command; this is for repairs, and for who does not want to wait.\n\n" +
			"On the master: pushes to every slave and waits for the end, with a bar for each on a terminal; rows that were changed by hand there become a commit. --push CID pushes to one, with --full every table whatever the digests say.\n\n" +
			"On a slave: takes what is missing from the master, and overwrites nothing. --pull overwrites this node with the master's configuration; " +
			"--pull CID with that of another slave, while the master is away. --master_ip tells this node of a new master, which it normally learns of " +
			"by itself.\n\n" +
			"Before rows or commits are overwritten it says which and asks; what only that node had goes to its journal.",
		ArgsUsage: "[CID]",
		Flags: []cli.Flag{
			&cli.BoolFlag{Name: "pull", Usage: "on a slave: overwrite this node with the master's configuration, or that of node CID"},
			&cli.BoolFlag{Name: "push", Usage: "on the master: push to the node CID, also over what differs there"},
			&cli.BoolFlag{Name: "full", Usage: "with --push: send every table"},
			&cli.BoolFlag{Name: "yes", Aliases: []string{"y"}, Usage: "do not ask"},
			&cli.StringFlag{Name: "master_ip", Aliases: []string{"master-ip"}, Usage: "`ADDRESS` of the new master"},
		},
		Action: runSync,
	}
}

func runSync(c *cli.Context) error {
	cid, err := syncCID(c)
	if err != nil {
		return err
	}
	var confirm cluster.Confirm
	if !c.Bool("yes") {
		confirm = func(what string) bool { return asked(c, "overwrite %s", what) }
	}
	return withOperator(c, "pmgcm sync", func(o *cluster.Operator) error {
		var one cluster.Synced
		shown := newProgress(c.App.Writer)
		o.Progress = shown.note
		switch {
		case c.IsSet("master_ip"):
			s, err := o.SyncWith(c.Context, c.String("master_ip"))
			if err != nil {
				return err
			}
			_, err = fmt.Fprintf(c.App.Writer, "in sync with %s(%d) at %v\n", s.Node.Name, s.Node.CID, s.Stats.To)
			return err
		case c.Bool("pull"):
			one, err = o.Pull(c.Context, cid, confirm)
		case c.Bool("push"):
			one, err = o.PushTo(c.Context, cid, c.Bool("full"), confirm)
			shown.end()
		default:
			done, err := o.Sync(c.Context, confirm)
			shown.end()
			return errors.Join(err, printSynced(c.App.Writer, done))
		}
		if err != nil {
			return err
		}
		return printSynced(c.App.Writer, []cluster.Synced{one})
	})
}

// syncCID reads the CID that --pull may have and --push must, and refuses what does not go together.
func syncCID(c *cli.Context) (config.CID, error) {
	ways := 0
	for _, f := range []string{"pull", "push", "master_ip"} {
		if c.IsSet(f) {
			ways++
		}
	}
	args := c.Args().Slice()
	switch {
	case ways > 1:
		return 0, usagef("sync: one of --pull, --push and --master_ip")
	case c.Bool("full") && !c.Bool("push"):
		return 0, usagef("sync: --full goes with --push")
	case c.Bool("push") && len(args) == 0:
		return 0, usagef("sync --push: CID is missing")
	case len(args) > 1 || len(args) == 1 && !c.Bool("pull") && !c.Bool("push"):
		return 0, usagef("sync: too many arguments: %s", strings.Join(args, " "))
	case len(args) == 0:
		return 0, nil
	}
	cid, err := strconv.ParseInt(args[0], 10, 32)
	if err != nil || cid < 1 {
		return 0, usagef("sync: %q is no CID", args[0])
	}
	return config.CID(cid), nil
}

// printSynced writes a line a node.
func printSynced(w io.Writer, done []cluster.Synced) error {
	for _, s := range done {
		if s.Node.CID == 0 {
			continue
		}
		text := fmt.Sprintf("in sync at %v", s.Stats.To)
		switch {
		case s.Err != nil:
			text = fmt.Sprintf("ERROR: %v", s.Err)
		case s.Stats.Rows > 0:
			text += fmt.Sprintf(" (%d rows, %d bytes, %d ms)", s.Stats.Rows, s.Stats.Bytes, s.Stats.Took.Milliseconds())
		}
		if s.Stats.Journalled > 0 {
			text += "; " + commits(s.Stats.Journalled) + " set aside in the journal"
		}
		if _, err := fmt.Fprintf(w, "%s(%d): %s\n", s.Node.Name, s.Node.CID, text); err != nil {
			return err
		}
	}
	return nil
}

// commits says how many.
func commits(n int) string {
	if n == 1 {
		return "1 commit"
	}
	return fmt.Sprintf("%d commits", n)
}
