package config

import (
	"bufio"
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"iter"
	"os"
	"slices"

	"mailproxy/internal/durable"
)

// ErrTorn is given for a snapshot file that is not whole or was changed.
var ErrTorn = errors.New("snapshot file is damaged")

// storeHead starts a snapshot file; behind it stand the SHA-256 of all that follows the line, in hex, and a line end.
const storeHead = "mailproxy-snapshot 1 "

// Save writes the snapshot to file so that a node can start from it: 0600, whole or not at all, on the disk when it returns.
func (s *Snapshot) Save(file string) error {
	err := durable.Replace(file, 0o600, func(f *os.File) error {
		if _, err := f.WriteString(headOf(make([]byte, sha256.Size))); err != nil { // its place: the sum is known at the end
			return err
		}
		sum := sha256.New()
		if err := s.encode(io.MultiWriter(f, sum)); err != nil {
			return err
		}
		_, err := f.WriteAt([]byte(headOf(sum.Sum(nil))), 0)
		return err
	})
	if err != nil {
		return fmt.Errorf("save snapshot: %w", err)
	}
	return nil
}

func headOf(sum []byte) string { return storeHead + hex.EncodeToString(sum) + "\n" }

// encode writes the snapshot as JSON, what there may be many of one by one: a large configuration is never in memory as text.
func (s *Snapshot) encode(w io.Writer) error {
	few := *s
	few.Domains, few.Recipients = Domains{}, nil
	body, err := json.Marshal(&few)
	if err != nil {
		return err
	}
	b := bufio.NewWriterSize(w, 64<<10)
	_, _ = b.Write(body[:len(body)-1]) // without its }; what fails Flush gives
	if err := encodeList(b, "domains", s.Domains.All()); err != nil {
		return err
	}
	if err := encodeList(b, "recipients", slices.Values(s.Recipients)); err != nil {
		return err
	}
	_ = b.WriteByte('}')
	return b.Flush()
}

// encodeList writes a list behind the fields of an object; nothing where it is empty.
func encodeList[T any](b *bufio.Writer, name string, list iter.Seq[T]) error {
	e := json.NewEncoder(b)
	before, end := `,"`+name+`":[`, ""
	for x := range list {
		_, _ = b.WriteString(before)
		if err := e.Encode(x); err != nil {
			return err
		}
		before, end = ",", "]"
	}
	_, err := b.WriteString(end)
	return err
}

// LoadSnapshot reads what Save wrote. The error is fs.ErrNotExist where there is none yet, ErrTorn where it is damaged.
func LoadSnapshot(file string) (*Snapshot, error) {
	data, err := os.ReadFile(file)
	if err != nil {
		return nil, err
	}
	head, body, ok := bytes.Cut(data, []byte("\n"))
	sum := sha256.Sum256(body)
	if !ok || string(head)+"\n" != headOf(sum[:]) {
		return nil, fmt.Errorf("%s: %w", file, ErrTorn)
	}
	s := new(Snapshot)
	if err := json.Unmarshal(body, s); err != nil {
		return nil, fmt.Errorf("%s: %w: %w", file, ErrTorn, err)
	}
	return s, nil
}
