package main

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/urfave/cli/v2"

	"mailproxy/config"
	"mailproxy/mail"
	"mailproxy/queue"
)

func queueCommand() *cli.Command {
	const meant = "What is meant is named by ID, or selected by flags, all of which must hold; ALL is everything. An item is meant as a whole: " +
		"where --to is one of several recipients, the others are meant with it."
	order := func(name, usage, description string, more ...cli.Flag) *cli.Command {
		return &cli.Command{Name: name, Usage: usage, ArgsUsage: "ID...|ALL", Description: description, Flags: append(selectionFlags(), append(more, nodesFlags()...)...)}
	}
	with := func(c *cli.Command, action cli.ActionFunc) *cli.Command {
		c.Action = action
		return c
	}
	yes := &cli.BoolFlag{Name: "yes", Usage: "do not ask"}
	return &cli.Command{
		Name: "queue", Usage: "mail that waits, here or on another node",
		Description: "These commands ask the running daemons, not the database. With --node or --all they reach other nodes through the tunnel; one that " +
			"does not answer costs 2 s, is named, and makes the exit code 1. Every order is in the log of its node, with who gave it and each item's ID. " + meant,
		Subcommands: []*cli.Command{
			with(&cli.Command{Name: "summary", Usage: "count what waits, by next hop and age", Flags: append(selectionFlags(), nodesFlags()...),
				Description: "An item that waits for several next hops counts at each."}, queueSummary),
			with(&cli.Command{Name: "list", Usage: "show the items, the oldest first", ArgsUsage: "[ID...]", Flags: append(selectionFlags(), append([]cli.Flag{
				&cli.IntFlag{Name: "limit", Usage: "show `N` of each node at most, 0 all", DefaultText: "100; with --json all"}}, nodesFlags()...)...),
				Description: "NEXT is when it is tried next; \"on hold\" until an operator releases it, \"trying\" now, \"unanswered\" while its client has no " +
					"answer yet: that is not decided by you; \"kept\" where it was refused, but never verified, so that its sender is not told: it is " +
					"there until its life is over, and tried again only by retry, route or move."}, queueList),
			with(&cli.Command{Name: "show", Usage: "show one item: envelope, recipients with their last answers, header", ArgsUsage: "ID",
				Flags:       []cli.Flag{&cli.BoolFlag{Name: "content", Usage: "print the whole message instead, as it is sent"}, jsonFlag(), nodeFlag()},
				Description: "Of the header the first 64 kB."}, queueShow),
			with(&cli.Command{Name: "trace", Usage: "tell an item's story", ArgsUsage: "ID",
				Flags: []cli.Flag{&cli.StringFlag{Name: "log", Usage: "read log lines from this `FILE` instead of from journalctl"}, jsonFlag(), nodeFlag()},
				Description: "What the queue knows of it, and what this host's log has about it and its session: also of one that is not in the queue any " +
					"more. Of another node's item the log is there."}, queueTrace),
			with(order("hold", "have items wait until they are released", "They are not tried, also after a restart, and do not expire: their life stands "+
				"still meanwhile. What is being tried just now is waited for, 2 s at most."), queueOrder(queue.PutOnHold)),
			with(order("release", "end the hold of items, and try them now", "The time on hold is no part of their life."), queueOrder(queue.Free)),
			with(order("retry", "try items now", "What cannot be delivered goes on waiting as before."), queueOrder(queue.Retry)),
			with(order("delete", "throw items away", "Nobody gets a DSN.", yes), queueOrder(queue.Delete)),
			with(order("route", "send items by another transport from now on, and try them now",
				"The transport is the last argument: \"queue route --to example.test backup\". It stays so over a restart; where that transport is taken out "+
					"of the configuration, the items wait.",
				&cli.BoolFlag{Name: "usual", Usage: "by the usual way again; no transport is named then"}), queueOrder(queue.Reroute)),
			with(order("move", "give items to another node's queue",
				"Each is synced there before it is removed here, keeps its ID, and is due there at once; what is on hold stays so. Killed or cut in between, "+
					"an item may be in both queues, which the log names (move.cut, move.unsure): run it again.",
				&cli.StringFlag{Name: "to-node", Usage: "to the node with this `CID` or name"}), queueOrder(queue.Move)),
			{Name: "flush", Usage: "try all items now", Flags: nodesFlags(), Action: queueFlush,
				Description: "The same as \"queue retry ALL\"."},
		},
	}
}

