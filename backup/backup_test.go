package backup

import (
	"archive/tar"
	"bytes"
	"context"
	"crypto/ed25519"
	"encoding/json"
	"errors"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"filippo.io/age"
	"github.com/rs/zerolog"

	"mailproxy/config"
	"mailproxy/db"
	"mailproxy/internal/pgtest"
	"mailproxy/tunnel"
)

func TestMain(m *testing.M) { os.Exit(pgtest.Main(m)) }

const passphrase = "correct horse battery staple"

// quick is a passphrase that costs little to try.
func quick(t testing.TB) *age.ScryptRecipient {
	t.Helper()
	r, err := age.NewScryptRecipient(passphrase)
	if err != nil {
		t.Fatal(err)
	}
	r.SetWorkFactor(4)
	return r
}

// source makes a node with a database and a node file.
func source(t testing.TB) Source {
	t.Helper()
	dir := t.TempDir()
	l := config.DefaultLocal()
	l.Name, l.Address, l.StateDir, l.File = "n1.test", "127.0.0.1", dir, filepath.Join(dir, "node.toml")
	d, err := db.Open(db.Options{DSN: pgtest.New(t), Log: zerolog.Nop(),
		NodeKey: func() (ed25519.PrivateKey, error) { return tunnel.PrivateKey(l.KeyDir()) }})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(d.Close)
	if err := os.WriteFile(l.File, l.Text(), 0o600); err != nil {
		t.Fatal(err)
	}
	return Source{Local: l, DB: d, TLSFile: filepath.Join(dir, "smtp.pem"), Version: "test"}
}

const clusterID = "6f1c0f6e-8f57-4c0c-9a35-2f9ae6c5a001"

// master makes the node the first of a cluster, with a domain.
func master(t testing.TB) Source {
	t.Helper()
	s := source(t)
	dir := s.Local.KeyDir()
	key, err := tunnel.LoadOrMakeKey(dir)
	if err != nil {
		t.Fatal(err)
	}
	ca, err := tunnel.LoadOrMakeCA(dir)
	if err != nil {
		t.Fatal(err)
	}
	certs, err := ca.Sign(key.Public(), 1, clusterID, time.Hour)
	if err != nil {
		t.Fatal(err)
	}
	node := config.Node{CID: 1, Name: "n1.test", Address: "127.0.0.1:7025", PublicKey: key.Public(), Promotable: true, JoinedAt: time.Unix(1e9, 0)}
	err = tunnel.SaveIdentity(dir, tunnel.Identity{ClusterID: clusterID, CID: 1, Certs: certs, Nodes: []config.Node{node}, CAs: []config.CA{ca.Config(1)}})
	if err != nil {
		t.Fatal(err)
	}
	if err := s.DB.CreateCluster(t.Context(), db.CreateParams{ClusterID: clusterID, Node: node, CA: ca.Config(1)}); err != nil {
		t.Fatal(err)
	}
	put(t, s.DB, "one.test")
	return s
}

func put(t testing.TB, d *db.DB, name string) {
	t.Helper()
	_, err := d.Commit(context.Background(), db.Author{Who: "root"}, func(ctx context.Context, tx *db.Tx) error {
		return tx.PutDomain(ctx, config.Domain{Name: name, Hosts: []string{"10.0.0.1:25"}})
	}, nil)
	if err != nil {
		t.Fatal(err)
	}
}

func putSecret(t testing.TB, d *db.DB, name, value string) {
	t.Helper()
	_, err := d.Commit(context.Background(), db.Author{Who: "root"}, func(ctx context.Context, tx *db.Tx) error {
		return tx.PutSecret(ctx, name, []byte(value))
	}, nil)
	if err != nil {
		t.Fatal(err)
	}
}

func wantSecret(t testing.TB, d *db.DB, name, want string) {
	t.Helper()
	if got, err := d.Secret(t.Context(), name); err != nil || string(got) != want {
		t.Errorf("secret %s: %q, %v, want %q", name, got, err, want)
	}
}

