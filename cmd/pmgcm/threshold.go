package main

import (
	"fmt"
	"math"
	"strconv"
	"strings"
)

// A threshold is a range of the Monitoring Plugins guidelines, as -w and -c take it: "10" alerts outside of 0 to 10, "10:" below 10,
// "~:10" above 10, "10:20" outside of them, "@10:20" inside.
type threshold struct {
	text     string
	from, to float64
	inside   bool
}

func parseThreshold(text string) (threshold, error) {
	t := threshold{text: text, to: math.Inf(1)}
	rest, inside := strings.CutPrefix(text, "@")
	t.inside = inside
	low, high, isRange := strings.Cut(rest, ":")
	if !isRange {
		low, high = "0", rest
	}
	var err error
	switch {
	case low == "~":
		t.from = math.Inf(-1)
	case low != "" || !isRange:
		t.from, err = number(low)
	}
	if err == nil && (high != "" || !isRange) {
		t.to, err = number(high)
	}
	if err != nil || t.from > t.to {
		return t, fmt.Errorf("%q is no range: 10, 10:, ~:10, 10:20 or @10:20", text)
	}
	return t, nil
}

func number(s string) (float64, error) {
	f, err := strconv.ParseFloat(s, 64)
	if err == nil && (math.IsNaN(f) || math.IsInf(f, 0)) {
		err = strconv.ErrRange
	}
	return f, err
}

// alerts says whether a value is one to alert for.
func (t threshold) alerts(v float64) bool { return (v < t.from || v > t.to) != t.inside }
