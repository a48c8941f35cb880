package main

import (
	"context"
	"errors"
	"fmt"
	"strings"

	"github.com/urfave/cli/v2"

	"mailproxy/config"
	"mailproxy/db"
)

func domainCommand() *cli.Command {
	flags := func() []cli.Flag {
		return []cli.Flag{
			&cli.StringSliceFlag{Name: "to", Usage: "next hop, `HOST[:PORT]`; several are tried in their order"},
			&cli.StringFlag{Name: "transport", Usage: "`NAME` of a transport, in place of --to"},
			&cli.StringFlag{Name: "comment", Usage: "`TEXT` for people"},
		}
	}
	return &cli.Command{
		Name: "domain", Usage: "domains that mail is relayed for",
		Description: "A domain's mail is taken from anyone and relayed to the hosts that --to names, or by a named transport.",
		Subcommands: []*cli.Command{
			{Name: "add", Usage: "relay for a domain", ArgsUsage: "NAME", Flags: flags(), Action: onMaster(domainAdd),
				Description: "Example: mailproxy domain add example.test --to 192.0.2.10 --to 192.0.2.11:2525"},
			{Name: "set", Usage: "change where a domain's mail goes", ArgsUsage: "NAME", Flags: flags(), Action: onMaster(domainSet),
				Description: "What is not named stays as it is. --to takes the place of all hosts there were."},
			{Name: "remove", Usage: "relay for a domain no longer", ArgsUsage: "NAME...", Action: onMaster(domainRemove),
				Description: "Mail for it that is queued already is still tried."},
			recipientsCommand(),
			{Name: "list", Usage: "show the domains", Flags: []cli.Flag{jsonFlag()}, Action: domainList, Description: "One line each, by name."},
		},
	}
}

func domainAdd(c *cli.Context) error {
	name, err := domainArgument(c)
	if err != nil {
		return err
	}
	d := config.Domain{Name: name}
	if err := domainFlags(c, &d); err != nil {
		return err
	}
	if len(d.Hosts) == 0 && d.Transport == "" {
		return usagef("domain add: --to or --transport is missing")
	}
	at, err := edit(c, func(ctx context.Context, tx *db.Tx, now *config.Snapshot) error {
		if now.Domains.Get(name) != nil {
			return withHint(fmt.Errorf("domain %s: %w", name, errExists), "mailproxy domain set %s …", name)
		}
		return tx.PutDomain(ctx, d)
	})
	if err != nil {
		return err
	}
	return done(c, at, "domain %s added", name)
}

func domainSet(c *cli.Context) error {
	name, err := domainArgument(c)
	if err != nil {
		return err
	}
	if !c.IsSet("to") && !c.IsSet("transport") && !c.IsSet("comment") {
		return usagef("domain set: nothing to change: name --to, --transport or --comment")
	}
	at, err := edit(c, func(ctx context.Context, tx *db.Tx, now *config.Snapshot) error {
		old := now.Domains.Get(name)
		if old == nil {
			return noSuch("domain", name)
		}
		d := *old
		if err := domainFlags(c, &d); err != nil {
			return err
		}
		return tx.PutDomain(ctx, d)
	})
	if err != nil {
		return err
	}
	return done(c, at, "domain %s changed", name)
}

// domainArguments reads one domain or more, each in its normal form.
func domainArguments(c *cli.Context) ([]string, error) {
	names, err := arguments(c, 1, -1)
	if err != nil {
		return nil, err
	}
	for i, n := range names {
		if names[i], err = config.NormalizeDomain(n); err != nil {
			return nil, usagef("%v", err)
		}
	}
	return names, nil
}

func domainRemove(c *cli.Context) error {
	names, err := domainArguments(c)
	if err != nil {
		return err
	}
	at, err := edit(c, func(ctx context.Context, tx *db.Tx, now *config.Snapshot) error {
		for _, name := range names {
			if now.Domains.Get(name) == nil {
				return noSuch("domain", name)
			}
			if err := tx.DeleteDomain(ctx, name); err != nil {
				return err
			}
		}
		return nil
	})
	if err != nil {
		return err
	}
	return done(c, at, "domain %s removed", strings.Join(names, " "))
}

func domainList(c *cli.Context) error {
	return show(c, func(s *config.Snapshot) any { return s.Domains.List() }, func(s *config.Snapshot) error {
		t := newTable(c.App.Writer, "DOMAIN", "TO", "COMMENT")
		for d := range s.Domains.All() {
			to := strings.Join(d.Hosts, " ")
			if d.Transport != "" {
				to = "transport " + d.Transport
			}
			t.row(d.Name, to, d.Comment)
		}
		return t.flush()
	})
}

func domainArgument(c *cli.Context) (string, error) {
	args, err := arguments(c, 1, 1)
	if err != nil {
		return "", err
	}
	name, err := config.NormalizeDomain(args[0])
	if err != nil {
		return "", usagef("%v", err)
	}
	return name, nil
}

// domainFlags puts the flags that were given into d.
func domainFlags(c *cli.Context, d *config.Domain) error {
	if c.IsSet("to") && c.IsSet("transport") {
		return usagef("--to and --transport exclude each other")
	}
	if c.IsSet("to") {
		hosts, err := hostsFlag(c, "to")
		if err != nil {
			return err
		}
		d.Hosts, d.Transport = hosts, ""
	}
	if c.IsSet("transport") {
		d.Hosts, d.Transport = nil, c.String("transport")
	}
	if c.IsSet("comment") {
		d.Comment = c.String("comment")
	}
	return nil
}

func hostsFlag(c *cli.Context, flag string) ([]string, error) {
	var hosts []string
	for _, given := range c.StringSlice(flag) {
		host, err := config.NormalizeHost(given, "25")
		if err != nil {
			return nil, usagef("--%s %v", flag, err)
		}
		hosts = append(hosts, host)
	}
	return hosts, nil
}

func noSuch(kind, name string) error {
	return withHint(fmt.Errorf("%s %s: %w", kind, name, errNoSuch), "mailproxy %s list", kind)
}

var (
	errNoSuch = errors.New("is not there")
	errExists = errors.New("is there already")
)

// show prints a part of the configuration of this node, for programs or for people.
func show(c *cli.Context, data func(*config.Snapshot) any, text func(*config.Snapshot) error) error {
	if _, err := arguments(c, 0, 0); err != nil {
		return err
	}
	return withStore(c, func(ctx context.Context, s *store) error {
		snapshot, err := s.Load(ctx)
		if err != nil {
			return err
		}
		if c.Bool("json") {
			return printJSON(c.App.Writer, data(snapshot))
		}
		return text(snapshot)
	})
}

// nonNil makes an empty list [] in JSON.
func nonNil[T any](list []T) []T {
	if list == nil {
		return []T{}
	}
	return list
}
