package main

import (
	"errors"
	"fmt"
	"io"

	"github.com/urfave/cli/v2"

	"mailproxy/cluster"
)

func syncCommand() *cli.Command {
	return &cli.Command{
		Name:  "sync",
		Usage: "bring nodes to the master's configuration now",
		Description: "On the master: pushes to every slave and waits for the end. On a slave: takes the master's configuration over what is here. " +
			"Either way rows that were changed behind the cluster's back (status: drifted) are put right. Pushes need no command otherwise.\n\n" +
			"With --master_ip on a slave: tells this node of a new master, which it normally learns of by itself.",
		Flags: []cli.Flag{&cli.StringFlag{Name: "master_ip", Aliases: []string{"master-ip"}, Usage: "`ADDRESS` of the new master"}},
		Action: func(c *cli.Context) error {
			if _, err := arguments(c); err != nil {
				return err
			}
			return withOperator(c, "pmgcm sync", func(o *cluster.Operator) error {
				if ip := c.String("master_ip"); ip != "" {
					s, err := o.SyncWith(c.Context, ip)
					if err != nil {
						return err
					}
					_, err = fmt.Fprintf(c.App.Writer, "in sync with %s(%d) at %v\n", s.Node.Name, s.Node.CID, s.Stats.To)
					return err
				}
				done, err := o.Sync(c.Context)
				return errors.Join(err, printSynced(c.App.Writer, done))
			})
		},
	}
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
		case s.Stats.From != s.Stats.To && s.Stats.Rows > 0:
			text += fmt.Sprintf(" (%d rows, %d bytes, %d ms)", s.Stats.Rows, s.Stats.Bytes, s.Stats.Took.Milliseconds())
		}
		if s.Stats.Journalled > 0 {
			text += fmt.Sprintf("; %d commits set aside in the journal", s.Stats.Journalled)
		}
		if _, err := fmt.Fprintf(w, "%s(%d): %s\n", s.Node.Name, s.Node.CID, text); err != nil {
			return err
		}
	}
	return nil
}
