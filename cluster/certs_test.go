package cluster

import (
	"errors"
	"strings"
	"testing"
	"time"

	"mailproxy/tunnel"
)

// shorten gives a node whose daemon does not run a certificate that ends soon.
func shorten(t *testing.T, master, n *testNode) {
	t.Helper()
	ca, err := tunnel.LoadCA(master.local.KeyDir())
	if err != nil {
		t.Fatal(err)
	}
	id, err := tunnel.LoadIdentity(n.local.KeyDir())
	if err != nil {
		t.Fatal(err)
	}
	key, err := tunnel.LoadOrMakeKey(n.local.KeyDir())
	if err != nil {
		t.Fatal(err)
	}
	if id.Certs, err = ca.Sign(key.Public(), id.CID, id.ClusterID, renewLeft-time.Hour); err != nil {
		t.Fatal(err)
	}
	if err := tunnel.SaveIdentity(n.local.KeyDir(), id); err != nil {
		t.Fatal(err)
	}
}

func TestWhenACertificateIsRenewed(t *testing.T) {
	const minute = time.Minute
	for _, c := range []struct {
		name             string
		left             time.Duration
		otherCA, allKnow bool
		want             bool
	}{
		{"young", renewLeft + minute, false, true, false},
		{"two thirds of its life are over", renewLeft - minute, false, false, true},
		{"another CA that all know", certValidity, true, true, true},
		{"another CA, and a member is away", certValidity, true, false, false},
		{"old, another CA, and a member is away", renewLeft - minute, true, false, false},
		{"at its end", lastLeft - minute, true, false, true},
	} {
		if got := renewal(c.left, c.otherCA, c.allKnow); got != c.want {
			t.Errorf("%s: %v, want %v", c.name, got, c.want)
		}
	}
}

func TestCertificatesRenewThemselves(t *testing.T) {
	nodes := newCluster(t, 2)
	for _, n := range nodes {
		n.stopDaemon()
		shorten(t, nodes[0], n)
	}
	nodes[1].start() // alone: there is nobody to sign
	eventually(t, "the slave says that it has no new certificate", func() bool {
		for _, p := range row(t, nodes[1].status(StatusParams{}), 2).Problems {
			if strings.Contains(p.What, "could not be renewed") && p.Remedy != "" {
				return true
			}
		}
		return false
	})
	nodes[0].start()
	eventually(t, "both have certificates of their full life", func() bool {
		for _, row := range nodes[0].status(StatusParams{}).Rows {
			if row.Certificate == nil || time.Until(row.Certificate.Expires) < certValidity-time.Hour || len(row.Problems) != 0 {
				return false
			}
		}
		return true
	})
	if !nodes[1].log.has("certificate.renewed") || !nodes[0].log.has("certificate.signed") {
		t.Error("the logs do not say so")
	}
	for _, n := range nodes { // and by them they let each other in
		n.stopDaemon()
	}
	for _, n := range nodes {
		n.start()
	}
	nodes[0].mustPutDomain("example.test")
	inSync(t, nodes...)
}

func TestACAIsReplacedWithoutLosingANode(t *testing.T) {
	nodes := newCluster(t, 2)
	master := nodes[0].operator()
	cas := func() CAs {
		t.Helper()
		all, err := master.CAs(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		return all
	}
	old := cas().CAs[0].Fingerprint
	if err := master.RetireCA(t.Context(), old, Forced); !errors.Is(err, ErrCAInUse) {
		t.Errorf("the one that signs is retired: %v", err)
	}
	if err := master.RetireCA(t.Context(), "SHA256:nonsense", Careful); !errors.Is(err, ErrNoSuchCA) {
		t.Errorf("one that is none: %v", err)
	}
	if _, _, err := nodes[1].operator().AddCA(t.Context()); !errors.Is(err, ErrNotMaster) {
		t.Errorf("on a slave: %v", err)
	}
	nodes[1].stopDaemon() // it keeps its old certificate
	fresh, missing, err := master.AddCA(t.Context())
	if !errors.Is(err, ErrNotInSync) || len(missing) != 1 {
		t.Fatalf("added without a majority: %v, missing %v", err, missing)
	}
	nodes[1].start()
	again, _, err := master.AddCA(t.Context())
	if err != nil || again.Fingerprint != fresh.Fingerprint {
		t.Fatalf("the same again: %v, %s and %s", err, fresh.Fingerprint, again.Fingerprint)
	}
	eventually(t, "all nodes have certificates of the new CA", func() bool {
		for _, n := range cas().Nodes {
			if n.Certificate == nil || n.Certificate.CA != fresh.Fingerprint {
				return false
			}
		}
		return true
	})
	nodes[1].stopDaemon()
	if err := master.RetireCA(t.Context(), old, Careful); !errors.Is(err, ErrCAInUse) || !strings.Contains(err.Error(), "mx2(2)") {
		t.Errorf("with a node that does not answer: %v", err)
	}
	nodes[1].start()
	eventually(t, "the old one is retired", func() bool { return master.RetireCA(t.Context(), old, Careful) == nil })
	if all := cas(); len(all.CAs) != 1 || all.CAs[0].Fingerprint != fresh.Fingerprint || !all.CAs[0].Signs {
		t.Errorf("CAs: %+v", all.CAs)
	}
	for _, n := range nodes {
		n.stopDaemon()
	}
	for _, n := range nodes {
		n.start()
	}
	nodes[0].mustPutDomain("example.test")
	inSync(t, nodes...)
}
