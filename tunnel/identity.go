package tunnel

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"slices"
	"time"

	"golang.org/x/crypto/ssh"

	"mailproxy/config"
)

// Identity says which node of which cluster this is. Nodes, CAs and Revoked are whom it believes until the replicated configuration
// of that cluster has arrived (Reload keeps them up to date after that, for a node that loses its database); SaveIdentity with none
// of them leaves those on disk.
type Identity struct {
	ClusterID string           `json:"cluster_id"` // UUID
	CID       config.CID       `json:"cid"`
	Certs     Certs            `json:"-"`
	Nodes     []config.Node    `json:"-"`
	CAs       []config.CA      `json:"-"`
	Revoked   []config.Revoked `json:"-"`
	// RevokedAt is from what position on Revoked was so; zero: not known.
	RevokedAt config.Position `json:"-"`
	// Tunnel is what carries the connections; empty is TunnelSSH.
	Tunnel config.TunnelKind `json:"-"`
}

// trusted is trust.json.
type trusted struct {
	ClusterID string            `json:"cluster_id"`
	Nodes     []config.Node     `json:"nodes"`
	CAs       []config.CA       `json:"cas"`
	Revoked   []config.Revoked  `json:"revoked,omitempty"`
	RevokedAt config.Position   `json:"revoked_at,omitzero"`
	Tunnel    config.TunnelKind `json:"tunnel,omitempty"`
}

// trusted is what the identity believes.
func (id *Identity) trusted() trusted {
	return trusted{id.ClusterID, id.Nodes, id.CAs, id.Revoked, id.RevokedAt, id.Tunnel}
}

func (id *Identity) believe(t trusted) {
	id.Nodes, id.CAs, id.Revoked, id.RevokedAt, id.Tunnel = t.Nodes, t.CAs, t.Revoked, t.RevokedAt, t.Tunnel
}

// after is what a snapshot says, where before was believed. Whoever was deleted stays so in one that is older than that: the database was put
// back to a time before.
func (t trusted) after(before trusted) trusted {
	same := func(a, b config.Revoked) bool { return a.CID == b.CID && a.PublicKey == b.PublicKey }
	if t.RevokedAt.Compare(before.RevokedAt) < 0 {
		for _, r := range before.Revoked {
			if !slices.ContainsFunc(t.Revoked, func(o config.Revoked) bool { return same(o, r) }) {
				t.Revoked = append(slices.Clip(t.Revoked), r)
			}
		}
	} else if !slices.EqualFunc(t.Revoked, before.Revoked, same) {
		return t
	}
	t.RevokedAt = before.RevokedAt
	return t
}

// SaveIdentity writes the identity to dir, durably: identity.json comes last, so that a node that dies in between is in no cluster.
// The certificates must be for the key in dir, the CID and the cluster: else ErrBadCertificate and nothing is changed.
func SaveIdentity(dir string, id Identity) error {
	d, err := openKeyDir(dir)
	if err != nil {
		return fmt.Errorf("open key directory: %w", err)
	}
	defer d.close()
	signer, _, err := d.loadSigner(nodeKeyFile)
	if err != nil {
		return fmt.Errorf("save identity: %w", err)
	}
	if err := id.fits(signer.PublicKey()); err != nil {
		return err
	}
	if len(id.Nodes)+len(id.CAs) > 0 {
		if err := d.writeTrusted(id.trusted()); err != nil {
			return fmt.Errorf("save identity: %w", err)
		}
	}
	text, err := json.Marshal(id)
	if err != nil {
		return err
	}
	for _, f := range []struct {
		name string
		data string
	}{{hostCertFile, id.Certs.Host + "\n"}, {userCertFile, id.Certs.User + "\n"}, {identityFile, string(text) + "\n"}} {
		if err := d.write(f.name, []byte(f.data)); err != nil {
			return fmt.Errorf("save identity: write %s: %w", f.name, err)
		}
	}
	return nil
}

// fits checks that both certificates are for this key, CID and cluster.
func (id *Identity) fits(key ssh.PublicKey) error {
	if id.CID < 1 || id.ClusterID == "" {
		return fmt.Errorf("node %d of cluster %q: %w", id.CID, id.ClusterID, ErrBadCertificate)
	}
	for _, c := range []struct {
		file string
		kind uint32
		text string
	}{{hostCertFile, ssh.HostCert, id.Certs.Host}, {userCertFile, ssh.UserCert, id.Certs.User}} {
		cert, err := parseCert(c.text)
		if err != nil {
			return fmt.Errorf("%s: %w", c.file, err)
		}
		principals := []string{cidPrincipal(id.CID), clusterPrincipal(id.ClusterID)}
		if cert.CertType != c.kind || !bytes.Equal(cert.Key.Marshal(), key.Marshal()) || len(cert.ValidPrincipals) != 2 ||
			cert.ValidPrincipals[0] != principals[0] || cert.ValidPrincipals[1] != principals[1] {
			return fmt.Errorf("%s: node %d of cluster %s: %w", c.file, id.CID, id.ClusterID, ErrBadCertificate)
		}
	}
	return nil
}

// LoadIdentity reads the identity in dir; fs.ErrNotExist when the node is in no cluster.
func LoadIdentity(dir string) (Identity, error) {
	d, err := openKeyDirToRead(dir)
	if err != nil {
		return Identity{}, err
	}
	defer d.close()
	return d.loadIdentity()
}

