package main

import (
	"context"
	"fmt"
	"net/netip"
	"slices"
	"strings"

	"github.com/urfave/cli/v2"

	"mailproxy/config"
	"mailproxy/db"
)

func networkCommand() *cli.Command {
	return &cli.Command{
		Name: "network", Usage: "our own networks, which may send to anywhere",
		Description: "Mail from hosts of these networks is relayed to any domain; from everywhere else, only to the domains of `mailproxy domain`.",
		Subcommands: []*cli.Command{
			{Name: "add", Usage: "let a network send to anywhere", ArgsUsage: "NETWORK", Action: onMaster(networkAdd),
				Flags:       []cli.Flag{&cli.StringFlag{Name: "comment", Usage: "`TEXT` for people"}},
				Description: "Example: mailproxy network add 10.0.0.0/8"},
			{Name: "remove", Usage: "let a network send to anywhere no longer", ArgsUsage: "NETWORK...", Action: onMaster(networkRemove),
				Description: "Sessions that are open keep what they had when their transaction began."},
			{Name: "list", Usage: "show the networks", Flags: []cli.Flag{jsonFlag()}, Action: networkList, Description: "One line each."},
		},
	}
}

func networkAdd(c *cli.Context) error {
	prefixes, err := networkArguments(c, 1)
	if err != nil {
		return err
	}
	n := config.Network{Prefix: prefixes[0], Comment: c.String("comment")}
	at, err := edit(c, func(ctx context.Context, tx *db.Tx, now *config.Snapshot) error {
		if hasNetwork(now, n.Prefix) {
			return withHint(fmt.Errorf("network %v: %w", n.Prefix, errExists), "mailproxy network list")
		}
		return tx.PutNetwork(ctx, n)
	})
	if err != nil {
		return err
	}
	return done(c, at, "network %v added", n.Prefix)
}

func networkRemove(c *cli.Context) error {
	prefixes, err := networkArguments(c, -1)
	if err != nil {
		return err
	}
	at, err := edit(c, func(ctx context.Context, tx *db.Tx, now *config.Snapshot) error {
		for _, p := range prefixes {
			if !hasNetwork(now, p) {
				return noSuch("network", p.String())
			}
			if err := tx.DeleteNetwork(ctx, p); err != nil {
				return err
			}
		}
		return nil
	})
	if err != nil {
		return err
	}
	return done(c, at, "network %s removed", strings.Trim(fmt.Sprint(prefixes), "[]"))
}

func networkList(c *cli.Context) error {
	return show(c, func(s *config.Snapshot) any { return nonNil(s.Networks) }, func(s *config.Snapshot) error {
		t := newTable(c.App.Writer, "NETWORK", "COMMENT")
		for _, n := range s.Networks {
			t.row(n.Prefix.String(), n.Comment)
		}
		return t.flush()
	})
}

func networkArguments(c *cli.Context, high int) ([]netip.Prefix, error) {
	args, err := arguments(c, 1, high)
	if err != nil {
		return nil, err
	}
	var prefixes []netip.Prefix
	for _, a := range args {
		p, err := config.ParseNetwork(a)
		if err != nil {
			return nil, usagef("%v", err)
		}
		prefixes = append(prefixes, p)
	}
	return prefixes, nil
}

func hasNetwork(s *config.Snapshot, p netip.Prefix) bool {
	return slices.ContainsFunc(s.Networks, func(n config.Network) bool { return n.Prefix == p })
}
