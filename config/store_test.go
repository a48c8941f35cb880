package config

import (
	"bytes"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

func TestSnapshotIsReadBackAsItWasSaved(t *testing.T) {
	file := filepath.Join(t.TempDir(), "snapshot.json")
	if _, err := LoadSnapshot(file); !errors.Is(err, fs.ErrNotExist) {
		t.Fatalf("without a file: %v", err)
	}
	s := sound()
	s.Position = Position{Epoch: Epoch{2, 1}, Serial: 9, Digest: Digest{1, 2, 3}}
	s.ClusterID = "c"
	s.Nodes = []Node{{CID: 1, Name: "a", JoinedAt: time.Unix(1e9, 0).UTC(), Services: []string{"smtp"}}}
	s.CAs = []CA{{Fingerprint: "SHA256:x"}}
	s.Revoked = []Revoked{{CID: 2}}
	if err := s.Save(file); err != nil {
		t.Fatal(err)
	}
	got, err := LoadSnapshot(file)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(s, got, compareParts); diff != "" {
		t.Error(diff)
	}
	if info, err := os.Stat(file); err != nil || info.Mode() != 0o600 {
		t.Errorf("mode %v, %v; want 0600", info.Mode(), err)
	}
}

func TestADamagedSnapshotIsNotUsed(t *testing.T) {
	file := filepath.Join(t.TempDir(), "snapshot.json")
	if err := sound().Save(file); err != nil {
		t.Fatal(err)
	}
	whole, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	damaged := [][]byte{nil, whole[:10], whole[:len(whole)-1], whole[:len(whole)/2], append(bytes.Clone(whole), ' '),
		bytes.Replace(whole, []byte("a.test"), []byte("b.test"), 1), make([]byte, len(whole)), []byte("{}")}
	for _, data := range damaged {
		if err := os.WriteFile(file, data, 0o600); err != nil {
			t.Fatal(err)
		}
		if s, err := LoadSnapshot(file); !errors.Is(err, ErrTorn) {
			t.Errorf("%.60q: %v, %v; want ErrTorn", data, s, err)
		}
	}
}
