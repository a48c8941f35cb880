package main

import (
	"fmt"
	"io"
	"strconv"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/urfave/cli/v2"

	"mailproxy/cluster"
	"mailproxy/db"
)

func journalCommand() *cli.Command {
	yes := func() cli.Flag { return &cli.BoolFlag{Name: "yes", Aliases: []string{"y"}, Usage: "do not ask"} }
	return &cli.Command{
		Name:  "journal",
		Usage: "commits that were set aside on this node",
		Description: "A commit that only this node had when another master took over is not lost: it is set aside here, and status names it until it is " +
			"applied or dropped. So are rows that were changed by hand, when a push or sync overwrites them.",
		Subcommands: []*cli.Command{
			{Name: "list", Usage: "one line a commit", Action: listJournal,
				Flags:       []cli.Flag{&cli.BoolFlag{Name: "all", Usage: "those too that were applied or dropped"}, jsonFlag()},
				Description: "Shows each commit's number, when and by whom it was made, its position, and the command."},
			{Name: "show", Usage: "one commit with every row that it changed", ArgsUsage: "N", Flags: []cli.Flag{jsonFlag()}, Action: showJournal,
				Description: "N is the number that list shows. Old rows stand behind -, new rows behind +; secrets are left out."},
			{Name: "diff", Usage: "what one commit would change in today's configuration", ArgsUsage: "N", Flags: []cli.Flag{jsonFlag()}, Action: diffJournal,
				Description: "Compares with the configuration that this node has now. Where a row was changed since, that shows."},
			{Name: "apply", Usage: "enter one commit again", ArgsUsage: "N", Flags: []cli.Flag{yes()}, Action: applyJournal,
				Description: "Shows the difference, asks, and commits it on the master, as any change of the configuration. Rows of the cluster itself and " +
					"secrets are not entered again: it names them, and refuses a commit of nothing else."},
			{Name: "drop", Usage: "forget one commit", ArgsUsage: "N", Action: dropJournal,
				Flags: []cli.Flag{&cli.StringFlag{Name: "reason", Usage: "`TEXT`; it stays in the history"}},
				Description: "The entry is not named in status any more. list --all still shows it, with who dropped it and why; so does " +
					"`mailproxy config history` on every node."},
		},
	}
}

func listJournal(c *cli.Context) error {
	if _, err := arguments(c); err != nil {
		return err
	}
	return withOperator(c, "", func(o *cluster.Operator) error {
		all, err := o.Journal(c.Context, c.Bool("all"))
		if err != nil {
			return err
		}
		if c.Bool("json") {
			if all == nil {
				all = []db.JournalEntry{}
			}
			return printJSON(c.App.Writer, all)
		}
		if len(all) == 0 {
			_, err := fmt.Fprintln(c.App.Writer, "the journal is empty")
			return err
		}
		w := tabwriter.NewWriter(c.App.Writer, 0, 8, 2, ' ', 0)
		_, _ = fmt.Fprintln(w, "N\tAT\tWHO\tPOSITION\tROWS\tCOMMAND\tOUTCOME")
		for _, e := range all {
			_, _ = fmt.Fprintf(w, "%d\t%s\t%s\t%v/%d\t%d\t%s\t%s\n", e.ID, e.At.UTC().Format(time.DateTime), printable(e.Who), e.Epoch, e.Serial,
				int64(len(e.Changes))+e.Omitted, orDash(printable(e.Command)), outcome(e))
		}
		return w.Flush()
	})
}

// outcome is what became of an entry: "dropped by anna: an accident".
func outcome(e db.JournalEntry) string {
	if e.Outcome == "" {
		return "open"
	}
	return printable(fmt.Sprintf("%s by %s: %s", e.Outcome, e.ClosedBy, orDash(e.Reason)))
}

// entryNumber reads N.
func entryNumber(c *cli.Context) (int64, error) {
	args, err := arguments(c, "N")
	if err != nil {
		return 0, err
	}
	id, err := strconv.ParseInt(args[0], 10, 64)
	if err != nil {
		return 0, usagef("journal %s: %q is no number", c.Command.Name, args[0])
	}
	return id, nil
}

