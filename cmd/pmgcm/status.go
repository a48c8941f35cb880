package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"strings"
	"time"

	"github.com/urfave/cli/v2"
	"golang.org/x/term"

	"mailproxy/cluster"
)

// statusHeader is PMG's, to the letter.
const statusHeader = "NAME(CID)--------------IPADDRESS----ROLE-STATE---------UPTIME---LOAD----MEM---DISK"

func statusCommand() *cli.Command {
	return &cli.Command{
		Name:  "status",
		Usage: "show all nodes, and what is wrong",
		Description: "Asks every node side by side, each for 2 s at most; a node that does not answer is a row with ERROR. STATE is A for a node in " +
			"sync with the master and S for one that is behind, drifted, stale, joining or draining; --long and --json have the word. Under the table " +
			"stands what each node knows to be wrong, with the remedy; of a node in no cluster that alone. Exit code 3 when not every node is in sync.\n\n" +
			"A node whose rows were changed by hand shows as drifted within a minute, with --verify at once; `pmgcm sync` on the master, or " +
			"`pmgcm sync --pull` on that node, puts them right.",
		Flags: []cli.Flag{
			jsonFlag(),
			&cli.BoolFlag{Name: "long", Aliases: []string{"l"}, Usage: "everything that is known of each node"},
			&cli.BoolFlag{Name: "wait", Usage: "wait until every node is in sync, at most for --timeout"},
			&cli.DurationFlag{Name: "timeout", Usage: "how long --wait waits, `60s`", Value: waitTimeout},
			&cli.BoolFlag{Name: "watch", Usage: "show it again every 2 s, until interrupted"},
			&cli.BoolFlag{Name: "verify", Usage: "let every node recompute its digest from the rows first (slow with millions of rows)"},
			&cli.BoolFlag{Name: "list_single_node", Aliases: []string{"list-single-node"}, Usage: "accepted as PMG has it", Hidden: true},
		},
		Action: func(c *cli.Context) error {
			if _, err := arguments(c); err != nil {
				return err
			}
			if err := statusFlags(c); err != nil {
				return err
			}
			return withOperator(c, "", func(o *cluster.Operator) error {
				if c.Bool("watch") {
					return watchStatus(c, o)
				}
				ask := o.Status
				if c.Bool("wait") {
					ask = func(ctx context.Context, p cluster.StatusParams) (cluster.Report, error) {
						return o.WaitInSync(ctx, p, c.Duration("timeout"))
					}
				}
				r, err := ask(c.Context, cluster.StatusParams{Verify: c.Bool("verify")})
				if err != nil {
					return errors.Join(printAlone(c, r), err)
				}
				if err = printStatus(c, r); err == nil && !r.InSync {
					return &shownError{cluster.ErrNotInSync}
				}
				return err
			})
		},
	}
}

// printAlone writes what is wrong with a node in no cluster.
func printAlone(c *cli.Context, r cluster.Report) error {
	if c.Bool("json") && len(r.Rows) > 0 {
		return printJSON(c.App.Writer, r)
	}
	var b strings.Builder
	for _, row := range r.Rows {
		for _, p := range row.Problems {
			writeProblem(&b, row.Name+": ", p)
		}
	}
	_, err := io.WriteString(c.App.Writer, b.String())
	return err
}

// Bounds of waiting and watching.
const (
	waitTimeout = time.Minute
	maxWait     = 24 * time.Hour
	watchEvery  = 2 * time.Second
)

func statusFlags(c *cli.Context) error {
	switch {
	case c.Bool("wait") && c.Bool("watch"):
		return usagef("status: --wait and --watch do not go together")
	case c.IsSet("timeout") && !c.Bool("wait"):
		return usagef("status: --timeout needs --wait")
	case c.Duration("timeout") <= 0 || c.Duration("timeout") > maxWait:
		return usagef("status: --timeout must be above 0 and at most 24h")
	}
	return nil
}

func printStatus(c *cli.Context, r cluster.Report) error {
	switch {
	case c.Bool("json"):
		return printJSON(c.App.Writer, r)
	case c.Bool("long"):
		return printLong(c.App.Writer, r, onTerminal(c.App.Writer))
	}
	return printTable(c.App.Writer, r)
}

// clearScreen puts the cursor to the upper left and wipes what is below (ECMA-48 CUP, ED).
const clearScreen = "\x1b[H\x1b[J"

// watchStatus prints the status until it is interrupted, which is its end and no failure. What goes wrong on the way is printed too.
func watchStatus(c *cli.Context, o *cluster.Operator) error {
	for c.Context.Err() == nil {
		r, err := o.Status(c.Context, cluster.StatusParams{Verify: c.Bool("verify")})
		if c.Context.Err() != nil {
			break
		}
		if onTerminal(c.App.Writer) {
			_, _ = io.WriteString(c.App.Writer, clearScreen)
		}
		if err != nil {
			_ = report(c.App.ErrWriter, err)
		} else if err := printStatus(c, r); err != nil {
			return err // nobody reads any more
		}
		select {
		case <-c.Context.Done():
		case <-time.After(watchEvery):
		}
	}
	return nil
}

