package tunnel

import (
	"crypto/ed25519"
	"crypto/sha512"
	"errors"
	"math/big"
	"slices"

	"golang.org/x/crypto/ssh"
)

// A wgKey is a WireGuard key, private or public (X25519, RFC 7748).
//
// It is the node's one key in another form: the birational map of RFC 7748 §4.1 takes Ed25519's curve to X25519's. So who has a
// member's row has its WireGuard key, there is no second one to hand out or revoke, and to hold one means to hold the other. That the
// two uses do not weaken each other is shown in https://eprint.iacr.org/2021/509.
type wgKey [32]byte

// wgPrivate gives the private key of the node with this key: the scalar that Ed25519 signs with (RFC 8032 §5.1.5).
func wgPrivate(key ed25519.PrivateKey) wgKey {
	h := sha512.Sum512(key.Seed())
	k := wgKey(h[:32])
	k[0] &= 248
	k[31] = k[31]&127 | 64
	return k
}

var errNoPoint = errors.New("key has no form for WireGuard")

// wgPublic gives the public key of the node with this SSH key: u = (1+y)/(1-y).
func wgPublic(key ssh.PublicKey) (wgKey, error) {
	crypto, ok := key.(ssh.CryptoPublicKey)
	if !ok {
		return wgKey{}, errNoPoint
	}
	point, ok := crypto.CryptoPublicKey().(ed25519.PublicKey)
	if !ok || len(point) != ed25519.PublicKeySize {
		return wgKey{}, errNoPoint
	}
	bytes := slices.Clone(point)
	bytes[31] &= 127 // the sign of x
	slices.Reverse(bytes)
	y, one := new(big.Int).SetBytes(bytes), big.NewInt(1)
	p := new(big.Int).Sub(new(big.Int).Lsh(one, 255), big.NewInt(19))
	below := new(big.Int).Sub(one, y)
	if below.ModInverse(below.Mod(below, p), p) == nil {
		return wgKey{}, errNoPoint
	}
	u := y.Add(y, one)
	u.Mod(u.Mul(u, below), p)
	var k wgKey
	u.FillBytes(k[:])
	slices.Reverse(k[:])
	return k, nil
}