func (d *keyDir) loadIdentity() (Identity, error) {
	var id Identity
	text, err := d.read(identityFile)
	if err != nil {
		return Identity{}, err
	}
	if err := json.Unmarshal(text, &id); err != nil {
		return Identity{}, fmt.Errorf("%s: %w", identityFile, err)
	}
	for name, cert := range map[string]*string{hostCertFile: &id.Certs.Host, userCertFile: &id.Certs.User} {
		text, err := d.read(name)
		if err != nil {
			// Not fs.ErrNotExist: an identity without its certificates is a broken one, not none.
			return Identity{}, fmt.Errorf("identity is broken: %s", err)
		}
		*cert = string(bytes.TrimSpace(text))
	}
	if known := d.readTrusted(); known.ClusterID == id.ClusterID {
		id.believe(known)
	}
	return id, nil
}

// RemoveIdentity makes the node one that is in no cluster; its key stays, and a CA's key too.
func RemoveIdentity(dir string) error {
	d, err := openKeyDirToRead(dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	defer d.close()
	return d.remove(identityFile, userCertFile, hostCertFile, trustFile)
}

// remove removes files durably; those that are not there are none.
func (d *keyDir) remove(names ...string) error {
	for _, name := range names {
		if err := d.root.Remove(name); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
	}
	return d.sync()
}

func (d *keyDir) writeTrusted(t trusted) error {
	text, err := json.Marshal(t)
	if err != nil {
		return err
	}
	return d.write(trustFile, append(text, '\n'))
}

// readTrusted reads trust.json. One that is damaged counts as none: it trusts nobody, and the next configuration that is loaded writes it
// anew.
func (d *keyDir) readTrusted() trusted {
	var t trusted
	text, err := d.read(trustFile)
	if err != nil || json.Unmarshal(text, &t) != nil {
		return trusted{}
	}
	return t
}

// loadSelf reads who this node is: key, identity and certificates, as a trust in nobody. Without an identity the key alone is set.
func loadSelf(dir string, now func() time.Time) (*trust, error) {
	key, err := LoadOrMakeKey(dir)
	if err != nil {
		return nil, err
	}
	t := &trust{key: key, now: now}
	id, err := LoadIdentity(dir)
	if errors.Is(err, fs.ErrNotExist) {
		return t, nil
	}
	if err != nil {
		return nil, err
	}
	if err := id.fits(key.signer.PublicKey()); err != nil {
		return nil, err
	}
	for text, signer := range map[string]*ssh.Signer{id.Certs.Host: &t.host, id.Certs.User: &t.user} {
		cert, err := parseCert(text)
		if err != nil {
			return nil, err
		}
		if *signer, err = ssh.NewCertSigner(cert, key.signer); err != nil {
			return nil, err
		}
	}
	t.id = id
	return t, nil
}

// with gives a trust of the same identity in whom the snapshot lists. The snapshot counts where it is of the identity's cluster;
// else, as right after a join, what was saved beside the identity does. Rows that cannot be read are left out and named in the error:
// whom they are about is not trusted.
func (t *trust) with(s *config.Snapshot) (*trust, error) {
	known := t.id.trusted()
	if s != nil && s.ClusterID == t.id.ClusterID && len(s.Nodes) > 0 {
		known = trusted{s.ClusterID, s.Nodes, s.CAs, s.Revoked, s.Position, s.Tunnel()}.after(known)
	}
	n := &trust{
		id: t.id, key: t.key, host: t.host, user: t.user, now: t.now,
		nodes: map[config.CID]config.Node{}, keys: map[config.CID]string{}, cas: map[string]bool{},
		revoked: map[config.CID]bool{}, badKeys: map[string]bool{}, tunnel: known.Tunnel,
	}
	if n.tunnel != config.TunnelWireGuard {
		n.tunnel = config.TunnelSSH
	}
	if !t.member() {
		return n, nil
	}
	n.id.believe(known)
	return n, n.believe(known)
}

// member says whether this node is in a cluster.
func (t *trust) member() bool { return t.id.CID > 0 }

// keepTrusted saves whom t trusts for a start without a snapshot, unless that is what is saved.
func keepTrusted(dir string, t *trust) error {
	d, err := openKeyDir(dir)
	if err != nil {
		return err
	}
	defer d.close()
	saved := d.readTrusted()
	fresh := t.id.trusted()
	a, err := json.Marshal(saved)
	if err != nil {
		return err
	}
	b, err := json.Marshal(fresh)
	if err != nil || bytes.Equal(a, b) {
		return err
	}
	return d.writeTrusted(fresh)
}

// believe takes members, CAs and deleted nodes. A row that cannot be read is left out and named: whom it is about is not trusted.
func (t *trust) believe(known trusted) error {
	var errs []error
	for _, ca := range known.CAs {
		key, err := parsePublic(ca.PublicKey)
		if err != nil {
			errs = append(errs, fmt.Errorf("CA %s: %w", ca.Fingerprint, err))
			continue
		}
		t.cas[string(key.Marshal())] = true
	}
	for _, r := range known.Revoked {
		t.revoked[r.CID] = true
		if key, err := parsePublic(r.PublicKey); err == nil {
			t.badKeys[string(key.Marshal())] = true
		}
	}
	for _, n := range known.Nodes {
		key, err := parsePublic(n.PublicKey)
		if err != nil {
			errs = append(errs, fmt.Errorf("node %d: %w", n.CID, err))
			continue
		}
		t.nodes[n.CID], t.keys[n.CID] = n, string(key.Marshal())
	}
	return errors.Join(errs...)
}