// onTerminal says whether a person sees what is written, at once.
func onTerminal(w io.Writer) bool {
	f, ok := w.(*os.File)
	return ok && term.IsTerminal(int(f.Fd()))
}

// printTable writes PMG's table, and what is wrong under it.
func printTable(w io.Writer, r cluster.Report) error {
	var b strings.Builder
	b.WriteString(statusHeader + "\n")
	for _, row := range r.Rows {
		b.WriteString(tableRow(row) + "\n")
	}
	first := true
	for _, row := range r.Rows {
		for _, p := range append(notes(row), row.Problems...) {
			if first {
				b.WriteString("\n")
				first = false
			}
			writeProblem(&b, fmt.Sprintf("%s(%d): ", row.Name, row.CID), p)
		}
	}
	_, err := io.WriteString(w, b.String())
	return err
}

const keptRemedy = "`mailproxy queue list --kept` there shows them; `mailproxy queue retry --kept` where the refusal was a mistake, " +
	"`mailproxy queue delete --kept` where it was not"

// notes are what to know of a node that is no problem: it takes no mail, since somebody wants it so, or has mail that is kept, which ends by
// itself. Each says how to change that.
func notes(row cluster.Row) (all []cluster.Problem) {
	if row.Error != "" {
		return nil
	}
	if row.Draining != nil {
		all = append(all, cluster.Problem{
			What: fmt.Sprintf("draining since %s UTC by %s, %d sessions left", row.Draining.Since.UTC().Format(time.DateTime), row.Draining.By,
				row.Draining.Sessions),
			Remedy: fmt.Sprintf("`pmgcm undrain` there, or `pmgcm undrain %d` on the master", row.CID),
		})
	}
	if row.Kept > 0 {
		all = append(all, cluster.Problem{
			What:   counted(row.Kept, "queued item") + " kept: refused by the next hop, and the sender may be forged, so nobody is told; each ends with its life",
			Remedy: keptRemedy,
		})
	}
	return all
}

func writeProblem(b *strings.Builder, prefix string, p cluster.Problem) {
	fmt.Fprintf(b, "%s%s\n", prefix, p.What)
	if p.Remedy != "" {
		fmt.Fprintf(b, "  remedy: %s\n", p.Remedy)
	}
}

// tableRow is a node's line in PMG's columns.
func tableRow(r cluster.Row) string {
	const format = "%-20s %-15s %-6s %1s %15s %6s %5s%% %5s%%"
	name := fmt.Sprintf("%s(%d)", r.Name, r.CID)
	if r.Error != "" {
		return fmt.Sprintf(format, name, host(r.Address), roleWord(r), "ERROR: "+oneLine(r.Error)+since(r), "-", "-", "-", "-")
	}
	if r.Draining != nil {
		return fmt.Sprintf("%-20s %-15s %-6s S draining %6s %6s %5s%% %5s%%", name, host(r.Address), roleWord(r), uptime(r.UptimeSeconds),
			figure("%.2f", r.Load1), figure("%.0f", r.MemoryPercent), figure("%.0f", r.DiskPercent))
	}
	state := "S"
	if r.State == cluster.InSync {
		state = "A"
	}
	return fmt.Sprintf(format, name, host(r.Address), roleWord(r), state, uptime(r.UptimeSeconds), figure("%.2f", r.Load1),
		figure("%.0f", r.MemoryPercent), figure("%.0f", r.DiskPercent))
}

// roleWord is PMG's word for a role.
func roleWord(r cluster.Row) string {
	if r.Role == cluster.Master {
		return "master"
	}
	return "node"
}

func since(r cluster.Row) string {
	if r.Since.IsZero() {
		return ""
	}
	return ", since " + r.Since.UTC().Format("2006-01-02 15:04:05") + " UTC"
}

// uptime is PMG's: "1 day 21:18", "2 days 00:05", "03:07".
func uptime(seconds int64) string {
	if seconds < 0 {
		return "-"
	}
	minutes := seconds / 60
	days, clock := minutes/(24*60), fmt.Sprintf("%02d:%02d", minutes/60%24, minutes%60)
	switch days {
	case 0:
		return clock
	case 1:
		return "1 day " + clock
	}
	return fmt.Sprintf("%d days %s", days, clock)
}

func figure(format string, v float64) string {
	if v < 0 {
		return "-"
	}
	return fmt.Sprintf(format, v)
}

func host(address string) string {
	if h, _, err := net.SplitHostPort(address); err == nil {
		return h
	}
	return address
}

