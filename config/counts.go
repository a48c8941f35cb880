package config

import (
	"fmt"
	"strings"
)

// Counts says how much there is of everything that an administrator writes, but for secrets, which are in no snapshot:
// "1 domain, 0 transports, …".
func (s *Snapshot) Counts() string {
	var words []string
	for _, c := range []struct {
		n         int
		one, many string
	}{
		{s.Domains.Len(), "domain", "domains"},
		{len(s.Recipients), "list of recipients", "lists of recipients"},
		{len(s.Transports), "transport", "transports"},
		{len(s.Networks), "network", "networks"},
		{len(s.Certificates), "certificate", "certificates"},
		{len(s.TLSSenders), "TLS sender", "TLS senders"},
		{len(s.Settings), "setting", "settings"},
	} {
		word := c.many
		if c.n == 1 {
			word = c.one
		}
		words = append(words, fmt.Sprintf("%d %s", c.n, word))
	}
	return strings.Join(words, ", ")
}
