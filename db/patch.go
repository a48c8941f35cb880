package db

import (
	"cmp"
	"context"
	"encoding/json"
	"fmt"
	"maps"
	"net/netip"
	"slices"

	"github.com/jackc/pgx/v5"

	"mailproxy/config"
)

// Patched says whether Patch knows the rows of a table: those that an administrator writes, not the cluster's own.
func Patched(table string) bool {
	return slices.Contains([]string{"setting", "network", "transport", "domain", "recipient", "certificate", "tls_sender"}, table)
}

// Patch gives the configuration in which each changed object is what image says of its change: a row as history and journal hold it, or
// nothing. Of several changes of one object the last counts. Tables that it does not know stay as they are.
func Patch(s *config.Snapshot, changes []Change, image func(Change) json.RawMessage) (*config.Snapshot, error) {
	settings, networks := byKey(s.Settings, settingKey), byKey(s.Networks, networkKey)
	recipients := recipientSets{}
	certificates, tlsSenders := byKey(s.Certificates, certificateKey), byKey(s.TLSSenders, tlsSenderKey)
	transports, domains := byKey(s.Transports, transportKey), byKey(s.Domains.List(), domainKey)
	for _, c := range changes {
		var err error
		switch c.Table {
		case "setting":
			err = put(settings, settingKey, c.Key, image(c), settingOf)
		case "network":
			err = put(networks, networkKey, c.Key, image(c), networkOf)
		case "transport":
			err = put(transports, transportKey, c.Key, image(c), transportOf)
		case "certificate":
			err = put(certificates, certificateKey, c.Key, image(c), certificateOf)
		case "tls_sender":
			err = put(tlsSenders, tlsSenderKey, c.Key, image(c), tlsSenderOf)
		case "recipient":
			err = recipients.put(c.Key, image(c))
		case "domain":
			err = put(domains, domainKey, c.Key, image(c), domainOf)
		}
		if err != nil {
			return nil, fmt.Errorf("row of config.%s: %w", c.Table, err)
		}
	}
	return s.With(&config.Parts{
		Settings:     slices.SortedFunc(maps.Values(settings), func(a, b config.Setting) int { return cmp.Compare(a.Name, b.Name) }),
		Networks:     slices.SortedFunc(maps.Values(networks), func(a, b config.Network) int { return config.ComparePrefix(a.Prefix, b.Prefix) }),
		Transports:   slices.SortedFunc(maps.Values(transports), func(a, b config.Transport) int { return cmp.Compare(a.Name, b.Name) }),
		Domains:      slices.SortedFunc(maps.Values(domains), func(a, b config.Domain) int { return cmp.Compare(a.Name, b.Name) }),
		Recipients:   recipients.over(s.Recipients),
		Certificates: slices.SortedFunc(maps.Values(certificates), func(a, b config.Certificate) int { return cmp.Compare(a.Name, b.Name) }),
		TLSSenders:   slices.SortedFunc(maps.Values(tlsSenders), func(a, b config.TLSSender) int { return cmp.Compare(a.Domain, b.Domain) }),
	}), nil
}

// A rowImage is a row of any of these tables in JSON.
type rowImage struct {
	Name, Value, Transport, Comment, TLS, Prefix string
	Hosts                                        []string
	Domain, Chain, Key                           string

	Order          string `json:"host_order"`
	User           string `json:"username"`
	Password, Tell string
	QueueLife      config.Duration `json:"queue_life"`
}

func certificateKey(c config.Certificate) string { return c.Name }
func tlsSenderKey(t config.TLSSender) string     { return t.Domain }

func certificateOf(i rowImage) (config.Certificate, error) {
	return config.Certificate{Name: i.Name, Chain: i.Chain, Key: i.Key}, nil
}

func tlsSenderOf(i rowImage) (config.TLSSender, error) {
	return config.TLSSender{Domain: i.Domain, Comment: i.Comment}, nil
}

