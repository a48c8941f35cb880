package main

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"

	"github.com/urfave/cli/v2"

	"mailproxy/config"
	"mailproxy/queue"
	"mailproxy/web"
)

// everything is the argument that means all items.
const everything = "ALL"

// maxRefused is how many items that an order was not done to are named.
const maxRefused = 10

// deedDone is what is said of an order.
var deedDone = map[queue.Deed]string{
	queue.PutOnHold: "on hold", queue.Free: "released", queue.Retry: "tried now", queue.Delete: "deleted", queue.Reroute: "routed", queue.Move: "moved",
}

// queueOrder makes the action of a command that gives an order.
func queueOrder(deed queue.Deed) cli.ActionFunc {
	return func(c *cli.Context) error {
		o, err := orderOf(c, deed)
		if err != nil {
			return err
		}
		nodes, err := queueNodes(c)
		if err == nil && deed == queue.Move {
			o.To, err = nodeOf(c, c.String("to-node"))
		}
		if err != nil {
			return err
		}
		if o.Deed == queue.Delete {
			if err := confirmDelete(c, nodes, o.Selection); err != nil {
				return err
			}
		}
		return giveOrder(c, nodes, o)
	}
}

// orderOf reads an order from the command line.
func orderOf(c *cli.Context, deed queue.Deed) (queue.Order, error) {
	o := queue.Order{Deed: deed, Who: cut(author().Who, maxWho)}
	args := c.Args().Slice()
	if deed == queue.Reroute && !c.Bool("usual") {
		if len(args) == 0 || slices.Equal(args, []string{everything}) {
			return o, usagef("queue route: TRANSPORT is missing, or --usual")
		}
		o.Transport, args = args[len(args)-1], args[:len(args)-1]
	}
	if deed == queue.Move && c.String("to-node") == "" {
		return o, usagef("queue move: --to-node wants a CID or name, as \"pmgcm status\" shows it")
	}
	named := !slices.Equal(args, []string{everything})
	if !named {
		args = nil
	}
	var err error
	if o.Selection, err = selection(c, args); err != nil {
		return o, err
	}
	if named && !o.Selection.Bounded() {
		return o, usagef("%s: which items? name them by ID, select them by flags, or say %s", commandName(c), everything)
	}
	return o, nil
}

// confirmDelete asks, with how many items it is about.
func confirmDelete(c *cli.Context, nodes *queueNodeList, s queue.Selection) error {
	if c.Bool("yes") {
		return nil
	}
	var mu sync.Mutex
	all := queue.Counted{}
	err := nodes.each(c.Context, func(ctx context.Context, n queueNode) error {
		counted, err := n.client.Queue(ctx, s, 0, nil)
		mu.Lock()
		defer mu.Unlock()
		addCounted(&all, counted)
		return err
	})
	if err != nil {
		return err
	}
	for _, away := range nodes.away {
		_, _ = fmt.Fprintf(c.App.ErrWriter, "mailproxy: %v\n", away)
	}
	nodes.away = nil // it is asked again
	if all.Matched == 0 {
		return nil // which the order itself says
	}
	question := fmt.Sprintf("delete %s of %s?", count(all.Matched, "item"), octets(all.Bytes))
	if all.Others > 0 {
		question = fmt.Sprintf("%d of them go to others, too. %s", all.Others, question)
	}
	return confirm(c, question)
}

// A refusal is an item that an order was not done to.
type refusal struct {
	Node config.CID `json:"node,omitempty"`
	web.Ordered
}

// giveOrder gives an order to all nodes and prints what came of it.
func giveOrder(c *cli.Context, nodes *queueNodeList, o queue.Order) error {
	result := struct {
		Items   int       `json:"items"`
		Refused []refusal `json:"refused"`
		more    int
	}{Refused: []refusal{}}
	var mu sync.Mutex
	missing := make(map[string]int) // on how many nodes an ID is not
	err := nodes.each(c.Context, func(ctx context.Context, n queueNode) error {
		return n.client.Order(ctx, o, func(d web.Ordered) error {
			mu.Lock()
			defer mu.Unlock()
			if d.Error == queue.ErrNoSuch.Error() {
				if missing[d.ID]++; missing[d.ID] < len(nodes.all) { // it is another node's
					return nil
				}
			}
			switch {
			case d.Error == "":
				result.Items++
			case len(result.Refused) < maxRefused || c.Bool("json"):
				result.Refused = append(result.Refused, refusal{n.cid, d})
			default:
				result.more++
			}
			return nil
		})
	})
	if p := (*web.ProblemError)(nil); errors.As(err, &p) && p.Usage() {
		return orderProblem(o, p)
	}
	var said error
	if err != nil && result.Items+len(result.Refused) == 0 {
		return err
	}
	if c.Bool("json") {
		said = printJSON(c.App.Writer, result)
	} else if result.Items > 0 || len(result.Refused) == 0 {
		_, said = fmt.Fprintf(c.App.Writer, "%s %s\n", count(result.Items, "item"), deedDone[o.Deed])
	}
	var refused []error
	for _, r := range result.Refused {
		refused = append(refused, fmt.Errorf("item %s: %w", r.ID, refusedError(r.Error)))
	}
	if result.more > 0 {
		refused = append(refused, fmt.Errorf("and %d more", result.more))
	}
	return errors.Join(errors.Join(refused...), nodes.ended(said, err))
}

func orderProblem(o queue.Order, p error) error {
	if o.Deed == queue.Reroute && strings.HasPrefix(p.Error(), queue.ErrNoTransport.Error()) {
		return withHint(p, `"mailproxy transport list" shows them`)
	}
	return p
}

// refusedError gives the sentinel that has a hint for what a daemon says of an item, where there is one.
func refusedError(text string) error {
	for _, err := range []error{queue.ErrNoSuch, queue.ErrBusy, queue.ErrComing, queue.ErrUnanswered, queue.ErrOnHold} {
		if err.Error() == text {
			return err
		}
	}
	return errors.New(text)
}

func queueFlush(c *cli.Context) error {
	if _, err := arguments(c, 0, 0); err != nil {
		return err
	}
	nodes, err := queueNodes(c)
	if err != nil {
		return err
	}
	return giveOrder(c, nodes, queue.Order{Deed: queue.Retry, Who: cut(author().Who, maxWho)})
}
