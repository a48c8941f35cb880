package main

import (
	"fmt"

	"github.com/urfave/cli/v2"

	"mailproxy/cluster"
)

func leaveCommand() *cli.Command {
	return &cli.Command{
		Name:  "leave",
		Usage: "take this node out of its cluster, orderly",
		Description: "Run it on a slave; the master must be in reach. The master revokes this node's key and tells the others. This node keeps its mail, " +
			"its configuration and its history and goes on as a single node, which takes configuration by itself; its keys are made anew when " +
			"it creates or joins a cluster. Killed at any point it can be run again. A node that was deleted becomes a single one by it, too, and so " +
			"does a master that has no other node.",
		Flags: []cli.Flag{&cli.BoolFlag{Name: "yes", Aliases: []string{"y"}, Usage: "do not ask"}},
		Action: func(c *cli.Context) error {
			if _, err := arguments(c); err != nil {
				return err
			}
			var confirm func() bool
			if !c.Bool("yes") {
				confirm = func() bool {
					return asked(c, "leave the cluster; changes made there no longer arrive here")
				}
			}
			return withOperator(c, "pmgcm leave", func(o *cluster.Operator) error {
				if err := o.Leave(c.Context, confirm); err != nil {
					return err
				}
				_, err := fmt.Fprintln(c.App.Writer, "this node is a single one now, with its configuration and mail")
				return err
			})
		},
	}
}
