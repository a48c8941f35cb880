package main

import (
	"context"
	"fmt"
	"strconv"
	"strings"
	"time"

	"github.com/urfave/cli/v2"

	"mailproxy/config"
	"mailproxy/mail"
	"mailproxy/queue"
	"mailproxy/web"
)

func queueCommand() *cli.Command {
	return &cli.Command{
		Name: "queue", Usage: "mail that waits on this node",
		Description: "These commands ask the running daemon, not the database.",
		Subcommands: []*cli.Command{
			{Name: "list", Usage: "show the items", Flags: []cli.Flag{jsonFlag()}, Action: queueList, Description: "At most 10,000 of them."},
			{Name: "show", Usage: "show one item and its header", ArgsUsage: "ID", Flags: []cli.Flag{jsonFlag()}, Action: queueShow,
				Description: "The body is not shown."},
			{Name: "flush", Usage: "try all items now", Flags: []cli.Flag{jsonFlag()}, Action: queueFlush,
				Description: "What cannot be delivered goes on waiting as before."},
			{Name: "delete", Usage: "throw an item away", ArgsUsage: "ID...", Action: queueDelete, Description: "Nobody gets a DSN."},
		},
	}
}

// askDaemon runs do with a client of the daemon's control socket.
func askDaemon(c *cli.Context, do func(ctx context.Context, client *web.Client) error) error {
	local, err := config.LoadLocal(configFile(c))
	if err != nil {
		return noNodeFile(err)
	}
	return do(c.Context, web.Control(local.ControlSocket()))
}

func queueList(c *cli.Context) error {
	if _, err := arguments(c, 0, 0); err != nil {
		return err
	}
	return askDaemon(c, func(ctx context.Context, client *web.Client) error {
		list, err := client.Queue(ctx)
		if err != nil {
			return err
		}
		if c.Bool("json") {
			return printJSON(c.App.Writer, list)
		}
		return printQueue(c, list)
	})
}

func printQueue(c *cli.Context, list web.QueueList) error {
	if list.Total == 0 {
		_, err := fmt.Fprintln(c.App.Writer, "queue is empty")
		return err
	}
	t := newTable(c.App.Writer, "ID", "SIZE", "AGE", "NEXT", "TRIES", "FROM", "TO", "LAST REPLY")
	for _, i := range list.Items {
		t.row(i.ID, strconv.FormatInt(i.Size, 10), age(time.Since(i.Created)), nextAttempt(i), strconv.Itoa(i.Attempts),
			from(i.ReversePath), joinPaths(i.ForwardPaths), i.LastReply)
	}
	if err := t.flush(); err != nil {
		return err
	}
	if rest := list.Total - len(list.Items); rest > 0 {
		_, err := fmt.Fprintf(c.App.Writer, "and %d more\n", rest)
		return err
	}
	return nil
}

func queueShow(c *cli.Context) error {
	args, err := arguments(c, 1, 1)
	if err != nil {
		return err
	}
	return askDaemon(c, func(ctx context.Context, client *web.Client) error {
		item, err := client.Item(ctx, args[0])
		if err != nil {
			return fmt.Errorf("item %s: %w", args[0], err)
		}
		if c.Bool("json") {
			return printJSON(c.App.Writer, item)
		}
		i := item.Item
		t := newTable(c.App.Writer, "item", i.ID)
		t.row("size", strconv.FormatInt(i.Size, 10))
		t.row("from", from(i.ReversePath))
		for _, p := range i.ForwardPaths {
			t.row("to", p.String())
		}
		t.row("transport", i.Transport)
		t.row("since", i.Created.UTC().Format(time.RFC3339))
		t.row("next", nextAttempt(i))
		t.row("tries", strconv.Itoa(i.Attempts))
		t.row("last reply", i.LastReply)
		if err := t.flush(); err != nil {
			return err
		}
		_, err = fmt.Fprintln(c.App.Writer)
		for line := range strings.SplitSeq(strings.TrimRight(item.Header, "\r\n"), "\n") {
			_, err = fmt.Fprintln(c.App.Writer, clean(strings.TrimRight(line, "\r")))
		}
		return err
	})
}

func queueFlush(c *cli.Context) error {
	if _, err := arguments(c, 0, 0); err != nil {
		return err
	}
	return askDaemon(c, func(ctx context.Context, client *web.Client) error {
		n, err := client.Flush(ctx)
		if err != nil {
			return err
		}
		if c.Bool("json") {
			return printJSON(c.App.Writer, web.Flushed{Items: n})
		}
		_, err = fmt.Fprintf(c.App.Writer, "%d items are tried now\n", n)
		return err
	})
}

func queueDelete(c *cli.Context) error {
	args, err := arguments(c, 1, -1)
	if err != nil {
		return err
	}
	return askDaemon(c, func(ctx context.Context, client *web.Client) error {
		for _, id := range args {
			if err := client.Delete(ctx, id); err != nil {
				return fmt.Errorf("item %s: %w", id, err)
			}
			if _, err := fmt.Fprintf(c.App.Writer, "item %s deleted\n", id); err != nil {
				return err
			}
		}
		return nil
	})
}

func from(p mail.Path) string { return "<" + p.String() + ">" }

func joinPaths(paths []mail.Path) string {
	words := make([]string, len(paths))
	for i, p := range paths {
		words[i] = p.String()
	}
	if len(words) > 3 {
		words = append(words[:2], fmt.Sprintf("and %d more", len(paths)-2))
	}
	return strings.Join(words, " ")
}

func nextAttempt(i queue.Item) string {
	wait := time.Until(i.Next)
	switch {
	case i.Held:
		return "held"
	case wait <= 0:
		return "now"
	}
	return "in " + age(wait)
}

// age gives a length of time in its largest unit.
func age(d time.Duration) string {
	switch {
	case d < time.Minute:
		return fmt.Sprintf("%ds", max(d, 0)/time.Second)
	case d < time.Hour:
		return fmt.Sprintf("%dm", d/time.Minute)
	case d < 48*time.Hour:
		return fmt.Sprintf("%dh", d/time.Hour)
	}
	return fmt.Sprintf("%dd", d/(24*time.Hour))
}
