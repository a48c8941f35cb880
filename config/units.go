package config

import (
	"errors"
	"fmt"
	"math"
	"strconv"
	"strings"
	"time"
)

// sizeUnits are powers of 1024, as PostgreSQL has them.
var sizeUnits = []struct {
	name  string
	bytes int64
}{{"GB", 1 << 30}, {"MB", 1 << 20}, {"kB", 1 << 10}, {"B", 1}}

// ParseSize reads a number of octets: 52428800, 50MB, 64 kB. Units are powers of 1024, in any case.
func ParseSize(s string) (int64, error) {
	number, factor := strings.TrimSpace(s), int64(1)
	for _, u := range sizeUnits {
		if cut, ok := cutSuffixFold(number, u.name); ok {
			number, factor = strings.TrimSpace(cut), u.bytes
			break
		}
	}
	n, err := strconv.ParseUint(number, 10, 63)
	if err != nil {
		return 0, fmt.Errorf("%q is not a size, want a number with B, kB, MB or GB, such as 50MB", s)
	}
	if int64(n) > math.MaxInt64/factor {
		return 0, fmt.Errorf("size %q is out of range", s)
	}
	return int64(n) * factor, nil
}

func cutSuffixFold(s, suffix string) (string, bool) {
	at := len(s) - len(suffix)
	if at < 0 || !strings.EqualFold(s[at:], suffix) {
		return s, false
	}
	return s[:at], true
}

// FormatSize gives a size that ParseSize reads, in the largest unit that leaves no rest: "50MB".
func FormatSize(n int64) string {
	for _, u := range sizeUnits {
		if n >= u.bytes && n%u.bytes == 0 {
			return strconv.FormatInt(n/u.bytes, 10) + u.name
		}
	}
	return strconv.FormatInt(n, 10) + "B"
}

const day = 24 * time.Hour

// ParseDuration reads a length of time: 90s, 5m, 1h30m, 5d, 1d12h. Days stand first and have 24 hours.
func ParseDuration(s string) (time.Duration, error) {
	errBad := fmt.Errorf("%q is not a length of time, want a number with s, m, h or d, such as 90s or 5d", s)
	rest := strings.TrimSpace(s)
	var days time.Duration
	if number, tail, ok := strings.Cut(rest, "d"); ok {
		n, err := strconv.ParseUint(number, 10, 31)
		if err != nil {
			return 0, errBad
		}
		if n > uint64(math.MaxInt64/day) {
			return 0, fmt.Errorf("length of time %q is out of range", s)
		}
		if days = time.Duration(n) * day; tail == "" {
			return days, nil
		}
		rest = tail
	}
	if rest == "" || rest[0] == '+' || rest[0] == '-' {
		return 0, errBad
	}
	d, err := time.ParseDuration(rest)
	if err != nil {
		return 0, errBad
	}
	if d > math.MaxInt64-days {
		return 0, fmt.Errorf("length of time %q is out of range", s)
	}
	return days + d, nil
}

// FormatDuration gives a length of time that ParseDuration reads, without units that are zero: "5d", "1h30m".
func FormatDuration(d time.Duration) string {
	if d <= 0 {
		return "0s"
	}
	var b strings.Builder
	if d >= day {
		fmt.Fprintf(&b, "%dd", d/day)
		d %= day
	}
	if d >= time.Hour {
		fmt.Fprintf(&b, "%dh", d/time.Hour)
		d %= time.Hour
	}
	if d >= time.Minute {
		fmt.Fprintf(&b, "%dm", d/time.Minute)
		d %= time.Minute
	}
	if d > 0 {
		b.WriteString(d.String())
	}
	return b.String()
}

// A Duration is a length of time whose text is that of FormatDuration; 0 is "".
type Duration time.Duration

// MarshalText gives the text.
func (d Duration) MarshalText() ([]byte, error) { return []byte(d.String()), nil }

// UnmarshalText reads what ParseDuration reads.
func (d *Duration) UnmarshalText(b []byte) error {
	if *d = 0; len(b) == 0 {
		return nil
	}
	parsed, err := ParseDuration(string(b))
	*d = Duration(parsed)
	return err
}

// String gives the text.
func (d Duration) String() string {
	if d == 0 {
		return ""
	}
	return FormatDuration(time.Duration(d))
}

// parseBool reads yes and no, and what is commonly written for them.
func parseBool(s string) (bool, error) {
	switch strings.ToLower(strings.TrimSpace(s)) {
	case "yes", "true", "on":
		return true, nil
	case "no", "false", "off":
		return false, nil
	}
	return false, errors.New("want yes or no")
}