// Secrets come back on a machine with another key, and with the node's own.
func TestSecretsComeBack(t *testing.T) {
	s := master(t)
	putSecret(t, s.DB, "dkim", "hunter2")
	b := backupOf(t, s)
	open := func() *Backup {
		opened, err := Open(bytes.NewReader(b), passphrase)
		if err != nil {
			t.Fatal(err)
		}
		return opened
	}
	single, back := source(t), source(t)
	for _, fresh := range []Source{single, back} {
		if _, err := tunnel.LoadOrMakeKey(fresh.Local.KeyDir()); err != nil { // made by its daemon
			t.Fatal(err)
		}
		putSecret(t, fresh.DB, "own", "gone then")
	}
	if _, err := open().Single(t.Context(), single.DB, db.Author{Who: "root"}); err != nil {
		t.Fatal(err)
	}
	if err := open().Identity(t.Context(), back.DB, back.Local.KeyDir()); err != nil {
		t.Fatal(err)
	}
	for _, fresh := range []Source{single, back} {
		wantSecret(t, fresh.DB, "dkim", "hunter2")
		if _, err := fresh.DB.Secret(t.Context(), "own"); !errors.Is(err, db.ErrNoSuch) {
			t.Errorf("own: %v, want ErrNoSuch", err)
		}
	}
	// A backup without the key that opens them is none.
	if err := os.Remove(filepath.Join(single.Local.KeyDir(), "node.key")); err != nil {
		t.Fatal(err)
	}
	if _, err := write(t.Context(), io.Discard, single, quick(t), db.WithoutLogs); !errors.Is(err, db.ErrNoDataKey) {
		t.Errorf("without a key: %v, want ErrNoDataKey", err)
	}
	if _, err := tunnel.LoadOrMakeKey(single.Local.KeyDir()); err != nil {
		t.Fatal(err)
	}
	if _, err := write(t.Context(), io.Discard, single, quick(t), db.WithoutLogs); !errors.Is(err, db.ErrNoDataKey) {
		t.Errorf("with another key: %v, want ErrNoDataKey", err)
	}
}

func domains(t testing.TB, d *db.DB) []string {
	t.Helper()
	s, err := d.Load(context.Background())
	if err != nil {
		t.Fatal(err)
	}
	var names []string
	for x := range s.Domains.All() {
		names = append(names, x.Name)
	}
	return names
}

