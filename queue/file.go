package queue

import (
	"bytes"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"strconv"
	"strings"
	"sync"
	"time"

	"mailproxy/mail"
	"mailproxy/relay"
)

// The shape of an item's file; see the package comment.
const (
	magic       = "MPROXYQ1"
	headSize    = 8 + 4 + 8 + 4
	tailSize    = 4
	maxEnvelope = 4 << 20 // octets: thousands of forward-paths
)

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

var buffers = sync.Pool{New: func() any { b := make([]byte, 0, 64<<10); return &b }}

// writeItem writes an item's file to w, a small one in a single write.
func writeItem(w io.Writer, e *mail.Envelope, c mail.Content) error {
	env, err := json.Marshal(e)
	if err != nil {
		return fmt.Errorf("write the envelope: %w", err)
	}
	if len(env) > maxEnvelope {
		return &contentError{fmt.Errorf("envelope of %d octets", len(env))}
	}
	pooled := buffers.Get().(*[]byte)
	defer buffers.Put(pooled)
	size := c.Size()
	b := append((*pooled)[:0], magic...)
	b = binary.BigEndian.AppendUint32(b, uint32(len(env)))
	b = binary.BigEndian.AppendUint64(b, uint64(size))
	b = binary.BigEndian.AppendUint32(b, crc32.Update(crc32.Checksum(b, castagnoli), castagnoli, env))
	if headSize+len(env) <= cap(b)/2 {
		b = append(b, env...)
	} else {
		if _, err := w.Write(append(b, env...)); err != nil {
			return err
		}
		b = b[:0]
	}
	sum := uint32(0)
	for off := int64(0); off < size; {
		n, err := c.ReadAt(b[len(b):len(b)+int(min(int64(cap(b)-len(b)), size-off))], off)
		if n == 0 {
			if err == nil || err == io.EOF {
				err = io.ErrUnexpectedEOF
			}
			return &contentError{err}
		}
		sum = crc32.Update(sum, castagnoli, b[len(b):len(b)+n])
		b = b[:len(b)+n]
		off += int64(n)
		if cap(b)-len(b) < tailSize {
			if _, err := w.Write(b); err != nil {
				return err
			}
			b = b[:0]
		}
	}
	_, err = w.Write(binary.BigEndian.AppendUint32(b, sum))
	return err
}

// contentError is an error of what is to be written: the spool has no part in it.
type contentError struct{ err error }

func (e *contentError) Error() string { return "content: " + e.err.Error() }
func (e *contentError) Unwrap() error { return e.err }

// readHead reads and checks an item's head and envelope, and gives where the content lies. size is the file's.
func readHead(r io.ReaderAt, size int64) (e *mail.Envelope, off, length int64, err error) {
	var head [headSize]byte
	if n, err := r.ReadAt(head[:], 0); n < headSize {
		return nil, 0, 0, shortRead(err)
	}
	envSize := int64(binary.BigEndian.Uint32(head[8:]))
	content := binary.BigEndian.Uint64(head[12:])
	switch {
	case string(head[:8]) != magic:
		return nil, 0, 0, damagedError("no item's file")
	case envSize > maxEnvelope, content > 1<<62, headSize+envSize+int64(content)+tailSize != size:
		return nil, 0, 0, damagedError("its size is not what its head says")
	}
	env := make([]byte, envSize)
	if n, err := r.ReadAt(env, headSize); n < len(env) {
		return nil, 0, 0, shortRead(err)
	}
	if crc32.Update(crc32.Checksum(head[:20], castagnoli), castagnoli, env) != binary.BigEndian.Uint32(head[20:]) {
		return nil, 0, 0, damagedError("checksum of the envelope")
	}
	e = new(mail.Envelope)
	if err := json.Unmarshal(env, e); err != nil {
		return nil, 0, 0, damagedError("envelope: " + err.Error())
	}
	if len(e.ForwardPaths) == 0 {
		return nil, 0, 0, damagedError("envelope without forward-paths")
	}
	return e, headSize + envSize, int64(content), nil
}

