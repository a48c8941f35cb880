package config

import (
	"bytes"
	"encoding/json"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"runtime"
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
	s.Recipients = []RecipientList{{"a.test", []string{"info", "<&>"}}, {"b.test", []string{"*"}}}
	s.TLSSenders = []TLSSender{{Domain: "c.test"}}
	bare := *s
	bare.Domains, bare.Recipients = Domains{}, nil
	for _, s := range []*Snapshot{s, &bare, {}} {
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
		// Nodes of other versions read it too: behind the head it is the snapshot in JSON.
		text, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		_, body, _ := bytes.Cut(text, []byte("\n"))
		plain, err := json.Marshal(s)
		if err != nil {
			t.Fatal(err)
		}
		var a, b any
		if err := errors.Join(json.Unmarshal(body, &a), json.Unmarshal(plain, &b)); err != nil {
			t.Fatal(err)
		}
		if diff := cmp.Diff(b, a); diff != "" {
			t.Error(diff)
		}
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

// A file of 2 MB that is written every few seconds: it is not in memory as a whole. With the race detector pools forget.
func TestSavingManyDomainsTakesLittleMemory(t *testing.T) {
	s := &Snapshot{Domains: manyDomains(30_000)}
	file := filepath.Join(t.TempDir(), "snapshot.json")
	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	if err := s.Save(file); err != nil {
		t.Fatal(err)
	}
	runtime.ReadMemStats(&after)
	info, err := os.Stat(file)
	if err != nil {
		t.Fatal(err)
	}
	if took := int64(after.TotalAlloc - before.TotalAlloc); took > info.Size()*3/2 || info.Size() < 1_500_000 {
		t.Errorf("%d octets were allocated for a file of %d", took, info.Size())
	}
}
