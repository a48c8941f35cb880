package db

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"time"

	"github.com/jackc/pgx/v5"

	"mailproxy/config"
)

// PutDomain makes or replaces a domain.
func (t *Tx) PutDomain(ctx context.Context, v config.Domain) error {
	return t.exec(ctx, `INSERT INTO config.domain (name, transport, hosts, comment) VALUES ($1, $2, $3, $4) ON CONFLICT (name)
		DO UPDATE SET transport = excluded.transport, hosts = excluded.hosts, comment = excluded.comment`,
		v.Name, v.Transport, list(v.Hosts), v.Comment)
}

// DeleteDomain deletes a domain and its list of recipients.
func (t *Tx) DeleteDomain(ctx context.Context, name string) error {
	if err := t.remove(ctx, "domain "+name, "DELETE FROM config.domain WHERE name = $1", name); err != nil {
		return err
	}
	return t.SetRecipients(ctx, name, nil)
}

// PutTransport makes or replaces a transport.
func (t *Tx) PutTransport(ctx context.Context, v config.Transport) error {
	return t.exec(ctx, `INSERT INTO config.transport (name, hosts, tls, host_order, username, password, tell, queue_life)
		VALUES ($1, $2, $3, nullif($4, ''), nullif($5, ''), nullif($6, ''), nullif($7, ''), nullif($8, '')) ON CONFLICT (name)
		DO UPDATE SET hosts = excluded.hosts, tls = excluded.tls, host_order = excluded.host_order, username = excluded.username,
		password = excluded.password, tell = excluded.tell, queue_life = excluded.queue_life`,
		v.Name, list(v.Hosts), string(v.TLS), string(v.Order), v.User, v.Password, string(v.Tell), v.QueueLife.String())
}

// DeleteTransport deletes a transport.
func (t *Tx) DeleteTransport(ctx context.Context, name string) error {
	return t.remove(ctx, "transport "+name, "DELETE FROM config.transport WHERE name = $1", name)
}

// PutNetwork makes or replaces a network; bits of its address past the prefix are cleared.
func (t *Tx) PutNetwork(ctx context.Context, v config.Network) error {
	return t.exec(ctx, `INSERT INTO config.network (prefix, comment) VALUES ($1, $2) ON CONFLICT (prefix)
		DO UPDATE SET comment = excluded.comment`, v.Prefix.Masked(), v.Comment)
}

// DeleteNetwork deletes a network.
func (t *Tx) DeleteNetwork(ctx context.Context, p netip.Prefix) error {
	return t.remove(ctx, "network "+p.String(), "DELETE FROM config.network WHERE prefix = $1", p.Masked())
}

// PutSetting sets a setting.
func (t *Tx) PutSetting(ctx context.Context, v config.Setting) error {
	return t.exec(ctx, `INSERT INTO config.setting (name, value) VALUES ($1, $2) ON CONFLICT (name)
		DO UPDATE SET value = excluded.value`, v.Name, v.Value)
}

// DeleteSetting brings a setting back to its default.
func (t *Tx) DeleteSetting(ctx context.Context, name string) error {
	return t.remove(ctx, "setting "+name, "DELETE FROM config.setting WHERE name = $1", name)
}

// PutCertificate makes or replaces a certificate.
func (t *Tx) PutCertificate(ctx context.Context, v config.Certificate) error {
	return t.exec(ctx, `INSERT INTO config.certificate (name, chain, key) VALUES ($1, $2, $3) ON CONFLICT (name)
		DO UPDATE SET chain = excluded.chain, key = excluded.key`, v.Name, v.Chain, v.Key)
}

// DeleteCertificate deletes a certificate; its key stays.
func (t *Tx) DeleteCertificate(ctx context.Context, name string) error {
	return t.remove(ctx, "certificate "+name, "DELETE FROM config.certificate WHERE name = $1", name)
}

// PutTLSSender makes or replaces a domain whose mail is taken by TLS only.
func (t *Tx) PutTLSSender(ctx context.Context, v config.TLSSender) error {
	return t.exec(ctx, `INSERT INTO config.tls_sender (domain, comment) VALUES ($1, $2) ON CONFLICT (domain)
		DO UPDATE SET comment = excluded.comment`, v.Domain, v.Comment)
}

// DeleteTLSSender takes a domain's mail without TLS again.
func (t *Tx) DeleteTLSSender(ctx context.Context, domain string) error {
	return t.remove(ctx, "tls_sender "+domain, "DELETE FROM config.tls_sender WHERE domain = $1", domain)
}