func oneLine(s string) string { return strings.Join(strings.Fields(s), " ") }

// printLong writes everything that is known of each node.
func printLong(w io.Writer, r cluster.Report, colour bool) error {
	var b strings.Builder
	fmt.Fprintf(&b, "cluster %s, asked by node %d at %s UTC\n", r.ClusterID, r.Asked, r.At.Format(time.DateTime))
	for _, row := range r.Rows {
		fmt.Fprintf(&b, "\n%s(%d)\n", row.Name, row.CID)
		for _, line := range longLines(row, r, colour) {
			fmt.Fprintf(&b, "  %-12s %s\n", line[0], line[1])
		}
		for _, p := range append(notes(row), row.Problems...) {
			writeProblem(&b, "  wrong        ", p)
		}
	}
	_, err := io.WriteString(w, b.String())
	return err
}

// longLines are a node's facts, name and value.
func longLines(row cluster.Row, r cluster.Report, colour bool) [][2]string {
	lines := [][2]string{{"address", row.Address}, {"role", roleWord(row)}, {"state", string(row.State) + behind(row)}}
	if row.Error != "" {
		lines = append(lines, [2]string{"error", oneLine(row.Error)}, [2]string{"last seen", lastSeen(row)})
	}
	if row.Position.Epoch.N > 0 {
		known := ""
		if row.Error != "" {
			known = " (last known)"
		}
		lines = append(lines, [2]string{"position", row.Position.String() + known})
		if row.Promised != row.Position.Epoch {
			lines = append(lines, [2]string{"promised", "epoch " + row.Promised.String()})
		}
		lines = append(lines, [2]string{"digest", row.Position.Digest.String()})
	}
	if row.Transport != "" {
		lines = append(lines, [2]string{"tunnel", string(row.Transport)})
	}
	if row.Error != "" {
		return lines
	}
	if row.PushAgeSeconds >= 0 {
		lines = append(lines, [2]string{"last push", span(row.PushAgeSeconds) + " ago"})
	}
	lines = append(lines,
		[2]string{"journal", commits(row.Journal) + " set aside"},
		[2]string{"uuid", row.UUID}, [2]string{"fqdn", row.FQDN},
		[2]string{"version", mark(row.Version, row.VersionDiffers, r, colour)}, [2]string{"services", strings.Join(row.Services, " ")},
		[2]string{"uptime", uptime(row.UptimeSeconds)}, [2]string{"load", figure("%.2f", row.Load1)},
		[2]string{"memory", figure("%.0f%%", row.MemoryPercent)}, [2]string{"disk", figure("%.0f%%", row.DiskPercent)},
		[2]string{"time", row.Time.UTC().Format(time.DateTime) + " UTC" + clock(row)},
		[2]string{"zone", mark(row.Zone, row.ZoneDiffers, r, false)}, [2]string{"reboot", reboot(row)},
		[2]string{"last seen", "now"})
	if !row.Database {
		lines = append(lines, [2]string{"database", "PostgreSQL does not answer"})
	}
	return lines
}

// behind says how many commits a node lacks.
func behind(row cluster.Row) string {
	switch row.CommitsBehind {
	case 0:
		return ""
	case 1:
		return ", 1 commit behind"
	}
	return fmt.Sprintf(", %d commits behind", row.CommitsBehind)
}

func lastSeen(row cluster.Row) string {
	if row.Since.IsZero() {
		return "not since this node's daemon started"
	}
	return row.Since.UTC().Format(time.DateTime) + " UTC"
}

// span is a time as people read it: "3 s", "2 min", "5 h", "3 days".
func span(seconds int64) string {
	switch {
	case seconds < 120:
		return fmt.Sprintf("%d s", seconds)
	case seconds < 2*60*60:
		return fmt.Sprintf("%d min", seconds/60)
	case seconds < 2*24*60*60:
		return fmt.Sprintf("%d h", seconds/(60*60))
	}
	return fmt.Sprintf("%d days", seconds/(24*60*60))
}

// mark marks what differs from the node that asked, in red where that is wanted.
func mark(value string, differs bool, r cluster.Report, red bool) string {
	switch {
	case !differs:
		return value
	case red:
		return fmt.Sprintf("\x1b[31m%s (differs from node %d)\x1b[0m", value, r.Asked)
	}
	return fmt.Sprintf("%s (differs from node %d)", value, r.Asked)
}

// clock says how far a node's clock is from that of the node that asked.
func clock(row cluster.Row) string {
	if row.ClockMS == nil {
		return ""
	}
	return fmt.Sprintf(", clock %+.3f s", float64(*row.ClockMS)/1000)
}

func reboot(row cluster.Row) string {
	if row.RebootRequired {
		return "required"
	}
	return "not required"
}
