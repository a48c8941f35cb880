package tunnel

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"encoding/pem"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/crypto/ssh"

	"mailproxy/config"
)

func TestTheKeyIsMadeOnce(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "state", "keys")
	keys := make([]*Key, 8)
	var all sync.WaitGroup
	for i := range keys {
		all.Go(func() {
			k, err := LoadOrMakeKey(dir)
			if err != nil {
				t.Error(err)
			}
			keys[i] = k
		})
	}
	all.Wait()
	for _, k := range keys {
		if k == nil || k.Public() != keys[0].Public() {
			t.Fatal("two that made the key at once got different ones")
		}
	}
	if got := keys[0].Public(); !strings.HasPrefix(got, "ssh-ed25519 ") || strings.Count(got, " ") != 1 || strings.ContainsAny(got, "\n\r") {
		t.Errorf("public key is %q", got)
	}
	if got, err := Fingerprint(keys[0].Public()); err != nil || got != keys[0].Fingerprint() || !strings.HasPrefix(got, "SHA256:") {
		t.Errorf("fingerprint is %q, %v", got, err)
	}
	entries, err := os.ReadDir(dir)
	if err != nil || len(entries) != 1 {
		t.Errorf("the directory holds %v, %v; want the key alone", entries, err)
	}
	for path, want := range map[string]os.FileMode{dir: 0o700, filepath.Join(dir, nodeKeyFile): 0o600} {
		if info, err := os.Stat(path); err != nil || info.Mode().Perm() != want {
			t.Errorf("%s has mode %v, %v; want %v", path, info.Mode(), err, want)
		}
	}
}

func TestKeysThatAreNone(t *testing.T) {
	for what, c := range map[string]struct {
		text string
		mode os.FileMode
		want error
	}{
		"one that others can read":       {"x", 0o640, ErrKeyMode},
		"no key":                         {"-----BEGIN RUBBISH-----", 0o600, ErrBadKey},
		"an empty file":                  {"", 0o600, ErrBadKey},
		"one of a kind that is not ours": {ecdsaKey(t), 0o600, ErrBadKey},
	} {
		t.Run(what, func(t *testing.T) {
			dir := t.TempDir()
			path := filepath.Join(dir, nodeKeyFile)
			if err := os.WriteFile(path, []byte(c.text), c.mode); err != nil {
				t.Fatal(err)
			}
			if _, err := LoadOrMakeKey(dir); !errors.Is(err, c.want) {
				t.Errorf("got %v, want %v", err, c.want)
			}
			if got, _ := os.ReadFile(path); string(got) != c.text {
				t.Error("the file was changed")
			}
		})
	}
}

// ecdsaKey is a sound key of another kind.
func ecdsaKey(t *testing.T) string {
	t.Helper()
	private, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	block, err := ssh.MarshalPrivateKey(private, "")
	if err != nil {
		t.Fatal(err)
	}
	return string(pem.EncodeToMemory(block))
}

// What root makes belongs to the owner of the directory above, so that the daemon can read it as another user.
func TestFilesBelongToTheStateDirectorysOwner(t *testing.T) {
	const nobody = 65534
	state := t.TempDir()
	if err := os.Chown(state, nobody, nobody); err != nil {
		t.Fatalf("this test runs as root: %v", err)
	}
	dir := filepath.Join(state, "keys")
	k, err := LoadOrMakeKey(dir)
	if err != nil {
		t.Fatal(err)
	}
	ca, err := LoadOrMakeCA(dir)
	if err != nil {
		t.Fatal(err)
	}
	certs, err := ca.Sign(k.Public(), 1, testCluster, time.Hour)
	if err != nil {
		t.Fatal(err)
	}
	err = SaveIdentity(dir, Identity{
		ClusterID: testCluster, CID: 1, Certs: certs, Nodes: []config.Node{{CID: 1, PublicKey: k.Public()}}, CAs: []config.CA{ca.Config(1)},
	})
	if err != nil {
		t.Fatal(err)
	}
	names := []string{".", nodeKeyFile, caKeyFile, hostCertFile, userCertFile, identityFile, trustFile}
	for _, name := range names {
		info, err := os.Stat(filepath.Join(dir, name))
		if err != nil {
			t.Fatal(err)
		}
		if uid := info.Sys().(*syscall.Stat_t).Uid; uid != nobody {
			t.Errorf("%s belongs to %d, want %d", name, uid, nobody)
		}
		if mode := info.Mode().Perm(); name != "." && mode != 0o600 {
			t.Errorf("%s has mode %v", name, mode)
		}
	}
	if entries, _ := os.ReadDir(dir); len(entries) != len(names)-1 {
		t.Errorf("the directory holds %v", entries)
	}
}

