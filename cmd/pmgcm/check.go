package main

import (
	"cmp"
	"errors"
	"fmt"
	"math"
	"strings"
	"time"

	"github.com/urfave/cli/v2"

	"mailproxy/cluster"
)

// A level is how a check ends, as the Monitoring Plugins guidelines have it.
type level int

const (
	levelOK level = iota
	levelWarning
	levelCritical
	levelUnknown
)

func (l level) code() int { return int(l) }

// String gives "OK", "WARNING", "CRITICAL" or "UNKNOWN".
func (l level) String() string { return [...]string{"OK", "WARNING", "CRITICAL", "UNKNOWN"}[l] }

// A checkError carries the exit code of a check that is not OK.
type checkError struct{ level level }

// Error is part of error.
func (e *checkError) Error() string { return e.level.String() }

func checkCommand() *cli.Command {
	const ranges = " -w and -c are ranges as the Monitoring Plugins guidelines have them: `10` alerts above 10, `10:` below 10."
	return &cli.Command{
		Name: "check", Usage: "check a thing for Nagios or Icinga",
		Description: "One line, with performance data. Exit codes of these alone: 0 OK, 1 WARNING, 2 CRITICAL, 3 UNKNOWN.",
		Action:      func(c *cli.Context) error { return checkUsage(c, "CHECK", "say which: cluster, queue or certificates") },
		OnUsageError: func(c *cli.Context, err error, _ bool) error {
			return checkUsage(c, "CHECK", onUsageError(c, err, true).Error())
		},
		Subcommands: []*cli.Command{
			checkSub("cluster", "nodes that are not in sync", "0", "",
				"CRITICAL too where the master does not answer, WARNING where a node knows something to be wrong; kept mail (see --kept of check queue) is named and no WARNING. Without -c: CRITICAL when "+
					"half of the nodes or more are not in sync."+ranges, checkCluster),
			checkSub("queue", "mail that waits on this node", "500", "2000", "Counts items. Those that are kept are named: refused by the next hop, and the sender is not told, since it may be forged; they end by "+
				"themselves with their life, so they are no WARNING unless --kept says how many are too many."+ranges, checkQueue,
				&cli.StringFlag{Name: "kept", Usage: "`RANGE` of kept items outside of which it warns"}),
			checkSub("certificates", "days until a node's certificate in the cluster ends", "30:", "7:",
				"The certificate that ends first, of all nodes that answer. They are renewed without anybody's help when a third of "+
					"their life is left; mail goes on with or without them."+ranges, checkCertificates),
		},
	}
}

// A result is what a check found: value is what the thresholds are for, and least says how bad it is whatever they are.
type result struct {
	level level
	text  string
	perf  []string
}

func checkSub(name, usage, warning, critical, description string, check func(*cli.Context, *cluster.Operator, limits) (result, error), more ...cli.Flag) *cli.Command {
	word := strings.ToUpper(name)
	return &cli.Command{
		Name: name, Usage: usage, Description: description,
		Flags: append([]cli.Flag{
			&cli.StringFlag{Name: "warning", Aliases: []string{"w"}, Usage: "`RANGE` outside of which it warns", Value: warning},
			&cli.StringFlag{Name: "critical", Aliases: []string{"c"}, Usage: "`RANGE` outside of which it is critical", Value: critical},
		}, more...),
		OnUsageError: func(c *cli.Context, err error, sub bool) error {
			return checkUsage(c, word, onUsageError(c, err, sub).Error())
		},
		Action: func(c *cli.Context) error {
			var r result
			l, err := readLimits(c)
			if err == nil {
				err = withOperator(c, "", func(o *cluster.Operator) (err error) {
					r, err = check(c, o, l)
					return err
				})
			}
			if err != nil {
				r = result{level: levelUnknown, text: err.Error()}
				if h := hint(err); h != "" {
					r.text += "; " + h
				}
			}
			return r.print(c, word)
		},
	}
}

func checkUsage(c *cli.Context, word, text string) error {
	return result{level: levelUnknown, text: text}.print(c, word)
}

// print writes the line. A bar would begin the performance data.
func (r result) print(c *cli.Context, word string) error {
	line := fmt.Sprintf("%s %s - %s", word, r.level, strings.ReplaceAll(oneLine(r.text), "|", "/"))
	if len(r.perf) > 0 {
		line += " | " + strings.Join(r.perf, " ")
	}
	if _, err := fmt.Fprintln(c.App.Writer, line); err != nil {
		return err
	}
	if r.level == levelOK {
		return nil
	}
	return &shownError{&checkError{r.level}}
}

// limits are -w and -c; critical.text is empty where the check has its own.
type limits struct{ warning, critical threshold }

func readLimits(c *cli.Context) (limits, error) {
	var l limits
	if _, err := arguments(c); err != nil {
		return l, err
	}
	var err error
	if l.warning, err = parseThreshold(c.String("warning")); err != nil {
		return l, usagef("check: -w %v", err)
	}
	if text := c.String("critical"); text != "" {
		if l.critical, err = parseThreshold(text); err != nil {
			return l, usagef("check: -c %v", err)
		}
	}
	return l, nil
}

