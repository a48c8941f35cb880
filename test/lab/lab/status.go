package main

import (
	"fmt"
	"os"
	"strings"
	"text/tabwriter"

	"mailproxy/test/lab"
)

// status shows the hosts, then what the first of them that answers says about the cluster.
func status(l *lab.Lab, _ []string) error {
	w := tabwriter.NewWriter(os.Stdout, 0, 8, 2, ' ', 0)
	fmt.Fprintln(w, "HOST\tADDRESS\tNODE\tDAEMON\tFAULTS")
	var asks *lab.Host
	for _, h := range l.Hosts() {
		daemon := "down"
		switch {
		case h.Paused():
			daemon = "paused"
		case h.Runs():
			daemon = "up"
			if asks == nil {
				asks = h
			}
		}
		fmt.Fprintf(w, "%s\t%s\t%s\t%s\t%s\n", h.ID, h.Address, h.Name, daemon, strings.Join(faults(h), ", "))
	}
	if err := w.Flush(); err != nil {
		return err
	}
	received, err := os.ReadDir(l.MailDir())
	if err != nil {
		return err
	}
	fmt.Printf("\n%d messages received, in %s\n", len(received), l.MailDir())
	if asks == nil {
		return nil
	}
	fmt.Printf("\n%s# pmgcm status\n", asks.ID)
	out, errs, _, err := asks.Run("pmgcm", "status")
	fmt.Print(out, errs)
	return err
}

func faults(h *lab.Host) []string {
	var all []string
	add := func(is bool, format string, args ...any) {
		if is {
			all = append(all, fmt.Sprintf(format, args...))
		}
	}
	add(h.Isolated, "cut off")
	add(len(h.CutFrom) > 0, "cut off from %s", strings.Join(h.CutFrom, " and "))
	add(h.Delay != "", "slow by %s", h.Delay)
	add(h.Skew != 0, "clock off by %+d s", h.Skew)
	add(h.DiskFull(), "disk full")
	return all
}
