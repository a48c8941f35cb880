package spool

import (
	"encoding/binary"
	"fmt"
	"hash/crc32"
	"io"
	"sync"

	"mailproxy/mail"
)

// Shapes; see the package comment.
const (
	magic      = "MPSPOOL1"
	markSize   = 8
	headerSize = 8 + markSize + 4 // of a segment
	headSize   = markSize + 4 + 4 + 8 + 4
	tailSize   = 4 + 4
	end        = "END\n"
	maxHead    = 4 << 20 // octets: thousands of forward-paths
	maxID      = 64

	offKind  = markSize
	offDead  = markSize + 1
	offFlags = markSize + 2
	offIDLen = markSize + 3
	offHead  = markSize + 4
	offSize  = markSize + 8
	offSum   = markSize + 16
)

type kind byte

const (
	kindMessage kind = 'M'
	kindState   kind = 'S'
	kindTrying  kind = 'T'
	kindEnded   kind = 'U'
	kindRemoved kind = 'D'
	kindGap     kind = 'G'

	flagHeld   = 1
	flagTrying = 2
	dead       = 'X'
)

type mark [markSize]byte

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// buffers are for encoding and checking; what has grown large is not kept.
var buffers = sync.Pool{New: func() any { b := make([]byte, 0, 16<<10); return &b }}

func putBuffer(b *[]byte) {
	if cap(*b) <= 256<<10 {
		*b = (*b)[:0]
		buffers.Put(b)
	}
}

func appendHeader(b []byte, m mark) []byte {
	start := len(b)
	b = append(append(b, magic...), m[:]...)
	return binary.BigEndian.AppendUint32(b, crc32.Checksum(b[start:], castagnoli))
}

func parseHeader(b []byte) (m mark, err error) {
	if len(b) < headerSize || string(b[:8]) != magic || crc32.Checksum(b[:8+markSize], castagnoli) != binary.BigEndian.Uint32(b[8+markSize:]) {
		return m, DamagedError("no segment of a spool")
	}
	copy(m[:], b[8:])
	return m, nil
}

// recordSize is the length of a whole record.
func recordSize(id string, head int, content int64) int64 {
	return headSize + int64(len(id)) + int64(head) + content + tailSize
}

// appendHead appends a record up to its content.
func appendHead(b []byte, m mark, k kind, flags byte, id string, head []byte, size int64) []byte {
	start := len(b)
	b = append(b, m[:]...)
	b = append(b, byte(k), 0, flags, byte(len(id)))
	b = binary.BigEndian.AppendUint32(b, uint32(len(head)))
	b = binary.BigEndian.AppendUint64(b, uint64(size))
	b = binary.BigEndian.AppendUint32(b, 0)
	b = append(append(b, id...), head...)
	binary.BigEndian.PutUint32(b[start+offSum:], headSum(b[start:start+headSize], b[start+headSize:]))
	return b
}

// headSum is the checksum of a head, without the octet that may be set in place.
func headSum(head, rest []byte) uint32 {
	sum := crc32.Checksum(head[:offDead], castagnoli)
	sum = crc32.Update(sum, castagnoli, head[offFlags:offSum])
	return crc32.Update(sum, castagnoli, rest)
}

func appendTail(b []byte, sum uint32) []byte {
	return append(binary.BigEndian.AppendUint32(b, sum), end...)
}

// appendSmall appends a record without content.
func appendSmall(b []byte, m mark, k kind, flags byte, id string, head []byte) []byte {
	return appendTail(appendHead(b, m, k, flags, id, head, 0), 0)
}

// appendContent appends the content and the tail.
func appendContent(b []byte, c mail.Content) ([]byte, error) {
	size := int(c.Size())
	at := len(b)
	b = append(b, make([]byte, size)...)
	if err := readAll(c, b[at:]); err != nil {
		return nil, err
	}
	return appendTail(b, crc32.Checksum(b[at:], castagnoli)), nil
}

func readAll(c mail.Content, b []byte) error {
	if n, err := c.ReadAt(b, 0); n < len(b) {
		if err == nil || err == io.EOF {
			err = io.ErrUnexpectedEOF
		}
		return &ContentError{err}
	}
	return nil
}

