package backup

import (
	"archive/tar"
	"bufio"
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"

	"filippo.io/age"

	"mailproxy/db"
)

// Bounds of what is believed of a file: the memory that its key may cost (1 << 20 is 1 GiB; 18 is written), the length of a file
// that is kept in memory, and of a row (PostgreSQL's own bound of a value is 1 GB).
const (
	maxWorkFactor = 20
	maxFileBytes  = 16 << 20
	maxRowBytes   = 1 << 30
)

// A Backup is one that was read from its first byte to its last.
type Backup struct {
	Manifest
	file   io.ReadSeeker
	opener age.Identity
	files  map[string][]byte
}

// Open reads all of a backup and checks it. ErrNotBackup, ErrPassphrase, ErrDamaged, ErrNewerFormat.
func Open(file io.ReadSeeker, passphrase string) (*Backup, error) {
	opener, err := age.NewScryptIdentity(passphrase)
	if err != nil {
		return nil, err
	}
	opener.SetMaxWorkFactor(maxWorkFactor)
	b := &Backup{file: file, opener: &onceOpener{opener: opener}, files: map[string][]byte{}}
	return b, b.walk(func(string, []byte) error { return nil })
}

// A onceOpener tries the passphrase once, which costs a second and 256 MiB, and keeps what it opened for the next reading. A file that
// is another by then does not open with it.
type onceOpener struct {
	opener age.Identity
	key    []byte
}

// Unwrap is part of age.Identity.
func (o *onceOpener) Unwrap(stanzas []*age.Stanza) (key []byte, err error) {
	if o.key == nil {
		o.key, err = o.opener.Unwrap(stanzas)
	}
	return bytes.Clone(o.key), err
}

// walk reads the whole file, and gives each row to row.
func (b *Backup) walk(row func(table string, row []byte) error) error {
	if _, err := b.file.Seek(0, io.SeekStart); err != nil {
		return err
	}
	plain, err := age.Decrypt(bufio.NewReaderSize(b.file, writeBuffer), b.opener)
	if none, ok := errors.AsType[*age.NoIdentityMatchError](err); ok {
		return fmt.Errorf("%w, or not encrypted with one: %w", ErrPassphrase, errors.Join(none.Errors...))
	}
	if err != nil {
		return fmt.Errorf("%w: %w", ErrNotBackup, err)
	}
	w := walker{b: b, row: row}
	if err := w.entries(tar.NewReader(plain)); err != nil {
		return err
	}
	// Behind the archive is nothing; but only the last byte proves that the file is whole.
	if n, err := io.Copy(io.Discard, plain); err != nil || n > tarPadding {
		return fmt.Errorf("%w: %d bytes behind the archive: %w", ErrDamaged, n, err)
	}
	if w.tables != len(b.Tables) || b.Format == 0 {
		return fmt.Errorf("%w: %d tables of %d", ErrDamaged, w.tables, len(b.Tables))
	}
	return nil
}

// tarPadding is what other programs append to fill their blocks.
const tarPadding = 1 << 20

// A walker reads the entries of a backup in order.
type walker struct {
	b      *Backup
	row    func(table string, row []byte) error
	tables int // how many were read
}

func (w *walker) entries(r *tar.Reader) error {
	for {
		h, err := r.Next()
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return fmt.Errorf("%w: %w", ErrDamaged, err)
		}
		if err := w.entry(h, r); err != nil {
			return fmt.Errorf("%s: %w", h.Name, err)
		}
	}
}

func (w *walker) entry(h *tar.Header, r io.Reader) error {
	if w.tables < len(w.b.Tables) && h.Name == rowsFile(w.b.Tables[w.tables].Name) {
		w.tables++
		return w.rows(w.b.Tables[w.tables-1], r)
	}
	if h.Size > maxFileBytes {
		return fmt.Errorf("%w: %d bytes", ErrDamaged, h.Size)
	}
	data, err := io.ReadAll(r)
	if err != nil {
		return fmt.Errorf("%w: %w", ErrDamaged, err)
	}
	if h.Name != manifestFile {
		w.b.files[h.Name] = data
		return nil
	}
	var m Manifest
	if err := json.Unmarshal(data, &m); err != nil {
		return fmt.Errorf("%w: %w", ErrDamaged, err)
	}
	if m.Format > format {
		return fmt.Errorf("%w: %d, written by version %s; this program knows %d", ErrNewerFormat, m.Format, m.Version, format)
	}
	w.b.Manifest = m
	return nil
}

// rows reads the rows of a table.
func (w *walker) rows(t db.Table, r io.Reader) error {
	lines := bufio.NewScanner(r)
	lines.Buffer(make([]byte, 0, 64<<10), maxRowBytes)
	n := int64(0)
	for ; lines.Scan(); n++ {
		if !json.Valid(lines.Bytes()) {
			return fmt.Errorf("%w: row %d is no JSON", ErrDamaged, n+1)
		}
		if err := w.row(t.Name, lines.Bytes()); err != nil {
			return err
		}
	}
	if err := lines.Err(); err != nil {
		return fmt.Errorf("%w: %w", ErrDamaged, err)
	}
	if n != t.Rows {
		return fmt.Errorf("%w: %d rows, the manifest says %d", ErrDamaged, n, t.Rows)
	}
	return nil
}
