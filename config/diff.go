package config

import (
	"fmt"
	"slices"
	"strings"
)

// A Difference is one object that two snapshots do not have alike.
type Difference struct {
	// Op is "+" for an object that is new, "-" for one that is gone, "~" for one that is changed.
	Op string `json:"op"`
	// Object is what it is: "domain example.test".
	Object string `json:"object"`
	// Old and New are what there is to say about it, on one line; empty where there is none.
	Old string `json:"old,omitempty"`
	New string `json:"new,omitempty"`
}

// String gives "+ domain example.test: to 10.0.0.1:25".
func (d Difference) String() string {
	switch d.Op {
	case "+":
		return fmt.Sprintf("+ %s: %s", d.Object, d.New)
	case "-":
		return fmt.Sprintf("- %s: %s", d.Object, d.Old)
	}
	return fmt.Sprintf("~ %s: %s -> %s", d.Object, d.Old, d.New)
}

// Diff says what an administrator would have to change in a to get b: settings, networks, transports, domains, certificates,
// senders by TLS only, lists of recipients, in that order,
// each by name.
func Diff(a, b *Snapshot) []Difference {
	var all []Difference
	all = append(all, diff(a.Settings, b.Settings, describeSetting)...)
	all = append(all, diff(a.Networks, b.Networks, describeNetwork)...)
	all = append(all, diff(a.Transports, b.Transports, describeTransport)...)
	all = append(all, diff(a.Domains.List(), b.Domains.List(), describeDomain)...)
	all = append(all, diff(a.Certificates, b.Certificates, describeCertificate)...)
	all = append(all, diff(a.TLSSenders, b.TLSSenders, describeTLSSender)...)
	return append(all, diffRecipients(a.Recipients, b.Recipients)...)
}

// diff compares two lists by their objects' names.
func diff[T any](a, b []T, describe func(T) (object, text string)) []Difference {
	old := make(map[string]string, len(a))
	for _, x := range a {
		object, text := describe(x)
		old[object] = text
	}
	var all []Difference
	for _, x := range b {
		object, text := describe(x)
		before, had := old[object]
		delete(old, object)
		switch {
		case !had:
			all = append(all, Difference{Op: "+", Object: object, New: text})
		case before != text:
			all = append(all, Difference{Op: "~", Object: object, Old: before, New: text})
		}
	}
	for object, text := range old {
		all = append(all, Difference{Op: "-", Object: object, Old: text})
	}
	slices.SortFunc(all, func(x, y Difference) int { return strings.Compare(x.Object, y.Object) })
	return all
}

func describeSetting(s Setting) (object, text string) {
	return "setting " + s.Name, quoteEmpty(s.Value)
}

func quoteEmpty(s string) string {
	if s == "" || strings.TrimSpace(s) != s {
		return quote(s)
	}
	return s
}

func describeNetwork(n Network) (object, text string) {
	if n.Comment == "" {
		return "network " + n.Prefix.String(), "no comment"
	}
	return "network " + n.Prefix.String(), "comment " + quote(n.Comment)
}

func describeTransport(t Transport) (object, text string) {
	text = "to MX"
	if len(t.Hosts) > 0 {
		text = "to " + strings.Join(t.Hosts, " ")
	}
	if t.TLS != "" && t.TLS != TLSMay {
		text += ", tls " + string(t.TLS)
	}
	if t.Order != "" && t.Order != OrderGiven {
		text += ", order " + string(t.Order)
	}
	if t.User != "" {
		text += ", user " + quoteEmpty(t.User) + ", password " + t.Password
	}
	if t.Tell != "" {
		text += ", tell " + string(t.Tell)
	}
	if t.QueueLife != 0 {
		text += ", queue_life " + t.QueueLife.String()
	}
	return "transport " + t.Name, text
}

func describeDomain(d Domain) (object, text string) {
	text = "to " + strings.Join(d.Hosts, " ")
	if d.Transport != "" {
		text = "transport " + d.Transport
	}
	if d.Comment != "" {
		text += ", comment " + quote(d.Comment)
	}
	return "domain " + d.Name, text
}
