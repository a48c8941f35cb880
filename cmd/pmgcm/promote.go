package main

import (
	"fmt"
	"strings"

	"github.com/urfave/cli/v2"

	"mailproxy/cluster"
	"mailproxy/config"
)

func promoteCommand() *cli.Command {
	return &cli.Command{
		Name:  "promote",
		Usage: "make this node the master",
		Description: "Run it on the slave that shall be master. With the old master in reach it hands over, and nothing is lost. With the old master " +
			"lost, a majority of the members must promise; the newest configuration among them is taken over. An old master that returns steps " +
			"down by itself, and commits that only it had are set aside in its journal.\n\n" +
			"Without a majority (always so with two nodes) it changes nothing, says what may be lost, and wants --force.\n\n" +
			"A master that hears no majority of three and more nodes for 10 s takes no configuration until it does. Where the others are lost for " +
			"good, --force on that master itself makes it writable, so that they can be deleted.\n\n" +
			"A node that was deleted, which the others do not let in, is not promoted without a majority, since that would make a second master: " +
			"`pmgcm leave` is for it.",
		Flags: []cli.Flag{
			&cli.BoolFlag{Name: "force", Usage: "without a majority; newer commits of members out of reach are set aside when they return"},
			&cli.BoolFlag{Name: "not-deleted", Usage: "with --force, where other nodes do not let this one in and you know that they are wrong"},
		},
		Action: func(c *cli.Context) error {
			if _, err := arguments(c); err != nil {
				return err
			}
			command := "pmgcm promote"
			if c.Bool("force") {
				command += " --force"
			}
			if c.Bool("not-deleted") {
				if command += " --not-deleted"; !c.Bool("force") {
					return usagef("promote: --not-deleted goes with --force")
				}
			}
			return withOperator(c, command, func(o *cluster.Operator) error {
				o.NotDeleted = c.Bool("not-deleted")
				p, err := o.Promote(c.Context, c.Bool("force"))
				if err != nil {
					return err
				}
				_, _ = fmt.Fprintf(c.App.Writer, "this node is master now, epoch %v\n", p.Epoch)
				if len(p.Untold) > 0 {
					_, _ = fmt.Fprintf(c.App.Writer, "not told yet (they learn of it when they are back): %s\n", names(p.Untold))
				}
				return nil
			})
		},
	}
}

// names is a list of nodes: "mx1(1), mx3(3)".
func names(nodes []config.Node) string {
	var s []string
	for _, n := range nodes {
		s = append(s, fmt.Sprintf("%s(%d)", n.Name, n.CID))
	}
	return strings.Join(s, ", ")
}
