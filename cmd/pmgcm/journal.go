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
	return &cli.Command{
		Name:  "journal",
		Usage: "commits that were set aside on this node",
		Description: "A commit that only this node had when another master took over is not lost: it is set aside here, and status names it. Look " +
			"at it, and enter on the master what is still wanted.",
		Subcommands: []*cli.Command{
			{Name: "list", Usage: "one line a commit", Flags: []cli.Flag{jsonFlag()}, Action: listJournal,
				Description: "Shows each commit's number, when and by whom it was made, its position, and the command."},
			{Name: "show", Usage: "one commit with every row that it changed", ArgsUsage: "N", Flags: []cli.Flag{jsonFlag()}, Action: showJournal,
				Description: "N is the number that list shows. Old rows stand behind -, new rows behind +; secrets are left out."},
		},
	}
}

func listJournal(c *cli.Context) error {
	if _, err := arguments(c); err != nil {
		return err
	}
	return withOperator(c, "", func(o *cluster.Operator) error {
		all, err := o.Journal(c.Context)
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
		_, _ = fmt.Fprintln(w, "N\tAT\tWHO\tPOSITION\tROWS\tCOMMAND")
		for _, e := range all {
			_, _ = fmt.Fprintf(w, "%d\t%s\t%s\t%v/%d\t%d\t%s\n", e.ID, e.At.UTC().Format(time.DateTime), printable(e.Who), e.Epoch, e.Serial, len(e.Changes),
				orDash(printable(e.Command)))
		}
		return w.Flush()
	})
}

func showJournal(c *cli.Context) error {
	args, err := arguments(c, "N")
	if err != nil {
		return err
	}
	id, err := strconv.ParseInt(args[0], 10, 64)
	if err != nil {
		return usagef("journal show: %q is no number", args[0])
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