func TestALinkLeadsRootNowhere(t *testing.T) {
	state, elsewhere := t.TempDir(), t.TempDir()
	dir := filepath.Join(state, "keys")
	if err := os.Symlink(elsewhere, dir); err != nil {
		t.Fatal(err)
	}
	if _, err := LoadOrMakeKey(dir); err == nil {
		t.Error("a key directory that is a link out of the state directory was taken")
	}
	if entries, _ := os.ReadDir(elsewhere); len(entries) > 0 {
		t.Errorf("written there: %v", entries)
	}
}

func TestIdentity(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "keys")
	if _, err := LoadIdentity(dir); !errors.Is(err, fs.ErrNotExist) {
		t.Fatalf("without a directory: %v", err)
	}
	k, err := LoadOrMakeKey(dir)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := LoadIdentity(dir); !errors.Is(err, fs.ErrNotExist) {
		t.Fatalf("without an identity: %v", err)
	}
	ca := newCA(t)
	certs, err := ca.Sign(k.Public(), 3, testCluster, time.Hour)
	if err != nil {
		t.Fatal(err)
	}
	want := Identity{ClusterID: testCluster, CID: 3, Certs: certs, Nodes: []config.Node{{CID: 1}}, CAs: []config.CA{ca.Config(1)}}
	for range 2 { // again with the same: the same
		if err := SaveIdentity(dir, want); err != nil {
			t.Fatal(err)
		}
	}
	got, err := LoadIdentity(dir)
	if err != nil || got.CID != 3 || got.ClusterID != testCluster || got.Certs != certs || len(got.Nodes) != 1 || len(got.CAs) != 1 {
		t.Errorf("got %+v, %v", got, err)
	}
	t.Run("one that does not fit the key is not saved", func(t *testing.T) {
		others, err := ca.Sign(newKey(t).Public(), 4, testCluster, time.Hour)
		if err != nil {
			t.Fatal(err)
		}
		for _, bad := range []Identity{
			{ClusterID: testCluster, CID: 4, Certs: others}, {ClusterID: testCluster, CID: 4, Certs: certs},
			{ClusterID: "other", CID: 3, Certs: certs}, {ClusterID: testCluster, CID: 3}, {Certs: certs},
			{ClusterID: testCluster, CID: 3, Certs: Certs{Host: certs.User, User: certs.Host}},
		} {
			if err := SaveIdentity(dir, bad); !errors.Is(err, ErrBadCertificate) {
				t.Errorf("%+v: %v, want %v", bad, err, ErrBadCertificate)
			}
		}
		if got, err := LoadIdentity(dir); err != nil || got.CID != 3 || got.Certs != certs {
			t.Errorf("now %+v, %v", got, err)
		}
	})
	t.Run("one without its certificates is broken, not absent", func(t *testing.T) {
		if err := os.Remove(filepath.Join(dir, userCertFile)); err != nil {
			t.Fatal(err)
		}
		if _, err := LoadIdentity(dir); err == nil || errors.Is(err, fs.ErrNotExist) {
			t.Errorf("got %v", err)
		}
	})
	t.Run("removed, twice", func(t *testing.T) {
		for range 2 {
			if err := RemoveIdentity(dir); err != nil {
				t.Fatal(err)
			}
		}
		if _, err := LoadIdentity(dir); !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("got %v", err)
		}
		if again, err := LoadOrMakeKey(dir); err != nil || again.Public() != k.Public() {
			t.Error("the key is gone too")
		}
	})
}

