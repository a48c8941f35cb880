package main

import (
	"bytes"
	"encoding/json"
	"fmt"
	"math"
	"os"
	"slices"
	"strconv"
	"strings"
	"text/tabwriter"
)

// A result is one figure that was measured.
type result struct {
	Name  string  `json:"name"`
	Value float64 `json:"value"`
	// Unit is for the table.
	Unit string `json:"-"`
	// Goal is what is wanted: zero for none.
	Goal goal `json:"-"`
	// Rounds are the single figures that Value is the median of, where there are some.
	Rounds []float64 `json:"-"`
}

// A goal is a bound that a result should keep.
type goal struct {
	bound   float64
	atLeast bool
}

func atLeast(bound float64) goal { return goal{bound, true} }
func below(bound float64) goal   { return goal{bound, false} }

// String gives ">= 2" or "< 250"; "" for no goal.
func (g goal) String() string {
	switch {
	case g == goal{}:
		return ""
	case g.atLeast:
		return ">= " + number(g.bound)
	}
	return "< " + number(g.bound)
}

// verdict says whether a value keeps the bound; "" for no goal.
func (g goal) verdict(value float64) string {
	switch {
	case g == goal{}:
		return ""
	case g.atLeast && value >= g.bound, !g.atLeast && value < g.bound:
		return "yes"
	}
	return "NO"
}

func (b *bench) add(r result) {
	b.results = append(b.results, r)
	b.say("  %s = %s %s", r.Name, number(r.Value), r.Unit)
}

// addRounds adds the median of several rounds' figures.
func (b *bench) addRounds(name, unit string, g goal, rounds []float64) {
	b.add(result{Name: name, Value: median(rounds), Unit: unit, Goal: g, Rounds: rounds})
}

// reported gives the results that BENCH_ONLY leaves in.
func (b *bench) reported(only string) []result {
	if wantedWhole(only) {
		return b.results
	}
	return slices.DeleteFunc(slices.Clone(b.results), func(r result) bool { return !strings.HasPrefix(r.Name, only) })
}

// wantedWhole says whether only names whole measurements.
func wantedWhole(only string) bool {
	return slices.ContainsFunc(measurements(), func(m measurement) bool { return strings.HasPrefix(m.prefix, only) })
}

// table gives the results as text: name, value, unit, what is wanted, whether it holds, the single rounds.
func (b *bench) table(only string) string {
	var buf bytes.Buffer
	w := tabwriter.NewWriter(&buf, 0, 0, 2, ' ', 0)
	fmt.Fprintln(w, "\nNAME\tVALUE\tUNIT\tWANTED\tHOLDS\tROUNDS")
	for _, r := range b.reported(only) {
		var rounds []string
		for _, v := range r.Rounds {
			rounds = append(rounds, number(v))
		}
		fmt.Fprintf(w, "%s\t%s\t%s\t%s\t%s\t%s\n", r.Name, number(r.Value), r.Unit, r.Goal, r.Goal.verdict(r.Value), strings.Join(rounds, " "))
	}
	_ = w.Flush() // into memory
	return buf.String()
}

// number gives about three digits: "8431", "57.3", "1.94".
func number(v float64) string {
	unit := 1.0
	switch a := math.Abs(v); {
	case a < 10:
		unit = 100
	case a < 100:
		unit = 10
	}
	return strconv.FormatFloat(math.Round(v*unit)/unit, 'f', -1, 64)
}

// writeJSON writes one JSON object a line, for each result; no file for no name.
func (b *bench) writeJSON(file, only string) error {
	if file == "" {
		return nil
	}
	var buf bytes.Buffer
	e := json.NewEncoder(&buf)
	for _, r := range b.reported(only) {
		r.Value = math.Round(r.Value*1000) / 1000
		if err := e.Encode(r); err != nil {
			return fmt.Errorf("result %s: %w", r.Name, err)
		}
	}
	return os.WriteFile(file, buf.Bytes(), 0o644)
}

// median gives the middle of the values, or the mean of the two in the middle.
func median(values []float64) float64 {
	s := slices.Sorted(slices.Values(values))
	if len(s) == 0 {
		return math.NaN()
	}
	return (s[(len(s)-1)/2] + s[len(s)/2]) / 2
}

// percentile gives the smallest value that at least p percent of the values do not exceed (nearest rank).
func percentile(values []float64, p float64) float64 {
	s := slices.Sorted(slices.Values(values))
	if len(s) == 0 {
		return math.NaN()
	}
	rank := int(math.Ceil(p / 100 * float64(len(s))))
	return s[max(rank, 1)-1]
}

// ratios divides the figures of the same rounds.
func ratios(of, by []float64) []float64 {
	out := make([]float64, min(len(of), len(by)))
	for i := range out {
		out[i] = of[i] / by[i]
	}
	return out
}