func diffJournal(c *cli.Context) error {
	id, err := entryNumber(c)
	if err != nil {
		return err
	}
	return withOperator(c, "", func(o *cluster.Operator) error {
		p, err := o.JournalDiff(c.Context, id)
		if err != nil {
			return err
		}
		if c.Bool("json") {
			return printJSON(c.App.Writer, p)
		}
		return printPlan(c.App.Writer, p)
	})
}

func printPlan(w io.Writer, p cluster.JournalPlan) error {
	var b strings.Builder
	for _, d := range p.Differences {
		fmt.Fprintln(&b, printable(d.String()))
	}
	if len(p.Differences)+len(p.Left) == 0 {
		fmt.Fprintln(&b, "today's configuration has it all")
	}
	if len(p.Left) > 0 {
		fmt.Fprintf(&b, "not entered again: rows of %s\n", strings.Join(p.Left, ", "))
	}
	_, err := io.WriteString(w, b.String())
	return err
}

func applyJournal(c *cli.Context) error {
	id, err := entryNumber(c)
	if err != nil {
		return err
	}
	return withOperator(c, fmt.Sprintf("pmgcm journal apply %d", id), func(o *cluster.Operator) error {
		p, err := o.JournalDiff(c.Context, id)
		if err != nil {
			return err
		}
		if err := printPlan(c.App.Writer, p); err != nil {
			return err
		}
		if !c.Bool("yes") && p.Entry.Outcome == "" && (len(p.Differences) > 0 || len(p.Left) == 0) && !asked(c, "apply %d changes", len(p.Differences)) {
			return cluster.ErrNotConfirmed
		}
		at, err := o.JournalApply(c.Context, p)
		if err != nil {
			return err
		}
		_, err = fmt.Fprintf(c.App.Writer, "journal entry %d applied (configuration %v)\n", id, at)
		return err
	})
}

func dropJournal(c *cli.Context) error {
	id, err := entryNumber(c)
	if err != nil {
		return err
	}
	reason := strings.TrimSpace(c.String("reason"))
	if reason == "" {
		return usagef("journal drop: --reason is missing")
	}
	return withOperator(c, fmt.Sprintf("pmgcm journal drop %d", id), func(o *cluster.Operator) error {
		if err := o.JournalDrop(c.Context, id, reason); err != nil {
			return err
		}
		_, err := fmt.Fprintf(c.App.Writer, "journal entry %d dropped\n", id)
		return err
	})
}

func showJournal(c *cli.Context) error {
	id, err := entryNumber(c)
	if err != nil {
		return err
	}
	return withOperator(c, "", func(o *cluster.Operator) error {
		e, err := o.JournalEntry(c.Context, id)
		if err != nil {
			return err
		}
		if c.Bool("json") {
			return printJSON(c.App.Writer, e)
		}
		return printEntry(c.App.Writer, e)
	})
}

func printEntry(w io.Writer, e db.JournalEntry) error {
	var b strings.Builder
	fmt.Fprintf(&b, "commit %v/%d, made %s UTC by %s on node %d\n", e.Epoch, e.Serial, e.At.UTC().Format(time.DateTime), printable(e.Who), e.Node)
	fmt.Fprintf(&b, "command: %s\n", orDash(printable(e.Command)))
	fmt.Fprintf(&b, "set aside %s UTC by epoch %v\n", e.SetAsideAt.UTC().Format(time.DateTime), e.By)
	if e.Outcome != "" {
		fmt.Fprintf(&b, "%s UTC: %s\n", e.ClosedAt.UTC().Format(time.DateTime), outcome(e))
	}
	for _, ch := range e.Changes {
		fmt.Fprintf(&b, "%s %s %s\n", ch.Op, ch.Table, printable(string(ch.Key)))
		if len(ch.Old) > 0 && string(ch.Old) != "null" {
			fmt.Fprintf(&b, "  - %s\n", printable(string(ch.Old)))
		}
		if len(ch.New) > 0 && string(ch.New) != "null" {
			fmt.Fprintf(&b, "  + %s\n", printable(string(ch.New)))
		}
	}
	_, err := io.WriteString(w, b.String())
	return err
}

func orDash(s string) string {
	if s == "" {
		return "-"
	}
	return s
}

// printable makes what came from elsewhere safe to print on one line.
func printable(s string) string {
	return strings.Map(func(r rune) rune {
		if r < ' ' || r >= 0x7f && r < 0xa0 {
			return ' '
		}
		return r
	}, s)
}
