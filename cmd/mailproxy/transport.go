package main

import (
	"context"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/urfave/cli/v2"

	"mailproxy/config"
	"mailproxy/db"
	"mailproxy/relay"
	"mailproxy/web"
)

func transportCommand() *cli.Command {
	flags := func() []cli.Flag {
		return []cli.Flag{
			&cli.StringSliceFlag{Name: "to", Usage: "next hop, `HOST[:PORT]`; of several the first that is in reach"},
			&cli.BoolFlag{Name: "mx", Usage: "look up the MX records of the recipient's domain, in place of --to"},
			&cli.StringFlag{Name: "order", Usage: "which of several hosts is tried first, `ORDER`: given (the first of the list), round-robin (each in turn)"},
			&cli.StringFlag{Name: "tls", Usage: "STARTTLS `POLICY`: none, may, encrypt (any certificate), verify (one that is valid for the host's name)"},
			&cli.StringFlag{Name: "user", Usage: "log in as `USER`, over TLS only; '' is no longer"},
			&cli.StringFlag{Name: "password", Usage: "where the password is: `secret:NAME`, as mailproxy secret set NAME stored it"},
			&cli.StringFlag{Name: "tell", Usage: "tell the next hop who our client is, `HOW`: xclient, proxy (PROXY protocol, version 2), none"},
			&cli.StringFlag{Name: "queue-life", Usage: "how long mail is tried by it, `TIME` up to 14d; \"default\": as the setting queue_life says"},
		}
	}
	return &cli.Command{
		Name: "transport", Usage: "named ways out",
		Description: "A transport is fixed hosts, or a look-up of MX records, with a policy for STARTTLS. Domains and the setting " +
			"outbound_transport refer to it by name.",
		Subcommands: []*cli.Command{
			{Name: "add", Usage: "make a transport", ArgsUsage: "NAME", Flags: flags(), Action: onMaster(transportAdd),
				Description: "Example: mailproxy transport add smarthost --to mail.example.net:587 --tls verify --user us@example.net " +
					"--password secret:smtp-password"},
			{Name: "set", Usage: "change a transport", ArgsUsage: "NAME", Flags: flags(), Action: onMaster(transportSet),
				Description: "What is not named stays as it is. --to takes the place of all hosts there were."},
			{Name: "remove", Usage: "remove a transport", ArgsUsage: "NAME...", Action: onMaster(transportRemove),
				Description: "Refused while a domain or setting refers to it."},
			{Name: "list", Usage: "show the transports", Flags: []cli.Flag{jsonFlag()}, Action: transportList,
				Description: "One line each, by name."},
			{Name: "health", Usage: "show which next hops are in reach", Flags: []cli.Flag{jsonFlag()}, Action: transportHealth,
				Description: "One line for each host that this node is connected to, or that was out of reach when it was tried last. Such a " +
					"host is tried behind the others of its transport, but for one message at the time under LOOK. It asks the running daemon."},
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
		return putTransport(ctx, tx, t)
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
	if !slices.ContainsFunc([]string{"to", "mx", "order", "tls", "user", "password", "tell", "queue-life"}, c.IsSet) {
		return usagef("transport set: nothing to change: name --to, --mx, --order, --tls, --user, --password, --tell or --queue-life")
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
		return putTransport(ctx, tx, t)
	})
	if err != nil {
		return err
	}
	return done(c, at, "transport %s changed", args[0])
}

// putTransport stores a transport whose password is there.
func putTransport(ctx context.Context, tx *db.Tx, t config.Transport) error {
	if name := t.PasswordSecret(); name != "" && config.CheckSecretName(name) == nil {
		there, err := tx.HasSecret(ctx, name)
		if err != nil {
			return err
		}
		if !there {
			return withHint(fmt.Errorf("transport %s: secret %s: %w", t.Name, name, errNoSuch), "mailproxy secret set %s", name)
		}
	}
	return tx.PutTransport(ctx, t)
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
		t := newTable(c.App.Writer, "TRANSPORT", "TO", "TLS", "USER", "TELL", "LIFE")
		for _, x := range s.Transports {
			to, tls := strings.Join(x.Hosts, " "), x.TLS
			if to == "" {
				to = "MX"
			}
			if x.Order == config.OrderRoundRobin {
				to += " (each in turn)"
			}
			if tls == "" {
				tls = config.TLSMay
			}
			t.row(x.Name, to, string(tls), x.User, string(x.Tell), x.QueueLife.String())
		}
		return t.flush()
	})
}

func transportHealth(c *cli.Context) error {
	if _, err := arguments(c, 0, 0); err != nil {
		return err
	}
	local, err := config.LoadLocal(configFile(c))
	if err != nil {
		return noNodeFile(err)
	}
	hops := []relay.HopState{}
	if err := web.Control(local.ControlSocket()).Hops(c.Context, &hops); err != nil {
		return err
	}
	if c.Bool("json") {
		return printJSON(c.App.Writer, hops)
	}
	t := newTable(c.App.Writer, "HOP", "TLS", "STATE", "LOOK", "CONNECTIONS", "REASON")
	for _, h := range hops {
		state, look, reason := "in reach", "-", ""
		if !h.Since.IsZero() {
			state, look, reason = "out of reach for "+age(time.Since(h.Since)), "now", h.Reason+": "+h.Error
			if wait := time.Until(h.Look); wait > 0 {
				look = "in " + age(wait)
			}
		}
		t.row(h.Hop, string(h.TLS), state, look, strconv.Itoa(h.Kept), reason)
	}
	return t.flush()
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
	if c.IsSet("order") {
		t.Order = config.Order(strings.ToLower(c.String("order")))
	}
	if c.IsSet("user") {
		if t.User = c.String("user"); t.User == "" {
			t.Password = ""
		}
	}
	if c.IsSet("password") {
		t.Password = c.String("password")
	}
	if c.IsSet("tell") {
		if t.Tell = config.Tell(strings.ToLower(c.String("tell"))); t.Tell == "none" {
			t.Tell = ""
		}
	}
	if life := c.String("queue-life"); c.IsSet("queue-life") {
		if life == "default" {
			life = ""
		}
		if err := t.QueueLife.UnmarshalText([]byte(life)); err != nil {
			return usagef("--queue-life: %v", err)
		}
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