func nodeFlag() cli.Flag {
	return &cli.StringFlag{Name: "node", Usage: "of the node with this `CID` or name"}
}

func nodesFlags() []cli.Flag {
	return []cli.Flag{nodeFlag(), &cli.BoolFlag{Name: "all", Usage: "of all nodes of the cluster, side by side"}, jsonFlag()}
}

func selectionFlags() []cli.Flag {
	return []cli.Flag{
		&cli.StringFlag{Name: "from", Usage: "whose sender is this `ADDRESS` or domain; <> is the null one"},
		&cli.StringFlag{Name: "to", Aliases: []string{"to-domain"}, Usage: "with a recipient of this `ADDRESS` or domain"},
		&cli.StringFlag{Name: "older", Usage: "that came at least this `TIME` ago: 90m, 2h, 3d"},
		&cli.StringFlag{Name: "reason", Usage: "whose last answer or error has this `TEXT` in it, or is of the class " + strings.Join(queue.Classes(), ", ")},
		&cli.BoolFlag{Name: "on-hold", Usage: "that are on hold"},
		&cli.BoolFlag{Name: "kept", Usage: "that are kept: refused, and the sender is not told"},
	}
}

// selection reads the flags, and IDs from args.
func selection(c *cli.Context, ids []string) (queue.Selection, error) {
	s := queue.Selection{IDs: ids, From: c.String("from"), To: c.String("to"), Reason: c.String("reason"), OnHold: c.Bool("on-hold"), Kept: c.Bool("kept")}
	if text := c.String("older"); text != "" {
		var err error
		if s.Older, err = config.ParseDuration(text); err != nil {
			return s, usagef("%s: --older: %v", commandName(c), err)
		}
	}
	if err := s.Check(); err != nil {
		return s, usagef("%s: %v", commandName(c), err)
	}
	return s, nil
}

func queueList(c *cli.Context) error {
	s, err := selection(c, c.Args().Slice())
	if err != nil {
		return err
	}
	limit := c.Int("limit")
	switch {
	case limit < 0:
		return usagef("queue list: --limit is at least 0")
	case limit == 0 && !c.IsSet("limit") && !c.Bool("json"):
		limit = 100
	case limit == 0:
		limit = -1
	}
	nodes, err := queueNodes(c)
	if err != nil {
		return err
	}
	var out itemPrinter
	if c.Bool("json") {
		out = &jsonItems{w: c.App.Writer}
	} else {
		out = &textItems{w: c.App.Writer, named: nodes.named}
	}
	var mu sync.Mutex
	all, answered := queue.Counted{}, false
	err = nodes.each(c.Context, func(ctx context.Context, n queueNode) error {
		counted, err := n.client.Queue(ctx, s, limit, func(i queue.Item) error {
			mu.Lock()
			defer mu.Unlock()
			return out.item(n, i)
		})
		mu.Lock()
		defer mu.Unlock()
		answered = answered || err == nil
		addCounted(&all, counted)
		return err
	})
	var said error
	if answered {
		said = out.end(all)
	}
	return nodes.ended(said, err)
}

func addCounted(all *queue.Counted, c queue.Counted) {
	all.Total += c.Total
	all.Matched += c.Matched
	all.Bytes += c.Bytes
	all.Others += c.Others
}

// An itemPrinter prints items as they come.
type itemPrinter interface {
	item(n queueNode, i queue.Item) error
	end(queue.Counted) error
}

// textRows is how many rows are put in columns together.
const textRows = 200

type textItems struct {
	w     io.Writer
	named bool
	t     *table
	rows  int // in t
	shown int
}

