package backup

import (
	"archive/tar"
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"os"
	"slices"
	"strings"
	"time"

	"filippo.io/age"

	"mailproxy/config"
	"mailproxy/db"
	"mailproxy/secret"
	"mailproxy/tunnel"
)

// format is what this package writes; it reads this one and those before.
const format = 1

// writeBuffer is between the archive and the disk.
const writeBuffer = 256 << 10

// A Manifest says what a backup holds.
type Manifest struct {
	Format  int       `json:"format"`
	MadeAt  time.Time `json:"made_at"`
	Version string    `json:"version"` // of the software
	Name    string    `json:"name"`    // the node's, as its node file has it
	Address string    `json:"address"` // host:port of its tunnel
	db.Dump
}

// A Source is the node that a backup is made of.
type Source struct {
	Local *config.Local
	DB    *db.DB
	// TLSFile is key and certificate of STARTTLS; it may be missing.
	TLSFile string
	// Version is the software's.
	Version string
}

// Write makes a backup. What it has written is nothing before it returns nil. ErrNothing, ErrChanging, db.ErrNoDataKey.
func Write(ctx context.Context, w io.Writer, s Source, passphrase string, logs db.Logs) (Manifest, error) {
	recipient, err := age.NewScryptRecipient(passphrase)
	if err != nil {
		return Manifest{}, err
	}
	return write(ctx, w, s, recipient, logs)
}

func write(ctx context.Context, w io.Writer, s Source, recipient age.Recipient, logs db.Logs) (Manifest, error) {
	m := Manifest{Format: format, MadeAt: time.Now().UTC().Truncate(time.Second), Version: s.Version, Name: s.Local.Name, Address: s.Local.TunnelAddress()}
	files, err := readFiles(s)
	if err != nil {
		return m, err
	}
	buffer := bufio.NewWriterSize(w, writeBuffer)
	sealed, err := age.Encrypt(buffer, recipient)
	if err != nil {
		return m, err
	}
	a := &archive{tar: tar.NewWriter(sealed), at: m.MadeAt}
	err = s.DB.Dump(ctx, logs, func(d db.Dump) error {
		m.Dump = d
		if err := whole(d.State, files); err != nil {
			return err
		}
		if err := opens(d.Wraps, files); err != nil {
			return err
		}
		return a.head(m, files)
	}, a.row)
	if err == nil {
		err = a.upTo(len(m.Tables))
	}
	if err != nil {
		return m, err
	}
	return m, errors.Join(a.tar.Close(), sealed.Close(), buffer.Flush())
}

// readFiles gives what is not in the database, by its name in the archive.
func readFiles(s Source) (map[string][]byte, error) {
	files := map[string][]byte{}
	keys, err := tunnel.ReadKeyFiles(s.Local.KeyDir())
	if err != nil {
		return nil, fmt.Errorf("read keys: %w", err)
	}
	for name, text := range keys {
		files[keyPrefix+name] = text
	}
	if files[nodeFile], err = os.ReadFile(s.Local.File); err != nil {
		return nil, fmt.Errorf("read node file: %w", err)
	}
	text, err := os.ReadFile(s.TLSFile)
	if err == nil {
		files[tlsFile] = text
	} else if !errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("read certificate: %w", err)
	}
	return files, nil
}

// The names in the archive.
const (
	readmeFile   = "README"
	manifestFile = "manifest.json"
	nodeFile     = "node.toml"
	tlsFile      = "tls/smtp.pem"
	keyPrefix    = "keys/"
	rowsSuffix   = ".jsonl"
)

// whole refuses a node of which a backup could not be restored.
func whole(st db.State, files map[string][]byte) error {
	if st.CID == 0 {
		return nil
	}
	if st.Position.Epoch.N == 0 {
		return ErrNothing
	}
	id, err := tunnel.CheckKeyFiles(keysOf(files))
	if err != nil {
		return fmt.Errorf("%w: %w", ErrChanging, err)
	}
	if id.CID != st.CID || id.ClusterID != st.ClusterID {
		return fmt.Errorf("%w: node %d of cluster %s, node %d of cluster %s", ErrChanging, id.CID, id.ClusterID, st.CID, st.ClusterID)
	}
	return nil
}