// writeContent is appendContent for a large one, through b's capacity: b is written first.
func writeContent(w io.Writer, b []byte, c mail.Content) error {
	sum := uint32(0)
	for off, size := int64(0), c.Size(); off < size; {
		if len(b) == cap(b) {
			if _, err := w.Write(b); err != nil {
				return err
			}
			b = b[:0]
		}
		part := b[len(b):min(int64(cap(b)), int64(len(b))+size-off)]
		n, err := c.ReadAt(part, off)
		if n == 0 {
			if err == nil || err == io.EOF {
				err = io.ErrUnexpectedEOF
			}
			return &ContentError{err}
		}
		sum = crc32.Update(sum, castagnoli, part[:n])
		b = b[:len(b)+n]
		off += int64(n)
	}
	_, err := w.Write(appendTail(b, sum))
	return err
}

// A record is what was parsed of one, up to its content.
type record struct {
	kind  kind
	dead  bool
	flags byte
	id    string
	head  []byte // into the buffer of who reads
	size  int64  // of the content
	off   int64  // of the record in its segment
}

func (r *record) held() bool        { return r.flags&flagHeld != 0 }
func (r *record) total() int64      { return recordSize(r.id, len(r.head), r.size) }
func (r *record) contentOff() int64 { return r.off + headSize + int64(len(r.id)) + int64(len(r.head)) }

// readRecord reads the record at off, of a segment of limit octets, up to its content; buf is used where it is large enough. The error
// wraps ErrDamaged, or is the disk's.
func readRecord(r io.ReaderAt, m mark, off, limit int64, buf []byte) (record, error) {
	n, err := r.ReadAt(buf[:min(int64(len(buf)), limit-off)], off)
	if err != nil && err != io.EOF {
		return record{}, err
	}
	b := buf[:n]
	if len(b) < headSize+tailSize || mark(b) != m {
		return record{}, DamagedError("no record")
	}
	ids, heads, size := int64(b[offIDLen]), int64(binary.BigEndian.Uint32(b[offHead:])), binary.BigEndian.Uint64(b[offSize:])
	if ids > maxID || heads > maxHead || size > 1<<56 || off+headSize+ids+heads+int64(size)+tailSize > limit {
		return record{}, DamagedError("its length is not what its head says")
	}
	if need := headSize + ids + heads; int64(n) < need {
		b = append(make([]byte, 0, need), b...)[:need]
		if n, err := r.ReadAt(b[n:], off+int64(n)); n == 0 {
			return record{}, shortRead(err)
		}
	}
	rest := b[headSize : headSize+ids+heads]
	if headSum(b[:headSize], rest) != binary.BigEndian.Uint32(b[offSum:]) {
		return record{}, DamagedError("checksum of its head")
	}
	rec := record{
		kind: kind(b[offKind]), dead: b[offDead] == dead, flags: b[offFlags],
		id: string(rest[:ids]), head: rest[ids:], size: int64(size), off: off,
	}
	if rec.kind != kindGap && !validID(rec.id) {
		return record{}, DamagedError("its ID")
	}
	return rec, nil
}

// validID: an ID is the name of a file, too.
func validID(id string) bool {
	for _, c := range []byte(id) {
		if c != '_' && (c < '0' || c > '9') && (c < 'A' || c > 'Z') && (c < 'a' || c > 'z') {
			return false
		}
	}
	return id != "" && len(id) <= maxID
}

// shortRead: what ends early is damaged; any other error is the disk's.
func shortRead(err error) error {
	if err == nil || err == io.EOF || err == io.ErrUnexpectedEOF {
		return DamagedError("it ends too early")
	}
	return err
}

// checkContent reads a record's content and tail and compares.
func checkContent(r io.ReaderAt, off, size int64) error {
	b := buffers.Get().(*[]byte)
	defer putBuffer(b)
	if cap(*b) < 64<<10 {
		*b = make([]byte, 0, 64<<10)
	}
	part, sum := (*b)[:cap(*b)], uint32(0)
	for left := size; left > 0; {
		n, err := r.ReadAt(part[:min(int64(len(part)), left)], off)
		if n == 0 {
			return shortRead(err)
		}
		sum = crc32.Update(sum, castagnoli, part[:n])
		off, left = off+int64(n), left-int64(n)
	}
	var tail [tailSize]byte
	if n, err := r.ReadAt(tail[:], off); n < tailSize {
		return shortRead(err)
	}
	switch {
	case string(tail[4:]) != end:
		return DamagedError("its end mark")
	case binary.BigEndian.Uint32(tail[:]) != sum:
		return DamagedError("checksum of the content")
	}
	return nil
}

func badHead(size int) error {
	return &ContentError{fmt.Errorf("envelope of %d octets", size)}
}
