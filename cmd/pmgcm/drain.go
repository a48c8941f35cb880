package main

import (
	"errors"
	"fmt"
	"strconv"

	"github.com/urfave/cli/v2"

	"mailproxy/cluster"
	"mailproxy/config"
)

func drainCommand() *cli.Command {
	return &cli.Command{
		Name:      "drain",
		Usage:     "take a node out of service, orderly",
		ArgsUsage: "[CID]",
		Description: "This node, or on the master any. It takes no new SMTP sessions; those that are open are told 421 4.3.2 as soon as they are " +
			"between two commands, and a message that is on its way has 5 minutes to finish. /health answers 503 \"draining\" at once, so that " +
			"balancers go elsewhere. Queued mail is still delivered, and configuration still arrives. It stays so over a restart, until " +
			"`pmgcm undrain`. Works with PostgreSQL down.",
		Flags: []cli.Flag{&cli.BoolFlag{Name: "wait", Usage: "return only when the last session has ended"}},
		Action: func(c *cli.Context) error {
			return onNode(c, "drain", func(o *cluster.Operator, cid config.CID) error {
				s, err := o.Drain(c.Context, cid)
				if err != nil {
					return err
				}
				if s.Draining == nil {
					return fmt.Errorf("%s(%d): somebody has put it back into service", s.Name, s.CID)
				}
				_, _ = fmt.Fprintf(c.App.Writer, "%s(%d) is draining, %d sessions left\n", s.Name, s.CID, s.Draining.Sessions)
				if !c.Bool("wait") {
					return nil
				}
				done, err := o.WaitDrained(c.Context, cid)
				if err == nil && !done {
					err = errors.New("sessions are left")
				}
				return err
			})
		},
	}
}

func undrainCommand() *cli.Command {
	return &cli.Command{
		Name:        "undrain",
		Usage:       "put a node back into service",
		ArgsUsage:   "[CID]",
		Description: "This node, or on the master any. It takes SMTP sessions again, and /health says so.",
		Action: func(c *cli.Context) error {
			return onNode(c, "undrain", func(o *cluster.Operator, cid config.CID) error {
				s, err := o.Undrain(c.Context, cid)
				if err != nil {
					return err
				}
				_, err = fmt.Fprintf(c.App.Writer, "%s(%d) takes mail\n", s.Name, s.CID)
				return err
			})
		},
	}
}

// onNode runs do for the CID that is given, or 0 for this node.
func onNode(c *cli.Context, command string, do func(o *cluster.Operator, cid config.CID) error) error {
	var cid config.CID
	switch args := c.Args().Slice(); len(args) {
	case 0:
	case 1:
		var err error
		if cid, err = parseCID(command, args[0]); err != nil {
			return err
		}
	default:
		return usagef("%s: too many arguments: %s", command, args[1])
	}
	return withOperator(c, "pmgcm "+command, func(o *cluster.Operator) error { return do(o, cid) })
}

func parseCID(command, text string) (config.CID, error) {
	n, err := strconv.ParseInt(text, 10, 32)
	if err != nil || n < 1 {
		return 0, usagef("%s: %q is no CID", command, text)
	}
	return config.CID(n), nil
}
