package secret

import (
	"bytes"
	"crypto/ed25519"
	"crypto/rand"
	"crypto/sha256"
	"encoding/base64"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"io"

	"filippo.io/age"
	"filippo.io/age/agessh"
	"golang.org/x/crypto/chacha20poly1305"
)

var (
	// ErrNotEntitled is a data key that is not wrapped for this node's key.
	ErrNotEntitled = errors.New("it is not wrapped for this node's key")
	// ErrSealed is a value that does not open: damaged, of another name or of another data key.
	ErrSealed = errors.New("the seal does not open")
)

// A DataKey seals secrets. It is nothing but memory: only its wraps are stored.
type DataKey struct {
	key [chacha20poly1305.KeySize]byte
}

// NewDataKey makes one.
func NewDataKey() DataKey {
	var k DataKey
	_, _ = rand.Read(k.key[:]) // never fails (crypto/rand)
	return k
}

// ID tells data keys apart: 16 hex digits, which follow from the key and do not tell it.
func (k DataKey) ID() string {
	sum := sha256.Sum256(append([]byte("mailproxy data key "), k.key[:]...))
	return hex.EncodeToString(sum[:8])
}

// Seal seals the value of a name.
func (k DataKey) Seal(name string, value []byte) []byte {
	nonce := make([]byte, chacha20poly1305.NonceSizeX, chacha20poly1305.NonceSizeX+len(value)+chacha20poly1305.Overhead)
	_, _ = rand.Read(nonce) // never fails (crypto/rand)
	aead, _ := chacha20poly1305.NewX(k.key[:])
	return aead.Seal(nonce, nonce, value, k.context(name))
}

// Open gives the value that was sealed for a name; ErrSealed.
func (k DataKey) Open(name string, sealed []byte) ([]byte, error) {
	if len(sealed) < chacha20poly1305.NonceSizeX {
		return nil, ErrSealed
	}
	aead, _ := chacha20poly1305.NewX(k.key[:])
	value, err := aead.Open(nil, sealed[:chacha20poly1305.NonceSizeX], sealed[chacha20poly1305.NonceSizeX:], k.context(name))
	if err != nil {
		return nil, ErrSealed
	}
	return value, nil
}

// context is what is sealed beside the value.
func (k DataKey) context(name string) []byte {
	return []byte("mailproxy secret " + k.ID() + " " + name)
}

// A Wrap is a data key wrapped for one node.
type Wrap struct {
	// KeyID is the data key's.
	KeyID string
	// PublicKey is the node's, in authorized_keys form.
	PublicKey string
	Wrapped   []byte
}

// WrapFor wraps the data key for the node with that Ed25519 key, in authorized_keys form.
func (k DataKey) WrapFor(publicKey string) (Wrap, error) {
	recipient, err := agessh.ParseRecipient(publicKey)
	if err != nil {
		return Wrap{}, err
	}
	var b bytes.Buffer
	w, err := age.Encrypt(&b, recipient)
	if err != nil {
		return Wrap{}, err
	}
	if _, err := w.Write(k.key[:]); err != nil {
		return Wrap{}, err
	}
	if err := w.Close(); err != nil {
		return Wrap{}, err
	}
	return Wrap{k.ID(), publicKey, b.Bytes()}, nil
}

// Unwrap gives the data key that one of the wraps has for this node's key; ErrNotEntitled where none has.
func Unwrap(wraps []Wrap, own ed25519.PrivateKey) (DataKey, error) {
	public := PublicText(own.Public().(ed25519.PublicKey))
	for _, w := range wraps {
		if w.PublicKey != public {
			continue
		}
		k, err := w.open(own)
		if err != nil {
			return DataKey{}, fmt.Errorf("%w: %w", ErrNotEntitled, err)
		}
		return k, nil
	}
	return DataKey{}, ErrNotEntitled
}

func (w Wrap) open(own ed25519.PrivateKey) (DataKey, error) {
	var k DataKey
	identity, err := agessh.NewEd25519Identity(own)
	if err != nil {
		return k, err
	}
	r, err := age.Decrypt(bytes.NewReader(w.Wrapped), identity)
	if err != nil {
		return k, err
	}
	if _, err := io.ReadFull(r, k.key[:]); err != nil {
		return DataKey{}, err
	}
	if k.ID() != w.KeyID {
		return DataKey{}, fmt.Errorf("it holds data key %s, not %s", k.ID(), w.KeyID)
	}
	return k, nil
}

// keyType is how SSH calls an Ed25519 key (RFC 8709 §4).
const keyType = "ssh-ed25519"

// PublicText gives a node's public key as the member list has it: authorized_keys form, without comment.
func PublicText(key ed25519.PublicKey) string {
	var blob []byte
	for _, field := range [][]byte{[]byte(keyType), key} { // RFC 4253 §6.6
		blob = binary.BigEndian.AppendUint32(blob, uint32(len(field)))
		blob = append(blob, field...)
	}
	return keyType + " " + base64.StdEncoding.EncodeToString(blob)
}