// judge gives the level of a value.
func (l limits) judge(v float64) level {
	switch {
	case l.critical.alerts(v):
		return levelCritical
	case l.warning.alerts(v):
		return levelWarning
	}
	return levelOK
}

// perf is one item of performance data: label=value;warning;critical;minimum
func (l limits) perf(label, value string) string {
	return fmt.Sprintf("%s=%s;%s;%s;0", label, value, l.warning.text, l.critical.text)
}

func checkCluster(c *cli.Context, o *cluster.Operator, l limits) (result, error) {
	r, err := o.Status(c.Context, cluster.StatusParams{})
	if err != nil {
		return result{}, err
	}
	if l.critical.text == "" {
		l.critical, _ = parseThreshold(fmt.Sprint((len(r.Rows) - 1) / 2)) // a number is a range
	}
	return judgeCluster(r, l), nil
}

func judgeCluster(r cluster.Report, l limits) result {
	var off, wrong []string
	kept := 0
	var behind int64
	master := ""
	for _, row := range r.Rows {
		name := fmt.Sprintf("%s(%d)", row.Name, row.CID)
		behind = max(behind, row.CommitsBehind)
		if row.State != cluster.InSync {
			off = append(off, name+" "+string(row.State))
		}
		if row.Role == cluster.Master && row.Error == "" {
			master = name
		}
		kept += row.Kept
		for _, p := range row.Problems {
			wrong = append(wrong, name+": "+p.What)
		}
	}
	out := result{level: l.judge(float64(len(off))), text: fmt.Sprintf("%d of %d nodes in sync", len(r.Rows)-len(off), len(r.Rows))}
	if len(off) > 0 {
		out.text += ": " + strings.Join(off, ", ")
	}
	if master == "" {
		out.level, out.text = levelCritical, "no master answers, "+out.text
	} else {
		out.text += ", master " + master
	}
	if len(wrong) > 0 {
		out.level = max(out.level, levelWarning)
		const shown = 3 // a line is all that a monitor shows
		out.text += "; " + strings.Join(wrong[:min(shown, len(wrong))], "; ")
		if len(wrong) > shown {
			out.text += fmt.Sprintf(" (and %d more, `pmgcm status`)", len(wrong)-shown)
		}
	}
	if kept > 0 {
		out.text += fmt.Sprintf("; %s kept", counted(kept, "queued item"))
	}
	out.perf = []string{l.perf("not_in_sync", fmt.Sprint(len(off))), fmt.Sprintf("nodes=%d;;;0", len(r.Rows)), fmt.Sprintf("commits_behind=%d;;;0", behind)}
	return out
}

func checkQueue(c *cli.Context, o *cluster.Operator, l limits) (result, error) {
	w, err := o.Waiting(c.Context)
	if err != nil {
		return result{}, err
	}
	kept, err := parseThreshold(cmp.Or(c.String("kept"), "~:"))
	if err != nil {
		return result{}, usagef("check: --kept %v", err)
	}
	return judgeQueue(w, l, kept), nil
}

func judgeQueue(w cluster.Waiting, l limits, kept threshold) result {
	oldest := int64(w.Oldest.Seconds())
	text := counted(w.Items, "item")
	if w.Items > 0 {
		text += ", the oldest since " + span(oldest)
	}
	level := l.judge(float64(w.Items))
	if w.Kept > 0 {
		text += fmt.Sprintf("; %d kept: refused, and nobody told (`mailproxy queue list --kept`)", w.Kept)
	}
	if kept.alerts(float64(w.Kept)) {
		level = max(level, levelWarning)
	}
	bound := kept.text
	if bound == "~:" {
		bound = ""
	}
	return result{level, text, []string{l.perf("items", fmt.Sprint(w.Items)), fmt.Sprintf("oldest=%ds;;;0", oldest), fmt.Sprintf("kept=%d;%s;;0", w.Kept, bound)}}
}

func counted(n int, what string) string {
	if n == 1 {
		return "1 " + what
	}
	return fmt.Sprintf("%d %ss", n, what)
}

func checkCertificates(c *cli.Context, o *cluster.Operator, l limits) (result, error) {
	r, err := o.Status(c.Context, cluster.StatusParams{})
	if err != nil {
		return result{}, err
	}
	return judgeCertificates(r, l)
}

func judgeCertificates(r cluster.Report, l limits) (result, error) {
	first, n := cluster.Row{}, 0
	for _, row := range r.Rows {
		if row.Certificate == nil {
			continue
		}
		if n++; n == 1 || row.Certificate.Expires.Before(first.Certificate.Expires) {
			first = row
		}
	}
	if n == 0 {
		return result{}, errors.New("no node says when its certificate ends")
	}
	days := math.Floor(first.Certificate.Expires.Sub(r.At).Hours() / 24)
	return result{
		l.judge(days),
		fmt.Sprintf("%s(%d) is the first to end, on %s UTC, in %.0f days; %d of %d nodes asked", first.Name, first.CID,
			first.Certificate.Expires.UTC().Format(time.DateOnly), days, n, len(r.Rows)),
		[]string{fmt.Sprintf("days=%.0f;%s;%s", days, l.warning.text, l.critical.text)},
	}, nil
}