func (p *textItems) item(n queueNode, i queue.Item) error {
	head := []string{"ID", "SIZE", "AGE", "NEXT", "TRIES", "FROM", "TO", "LAST REPLY"}
	row := []string{i.ID, strconv.FormatInt(i.Size, 10), age(time.Since(i.Created)), nextAttempt(i), strconv.Itoa(i.Attempts), from(i.ReversePath),
		joinPaths(i.ForwardPaths), i.LastReply}
	if p.named {
		head, row = append([]string{"NODE"}, head...), append([]string{n.label()}, row...)
	}
	switch {
	case p.shown == 0:
		p.t = newTable(p.w, head...)
	case p.rows == textRows:
		if err := p.t.flush(); err != nil {
			return err
		}
		p.rows = 0
	}
	p.rows++
	p.shown++
	p.t.row(row...)
	return nil
}

func (p *textItems) end(c queue.Counted) error {
	if p.t != nil {
		if err := p.t.flush(); err != nil {
			return err
		}
	}
	var err error
	switch {
	case c.Total == 0:
		_, err = fmt.Fprintln(p.w, "queue is empty")
	case c.Matched == 0:
		_, err = fmt.Fprintf(p.w, "none of %s is meant\n", count(c.Total, "item"))
	case c.Matched > p.shown:
		_, err = fmt.Fprintf(p.w, "and %d more; \"mailproxy queue summary\" counts them, --limit 0 shows all\n", c.Matched-p.shown)
	}
	return err
}

// jsonItems writes one document, item by item.
type jsonItems struct {
	w     io.Writer
	begun bool
}

// An ownedItem is an item and the node that it is on.
type ownedItem struct {
	Node config.CID `json:"node,omitempty"`
	queue.Item
}

func (p *jsonItems) item(n queueNode, i queue.Item) error {
	b, err := json.Marshal(ownedItem{n.cid, i})
	if err != nil {
		return err
	}
	lead := "{\n  \"items\": [\n    "
	if p.begun {
		lead = ",\n    "
	}
	p.begun = true
	_, err = fmt.Fprintf(p.w, "%s%s", lead, b)
	return err
}

func (p *jsonItems) end(c queue.Counted) error {
	lead := "{\n  \"items\": []"
	if p.begun {
		lead = "\n  ]"
	}
	_, err := fmt.Fprintf(p.w, "%s,\n  \"matched\": %d,\n  \"total\": %d\n}\n", lead, c.Matched, c.Total)
	return err
}

func queueSummary(c *cli.Context) error {
	s, err := selection(c, nil)
	if err == nil {
		_, err = arguments(c, 0, 0)
	}
	if err != nil {
		return err
	}
	nodes, err := queueNodes(c)
	if err != nil {
		return err
	}
	type owned struct {
		Node config.CID `json:"node,omitempty"`
		Name string     `json:"name,omitempty"`
		queue.Summary
	}
	answers := make([]*owned, len(nodes.all))
	err = nodes.each(c.Context, func(ctx context.Context, n queueNode) error {
		summary, err := n.client.QueueSummary(ctx, s)
		if err == nil {
			answers[n.index] = &owned{n.cid, n.name, summary}
		}
		return err
	})
	var said error
	if c.Bool("json") && !c.Bool("all") && answers[0] != nil {
		said = printJSON(c.App.Writer, answers[0])
	} else if c.Bool("json") {
		list := []*owned{}
		for _, a := range answers {
			if a != nil {
				list = append(list, a)
			}
		}
		said = printJSON(c.App.Writer, map[string]any{"nodes": list})
	} else {
		for i, a := range answers {
			if a != nil && said == nil {
				said = printSummary(c.App.Writer, nodes.all[i], nodes.named, a.Summary)
			}
		}
	}
	return nodes.ended(said, err)
}