func backupOf(t testing.TB, s Source) []byte {
	t.Helper()
	var b bytes.Buffer
	if _, err := write(t.Context(), &b, s, quick(t), db.WithoutLogs); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

// An administrator without this program, but with age and tar, finds readable files.
func TestAgeAndTarOpenABackup(t *testing.T) {
	s := master(t)
	if err := os.WriteFile(s.TLSFile, []byte("certificate"), 0o600); err != nil {
		t.Fatal(err)
	}
	opener, err := age.NewScryptIdentity(passphrase)
	if err != nil {
		t.Fatal(err)
	}
	plain, err := age.Decrypt(bytes.NewReader(backupOf(t, s)), opener)
	if err != nil {
		t.Fatal(err)
	}
	files := map[string]string{}
	var order []string
	r := tar.NewReader(plain)
	for h, err := r.Next(); !errors.Is(err, io.EOF); h, err = r.Next() {
		if err != nil {
			t.Fatal(err)
		}
		b, err := io.ReadAll(r)
		if err != nil || h.Mode != 0o600 {
			t.Fatalf("%s: mode %o, %v", h.Name, h.Mode, err)
		}
		files[h.Name] = string(b)
		order = append(order, h.Name)
	}
	key, err := os.ReadFile(filepath.Join(s.Local.KeyDir(), "node.key"))
	if err != nil {
		t.Fatal(err)
	}
	for name, want := range map[string]string{
		"README":              "mailproxy restore",
		"manifest.json":       `"cluster_id": "` + clusterID + `"`,
		"node.toml":           `name = "n1.test"`,
		"keys/node.key":       string(key),
		"keys/ca.key":         "PRIVATE KEY",
		"keys/identity.json":  clusterID,
		"keys/host-cert.pub":  "ssh-ed25519-cert",
		"tls/smtp.pem":        "certificate",
		"config/domain.jsonl": `"name": "one.test"`,
		"config/node.jsonl":   `"cid": 1`,
		"node/journal.jsonl":  "",
	} {
		if got, ok := files[name]; !ok || !strings.Contains(got, want) {
			t.Errorf("%s: no %q in %q (%v)", name, want, got, order)
		}
	}
	if order[0] != "README" || order[1] != "manifest.json" {
		t.Errorf("order: %v", order)
	}
}

func TestNoFileThatIsNotWholeIsOpened(t *testing.T) {
	whole := backupOf(t, master(t))
	if _, err := Open(bytes.NewReader(whole), passphrase); err != nil {
		t.Fatal(err)
	}
	known := []error{ErrNotBackup, ErrPassphrase, ErrDamaged}
	refused := func(what string, at int, b []byte) {
		t.Helper()
		_, err := Open(bytes.NewReader(b), passphrase)
		if !slices.ContainsFunc(known, func(k error) bool { return errors.Is(err, k) }) {
			t.Errorf("%s at %d of %d: %v", what, at, len(whole), err)
		}
	}
	for at := 0; at < len(whole); at += max(1, len(whole)/199) {
		refused("cut", at, whole[:at])
		flipped := bytes.Clone(whole)
		flipped[at] ^= 0x10
		refused("flipped", at, flipped)
	}
	refused("cut", len(whole)-1, whole[:len(whole)-1])
	refused("longer", len(whole), append(bytes.Clone(whole), 'x'))
	refused("twice", len(whole), append(bytes.Clone(whole), whole...))
	if _, err := Open(bytes.NewReader(whole), "incorrect horse battery staple"); !errors.Is(err, ErrPassphrase) {
		t.Errorf("another passphrase: %v", err)
	}
}

// Where the archive ends with one of age's chunks (64 KiB), only a read behind its end tells that the file does not.
func TestBehindTheLastChunkIsNothing(t *testing.T) {
	opener, err := age.NewScryptIdentity(passphrase)
	if err != nil {
		t.Fatal(err)
	}
	plain, err := age.Decrypt(bytes.NewReader(backupOf(t, master(t))), opener)
	if err != nil {
		t.Fatal(err)
	}
	archive, err := io.ReadAll(plain)
	if err != nil {
		t.Fatal(err)
	}
	const chunk = 64 << 10
	var b bytes.Buffer
	sealed, err := age.Encrypt(&b, quick(t))
	if err != nil {
		t.Fatal(err)
	}
	archive = append(archive, make([]byte, chunk-len(archive)%chunk)...) // tar(1) pads too
	if _, err := sealed.Write(archive); err != nil {
		t.Fatal(err)
	}
	if err := sealed.Close(); err != nil {
		t.Fatal(err)
	}
	if _, err := Open(bytes.NewReader(b.Bytes()), passphrase); err != nil {
		t.Error(err)
	}
	if _, err := Open(bytes.NewReader(append(b.Bytes(), 'x')), passphrase); !errors.Is(err, ErrDamaged) {
		t.Errorf("with a byte more: %v, want ErrDamaged", err)
	}
}

// remade takes an archive apart and puts it together again.
func remade(t testing.TB, b []byte, change func(name string, data []byte) (string, []byte)) []byte {
	t.Helper()
	opener, err := age.NewScryptIdentity(passphrase)
	if err != nil {
		t.Fatal(err)
	}
	plain, err := age.Decrypt(bytes.NewReader(b), opener)
	if err != nil {
		t.Fatal(err)
	}
	var out bytes.Buffer
	sealed, err := age.Encrypt(&out, quick(t))
	if err != nil {
		t.Fatal(err)
	}
	r, w := tar.NewReader(plain), tar.NewWriter(sealed)
	for h, err := r.Next(); !errors.Is(err, io.EOF); h, err = r.Next() {
		if err != nil {
			t.Fatal(err)
		}
		data, err := io.ReadAll(r)
		if err != nil {
			t.Fatal(err)
		}
		name, data := change(h.Name, data)
		if name == "" {
			continue
		}
		if err := w.WriteHeader(&tar.Header{Name: name, Size: int64(len(data)), Mode: 0o600}); err != nil {
			t.Fatal(err)
		}
		if _, err := w.Write(data); err != nil {
			t.Fatal(err)
		}
	}
	if err := errors.Join(w.Close(), sealed.Close()); err != nil {
		t.Fatal(err)
	}
	return out.Bytes()
}

func TestAnArchiveThatWasChangedByHandIsRefused(t *testing.T) {
	b := backupOf(t, master(t))
	for _, c := range []struct {
		name   string
		change func(name string, data []byte) (string, []byte)
		want   error
	}{
		{"a row is gone", func(name string, data []byte) (string, []byte) {
			if name == "config/domain.jsonl" {
				return name, nil
			}
			return name, data
		}, ErrDamaged},
		{"a row is no JSON", func(name string, data []byte) (string, []byte) {
			if name == "config/domain.jsonl" {
				return name, []byte("{\n")
			}
			return name, data
		}, ErrDamaged},
		{"a table is gone", func(name string, data []byte) (string, []byte) {
			if name == "config/transport.jsonl" {
				return "", nil
			}
			return name, data
		}, ErrDamaged},
		{"the manifest is gone", func(name string, data []byte) (string, []byte) {
			if name == "manifest.json" {
				return "", nil
			}
			return name, data
		}, ErrDamaged},
		{"the manifest is no JSON", func(name string, data []byte) (string, []byte) {
			if name == "manifest.json" {
				return name, data[1:]
			}
			return name, data
		}, ErrDamaged},
		{"a later format", func(name string, data []byte) (string, []byte) {
			return name, bytes.Replace(data, []byte(`"format": 1`), []byte(`"format": 2`), 1)
		}, ErrNewerFormat},
	} {
		t.Run(c.name, func(t *testing.T) {
			if _, err := Open(bytes.NewReader(remade(t, b, c.change)), passphrase); !errors.Is(err, c.want) {
				t.Errorf("%v, want %v", err, c.want)
			}
		})
	}
	// And what is only packed anew is as good as it was.
	same := remade(t, b, func(name string, data []byte) (string, []byte) { return name, data })
	if _, err := Open(bytes.NewReader(same), passphrase); err != nil {
		t.Error(err)
	}
}

func TestTheIdentityComesBackWithItsKeys(t *testing.T) {
	s := master(t)
	b := backupOf(t, s)
	fresh := source(t)
	if _, err := tunnel.LoadOrMakeKey(fresh.Local.KeyDir()); err != nil { // its own, made by its daemon
		t.Fatal(err)
	}
	opened, err := Open(bytes.NewReader(b), passphrase)
	if err != nil {
		t.Fatal(err)
	}
	if err := opened.Identity(t.Context(), fresh.DB, fresh.Local.KeyDir()); err != nil {
		t.Fatal(err)
	}
	before, err := tunnel.ReadKeyFiles(s.Local.KeyDir())
	if err != nil {
		t.Fatal(err)
	}
	after, err := tunnel.ReadKeyFiles(fresh.Local.KeyDir())
	if err != nil || len(after) != 6 {
		t.Fatalf("%d key files, %v", len(after), err)
	}
	for name, text := range before {
		if !bytes.Equal(after[name], text) {
			t.Errorf("%s differs", name)
		}
		info, err := os.Stat(filepath.Join(fresh.Local.KeyDir(), name))
		if err != nil || info.Mode() != 0o600 {
			t.Errorf("%s: %v, %v", name, info.Mode(), err)
		}
	}
	if r, err := fresh.DB.Restored(t.Context()); err != nil || r == nil || !r.Keys {
		t.Errorf("restored: %+v, %v", r, err)
	}
	// A node that was not pushed to has nothing to back up.
	if _, err := write(t.Context(), io.Discard, fresh, quick(t), db.WithoutLogs); !errors.Is(err, ErrNothing) {
		t.Errorf("a backup of it: %v, want ErrNothing", err)
	}
}

func TestKeysOfAnotherNodeAreNoIdentity(t *testing.T) {
	s := master(t)
	b := backupOf(t, s)
	other, err := tunnel.ReadKeyFiles(master(t).Local.KeyDir())
	if err != nil {
		t.Fatal(err)
	}
	mixed := remade(t, b, func(name string, data []byte) (string, []byte) {
		if name == "keys/node.key" {
			return name, other["node.key"]
		}
		return name, data
	})
	fresh := source(t)
	for name, c := range map[string]struct {
		file []byte
		want error
	}{
		"another key": {mixed, ErrDamaged},
		"no cluster":  {backupOf(t, source(t)), ErrNoIdentity},
		"no identity.json": {remade(t, b, func(name string, data []byte) (string, []byte) {
			if name == "keys/identity.json" {
				return "", nil
			}
			return name, data
		}), ErrDamaged},
	} {
		opened, err := Open(bytes.NewReader(c.file), passphrase)
		if err != nil {
			t.Fatal(err)
		}
		if err := opened.Identity(t.Context(), fresh.DB, fresh.Local.KeyDir()); !errors.Is(err, c.want) {
			t.Errorf("%s: %v, want %v", name, err, c.want)
		}
		if st, err := fresh.DB.State(t.Context()); err != nil || st.CID != 0 {
			t.Errorf("%s: the database is node %d's, %v", name, st.CID, err)
		}
		if _, err := os.Stat(fresh.Local.KeyDir()); !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("%s: keys were written", name)
		}
	}
	// The node itself, where the keys are of another member, and between two steps of a join.
	key, err := tunnel.LoadOrMakeKey(s.Local.KeyDir())
	if err != nil {
		t.Fatal(err)
	}
	ca, err := tunnel.LoadOrMakeCA(s.Local.KeyDir())
	if err != nil {
		t.Fatal(err)
	}
	certs, err := ca.Sign(key.Public(), 2, clusterID, time.Hour)
	if err != nil {
		t.Fatal(err)
	}
	if err := tunnel.SaveIdentity(s.Local.KeyDir(), tunnel.Identity{ClusterID: clusterID, CID: 2, Certs: certs}); err != nil {
		t.Fatal(err)
	}
	if _, err := write(t.Context(), io.Discard, s, quick(t), db.WithoutLogs); !errors.Is(err, ErrChanging) {
		t.Errorf("a backup with another's keys: %v, want ErrChanging", err)
	}
	if err := tunnel.RemoveIdentity(s.Local.KeyDir()); err != nil {
		t.Fatal(err)
	}
	if _, err := write(t.Context(), io.Discard, s, quick(t), db.WithoutLogs); !errors.Is(err, ErrChanging) {
		t.Errorf("a backup of it: %v, want ErrChanging", err)
	}
}