func TestCA(t *testing.T) {
	dir := t.TempDir()
	if _, err := LoadCA(dir); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("without a CA: %v", err)
	}
	ca, err := LoadOrMakeCA(dir)
	if err != nil {
		t.Fatal(err)
	}
	again, err := LoadCA(dir)
	if err != nil || again.Config(1) != ca.Config(1) {
		t.Errorf("loaded again it is %+v, %v; was %+v", again.Config(1), err, ca.Config(1))
	}
	k := newKey(t)
	now := time.Now()
	ca.now = func() time.Time { return now }
	certs, err := ca.Sign(k.Public(), 3, testCluster, time.Hour)
	if err != nil {
		t.Fatal(err)
	}
	for kind, text := range map[uint32]string{ssh.HostCert: certs.Host, ssh.UserCert: certs.User} {
		cert, err := parseCert(text)
		if err != nil {
			t.Fatal(err)
		}
		if cert.CertType != kind || publicText(cert.Key) != k.Public() || len(cert.CriticalOptions)+len(cert.Extensions) > 0 {
			t.Errorf("certificate is %+v", cert)
		}
		if cert.ValidAfter != 0 || cert.ValidBefore != uint64(now.Add(time.Hour).Unix()) {
			t.Errorf("valid from %d to %d", cert.ValidAfter, cert.ValidBefore)
		}
		if got := strings.Join(cert.ValidPrincipals, " "); got != "cid-3 cluster-"+testCluster {
			t.Errorf("principals are %s", got)
		}
	}
	for what, sign := range map[string]func() (Certs, error){
		"no key":      func() (Certs, error) { return ca.Sign("rubbish", 3, testCluster, time.Hour) },
		"a cert":      func() (Certs, error) { return ca.Sign(certs.User, 3, testCluster, time.Hour) },
		"options":     func() (Certs, error) { return ca.Sign(`command="x" `+k.Public(), 3, testCluster, time.Hour) },
		"CID 0":       func() (Certs, error) { return ca.Sign(k.Public(), 0, testCluster, time.Hour) },
		"no cluster":  func() (Certs, error) { return ca.Sign(k.Public(), 3, "", time.Hour) },
		"no validity": func() (Certs, error) { return ca.Sign(k.Public(), 3, testCluster, 0) },
	} {
		if _, err := sign(); err == nil {
			t.Errorf("%s was signed", what)
		}
	}
}

func TestLimits(t *testing.T) {
	now := time.Now()
	t.Run("buckets", func(t *testing.T) {
		b := &buckets{burst: 2, every: time.Second}
		for i, want := range []bool{true, true, false} {
			if b.take("x", now) != want {
				t.Errorf("take %d: not %v", i+1, want)
			}
		}
		if !b.take("y", now) || b.take("x", now.Add(900*time.Millisecond)) || !b.take("x", now.Add(time.Second)) {
			t.Error("keys are not apart, or the bucket does not fill again")
		}
		for i := range maxRemembered {
			b.take(strings.Repeat("k", i+2), now)
		}
		if len(b.full) > maxRemembered || b.take("new", now) || !b.take("new", now.Add(time.Hour)) {
			t.Errorf("%d keys are remembered", len(b.full))
		}
	})
	t.Run("repeats", func(t *testing.T) {
		r := &repeats{every: time.Minute}
		for i, want := range []int{1, 0, 0} {
			if got, _ := r.take("x", now); got != want {
				t.Errorf("take %d: %d, want %d", i+1, got, want)
			}
		}
		if got, ok := r.take("x", now.Add(time.Minute)); got != 3 || !ok {
			t.Errorf("a minute later: %d, %v; want 3", got, ok)
		}
	})
	t.Run("slots", func(t *testing.T) {
		s := &slots{all: 3, each: 2}
		for i, c := range []struct {
			key  string
			want bool
		}{{"x", true}, {"x", true}, {"x", false}, {"y", true}, {"z", false}} {
			if s.take(c.key) != c.want {
				t.Errorf("take %d of %s: not %v", i+1, c.key, c.want)
			}
		}
		s.give("x")
		if !s.take("z") || len(s.held) != 3 {
			t.Error("a slot that was given back cannot be taken")
		}
	})
}
