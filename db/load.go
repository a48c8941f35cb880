package db

import (
	"context"
	"fmt"
	"net/netip"

	"github.com/jackc/pgx/v5"

	"mailproxy/config"
)

// Load gives the configuration as one value, as of one moment. It reads what changed since the last Load, or the last commit that was
// checked, where history tells, else everything.
func (d *DB) Load(ctx context.Context) (*config.Snapshot, error) {
	var l *loaded
	err := d.read(ctx, func(tx pgx.Tx) error {
		var err error
		l, err = d.load(ctx, tx)
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("load configuration: %w", err)
	}
	d.keep(l)
	return l.snapshot, nil
}

// keep makes what was read the base of what is read next.
func (d *DB) keep(l *loaded) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.loaded = l
}

// Members gives the member list, by CID, without the rest of the configuration, which may be large.
func (d *DB) Members(ctx context.Context) ([]config.Node, error) {
	var nodes []config.Node
	if err := collect(ctx, d.pool, &nodes, scanNode, selectNode+" ORDER BY cid"); err != nil {
		return nil, fmt.Errorf("load members: %w", mapError(err))
	}
	return nodes, nil
}

// loaded is a snapshot and the state that it was read in.
type loaded struct {
	state    State
	snapshot *config.Snapshot
}

func (d *DB) snapshot(ctx context.Context, q querier) (*config.Snapshot, error) {
	l, err := d.load(ctx, q)
	if err != nil {
		return nil, err
	}
	return l.snapshot, nil
}

// load reads the configuration as q sees it.
func (d *DB) load(ctx context.Context, q querier) (*loaded, error) {
	st, err := readState(ctx, q)
	if err != nil {
		return nil, err
	}
	d.mu.Lock()
	base := d.loaded
	d.mu.Unlock()
	s := &config.Snapshot{}
	var touched map[string]int
	if base != nil {
		if touched, err = touchedSince(ctx, q, base.state, st); err != nil {
			return nil, err
		}
	}
	if touched != nil {
		*s = *base.snapshot // its lists are shared, and replaced below where they changed
	}
	s.Position, s.ClusterID = st.Position, st.ClusterID
	if err := refresh(ctx, q, s, touched, base); err != nil {
		return nil, err
	}
	return &loaded{state: st, snapshot: s}, nil
}

// touchedSince gives how many rows of each table have changed between two states; nil where that is not known, and everything must
// be read.
func touchedSince(ctx context.Context, q querier, from, to State) (map[string]int, error) {
	if from.rewrites != to.rewrites || from.CID != to.CID {
		return nil, nil
	}
	if from.Position == to.Position {
		return map[string]int{}, nil
	}
	var known bool
	var touched map[string]int
	err := q.QueryRow(ctx, "SELECT node.can_delta($1, $2, $3)", from.Position.Epoch.N, from.Position.Epoch.Owner, from.Position.Serial).
		Scan(&known)
	if err != nil || !known {
		return nil, err
	}
	err = q.QueryRow(ctx, `SELECT coalesce(jsonb_object_agg(tab, n), '{}') FROM (SELECT tab, count(*) AS n FROM config.change
		WHERE serial > $1 AND serial <= $2 GROUP BY tab) t`, from.Position.Serial, to.Position.Serial).Scan(&touched)
	return touched, err
}

// manyDomains is where reading all domains is no slower than patching the list.
const manyDomains = 5000

// refresh reads the tables that were touched; all where touched is nil. Of the domains and recipients, which may
// be many, it reads only those rows.
func refresh(ctx context.Context, q querier, s *config.Snapshot, touched map[string]int, base *loaded) error {
	for _, t := range []struct {
		name string
		read func() error
	}{
		{"node", func() error { return reread(ctx, q, &s.Nodes, scanNode, selectNode+" ORDER BY cid") }},
		{"ca", func() error { return reread(ctx, q, &s.CAs, scanCA, selectCA+` ORDER BY fingerprint COLLATE "C"`) }},
		{"revoked", func() error { return reread(ctx, q, &s.Revoked, scanRevoked, selectRevoked+" ORDER BY cid") }},
		{"setting", func() error {
			return reread(ctx, q, &s.Settings, scanSetting, selectSetting+` ORDER BY name COLLATE "C"`)
		}},
		{"network", func() error { return reread(ctx, q, &s.Networks, scanNetwork, selectNetwork+" ORDER BY prefix") }},
		{"transport", func() error {
			return reread(ctx, q, &s.Transports, scanTransport, selectTransport+` ORDER BY name COLLATE "C"`)
		}},
		{"domain", func() error {
			var err error
			if touched == nil || touched["domain"] > manyDomains {
				s.Domains, err = readDomains(ctx, q)
				return err
			}
			s.Domains, err = patchDomains(ctx, q, s.Domains, base.state.Position.Serial, s.Position.Serial)
			return err
		}},
		{"certificate", func() error {
			return reread(ctx, q, &s.Certificates, scanCertificate, selectCertificate+` ORDER BY name COLLATE "C"`)
		}},
		{"tls_sender", func() error {
			return reread(ctx, q, &s.TLSSenders, scanTLSSender, selectTLSSender+` ORDER BY domain COLLATE "C"`)
		}},
		{"recipient", func() error {
			var err error
			if touched == nil || touched["recipient"] > manyDomains {
				s.Recipients, err = readRecipients(ctx, q)
				return err
			}
			s.Recipients, err = patchRecipients(ctx, q, s.Recipients, base.state.Position.Serial, s.Position.Serial)
			return err
		}},
	} {
		if touched == nil || touched[t.name] > 0 {
			if err := t.read(); err != nil {
				return fmt.Errorf("config.%s: %w", t.name, err)
			}
		}
	}
	return nil
}