// What is broken after the file was opened, or as its second reading goes on, changes nothing.
func TestAFileThatChangesWhileItIsReadChangesNothing(t *testing.T) {
	b := backupOf(t, master(t))
	fresh := source(t)
	put(t, fresh.DB, "own.test")
	file := bytes.NewReader(b)
	opened, err := Open(file, passphrase)
	if err != nil {
		t.Fatal(err)
	}
	file.Reset(b[:len(b)-20])
	if _, err := opened.Single(t.Context(), fresh.DB, db.Author{Who: "root"}); !errors.Is(err, ErrDamaged) {
		t.Errorf("cut off meanwhile: %v", err)
	}
	if got := domains(t, fresh.DB); !slices.Equal(got, []string{"own.test"}) {
		t.Errorf("domains: %q", got)
	}
}

// The file in testdata was made by the first version that made backups. It must be taken by all that come after.
func TestTheFirstFormatIsTaken(t *testing.T) {
	b, err := os.ReadFile(filepath.Join("testdata", "format-1.age"))
	if err != nil {
		t.Fatal(err)
	}
	opened, err := Open(bytes.NewReader(b), passphrase)
	if err != nil {
		t.Fatal(err)
	}
	if text, err := json.Marshal(opened.Manifest); err != nil || opened.State.CID != 1 || opened.Schema != 12 {
		t.Errorf("manifest: %s, %v", text, err)
	}
	single, back := source(t), source(t)
	if _, err := opened.Single(t.Context(), single.DB, db.Author{Who: "root"}); err != nil {
		t.Fatal(err)
	}
	if err := opened.Identity(t.Context(), back.DB, back.Local.KeyDir()); err != nil {
		t.Fatal(err)
	}
	for _, s := range []Source{single, back} {
		if got := domains(t, s.DB); !slices.Equal(got, []string{"one.test"}) {
			t.Errorf("domains: %q", got)
		}
	}
}
