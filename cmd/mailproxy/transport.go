package main

import (
	"context"
	"fmt"
	"slices"
	"strings"

	"github.com/urfave/cli/v2"

	"mailproxy/config"
	"mailproxy/db"
)

func transportCommand() *cli.Command {
	flags := func() []cli.Flag {
		return []cli.Flag{
			&cli.StringSliceFlag{Name: "to", Usage: "next hop, `HOST[:PORT]`; several are tried in their order"},
			&cli.BoolFlag{Name: "mx", Usage: "look up the MX records of the recipient's domain, in place of --to"},
			&cli.StringFlag{Name: "tls", Usage: "STARTTLS `POLICY`: none, may, encrypt or verify"},
		}
	}
	return &cli.Command{
		Name: "transport", Usage: "named ways out",
		Description: "A transport is fixed hosts, or a look-up of MX records, with a policy for STARTTLS. Domains and the setting " +
			"outbound_transport refer to it by name.",
		Subcommands: []*cli.Command{
			{Name: "add", Usage: "make a transport", ArgsUsage: "NAME", Flags: flags(), Action: onMaster(transportAdd),
				Description: "Example: mailproxy transport add smarthost --to mail.example.net:587 --tls verify"},
			{Name: "set", Usage: "change a transport", ArgsUsage: "NAME", Flags: flags(), Action: onMaster(transportSet),
				Description: "What is not named stays as it is."},
			{Name: "remove", Usage: "remove a transport", ArgsUsage: "NAME...", Action: onMaster(transportRemove),
				Description: "Refused while a domain or setting refers to it."},
			{Name: "list", Usage: "show the transports", Flags: []cli.Flag{jsonFlag()}, Action: transportList,
				Description: "One line each, by name."},
		},
	}
}

func transportAdd(c *cli.Context) error {
	args, err := arguments(c, 1, 1)
	if err != nil {
		return err
	}
	t := config.Transport{Name: args[0]}
	if err := transportFlags(c, &t); err != nil {
		return err
	}
	if len(t.Hosts) == 0 && !c.Bool("mx") {
		return usagef("transport add: --to or --mx is missing")
	}
	at, err := edit(c, func(ctx context.Context, tx *db.Tx, now *config.Snapshot) error {
		if findTransport(now, t.Name) != nil {
			return withHint(fmt.Errorf("transport %s: %w", t.Name, errExists), "mailproxy transport set %s …", t.Name)
		}
		return tx.PutTransport(ctx, t)
	})
	if err != nil {
		return err
	}
	return done(c, at, "transport %s added", t.Name)
}

func transportSet(c *cli.Context) error {
	args, err := arguments(c, 1, 1)
	if err != nil {
		return err
	}
	if !c.IsSet("to") && !c.IsSet("mx") && !c.IsSet("tls") {
		return usagef("transport set: nothing to change: name --to, --mx or --tls")
	}
	at, err := edit(c, func(ctx context.Context, tx *db.Tx, now *config.Snapshot) error {
		old := findTransport(now, args[0])
		if old == nil {
			return noSuch("transport", args[0])
		}
		t := *old
		if err := transportFlags(c, &t); err != nil {
			return err
		}
		return tx.PutTransport(ctx, t)
	})
	if err != nil {
		return err
	}
	return done(c, at, "transport %s changed", args[0])
}

func transportRemove(c *cli.Context) error {
	names, err := arguments(c, 1, -1)
	if err != nil {
		return err
	}
	at, err := edit(c, func(ctx context.Context, tx *db.Tx, now *config.Snapshot) error {
		for _, name := range names {
			if findTransport(now, name) == nil {
				return noSuch("transport", name)
			}
			if err := tx.DeleteTransport(ctx, name); err != nil {
				return err
			}
		}
		return nil
	})
	if err != nil {
		return err
	}
	return done(c, at, "transport %s removed", strings.Join(names, " "))
}

func transportList(c *cli.Context) error {
	return show(c, func(s *config.Snapshot) any { return nonNil(s.Transports) }, func(s *config.Snapshot) error {
		t := newTable(c.App.Writer, "TRANSPORT", "TO", "TLS")
		for _, x := range s.Transports {
			to, tls := strings.Join(x.Hosts, " "), x.TLS
			if to == "" {
				to = "MX"
			}
			if tls == "" {
				tls = config.TLSMay
			}
			t.row(x.Name, to, string(tls))
		}
		return t.flush()
	})
}

func transportFlags(c *cli.Context, t *config.Transport) error {
	if c.IsSet("to") && c.Bool("mx") {
		return usagef("--to and --mx exclude each other")
	}
	if c.IsSet("to") {
		hosts, err := hostsFlag(c, "to")
		if err != nil {
			return err
		}
		t.Hosts = hosts
	}
	if c.Bool("mx") {
		t.Hosts = nil
	}
	if c.IsSet("tls") {
		t.TLS = config.TLS(strings.ToLower(c.String("tls")))
	}
	return nil
}

func findTransport(s *config.Snapshot, name string) *config.Transport {
	i := slices.IndexFunc(s.Transports, func(t config.Transport) bool { return t.Name == name })
	if i < 0 {
		return nil
	}
	return &s.Transports[i]
}
