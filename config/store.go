package config

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"os"

	"mailproxy/internal/durable"
)

// ErrTorn is given for a snapshot file that is not whole or was changed.
var ErrTorn = errors.New("snapshot file is damaged")

// storeHead starts a snapshot file; behind it stand the SHA-256 of all that follows the line, in hex, and a line end.
const storeHead = "mailproxy-snapshot 1 "

// Save writes the snapshot to file so that a node can start from it: 0600, whole or not at all, on the disk when it returns.
func (s *Snapshot) Save(file string) error {
	body, err := json.Marshal(s)
	if err != nil {
		return fmt.Errorf("save snapshot: %w", err)
	}
	sum := sha256.Sum256(body)
	var b bytes.Buffer
	b.Grow(len(body) + 128)
	b.WriteString(storeHead + hex.EncodeToString(sum[:]) + "\n")
	b.Write(body)
	if err := durable.WriteFile(file, b.Bytes(), 0o600); err != nil {
		return fmt.Errorf("save snapshot: %w", err)
	}
	return nil
}

// LoadSnapshot reads what Save wrote. The error is fs.ErrNotExist where there is none yet, ErrTorn where it is damaged.
func LoadSnapshot(file string) (*Snapshot, error) {
	data, err := os.ReadFile(file)
	if err != nil {
		return nil, err
	}
	head, body, ok := bytes.Cut(data, []byte("\n"))
	sum := sha256.Sum256(body)
	if !ok || string(head) != storeHead+hex.EncodeToString(sum[:]) {
		return nil, fmt.Errorf("%s: %w", file, ErrTorn)
	}
	s := new(Snapshot)
	if err := json.Unmarshal(body, s); err != nil {
		return nil, fmt.Errorf("%s: %w: %w", file, ErrTorn, err)
	}
	return s, nil
}
