package db

import (
	"context"
	"encoding/json"
	"maps"
	"slices"
	"strings"

	"github.com/jackc/pgx/v5"

	"mailproxy/config"
)

// PutRecipients adds local parts to the list of a domain; those that are on it are passed over.
func (t *Tx) PutRecipients(ctx context.Context, domain string, locals []string) error {
	return t.exec(ctx, "INSERT INTO config.recipient (domain, local) SELECT $1, unnest($2::text[]) ON CONFLICT DO NOTHING", domain, list(locals))
}

// DeleteRecipients takes local parts off the list of a domain.
func (t *Tx) DeleteRecipients(ctx context.Context, domain string, locals []string) error {
	return t.exec(ctx, "DELETE FROM config.recipient WHERE domain = $1 AND local = ANY ($2)", domain, list(locals))
}

// SetRecipients makes the list of a domain another one; without local parts it has none any more.
func (t *Tx) SetRecipients(ctx context.Context, domain string, locals []string) error {
	err := t.exec(ctx, `DELETE FROM config.recipient r WHERE domain = $1
		AND NOT EXISTS (SELECT FROM unnest($2::text[]) n(local) WHERE n.local = r.local)`, domain, list(locals))
	if err != nil || len(locals) == 0 {
		return err
	}
	return t.PutRecipients(ctx, domain, locals)
}

// A recipientRow is one row of config.recipient.
type recipientRow struct{ domain, local string }

func scanRecipient(r pgx.Rows, x *recipientRow) error { return r.Scan(&x.domain, &x.local) }

const recipientOrder = ` ORDER BY domain COLLATE "C", local COLLATE "C"`

// readRecipients reads all lists.
func readRecipients(ctx context.Context, q querier) (all []config.RecipientList, err error) {
	rows, err := q.Query(ctx, "SELECT domain, local FROM config.recipient t"+recipientOrder)
	if err != nil {
		return nil, err
	}
	defer rows.Close()
	for rows.Next() {
		var r recipientRow
		if err := scanRecipient(rows, &r); err != nil {
			return nil, err
		}
		if n := len(all); n == 0 || all[n-1].Domain != r.domain {
			all = append(all, config.RecipientList{Domain: r.domain})
		}
		last := &all[len(all)-1]
		last.Locals = append(last.Locals, r.local)
	}
	return all, rows.Err()
}

// patchRecipients makes new lists of the old ones and the rows that commits after a serial touched.
func patchRecipients(ctx context.Context, q querier, old []config.RecipientList, after, upto int64) ([]config.RecipientList, error) {
	var touched, there []recipientRow
	err := collect(ctx, q, &touched, scanRecipient, `SELECT DISTINCT key->>'domain', key->>'local' FROM config.change
		WHERE serial > $1 AND serial <= $2 AND tab = 'recipient'`, after, upto)
	if err != nil {
		return nil, err
	}
	sets := recipientSets{}
	var domains, locals []string
	for _, r := range touched {
		sets.of(r.domain)[r.local] = false
		domains, locals = append(domains, r.domain), append(locals, r.local)
	}
	err = collect(ctx, q, &there, scanRecipient, `SELECT domain, local FROM config.recipient
		JOIN unnest($1::text[], $2::text[]) n(domain, local) USING (domain, local)`, domains, locals)
	if err != nil {
		return nil, err
	}
	for _, r := range there {
		sets.of(r.domain)[r.local] = true
	}
	return sets.over(old), nil
}

// recipientSets are changes of lists, by domain: which local parts are on it now, and which are not any more.
type recipientSets map[string]map[string]bool

func (s recipientSets) of(domain string) map[string]bool {
	if s[domain] == nil {
		s[domain] = make(map[string]bool)
	}
	return s[domain]
}

// put notes a row as history has it.
func (s recipientSets) put(key, row json.RawMessage) error {
	var k struct{ Domain, Local string }
	if err := json.Unmarshal(key, &k); err != nil {
		return err
	}
	s.of(k.Domain)[k.Local] = len(row) > 0 && string(row) != "null"
	return nil
}

// over gives the lists with the changes made.
func (s recipientSets) over(lists []config.RecipientList) []config.RecipientList {
	for _, domain := range slices.Sorted(maps.Keys(s)) {
		lists = config.PutRecipients(lists, domain, patchSorted(config.RecipientsOf(lists, domain), s[domain]))
	}
	return lists
}

// patchSorted makes a new sorted list of an old one and changes.
func patchSorted(old []string, changes map[string]bool) []string {
	list := make([]string, 0, len(old)+len(changes))
	rest := old
	for _, name := range slices.Sorted(maps.Keys(changes)) {
		at, found := slices.BinarySearchFunc(rest, name, strings.Compare)
		list = append(list, rest[:at]...)
		if rest = rest[at:]; found {
			rest = rest[1:]
		}
		if changes[name] {
			list = append(list, name)
		}
	}
	return append(list, rest...)
}
