package main

import (
	"testing"
	"time"

	"github.com/rs/zerolog"

	"mailproxy/config"
	"mailproxy/tunnel"
)

// A member whose snapshot file is lost knows the others by what lies beside its keys, before its database is up: it would turn them away,
// and they would take themselves for deleted.
func TestMembersAreKnownWithoutASnapshotFile(t *testing.T) {
	local := config.DefaultLocal()
	local.Name, local.StateDir, local.RunDir = "mx1.test", t.TempDir(), t.TempDir()
	local.Database.DSN = "host=" + t.TempDir() + " user=x dbname=x"
	key, err := tunnel.LoadOrMakeKey(local.KeyDir())
	if err != nil {
		t.Fatal(err)
	}
	other, err := tunnel.LoadOrMakeKey(t.TempDir() + "/keys")
	if err != nil {
		t.Fatal(err)
	}
	ca, err := tunnel.LoadOrMakeCA(local.KeyDir())
	if err != nil {
		t.Fatal(err)
	}
	certs, err := ca.Sign(key.Public(), 1, "c", time.Hour)
	if err != nil {
		t.Fatal(err)
	}
	err = tunnel.SaveIdentity(local.KeyDir(), tunnel.Identity{
		ClusterID: "c", CID: 1, Certs: certs, CAs: []config.CA{ca.Config(1)},
		Nodes: []config.Node{{CID: 1, Name: "mx1.test", PublicKey: key.Public()}, {CID: 2, Name: "mx2.test", PublicKey: other.Public()}},
	})
	if err != nil {
		t.Fatal(err)
	}
	d, err := build(local, &listeners{}, zerolog.Nop())
	if err != nil {
		t.Fatal(err)
	}
	if err := d.open(); err != nil {
		t.Fatal(err)
	}
	defer d.close()
	if got := d.tunnel.Peers(); len(got) != 1 || got[0].CID != 2 {
		t.Errorf("peers %v, want node 2", got)
	}
}
