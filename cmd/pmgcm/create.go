package main

import (
	"fmt"

	"github.com/urfave/cli/v2"

	"mailproxy/cluster"
	"mailproxy/config"
)

func createCommand() *cli.Command {
	return &cli.Command{
		Name:  "create",
		Usage: "make this node the master of a new cluster",
		Description: "All data of this node is kept. It makes the cluster's CA, whose private key never leaves this node, and prints the command " +
			"to paste on the first further node.\n\n" +
			"Nodes reach each other by SSH over TCP. With --tunnel wireguard they put WireGuard around it: UDP to the same port, which must " +
			"be open too. `mailproxy setting set tunnel wireguard` (or ssh) on the master changes it later, while all stay connected. A " +
			"node that UDP does not reach is reached by SSH alone, and status says so. Joining is always by SSH over TCP.",
		Flags: []cli.Flag{&cli.StringFlag{Name: "tunnel", Usage: "what nodes reach each other by, ssh or wireguard: `KIND`", DefaultText: "ssh"}},
		Action: func(c *cli.Context) error {
			if _, err := arguments(c); err != nil {
				return err
			}
			kind := c.String("tunnel")
			if kind != "" {
				if err := config.CheckSetting("tunnel", kind); err != nil {
					return usagef("--tunnel: %v", err)
				}
			}
			return withOperator(c, "pmgcm create", func(o *cluster.Operator) error {
				made, err := o.Create(c.Context, cluster.CreateParams{Tunnel: config.TunnelKind(kind)})
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