// opens refuses a node whose key does not open its secrets: a backup brings them back by that key.
func opens(wraps []secret.Wrap, files map[string][]byte) error {
	if len(wraps) == 0 {
		return nil
	}
	key, err := tunnel.PrivateKeyOf(keysOf(files))
	if err == nil {
		_, err = secret.Unwrap(wraps, key)
	}
	if err != nil {
		return fmt.Errorf("%w: %w", db.ErrNoDataKey, err)
	}
	return nil
}

// keysOf gives the files of the key directory.
func keysOf(files map[string][]byte) map[string][]byte {
	keys := map[string][]byte{}
	for name, text := range files {
		if base, ok := strings.CutPrefix(name, keyPrefix); ok {
			keys[base] = text
		}
	}
	return keys
}

// rowsFile is the name of a table's file: config.domain is config/domain.jsonl.
func rowsFile(table string) string { return strings.Replace(table, ".", "/", 1) + rowsSuffix }

// archive writes the tar.
type archive struct {
	tar    *tar.Writer
	at     time.Time
	tables []db.Table
	begun  int // how many tables have their head
}

func (a *archive) head(m Manifest, files map[string][]byte) error {
	a.tables = m.Tables
	text, err := json.MarshalIndent(m, "", "  ")
	if err != nil {
		return err
	}
	if err := a.file(readmeFile, []byte(readme(m))); err != nil {
		return err
	}
	if err := a.file(manifestFile, append(text, '\n')); err != nil {
		return err
	}
	for _, name := range slices.Sorted(maps.Keys(files)) {
		if err := a.file(name, files[name]); err != nil {
			return err
		}
	}
	return nil
}

func (a *archive) file(name string, data []byte) error {
	if err := a.begin(name, int64(len(data))); err != nil {
		return err
	}
	_, err := a.tar.Write(data)
	return err
}

func (a *archive) begin(name string, size int64) error {
	return a.tar.WriteHeader(&tar.Header{Name: name, Size: size, Mode: 0o600, ModTime: a.at, Typeflag: tar.TypeReg})
}

// row writes a row of a table, and the heads of that and of the empty ones before it.
func (a *archive) row(t db.Table, row []byte) error {
	if a.begun == 0 || a.tables[a.begun-1].Name != t.Name {
		at := slices.IndexFunc(a.tables, func(x db.Table) bool { return x.Name == t.Name })
		if err := a.upTo(at + 1); err != nil {
			return err
		}
	}
	if _, err := a.tar.Write(row); err != nil {
		return err
	}
	_, err := a.tar.Write([]byte{'\n'})
	return err
}

// upTo begins tables until n are begun.
func (a *archive) upTo(n int) error {
	for ; a.begun < n; a.begun++ {
		t := a.tables[a.begun]
		if err := a.begin(rowsFile(t.Name), t.Bytes); err != nil {
			return fmt.Errorf("%s: %w", t.Name, err)
		}
	}
	return nil
}

func readme(m Manifest) string {
	return fmt.Sprintf(`Backup of the mailproxy node %s, made at %s.

manifest.json  what is in here, and where the node was
node.toml      the node's own file; it belongs to /etc/mailproxy
keys/          state_dir/keys: the node's key, its certificates, who it is, and the key of the CA that it made, if it made one
tls/           state_dir/tls: key and certificate of STARTTLS
config/        the tables of the configuration, a row a line, as JSON; secrets are sealed, and keys/node.key opens them
node/          commits that were set aside on this node (pmgcm journal), and those that left its history before every member had them
mail/          what happened to mail, if the backup was made with --logs

"mailproxy restore" brings it back; see mailproxy(8).
`, m.Name, m.MadeAt.Format(time.RFC3339))
}
