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

func tlsCommand() *cli.Command {
	return &cli.Command{
		Name: "tls", Usage: "TLS of clients that send mail to us",
		Description: "TLS 1.2 and later, by STARTTLS or from the first octet where the node file has such a listener.",
		Subcommands: []*cli.Command{tlsSenderCommand()},
	}
}

func tlsSenderCommand() *cli.Command {
	return &cli.Command{
		Name: "sender", Usage: "domains whose mail is taken by TLS only",
		Description: "A message whose sender is of such a domain, and that comes in clear, is refused with 530 5.7.0. Domains below it are others.",
		Subcommands: []*cli.Command{
			{Name: "add", Usage: "take a domain's mail by TLS only", ArgsUsage: "DOMAIN", Action: onMaster(tlsSenderAdd),
				Flags:       []cli.Flag{&cli.StringFlag{Name: "comment", Usage: "`TEXT` for people"}},
				Description: "Example: mailproxy tls sender add bank.example"},
			{Name: "remove", Usage: "take a domain's mail in clear again", ArgsUsage: "DOMAIN...", Action: onMaster(tlsSenderRemove)},
			{Name: "list", Usage: "show these domains", Flags: []cli.Flag{jsonFlag()}, Action: tlsSenderList, Description: "One line each, by name."},
		},
	}
}

func tlsSenderAdd(c *cli.Context) error {
	name, err := domainArgument(c)
	if err != nil {
		return err
	}
	at, err := edit(c, func(ctx context.Context, tx *db.Tx, now *config.Snapshot) error {
		if hasTLSSender(now, name) {
			return withHint(fmt.Errorf("tls sender %s: %w", name, errExists), "mailproxy tls sender list")
		}
		return tx.PutTLSSender(ctx, config.TLSSender{Domain: name, Comment: c.String("comment")})
	})
	if err != nil {
		return err
	}
	return done(c, at, "tls sender %s added", name)
}

func tlsSenderRemove(c *cli.Context) error {
	names, err := arguments(c, 1, -1)
	if err != nil {
		return err
	}
	for i, n := range names {
		if names[i], err = config.NormalizeDomain(n); err != nil {
			return usagef("%v", err)
		}
	}
	at, err := edit(c, func(ctx context.Context, tx *db.Tx, now *config.Snapshot) error {
		for _, name := range names {
			if !hasTLSSender(now, name) {
				return noSuch("tls sender", name)
			}
			if err := tx.DeleteTLSSender(ctx, name); err != nil {
				return err
			}
		}
		return nil
	})
	if err != nil {
		return err
	}
	return done(c, at, "tls sender %s removed", strings.Join(names, " "))
}

func tlsSenderList(c *cli.Context) error {
	return show(c, func(s *config.Snapshot) any { return nonNil(s.TLSSenders) }, func(s *config.Snapshot) error {
		t := newTable(c.App.Writer, "DOMAIN", "COMMENT")
		for _, x := range s.TLSSenders {
			t.row(x.Domain, x.Comment)
		}
		return t.flush()
	})
}

func hasTLSSender(s *config.Snapshot, name string) bool {
	return slices.ContainsFunc(s.TLSSenders, func(t config.TLSSender) bool { return t.Domain == name })
}