func printSummary(w io.Writer, n queueNode, named bool, s queue.Summary) error {
	if named {
		if _, err := fmt.Fprintf(w, "%s: ", n.label()); err != nil {
			return err
		}
	}
	if s.Total == 0 {
		_, err := fmt.Fprintln(w, "queue is empty")
		return err
	}
	text := fmt.Sprintf("%s of %s", count(s.Matched, "item"), octets(s.Bytes))
	if s.Matched < s.Total {
		text += fmt.Sprintf(", of %d in all", s.Total)
	}
	if s.Matched > 0 {
		text += fmt.Sprintf("; the oldest came %s ago; %d on hold", age(time.Since(s.Oldest)), s.OnHold)
		if s.Kept > 0 {
			text += fmt.Sprintf(", %d kept", s.Kept)
		}
	}
	if _, err := fmt.Fprintln(w, text); err != nil || s.Matched == 0 {
		return err
	}
	head := []string{"ITEMS", "ON HOLD", "SIZE"}
	for _, a := range queue.Ages {
		head = append(head, "<"+config.FormatDuration(a))
	}
	t := newTable(w, append(head, "OLDER", "OLDEST", "NEXT HOP", "LAST REPLY")...)
	for _, h := range s.Hops {
		row := []string{strconv.Itoa(h.Items), strconv.Itoa(h.OnHold), octets(h.Bytes)}
		for _, n := range h.Ages {
			row = append(row, strconv.Itoa(n))
		}
		if h.Hop == "" {
			h.Hop = "all others"
		}
		t.row(append(row, age(time.Since(h.Oldest)), h.Hop, h.LastReply)...)
	}
	return t.flush()
}

// octets gives a size for people: 950, 4.1kB, 1.2GB.
func octets(n int64) string {
	const units = "kMGT"
	f := float64(n)
	if n < 1000 {
		return strconv.FormatInt(n, 10)
	}
	unit := -1
	for f >= 1000 && unit < len(units)-1 {
		f /= 1024
		unit++
	}
	return fmt.Sprintf("%.1f%cB", f, units[unit])
}

func queueShow(c *cli.Context) error {
	args, err := arguments(c, 1, 1)
	if err != nil {
		return err
	}
	nodes, err := queueNodes(c)
	if err != nil {
		return err
	}
	client := nodes.all[0].client
	if c.Bool("content") {
		if err := client.Content(c.Context, args[0], c.App.Writer); err != nil {
			return fmt.Errorf("item %s: %w", args[0], err)
		}
		return nil
	}
	story, err := client.Item(c.Context, args[0])
	if err != nil {
		return fmt.Errorf("item %s: %w", args[0], err)
	}
	if c.Bool("json") {
		return printJSON(c.App.Writer, story)
	}
	i := story.Item
	t := newTable(c.App.Writer, "item", i.ID)
	t.row("size", strconv.FormatInt(i.Size, 10))
	t.row("from", from(i.ReversePath))
	for _, r := range story.Recipients {
		t.row("to", r.ForwardPath.String()+recipientText(r))
	}
	t.row("client", cmpText(i.Client, "made here"))
	t.row("helo", story.Envelope.Helo)
	t.row("session", i.Session)
	if i.Via != "" {
		t.row("ordered by", i.Via)
	}
	t.row("transport", i.Transport)
	t.row("since", i.Created.UTC().Format(time.RFC3339))
	t.row("next", nextAttempt(i))
	if i.OnHold != nil {
		t.row("on hold since", i.OnHold.Since.UTC().Format(time.RFC3339)+", by "+i.OnHold.By)
	}
	if !story.Expires.IsZero() {
		t.row("given up", story.Expires.UTC().Format(time.RFC3339))
	}
	t.row("tries", strconv.Itoa(i.Attempts))
	t.row("last reply", i.LastReply)
	if err := t.flush(); err != nil {
		return err
	}
	_, err = fmt.Fprintln(c.App.Writer)
	for line := range strings.SplitSeq(strings.TrimRight(story.Header, "\r\n"), "\n") {
		_, err = fmt.Fprintln(c.App.Writer, clean(strings.TrimRight(line, "\r")))
	}
	return err
}

func cmpText(text, otherwise string) string {
	if text == "" {
		return otherwise
	}
	return text
}

// recipientText is what became of a recipient so far, behind its address.
func recipientText(r queue.Recipient) string {
	switch {
	case r.Done:
		return "  delivered, or reported to the sender"
	case r.Reply == "":
		return ""
	}
	return fmt.Sprintf("  %s (%s at %s)", r.Reply, cmpText(r.Class, "answered"), cmpText(r.Hop, "no host"))
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
	case i.Unanswered:
		return "unanswered"
	case i.OnHold != nil:
		return "on hold"
	case i.Busy:
		return "trying"
	case i.Kept:
		return "kept"
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
