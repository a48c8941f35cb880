package tunnel

import (
	"crypto/ed25519"
	"crypto/rand"
	"encoding/pem"
	"errors"
	"fmt"
	"io/fs"
	"strings"
	"time"

	"golang.org/x/crypto/ssh"

	"mailproxy/config"
)

// The files of the key directory.
const (
	nodeKeyFile  = "node.key"
	nextKeyFile  = "node.key.next" // the key of a node that leaves its cluster, for afterwards
	caKeyFile    = "ca.key"
	nextCAFile   = "ca.key.next" // a CA that does not sign yet
	hostCertFile = "host-cert.pub"
	userCertFile = "user-cert.pub"
	identityFile = "identity.json"
	trustFile    = "trust.json"
)

// Key is a node's own key: Ed25519, in OpenSSH's PEM form. It is made once and is the node's identity in all clusters.
type Key struct {
	signer  ssh.Signer
	private ed25519.PrivateKey
}

// LoadOrMakeKey reads node.key in dir, or makes it. Two that make it at once get the same key. ErrKeyMode when others can read it,
// ErrBadKey when it is no key.
func LoadOrMakeKey(dir string) (*Key, error) {
	private, _, err := loadOrMake(dir, nodeKeyFile)
	if err != nil {
		return nil, err
	}
	signer, err := ssh.NewSignerFromSigner(private)
	if err != nil {
		return nil, err
	}
	return &Key{signer, private}, nil
}

// LoadOrLendKey is LoadOrMakeKey that writes nothing: where there is no key, it gives one that is not kept.
func LoadOrLendKey(dir string) (*Key, error) {
	private, err := loadKey(dir)
	if errors.Is(err, fs.ErrNotExist) {
		_, private, err = ed25519.GenerateKey(rand.Reader)
	}
	if err != nil {
		return nil, err
	}
	signer, err := ssh.NewSignerFromSigner(private)
	if err != nil {
		return nil, err
	}
	return &Key{signer, private}, nil
}

// PrivateKey reads node.key in dir; fs.ErrNotExist where there is none, and errors as of LoadOrMakeKey.
func PrivateKey(dir string) (ed25519.PrivateKey, error) { return loadKey(dir) }

func loadKey(dir string) (ed25519.PrivateKey, error) {
	d, err := openKeyDirToRead(dir)
	if err != nil {
		return nil, fmt.Errorf("open key directory: %w", err)
	}
	defer d.close()
	private, _, err := d.loadPrivate(nodeKeyFile)
	return private, err
}

// NextKey gives the key that takes the place of node.key with RenewKey; it is made where there is none.
func NextKey(dir string) (ed25519.PublicKey, error) {
	private, _, err := loadOrMake(dir, nextKeyFile)
	if err != nil {
		return nil, err
	}
	return private.Public().(ed25519.PublicKey), nil
}

// RenewKey puts the next key in the place of the node's key, which its last cluster has revoked, and removes a CA's key: the next
// cluster gets fresh ones. Again it does nothing.
func RenewKey(dir string) error {
	d, err := openKeyDir(dir)
	if err != nil {
		return err
	}
	defer d.close()
	if err := d.root.Rename(nextKeyFile, nodeKeyFile); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return d.remove(caKeyFile, nextCAFile)
}

// Public gives the public key in authorized_keys form, without comment.
func (k *Key) Public() string { return publicText(k.signer.PublicKey()) }

// Fingerprint gives "SHA256:" and 43 characters of base64, as ssh-keygen -l does.
func (k *Key) Fingerprint() string { return ssh.FingerprintSHA256(k.signer.PublicKey()) }

func publicText(key ssh.PublicKey) string {
	return strings.TrimSuffix(string(ssh.MarshalAuthorizedKey(key)), "\n")
}

// loadOrMake gives the key in a file and when the file was made.
func loadOrMake(dir, name string) (ed25519.PrivateKey, time.Time, error) {
	d, err := openKeyDir(dir)
	if err != nil {
		return nil, time.Time{}, fmt.Errorf("open key directory: %w", err)
	}
	defer d.close()
	found, made, err := d.loadPrivate(name)
	if !errors.Is(err, fs.ErrNotExist) {
		return found, made, err
	}
	_, private, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		return nil, time.Time{}, err
	}
	block, err := ssh.MarshalPrivateKey(private, "mailproxy")
	if err != nil {
		return nil, time.Time{}, err
	}
	if err := d.create(name, pem.EncodeToMemory(block)); err != nil && !errors.Is(err, fs.ErrExist) {
		return nil, time.Time{}, fmt.Errorf("write %s: %w", name, err)
	}
	return d.loadPrivate(name)
}

