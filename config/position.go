package config

import (
	"encoding/hex"
	"fmt"
)

// CID is a node's number in its cluster: from 1, never reused. 0 is a node that is in no cluster.
type CID int32

// An Epoch is one reign of a master: the N-th, owned by Owner. Pairs compare in that order, so that two forced promotions
// still have one winner. The zero Epoch is that of a single node.
type Epoch struct {
	N     int64 `json:"n"`
	Owner CID   `json:"owner"`
}

// Compare gives -1, 0 or 1.
func (e Epoch) Compare(o Epoch) int {
	switch {
	case e.N != o.N:
		return sign(e.N < o.N)
	case e.Owner != o.Owner:
		return sign(e.Owner < o.Owner)
	}
	return 0
}

func sign(less bool) int {
	if less {
		return -1
	}
	return 1
}

// String gives "2.3": the second epoch, owned by CID 3.
func (e Epoch) String() string { return fmt.Sprintf("%d.%d", e.N, e.Owner) }

// A Digest sums up the rows of the replicated configuration, in no order: equal rows give equal digests.
type Digest [32]byte

// String gives 12 hex digits, enough to compare by eye.
func (d Digest) String() string { return hex.EncodeToString(d[:6]) }

// MarshalText gives 64 hex digits.
func (d Digest) MarshalText() ([]byte, error) { return []byte(hex.EncodeToString(d[:])), nil }

// UnmarshalText reads 64 hex digits.
func (d *Digest) UnmarshalText(b []byte) error {
	if len(b) != 64 {
		return fmt.Errorf("digest of %d characters, want 64", len(b))
	}
	_, err := hex.Decode(d[:], b)
	return err
}

// A Position says how far a node's configuration is: the epoch, the number of commits, and the digest of the rows.
type Position struct {
	Epoch  Epoch  `json:"epoch"`
	Serial int64  `json:"serial"`
	Digest Digest `json:"digest"`
}

// Compare orders positions by epoch, then serial; -1, 0 or 1. Equal positions with unequal digests are drift.
func (p Position) Compare(o Position) int {
	if c := p.Epoch.Compare(o.Epoch); c != 0 {
		return c
	}
	if p.Serial != o.Serial {
		return sign(p.Serial < o.Serial)
	}
	return 0
}

// String gives "2.3/17": epoch 2 of CID 3, serial 17.
func (p Position) String() string { return fmt.Sprintf("%v/%d", p.Epoch, p.Serial) }