// shortRead: a file that ends early is damaged; any other error is the disk's.
func shortRead(err error) error {
	if err == nil || err == io.EOF || err == io.ErrUnexpectedEOF {
		return damagedError("it ends too early")
	}
	return err
}

// checkContent reads the content through and compares its checksum.
func checkContent(r io.ReaderAt, off, length int64) error {
	pooled := buffers.Get().(*[]byte)
	defer buffers.Put(pooled)
	sum := uint32(0)
	b := (*pooled)[:cap(*pooled)]
	for end := off + length; off < end; {
		n, err := r.ReadAt(b[:min(int64(len(b)), end-off)], off)
		if n == 0 {
			return shortRead(err)
		}
		sum = crc32.Update(sum, castagnoli, b[:n])
		off += int64(n)
	}
	var tail [tailSize]byte
	if n, err := r.ReadAt(tail[:], off); n < tailSize {
		return shortRead(err)
	}
	if binary.BigEndian.Uint32(tail[:]) != sum {
		return damagedError("checksum of the content")
	}
	return nil
}

// An outcome is the last answer for one forward-path.
type outcome struct {
	Code     int       `json:"code"`
	Enhanced [3]int    `json:"enhanced"`
	Text     string    `json:"text"`
	Hop      string    `json:"hop,omitempty"`
	Source   source    `json:"source,omitempty"`
	At       time.Time `json:"at"`
}

// A source says whose words an outcome has.
type source uint8

const (
	fromHop    source = iota // the hop's answer
	fromHere                 // made here: the hop did not say so
	fromNobody               // no hop was in reach: Text is why, with the host in front
)

// outcomeOf is what is kept of a result.
func outcomeOf(r relay.Result, at time.Time) *outcome {
	o := &outcome{Code: r.Reply.Code, Enhanced: r.Reply.Enhanced, Text: r.Reply.Text, Hop: r.Hop, At: at}
	if out := new(relay.OutOfReach); errors.As(r.Reply.Cause, &out) {
		o.Source, o.Text = fromNobody, printable(out.Error())
	} else if r.Reply.Cause != nil && !errors.As(r.Reply.Cause, new(*mail.Reply)) {
		o.Source = fromHere
	}
	return o
}

// printable is s with what is not printable ASCII as '?': an error may quote what a host sent, such as the names in its certificate.
func printable(s string) string {
	return strings.Map(func(r rune) rune {
		if r < ' ' || r > '~' {
			return '?'
		}
		return r
	}, s)
}

func (o *outcome) reply() *mail.Reply {
	return &mail.Reply{Code: o.Code, Enhanced: o.Enhanced, Text: o.Text}
}

// A state is what became of an item so far, as ID.state holds it.
type state struct {
	Attempts int       `json:"attempts"`
	Next     time.Time `json:"next"`
	// Done counts forward-paths, from 0, that are delivered or reported.
	Done []int `json:"done,omitempty"`
	// Last has the last outcome of those that are open.
	Last map[int]*outcome `json:"last,omitempty"`
}

func (s *state) encode() ([]byte, error) {
	b, err := json.Marshal(s)
	if err != nil {
		return nil, err
	}
	return fmt.Appendf(nil, "%08x %s\n", crc32.Checksum(b, castagnoli), b), nil
}

func decodeState(b []byte) (*state, error) {
	sum, rest, ok := bytes.Cut(bytes.TrimSuffix(b, []byte("\n")), []byte(" "))
	want, err := strconv.ParseUint(string(sum), 16, 32)
	if !ok || err != nil || len(sum) != 8 || crc32.Checksum(rest, castagnoli) != uint32(want) {
		return nil, damagedError("checksum of the state")
	}
	s := new(state)
	if err := json.Unmarshal(rest, s); err != nil {
		return nil, damagedError("state: " + err.Error())
	}
	return s, nil
}
