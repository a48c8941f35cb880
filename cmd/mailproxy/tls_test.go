package main

import (
	"crypto/tls"
	"os"
	"testing"
	"time"

	"mailproxy/config"
)

func TestTheCertificateIsMadeOnceAndKept(t *testing.T) {
	l := &config.Local{Name: "mx.test", StateDir: t.TempDir()}
	now := time.Now()
	first, err := fileCertificate(l, now)
	if err != nil {
		t.Fatal(err)
	}
	leaf := first.Leaf
	if leaf.VerifyHostname("mx.test") != nil || now.Before(leaf.NotBefore) || now.After(leaf.NotAfter) {
		t.Errorf("certificate for %v from %v to %v", leaf.DNSNames, leaf.NotBefore, leaf.NotAfter)
	}
	if c := new(certificates).tlsConfig(); c.MinVersion != tls.VersionTLS12 || !c.SessionTicketsDisabled {
		t.Errorf("TLS %+v", c)
	}
	info, err := os.Stat(tlsFile(l))
	if err != nil || info.Mode() != 0o600 {
		t.Errorf("mode %v, %v", info.Mode(), err)
	}
	second, err := fileCertificate(l, now.Add(time.Hour))
	if err != nil || !second.Leaf.Equal(leaf) {
		t.Errorf("made anew within an hour: %v", err)
	}
	for name, change := range map[string]func() time.Time{
		"its time is nearly over": func() time.Time { return leaf.NotAfter.Add(-24 * time.Hour) },
		"the node has a new name": func() time.Time { l.Name = "other.test"; return now },
	} {
		renewed, err := fileCertificate(l, change())
		if err != nil || renewed.Leaf.Equal(leaf) || renewed.Leaf.VerifyHostname(l.Name) != nil {
			t.Errorf("%s: not made anew: %v", name, err)
		}
	}
}

func TestSomeoneElsesCertificateIsUsedAsItIs(t *testing.T) {
	l := &config.Local{Name: "mx.test", StateDir: t.TempDir()}
	now := time.Now()
	if _, err := fileCertificate(l, now); err != nil {
		t.Fatal(err)
	}
	l.Name = "other.test" // as if it had been put there: not ours by its mark
	text, err := os.ReadFile(tlsFile(l))
	if err != nil {
		t.Fatal(err)
	}
	leaf := mustLeaf(t, tlsFile(l))
	leaf.Subject.Organization = []string{"Example CA"}
	if ownAndOld(leaf, l.Name, leaf.NotAfter) {
		t.Error("another's certificate counts as ours")
	}
	if err := os.WriteFile(tlsFile(l), append([]byte("broken\n"), text[:20]...), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := fileCertificate(l, now); err == nil {
		t.Error("a broken file is passed over in silence")
	}
}
