package main

import (
	"context"
	"fmt"

	"github.com/urfave/cli/v2"

	"mailproxy/cluster"
	"mailproxy/config"
)

func renameCommand() *cli.Command {
	return &cli.Command{
		Name:      "rename",
		Usage:     "give a node another name",
		ArgsUsage: "NAME [CID]",
		Description: "This node, or on the master any. The master must be in reach. The others learn it at once, nothing is interrupted, and CID, keys " +
			"and mail stay. This node's own file is changed too; its SMTP greets by the new name after `systemctl restart mailproxy`.",
		Action: func(c *cli.Context) error {
			return changeNode(c, "rename", "NAME", config.NodeName, (*cluster.Operator).Rename)
		},
	}
}

func setAddressCommand() *cli.Command {
	return &cli.Command{
		Name:      "set-address",
		Aliases:   []string{"set_address"},
		Usage:     "tell the others where a node is now",
		ArgsUsage: "ADDRESS [CID]",
		Description: "This node, or on the master any, after its host got another address: an IP address or a host name, without a port. The port is " +
			"that of [tunnel] listen in this node's file. The others learn it at once and dial there; a node that can still dial out is in reach " +
			"meanwhile. This node's own file is changed too.",
		Action: func(c *cli.Context) error {
			return changeNode(c, "set-address", "ADDRESS", config.NodeAddress, (*cluster.Operator).SetAddress)
		},
	}
}

func changeNode(c *cli.Context, command, what string, normalize func(string) (string, error),
	change func(*cluster.Operator, context.Context, config.CID, string) (cluster.Changed, error)) error {
	args := c.Args().Slice()
	if len(args) < 1 || len(args) > 2 {
		return usagef("%s: want %s, and perhaps a CID", command, what)
	}
	value, err := normalize(args[0])
	if err != nil {
		return usagef("%s: %v", command, err)
	}
	line, cid := "pmgcm "+command+" "+value, config.CID(0)
	if len(args) == 2 {
		if cid, err = parseCID(command, args[1]); err != nil {
			return err
		}
		line += " " + args[1]
	}
	return withOperator(c, line, func(o *cluster.Operator) error {
		done, err := change(o, c.Context, cid, value)
		if err != nil {
			return err
		}
		_, _ = fmt.Fprintf(c.App.Writer, "node %d is %s at %s\n", done.Node.CID, done.Node.Name, done.Node.Address)
		if len(done.Missing) > 0 {
			_, _ = fmt.Fprintf(c.App.Writer, "not told yet (they learn of it when they are back): %s\n", names(done.Missing))
		}
		return nil
	})
}