func (d *keyDir) loadSigner(name string) (ssh.Signer, time.Time, error) {
	private, made, err := d.loadPrivate(name)
	if err != nil {
		return nil, time.Time{}, err
	}
	signer, err := ssh.NewSignerFromSigner(private)
	return signer, made, err
}

func (d *keyDir) loadPrivate(name string) (ed25519.PrivateKey, time.Time, error) {
	info, err := d.root.Stat(name)
	if err != nil {
		return nil, time.Time{}, err
	}
	if info.Mode().Perm()&0o077 != 0 {
		return nil, time.Time{}, fmt.Errorf("%s: %w: mode %04o, want 0600", name, ErrKeyMode, info.Mode().Perm())
	}
	data, err := d.read(name)
	if err != nil {
		return nil, time.Time{}, err
	}
	parsed, err := ssh.ParseRawPrivateKey(data)
	private, ok := parsed.(*ed25519.PrivateKey)
	if err != nil || !ok {
		// The parser's error may quote the file.
		return nil, time.Time{}, fmt.Errorf("%s: %w", name, ErrBadKey)
	}
	return *private, info.ModTime().UTC().Truncate(time.Second), nil
}

// parsePublic reads an Ed25519 key in authorized_keys form; a comment is dropped, options and certificates are refused.
func parsePublic(text string) (ssh.PublicKey, error) {
	if len(text) > 1024 {
		return nil, ErrBadKey
	}
	key, _, options, rest, err := ssh.ParseAuthorizedKey([]byte(text))
	if err != nil || len(options) > 0 || len(rest) > 0 || key.Type() != ssh.KeyAlgoED25519 {
		return nil, ErrBadKey
	}
	return key, nil
}

// Fingerprint gives the fingerprint of a public key in authorized_keys form; ErrBadKey where it is none.
func Fingerprint(publicKey string) (string, error) {
	key, err := parsePublic(publicKey)
	if err != nil {
		return "", err
	}
	return ssh.FingerprintSHA256(key), nil
}

// CA signs node certificates. Its private key stays in the key directory of the node that made it.
type CA struct {
	signer ssh.Signer
	made   time.Time
	now    func() time.Time
}

// LoadOrMakeCA reads ca.key in dir, or makes it.
func LoadOrMakeCA(dir string) (*CA, error) { return loadOrMakeCA(dir, caKeyFile) }

// LoadOrMakeNextCA reads or makes the key of the CA that shall sign next. It signs nothing before PromoteCA.
func LoadOrMakeNextCA(dir string) (*CA, error) { return loadOrMakeCA(dir, nextCAFile) }

func loadOrMakeCA(dir, name string) (*CA, error) {
	private, made, err := loadOrMake(dir, name)
	if err != nil {
		return nil, err
	}
	signer, err := ssh.NewSignerFromSigner(private)
	if err != nil {
		return nil, err
	}
	return &CA{signer: signer, made: made, now: time.Now}, nil
}

// PromoteCA makes the next CA the one that signs. The key that it takes the place of is gone. Again it does nothing.
func PromoteCA(dir string) error {
	d, err := openKeyDir(dir)
	if err != nil {
		return err
	}
	defer d.close()
	if err := d.root.Rename(nextCAFile, caKeyFile); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return d.sync()
}

// LoadCA reads ca.key in dir; fs.ErrNotExist where this node has made none.
func LoadCA(dir string) (*CA, error) {
	d, err := openKeyDirToRead(dir)
	if err != nil {
		return nil, err
	}
	defer d.close()
	signer, made, err := d.loadSigner(caKeyFile)
	if err != nil {
		return nil, err
	}
	return &CA{signer: signer, made: made, now: time.Now}, nil
}

// Config gives the CA's row, made by the node cid.
func (c *CA) Config(cid config.CID) config.CA {
	key := c.signer.PublicKey()
	return config.CA{Fingerprint: ssh.FingerprintSHA256(key), PublicKey: publicText(key), CID: cid, CreatedAt: c.made}
}
