package db

import (
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"math/big"
	"math/bits"
	"strconv"
	"strings"
)

// rowSums sums rows that are COPYed as text, as node.sum_sql and node.check_sql sum the rows of a table.
type rowSums struct {
	rows  int64
	lanes [4]sum128 // of the SHA-256 of each row
	check sum128    // of its 64-bit hash

	names [][]byte // of each column, with "="
	row   []byte   // what is hashed of a row
	value []byte   // a value without its escapes
}

func newRowSums(columns []string) *rowSums {
	s := &rowSums{value: []byte{}}
	for _, c := range columns {
		s.names = append(s.names, []byte(c+"="))
	}
	return s
}

// nullText stands for NULL in node.check_sql.
var nullText = []byte("\x01NULL")

// add takes in one line of SQL COPY's text format: values between tabs, a line feed at the end.
func (s *rowSums) add(line []byte) {
	line = bytes.TrimSuffix(line, []byte{'\n'})
	escaped := bytes.IndexByte(line, '\\') >= 0
	s.row = s.row[:0]
	x := uint64(1)
	for _, name := range s.names {
		var raw []byte
		if i := bytes.IndexByte(line, '\t'); i >= 0 {
			raw, line = line[:i], line[i+1:]
		} else {
			raw, line = line, nil
		}
		value := raw
		if escaped {
			value = s.unescape(raw)
		}
		if value == nil {
			x = hash64(nullText, x)
			continue
		}
		x = hash64(value, x)
		s.row = append(append(append(s.row, name...), value...), 0)
	}
	h := sha256.Sum256(s.row)
	for i := range s.lanes {
		s.lanes[i].add(int64(binary.BigEndian.Uint64(h[8*i:])))
	}
	s.check.add(int64(x))
	s.rows++
}

// unescape gives a value as it is; nil for NULL. It is valid until the next call.
func (s *rowSums) unescape(raw []byte) []byte {
	if string(raw) == `\N` {
		return nil
	}
	s.value = s.value[:0]
	for i := 0; i < len(raw); i++ {
		b := raw[i]
		if b == '\\' && i+1 < len(raw) {
			i++
			b = raw[i]
			if at := strings.IndexByte("bfnrtv", b); at >= 0 {
				b = "\b\f\n\r\t\v"[at]
			}
		}
		s.value = append(s.value, b)
	}
	return s.value
}

// String is as node.sums gives the kept sums of a table.
func (s *rowSums) String() string {
	text := strconv.FormatInt(s.rows, 10)
	for i := range s.lanes {
		text += " " + s.lanes[i].String()
	}
	return text
}

// A sum128 is a sum of 64-bit integers in two's complement.
type sum128 struct{ hi, lo uint64 }

func (s *sum128) add(v int64) {
	lo, carry := bits.Add64(s.lo, uint64(v), 0)
	s.lo = lo
	s.hi += uint64(v>>63) + carry
}

func (s *sum128) String() string {
	n := new(big.Int).Lsh(big.NewInt(int64(s.hi)), 64)
	return n.Add(n, new(big.Int).SetUint64(s.lo)).String()
}

// hash64 is PostgreSQL's hashtextextended: Bob Jenkins' lookup3 with a 64-bit seed, its two halves swapped. It holds for little-endian
// servers; where one hashes otherwise, the sums differ and the slower sums decide.
func hash64(b []byte, seed uint64) uint64 {
	a := uint32(0x9e3779b9) + uint32(len(b)) + 3923095
	h, c := a, a
	if seed != 0 {
		a += uint32(seed >> 32)
		h += uint32(seed)
		a, h, c = mix(a, h, c)
	}
	for len(b) >= 12 {
		a += binary.LittleEndian.Uint32(b)
		h += binary.LittleEndian.Uint32(b[4:])
		c += binary.LittleEndian.Uint32(b[8:])
		a, h, c = mix(a, h, c)
		b = b[12:]
	}
	var tail [12]byte
	copy(tail[:], b)
	a += binary.LittleEndian.Uint32(tail[0:])
	h += binary.LittleEndian.Uint32(tail[4:])
	c += binary.LittleEndian.Uint32(tail[8:]) << 8 // its lowest byte is for the length
	c = (c ^ h) - bits.RotateLeft32(h, 14)
	a = (a ^ c) - bits.RotateLeft32(c, 11)
	h = (h ^ a) - bits.RotateLeft32(a, 25)
	c = (c ^ h) - bits.RotateLeft32(h, 16)
	a = (a ^ c) - bits.RotateLeft32(c, 4)
	h = (h ^ a) - bits.RotateLeft32(a, 14)
	c = (c ^ h) - bits.RotateLeft32(h, 24)
	return uint64(h)<<32 | uint64(c)
}

func mix(a, b, c uint32) (x, y, z uint32) {
	a = (a - c) ^ bits.RotateLeft32(c, 4)
	c += b
	b = (b - a) ^ bits.RotateLeft32(a, 6)
	a += c
	c = (c - b) ^ bits.RotateLeft32(b, 8)
	b += a
	a = (a - c) ^ bits.RotateLeft32(c, 16)
	c += b
	b = (b - a) ^ bits.RotateLeft32(a, 19)
	a += c
	c = (c - b) ^ bits.RotateLeft32(b, 4)
	b += a
	return a, b, c
}
