package mail

import (
	"crypto/rand"
	"encoding/base32"
	"encoding/binary"
	"strings"
	"time"
)

const idAlphabet = "0123456789BCDFGHJKLMNPQRSTVWXYZ_"

// idEncoding sorts as the bytes do, and has neither vowels that make words nor letters that look like digits.
var idEncoding = base32.NewEncoding(idAlphabet).WithPadding(base32.NoPadding)

// NewID makes the ID of a session or a queue item: 16 characters, sorting by time of making (to 1/65536 s), with 32 random
// bits behind.
func NewID(now time.Time) string {
	var b [10]byte
	binary.BigEndian.PutUint64(b[:8], uint64(now.Unix())<<32|uint64(now.Nanosecond())<<2&0xffffffff)
	_, _ = rand.Read(b[6:]) // never fails (crypto/rand)
	return idEncoding.EncodeToString(b[:])
}

// IsID says whether s has the shape of what NewID makes.
func IsID(s string) bool { return len(s) == 16 && strings.Trim(s, idAlphabet) == "" }
