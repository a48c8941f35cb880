package main

import (
	"fmt"
	"os"
	"strconv"
	"strings"
	"time"
)

// clockVariable is for tests of clocks that are wrong: it names a file with the seconds by which the clock of the cluster and of the tunnel
// is ahead, "3600" or "-60". The file is read at every look at the clock, so that it can jump. Timers, logs, the queue and PostgreSQL
// keep the machine's time.
const clockVariable = "MAILPROXY_TEST_CLOCK"

// clock gives the clock of the cluster and of the tunnel: the machine's, but in tests.
func clock() (func() time.Time, error) {
	file := os.Getenv(clockVariable)
	if file == "" {
		return time.Now, nil
	}
	last, err := clockOffset(file)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", clockVariable, err)
	}
	return func() time.Time {
		offset, err := clockOffset(file)
		if err != nil {
			offset = last
		}
		return time.Now().Add(offset)
	}, nil
}

func clockOffset(file string) (time.Duration, error) {
	b, err := os.ReadFile(file)
	if err != nil {
		return 0, err
	}
	seconds, err := strconv.ParseInt(strings.TrimSpace(string(b)), 10, 32)
	return time.Duration(seconds) * time.Second, err
}
