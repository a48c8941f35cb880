package tunnel

import (
	"crypto/rand"
	"encoding/binary"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/crypto/ssh"

	"mailproxy/config"
)

// Certs are a node's two certificates, in authorized_keys form. They are not interchangeable: the node answers with Host and dials
// with User.
type Certs struct {
	Host string `json:"host"`
	User string `json:"user"`
}

// A Certificate says what a person wants to know of a node's two certificates.
type Certificate struct {
	// Fingerprint is that of the node's key, CA that of the key that signed, both "SHA256:…".
	Fingerprint string `json:"fingerprint"`
	CA          string `json:"ca"`
	// Expires is when the first of them does.
	Expires time.Time `json:"expires"`
}

// Describe reads the certificates. ErrBadCertificate.
func (c Certs) Describe() (Certificate, error) {
	var d Certificate
	for _, text := range []string{c.Host, c.User} {
		cert, err := parseCert(text)
		if err != nil {
			return d, err
		}
		expires := time.Unix(int64(min(cert.ValidBefore, maxUnix)), 0).UTC()
		if d.Expires.IsZero() || expires.Before(d.Expires) {
			d = Certificate{ssh.FingerprintSHA256(cert.Key), ssh.FingerprintSHA256(cert.SignatureKey), expires}
		}
	}
	return d, nil
}

// maxUnix is the end of the year 9999, the last that JSON can tell.
const maxUnix = 253402300799

// Certificate describes this node's own; nil for a node that has none.
func (t *Tunnel) Certificate() *Certificate {
	t.mu.Lock()
	self := t.self
	t.mu.Unlock()
	if self == nil || !self.member() {
		return nil
	}
	d, err := self.id.Certs.Describe()
	if err != nil {
		return nil // loadSelf has read them
	}
	return &d
}

func cidPrincipal(cid config.CID) string     { return "cid-" + strconv.Itoa(int(cid)) }
func clusterPrincipal(cluster string) string { return "cluster-" + cluster }

// parseCIDPrincipal reads "cid-3".
func parseCIDPrincipal(s string) (config.CID, bool) {
	digits, ok := strings.CutPrefix(s, "cid-")
	n, err := strconv.ParseInt(digits, 10, 32)
	if !ok || err != nil || n < 1 || cidPrincipal(config.CID(n)) != s {
		return 0, false
	}
	return config.CID(n), true
}

// Sign makes the two certificates of the node cid of a cluster, over its public key (authorized_keys form); valid for
// the given time from now. They have no beginning, so that a peer whose clock is days behind takes them too.
func (c *CA) Sign(publicKey string, cid config.CID, cluster string, validity time.Duration) (Certs, error) {
	key, err := parsePublic(publicKey)
	if err != nil {
		return Certs{}, err
	}
	if cid < 1 || cluster == "" || validity <= 0 {
		return Certs{}, fmt.Errorf("sign for node %d of cluster %q: %w", cid, cluster, ErrBadCertificate)
	}
	host, err := c.sign(ssh.HostCert, key, cid, cluster, validity)
	if err != nil {
		return Certs{}, err
	}
	user, err := c.sign(ssh.UserCert, key, cid, cluster, validity)
	return Certs{Host: host, User: user}, err
}

func (c *CA) sign(kind uint32, key ssh.PublicKey, cid config.CID, cluster string, validity time.Duration) (string, error) {
	var serial [8]byte
	rand.Read(serial[:]) // never fails
	now := c.now()
	cert := &ssh.Certificate{
		Key:             key,
		Serial:          binary.BigEndian.Uint64(serial[:]),
		CertType:        kind,
		KeyId:           cidPrincipal(cid),
		ValidPrincipals: []string{cidPrincipal(cid), clusterPrincipal(cluster)},
		ValidBefore:     uint64(now.Add(validity).Unix()),
	}
	if err := cert.SignCert(rand.Reader, c.signer); err != nil {
		return "", fmt.Errorf("sign certificate: %w", err)
	}
	return publicText(cert), nil
}

// parseCert reads a certificate in authorized_keys form.
func parseCert(text string) (*ssh.Certificate, error) {
	if len(text) > 8192 {
		return nil, ErrBadCertificate
	}
	key, _, _, rest, err := ssh.ParseAuthorizedKey([]byte(text))
	if err != nil || len(rest) > 0 {
		return nil, ErrBadCertificate
	}
	cert, ok := key.(*ssh.Certificate)
	if !ok {
		return nil, ErrBadCertificate
	}
	return cert, nil
}

// Why a peer is not trusted; the text is the reason in the log.
var (
	errNoCertificate = errors.New("no certificate")
	errCertKind      = errors.New("certificate is of the wrong kind")
	errAuthority     = errors.New("certificate of an unknown CA")
	errCluster       = errors.New("certificate of another cluster")
	errPrincipal     = errors.New("certificate of another node")
	errRevoked       = errors.New("node was deleted")
	errNotMember     = errors.New("not a member")
	errOtherKey      = errors.New("not the key of that node")
	errNotValid      = errors.New("certificate is not valid")
)

// trust is what a node believes at one time: who it is and whom it lets in. It is immutable.
type trust struct {
	id      Identity
	key     *Key
	host    ssh.Signer // key with the host certificate
	user    ssh.Signer // key with the user certificate
	nodes   map[config.CID]config.Node
	keys    map[config.CID]string // marshalled public key
	cas     map[string]bool       // marshalled public keys
	revoked map[config.CID]bool
	badKeys map[string]bool // marshalled public keys of deleted nodes
	tunnel  config.TunnelKind
	now     func() time.Time
}

// check says whether what was presented is the certificate, of the wanted kind, of the member cid.
func (t *trust) check(presented ssh.PublicKey, kind uint32, cid config.CID) error {
	cert, ok := presented.(*ssh.Certificate)
	if !ok {
		return errNoCertificate
	}
	if cert.CertType != kind {
		return errCertKind
	}
	if !t.cas[string(cert.SignatureKey.Marshal())] {
		return errAuthority
	}
	if !slices.Contains(cert.ValidPrincipals, clusterPrincipal(t.id.ClusterID)) {
		return errCluster
	}
	if len(cert.ValidPrincipals) != 2 || !slices.Contains(cert.ValidPrincipals, cidPrincipal(cid)) {
		return errPrincipal
	}
	if err := t.admits(cid, string(cert.Key.Marshal())); err != nil {
		return err
	}
	// CheckCert verifies the signature, the time and that there are no critical options.
	checker := ssh.CertChecker{Clock: t.now}
	if err := checker.CheckCert(cidPrincipal(cid), cert); err != nil {
		return fmt.Errorf("%w: %w", errNotValid, err)
	}
	return nil
}

// knowsKey says whether what check refused for its CA alone is of the very key that the member cid had when this node last heard of it. Who
// was away while the cluster got a new CA, or was deleted before it did, knows the others by nothing else. It is enough to be believed
// in a no, and for no more.
func (t *trust) knowsKey(refused error, presented ssh.PublicKey, cid config.CID) bool {
	cert, ok := presented.(*ssh.Certificate)
	return ok && errors.Is(refused, errAuthority) && t.admits(cid, string(cert.Key.Marshal())) == nil
}

// admits says whether the member cid has this very key and was not deleted.
func (t *trust) admits(cid config.CID, key string) error {
	switch {
	case t.revoked[cid] || t.badKeys[key]:
		return errRevoked
	case t.keys[cid] == "" || cid == t.id.CID:
		return errNotMember
	case t.keys[cid] != key:
		return errOtherKey
	}
	return nil
}
