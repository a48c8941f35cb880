package main

import (
	"fmt"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/urfave/cli/v2"

	"mailproxy/cluster"
)

func caCommand() *cli.Command {
	return &cli.Command{
		Name:  "ca",
		Usage: "the CAs that all nodes trust, and the nodes' certificates",
		Description: "Certificates are renewed when two thirds of their life are over, and when the master has another CA, without anybody's help. Mail " +
			"does not need them.",
		Subcommands: []*cli.Command{
			{Name: "show", Usage: "fingerprints and when they end", Flags: []cli.Flag{jsonFlag()}, Action: showCAs,
				Description: "Asks every node for its certificate. A CA does not end by itself: it is retired."},
			{Name: "add", Usage: "give the master another CA", Action: addCA,
				Description: "Run it on the master. The new CA's key stays on it; it signs when a majority and every node in reach trust it, and the nodes " +
					"have new certificates within a minute."},
			{Name: "retire", Usage: "trust a CA no more", ArgsUsage: "FINGERPRINT", Action: retireCA,
				Flags: []cli.Flag{&cli.BoolFlag{Name: "force", Usage: "also where a node may still have a certificate of it; that node is cut off"}},
				Description: "Run it on the master, after a promote or `pmgcm ca add`, when no node has a certificate of it any more. FINGERPRINT as show has " +
					"it."},
		},
	}
}

func showCAs(c *cli.Context) error {
	if _, err := arguments(c); err != nil {
		return err
	}
	return withOperator(c, "", func(o *cluster.Operator) error {
		all, err := o.CAs(c.Context)
		if err != nil {
			return err
		}
		if c.Bool("json") {
			return printJSON(c.App.Writer, all)
		}
		w := tabwriter.NewWriter(c.App.Writer, 0, 0, 2, ' ', 0)
		_, _ = fmt.Fprintln(w, "CA\tMADE BY\tMADE\tENDS\t")
		for _, ca := range all.CAs {
			signs := ""
			if ca.Signs {
				signs = "signs"
			}
			_, _ = fmt.Fprintf(w, "%s\tnode %d\t%s\tnever\t%s\n", ca.Fingerprint, ca.CID, ca.CreatedAt.UTC().Format(time.DateOnly), signs)
		}
		if err := w.Flush(); err != nil { // the two have columns of their own
			return err
		}
		_, _ = fmt.Fprintln(w, "\nNODE\tKEY\tENDS\tSIGNED BY\t")
		for _, n := range all.Nodes {
			if n.Certificate == nil {
				_, _ = fmt.Fprintf(w, "%s(%d)\tdoes not answer\t\t\t\n", n.Name, n.CID)
				continue
			}
			_, _ = fmt.Fprintf(w, "%s(%d)\t%s\t%s\t%s\t\n", n.Name, n.CID, n.Certificate.Fingerprint, n.Certificate.Expires.UTC().Format(time.DateOnly),
				n.Certificate.CA)
		}
		return w.Flush()
	})
}

func addCA(c *cli.Context) error {
	if _, err := arguments(c); err != nil {
		return err
	}
	return withOperator(c, "pmgcm ca add", func(o *cluster.Operator) error {
		ca, missing, err := o.AddCA(c.Context)
		if err != nil {
			return err
		}
		_, _ = fmt.Fprintf(c.App.Writer, "%s signs from now on\n", ca.Fingerprint)
		if len(missing) > 0 {
			_, _ = fmt.Fprintf(c.App.Writer, "not told yet (they learn of it when they are back): %s\n", names(missing))
		}
		return nil
	})
}

func retireCA(c *cli.Context) error {
	args, err := arguments(c, "FINGERPRINT")
	if err != nil {
		return err
	}
	if !strings.HasPrefix(args[0], "SHA256:") {
		return usagef("ca retire: a fingerprint begins with SHA256:")
	}
	f := cluster.Careful
	if c.Bool("force") {
		f = cluster.Forced
	}
	return withOperator(c, "pmgcm ca retire "+args[0], func(o *cluster.Operator) error {
		if err := o.RetireCA(c.Context, args[0], f); err != nil {
			return err
		}
		_, err := fmt.Fprintf(c.App.Writer, "%s is trusted no more\n", args[0])
		return err
	})
}

func updateFingerprintsCommand() *cli.Command {
	return &cli.Command{
		Name:    "update-fingerprints",
		Aliases: []string{"update_fingerprints"},
		Usage:   "nothing is to be done: nodes know each other's keys",
		Description: "PMG has this command for API certificates that were changed. Here each node's key is in the member list that all nodes have, and " +
			"certificates renew themselves; `pmgcm ca show` shows them.",
		Action: func(c *cli.Context) error {
			if _, err := arguments(c); err != nil {
				return err
			}
			_, err := fmt.Fprintln(c.App.Writer, "nothing to do: every node has the others' keys, and certificates renew themselves")
			return err
		},
	}
}
