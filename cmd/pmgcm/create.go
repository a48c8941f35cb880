package main

import (
	"fmt"

	"github.com/urfave/cli/v2"

	"mailproxy/cluster"
)

func createCommand() *cli.Command {
	return &cli.Command{
		Name:  "create",
		Usage: "make this node the master of a new cluster",
		Description: "All data of this node is kept. It makes the cluster's CA, whose private key never leaves this node, and prints the command " +
			"to paste on the first further node.",
		Action: func(c *cli.Context) error {
			if _, err := arguments(c); err != nil {
				return err
			}
			return withOperator(c, "pmgcm create", func(o *cluster.Operator) error {
				made, err := o.Create(c.Context)
				if err != nil {
					return err
				}
				_, _ = fmt.Fprintf(c.App.Writer, "cluster %s created, this node is its master with CID %d\n", made.ClusterID, made.CID)
				_, _ = fmt.Fprintf(c.App.Writer, "cluster CA %s\n", made.Fingerprint)
				line, err := o.JoinCommand(c.Context, defaultTTL)
				if err != nil {
					return err
				}
				_, _ = fmt.Fprintf(c.App.Writer, "on a new node, within %s (`pmgcm join-cmd` prints another):\n  %s\n", ttlText(defaultTTL), line)
				return nil
			})
		},
	}
}