func settingKey(s config.Setting) string     { return s.Name }
func networkKey(n config.Network) string     { return n.Prefix.String() }
func transportKey(t config.Transport) string { return t.Name }
func domainKey(d config.Domain) string       { return d.Name }

func settingOf(i rowImage) (config.Setting, error) {
	return config.Setting{Name: i.Name, Value: i.Value}, nil
}

func networkOf(i rowImage) (config.Network, error) {
	p, err := netip.ParsePrefix(i.Prefix)
	return config.Network{Prefix: p, Comment: i.Comment}, err
}

func transportOf(i rowImage) (config.Transport, error) {
	return config.Transport{Name: i.Name, Hosts: i.Hosts, Order: config.Order(i.Order), TLS: config.TLS(i.TLS), User: i.User,
		Password: i.Password, Tell: config.Tell(i.Tell), QueueLife: i.QueueLife}, nil
}

func domainOf(i rowImage) (config.Domain, error) {
	return config.Domain{Name: i.Name, Transport: i.Transport, Hosts: i.Hosts, Comment: i.Comment}, nil
}

func byKey[T any](list []T, key func(T) string) map[string]T {
	m := make(map[string]T, len(list))
	for _, v := range list {
		m[key(v)] = v
	}
	return m
}

// put makes the object with a key what a row says; no row takes it away.
func put[T any](m map[string]T, keyOf func(T) string, key, row json.RawMessage, of func(rowImage) (T, error)) error {
	read := func(raw json.RawMessage) (v T, err error) {
		var i rowImage
		if err = json.Unmarshal(raw, &i); err == nil {
			v, err = of(i)
		}
		return v, err
	}
	old, err := read(key)
	if err != nil {
		return err
	}
	delete(m, keyOf(old))
	if len(row) == 0 || string(row) == "null" {
		return nil
	}
	v, err := read(row)
	if err == nil {
		m[keyOf(v)] = v
	}
	return err
}

// Undo gives the configuration as it is, and as it was after a commit of the line that this node holds: what an administrator writes, not
// members or tokens. epoch is the number of that commit's epoch, or 0 for whichever it was. ErrNoSuch where the history does not reach there.
func (d *DB) Undo(ctx context.Context, epoch, serial int64) (now, then *config.Snapshot, err error) {
	err = d.read(ctx, func(tx pgx.Tx) error {
		var err error
		if now, err = d.snapshot(ctx, tx); err != nil {
			return err
		}
		var after int64
		var known bool
		err = tx.QueryRow(ctx, `SELECT (SELECT count(*) FROM config.history WHERE serial > $1),
			EXISTS (SELECT FROM config.history WHERE serial = $1 AND $2::bigint IN (0, epoch_n))`, serial, epoch).Scan(&after, &known)
		if err != nil {
			return err
		}
		if !known || after != now.Position.Serial-serial {
			return fmt.Errorf("commit %d: %w", serial, ErrNoSuch)
		}
		var silent int64 // the newest commit without changes: rows that were changed by hand became its
		if err := tx.QueryRow(ctx, `SELECT coalesce(max(h.serial), 0) FROM config.history h
			WHERE h.serial > $1 AND NOT EXISTS (SELECT FROM config.change c WHERE c.serial = h.serial)`, serial).Scan(&silent); err != nil {
			return err
		}
		if silent > 0 {
			return fmt.Errorf("%w (commit %d)", ErrByHand, silent)
		}
		var first []Change // of each row after that commit: its old image is what the row was then
		err = collect(ctx, tx, &first, func(r pgx.Rows, c *Change) error { return r.Scan(&c.Table, &c.Key, &c.Old) },
			`SELECT DISTINCT ON (tab, key) tab, key, old FROM config.change WHERE serial > $1 ORDER BY tab, key, serial, seq`, serial)
		if err != nil {
			return err
		}
		then, err = Patch(now, first, func(c Change) json.RawMessage { return c.Old })
		return err
	})
	if err != nil {
		return nil, nil, fmt.Errorf("undo: %w", err)
	}
	return now, then, nil
}