// PutNode makes or replaces a member, and lets it open the secrets. ErrNoDataKey.
func (t *Tx) PutNode(ctx context.Context, n config.Node) error {
	err := t.exec(ctx, `INSERT INTO config.node (cid, uuid, name, address, public_key, machine_id, services, promotable, joined_at)
		VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9) ON CONFLICT (cid) DO UPDATE SET uuid = excluded.uuid, name = excluded.name,
		address = excluded.address, public_key = excluded.public_key, machine_id = excluded.machine_id, services = excluded.services,
		promotable = excluded.promotable, joined_at = excluded.joined_at`,
		n.CID, n.UUID, n.Name, n.Address, n.PublicKey, n.MachineID, list(n.Services), n.Promotable, n.JoinedAt)
	if err != nil {
		return err
	}
	return t.entitle(ctx, t.db.ownKeyring())
}

// PutCA makes or replaces a CA that all nodes trust.
func (t *Tx) PutCA(ctx context.Context, c config.CA) error {
	return t.exec(ctx, `INSERT INTO config.ca (fingerprint, public_key, cid, created_at) VALUES ($1, $2, $3, $4)
		ON CONFLICT (fingerprint) DO UPDATE SET public_key = excluded.public_key, cid = excluded.cid, created_at = excluded.created_at`,
		c.Fingerprint, c.PublicKey, c.CID, c.CreatedAt)
}

// DeleteCA ends the trust in a CA.
func (t *Tx) DeleteCA(ctx context.Context, fingerprint string) error {
	return t.remove(ctx, "CA "+fingerprint, "DELETE FROM config.ca WHERE fingerprint = $1", fingerprint)
}

// Revoke deletes a member: its row goes, its CID and key are revoked for ever, and the secrets get a new data key. ErrNoDataKey.
func (t *Tx) Revoke(ctx context.Context, cid config.CID) error {
	what := fmt.Sprintf("node %d", cid)
	err := t.remove(ctx, what, `INSERT INTO config.revoked (cid, name, public_key, revoked_at)
		SELECT cid, name, public_key, now() FROM config.node WHERE cid = $1`, cid)
	if err != nil {
		return err
	}
	if err := t.remove(ctx, what, "DELETE FROM config.node WHERE cid = $1", cid); err != nil {
		return err
	}
	return t.entitle(ctx, t.db.ownKeyring())
}

// MaxCID gives the highest CID that was ever used, by members and deleted ones.
func (t *Tx) MaxCID(ctx context.Context) (config.CID, error) {
	var cid config.CID
	err := t.tx.QueryRow(ctx, `SELECT coalesce(max(cid), 0) FROM (SELECT cid FROM config.node UNION ALL SELECT cid FROM config.revoked) c`).
		Scan(&cid)
	return cid, mapError(err)
}

// tokenKept is how long an expired token is still told from an unknown one.
const tokenKept = 30 * 24 * time.Hour

// PutToken makes a join token known by its SHA-256, and forgets those long expired.
func (t *Tx) PutToken(ctx context.Context, hash []byte, expires time.Time) error {
	if err := t.exec(ctx, "DELETE FROM config.token WHERE expires_at < $1", time.Now().Add(-tokenKept)); err != nil {
		return err
	}
	return t.exec(ctx, `INSERT INTO config.token (hash, created_at, expires_at) VALUES ($1, now(), $2) ON CONFLICT (hash) DO NOTHING`,
		hash, expires)
}

// TakeToken uses a join token for the node with this public key. Only one key can, and it can again. ErrTokenUnknown, ErrTokenUsed,
// ErrTokenExpired.
func (t *Tx) TakeToken(ctx context.Context, hash []byte, publicKey string) error {
	tag, err := t.tx.Exec(ctx, `UPDATE config.token SET used_by = $2, used_at = now()
		WHERE hash = $1 AND used_by IS NULL AND expires_at > clock_timestamp()`, hash, publicKey)
	if err != nil || tag.RowsAffected() == 1 {
		return mapError(err)
	}
	var used *string
	err = t.tx.QueryRow(ctx, "SELECT used_by FROM config.token WHERE hash = $1", hash).Scan(&used)
	switch {
	case errors.Is(err, pgx.ErrNoRows):
		return ErrTokenUnknown
	case err != nil:
		return mapError(err)
	case used == nil:
		return ErrTokenExpired
	case *used != publicKey:
		return ErrTokenUsed
	}
	return nil
}

// list makes a column that is never NULL.
func list(v []string) []string {
	if v == nil {
		return []string{}
	}
	return v
}
