package main

import (
	"fmt"
	"strings"

	"github.com/urfave/cli/v2"

	"mailproxy/cluster"
	"mailproxy/config"
)

func deleteCommand() *cli.Command {
	return &cli.Command{
		Name:      "delete",
		Usage:     "take a node out of the cluster for ever",
		ArgsUsage: "CID",
		Description: "Run it on the master; the node may be dead. Its keys stop working on every node in reach within a second, its connections are cut, " +
			"and its CID is never given again. Mail that is queued on it stays there. The secrets are sealed anew, so that it opens none that is " +
			"set from now on; those that it knew are listed, to be changed.",
		Flags: []cli.Flag{&cli.BoolFlag{Name: "yes", Aliases: []string{"y"}, Usage: "do not ask"}},
		Action: func(c *cli.Context) error {
			args, err := arguments(c, "CID")
			if err != nil {
				return err
			}
			cid, err := parseCID("delete", args[0])
			if err != nil {
				return err
			}
			var confirm func(config.Node) bool
			if !c.Bool("yes") {
				confirm = func(n config.Node) bool {
					return asked(c, "delete %s(%d) at %s from the cluster", n.Name, n.CID, n.Address)
				}
			}
			return withOperator(c, fmt.Sprintf("pmgcm delete %d", cid), func(o *cluster.Operator) error {
				d, err := o.Delete(c.Context, cid, confirm)
				if err != nil {
					return err
				}
				return printDeleted(c, d)
			})
		},
	}
}

func printDeleted(c *cli.Context, d cluster.Deleted) error {
	did := "deleted"
	if d.Already {
		did = "was deleted already"
	}
	_, _ = fmt.Fprintf(c.App.Writer, "%s(%d) %s\n", d.Node.Name, d.Node.CID, did)
	if len(d.Secrets) > 0 {
		_, _ = fmt.Fprintf(c.App.Writer, "it knew these secrets, change them: %s\n", strings.Join(d.Secrets, ", "))
	}
	if len(d.Missing) > 0 {
		_, _ = fmt.Fprintf(c.App.Writer, "not told yet (they learn of it when they are back): %s\n", names(d.Missing))
	}
	if !d.Majority {
		return fmt.Errorf("%w: less than a majority knows that %s(%d) is deleted", cluster.ErrNotInSync, d.Node.Name, d.Node.CID)
	}
	return nil
}