// readDomains reads all of them.
func readDomains(ctx context.Context, q querier) (config.Domains, error) {
	var all []config.Domain
	err := collect(ctx, q, &all, scanDomain, selectDomain+` ORDER BY name COLLATE "C"`)
	return config.NewDomains(all), err
}

// patchDomains makes a new list of the old one and the domains that commits after a serial touched.
func patchDomains(ctx context.Context, q querier, old config.Domains, after, upto int64) (config.Domains, error) {
	var names []string
	err := collect(ctx, q, &names, func(r pgx.Rows, s *string) error { return r.Scan(s) },
		`SELECT DISTINCT key->>'name' FROM config.change WHERE serial > $1 AND serial <= $2 AND tab = 'domain'`, after, upto)
	if err != nil {
		return old, err
	}
	var there []config.Domain
	if err := collect(ctx, q, &there, scanDomain, selectDomain+` WHERE name = ANY ($1)`, names); err != nil {
		return old, err
	}
	changes := make(map[string]*config.Domain, len(names))
	for _, name := range names {
		changes[name] = nil
	}
	for i := range there {
		changes[there[i].Name] = &there[i]
	}
	return old.Patch(changes), nil
}

const (
	selectNode = `SELECT cid, uuid, name, address, public_key, machine_id, services, promotable, joined_at FROM config.node t`
	selectCA   = `SELECT fingerprint, public_key, cid, created_at FROM config.ca t`

	selectRevoked   = `SELECT cid, name, public_key, revoked_at FROM config.revoked t`
	selectSetting   = `SELECT name, value FROM config.setting t`
	selectNetwork   = `SELECT prefix, comment FROM config.network t`
	selectTransport = `SELECT name, hosts, tls, coalesce(host_order, ''), coalesce(username, ''), coalesce(password, ''), coalesce(tell, ''),
		coalesce(queue_life, '') FROM config.transport t`
	selectDomain = `SELECT name, transport, hosts, comment FROM config.domain t`
)

const (
	selectCertificate = `SELECT name, chain, key FROM config.certificate t`
	selectTLSSender   = `SELECT domain, comment FROM config.tls_sender t`
)

func scanCertificate(r pgx.Rows, c *config.Certificate) error {
	return r.Scan(&c.Name, &c.Chain, &c.Key)
}

func scanTLSSender(r pgx.Rows, t *config.TLSSender) error { return r.Scan(&t.Domain, &t.Comment) }

func scanNode(r pgx.Rows, n *config.Node) error {
	return r.Scan(&n.CID, &n.UUID, &n.Name, &n.Address, &n.PublicKey, &n.MachineID, &n.Services, &n.Promotable, &n.JoinedAt)
}

func scanCA(r pgx.Rows, c *config.CA) error {
	return r.Scan(&c.Fingerprint, &c.PublicKey, &c.CID, &c.CreatedAt)
}

func scanRevoked(r pgx.Rows, v *config.Revoked) error {
	return r.Scan(&v.CID, &v.Name, &v.PublicKey, &v.RevokedAt)
}

func scanSetting(r pgx.Rows, s *config.Setting) error { return r.Scan(&s.Name, &s.Value) }

func scanNetwork(r pgx.Rows, n *config.Network) error {
	var p netip.Prefix
	err := r.Scan(&p, &n.Comment)
	n.Prefix = p
	return err
}

func scanTransport(r pgx.Rows, t *config.Transport) error {
	var life string
	err := r.Scan(&t.Name, &t.Hosts, (*string)(&t.TLS), (*string)(&t.Order), &t.User, &t.Password, (*string)(&t.Tell), &life)
	if err != nil {
		return err
	}
	return t.QueueLife.UnmarshalText([]byte(life))
}

func scanDomain(r pgx.Rows, x *config.Domain) error {
	return r.Scan(&x.Name, &x.Transport, &x.Hosts, &x.Comment)
}

// reread replaces a list by the rows of a query.
func reread[T any](ctx context.Context, q querier, list *[]T, scan func(pgx.Rows, *T) error, sql string) error {
	*list = nil
	return collect(ctx, q, list, scan, sql)
}

// collect appends the rows of a query to a list.
func collect[T any](ctx context.Context, q querier, to *[]T, scan func(pgx.Rows, *T) error, sql string, args ...any) error {
	rows, err := q.Query(ctx, sql, args...)
	if err != nil {
		return err
	}
	defer rows.Close()
	for rows.Next() {
		var v T
		if err := scan(rows, &v); err != nil {
			return err
		}
		*to = append(*to, v)
	}
	return rows.Err()
}
