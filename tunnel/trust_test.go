package tunnel

import (
	"bytes"
	"context"
	"crypto/rand"
	"errors"
	"io"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/crypto/ssh"

	"mailproxy/config"
)

// forged is a certificate over key with whatever change makes it wrong.
func forged(t *testing.T, ca *CA, key *Key, kind uint32, cid config.CID, change func(*ssh.Certificate)) ssh.Signer {
	t.Helper()
	now := time.Now()
	cert := &ssh.Certificate{
		Key: key.signer.PublicKey(), CertType: kind, KeyId: "x",
		ValidPrincipals: []string{cidPrincipal(cid), clusterPrincipal(testCluster)},
		ValidAfter:      uint64(now.Add(-time.Minute).Unix()), ValidBefore: uint64(now.Add(time.Hour).Unix()),
	}
	if change != nil {
		change(cert)
	}
	if err := cert.SignCert(rand.Reader, ca.signer); err != nil {
		t.Fatal(err)
	}
	signer, err := ssh.NewCertSigner(cert, key.signer)
	if err != nil {
		t.Fatal(err)
	}
	return signer
}

func newKey(t *testing.T) *Key {
	t.Helper()
	k, err := LoadOrMakeKey(filepath.Join(t.TempDir(), "k"))
	if err != nil {
		t.Fatal(err)
	}
	return k
}

// intrude dials as user with the signer and says whether the node let it in.
func intrude(t *testing.T, n *node, user string, signer ssh.Signer, change func(*ssh.ClientConfig)) (ssh.Conn, error) {
	t.Helper()
	c := &ssh.ClientConfig{
		Config: algorithms(), User: user, ClientVersion: version, HostKeyCallback: ssh.InsecureIgnoreHostKey(), Timeout: 5 * time.Second,
		Auth: []ssh.AuthMethod{ssh.PublicKeys(signer)},
	}
	if change != nil {
		change(c)
	}
	client, err := ssh.Dial("tcp", n.addr, c)
	if err != nil {
		return nil, err
	}
	t.Cleanup(func() { client.Close() })
	return client, nil
}

// An impostor is one way in which a caller differs from the member that it says it is.
type impostor struct {
	what   string
	cid    config.CID // claims to be
	kind   uint32
	ca     *CA
	key    *Key
	change func(*ssh.Certificate)
	reason error
}

func impostors(good uint32, ca, strangers *CA, member, other, deleted *Key) []impostor {
	bad := uint32(ssh.UserCert)
	if good == bad {
		bad = ssh.HostCert
	}
	return []impostor{
		{"a certificate of another cluster's CA", 2, good, strangers, member, nil, errAuthority},
		{"a certificate of the other kind", 2, bad, ca, member, nil, errCertKind},
		{"a certificate for another node", 2, good, ca, member, func(c *ssh.Certificate) { c.ValidPrincipals[0] = "cid-3" }, errPrincipal},
		{"a certificate without principals, which is for all", 2, good, ca, member,
			func(c *ssh.Certificate) { c.ValidPrincipals = nil }, errCluster},
		{"a certificate for more than one node", 2, good, ca, member,
			func(c *ssh.Certificate) { c.ValidPrincipals = append(c.ValidPrincipals, "cid-3") }, errPrincipal},
		{"a certificate of this CA for another cluster", 2, good, ca, member,
			func(c *ssh.Certificate) { c.ValidPrincipals[1] = "cluster-other" }, errCluster},
		{"another key than the member's", 2, good, ca, other, nil, errOtherKey},
		{"a CID that is no member", 8, good, ca, other, nil, errNotMember},
		{"this node's own CID", 1, good, ca, other, nil, errNotMember},
		{"a deleted node", 4, good, ca, deleted, nil, errRevoked},
		{"a deleted node's key under a member's CID", 2, good, ca, deleted, nil, errRevoked},
		{"a certificate that has expired", 2, good, ca, member,
			func(c *ssh.Certificate) { c.ValidBefore = uint64(time.Now().Add(-time.Second).Unix()) }, errNotValid},
		{"a certificate of the future", 2, good, ca, member,
			func(c *ssh.Certificate) { c.ValidAfter = uint64(time.Now().Add(time.Minute).Unix()) }, errNotValid},
		{"a certificate with a critical option", 2, good, ca, member,
			func(c *ssh.Certificate) { c.CriticalOptions = map[string]string{"force-command": "x"} }, errNotValid},
	}
}

// besieged is node 1 whose snapshot lists member 2 and the deleted node 4.
func besieged(t *testing.T) (n *node, ca *CA, member, deleted *Key, s *config.Snapshot) {
	ca = newCA(t)
	n = newNode(t, Options{Join: func(context.Context, JoinRequest) (JoinReply, error) { return JoinReply{}, ErrNotMaster }})
	n.enter(ca, 1)
	member, deleted = newKey(t), newKey(t)
	s = snapshot(ca, n)
	s.Nodes = append(s.Nodes, config.Node{CID: 2, PublicKey: member.Public()})
	s.Revoked = []config.Revoked{{CID: 4, PublicKey: deleted.Public()}}
	n.start()
	n.Reload(s)
	return n, ca, member, deleted, s
}

func TestWhoIsLetIn(t *testing.T) {
	n, ca, member, deleted, _ := besieged(t)
	if _, err := intrude(t, n, "cid-2", forged(t, ca, member, ssh.UserCert, 2, nil), nil); err != nil {
		t.Fatalf("the member itself: %v", err)
	}
	for _, c := range impostors(ssh.UserCert, ca, newCA(t), member, newKey(t), deleted) {
		t.Run(c.what, func(t *testing.T) {
			before := len(n.log.events("tunnel.refused"))
			_, err := intrude(t, n, cidPrincipal(c.cid), forged(t, c.ca, c.key, c.kind, c.cid, c.change), nil)
			if err == nil {
				t.Fatal("was let in")
			}
			eventually(t, "the refusal's log", 5*time.Second, func() bool { return len(n.log.events("tunnel.refused")) > before })
			events := n.log.events("tunnel.refused")
			if got := events[len(events)-1]["reason"]; got != c.reason.Error() {
				t.Errorf("refused since %q, want %q", got, c.reason)
			}
		})
	}
	t.Run("a bare key", func(t *testing.T) {
		if _, err := intrude(t, n, "cid-2", member.signer, nil); err == nil {
			t.Error("was let in")
		}
	})
	t.Run("a certificate whose signature is another's", func(t *testing.T) {
		signer := forged(t, newCA(t), member, ssh.UserCert, 2, nil)
		signer.PublicKey().(*ssh.Certificate).SignatureKey = ca.signer.PublicKey()
		if _, err := intrude(t, n, "cid-2", signer, nil); err == nil {
			t.Error("was let in")
		}
	})
	t.Run("a user name that is another's", func(t *testing.T) {
		for _, user := range []string{"root", "cid-3", "cid-02", "cid-+2", "cid-", "2", ""} {
			if _, err := intrude(t, n, user, forged(t, ca, member, ssh.UserCert, 2, nil), nil); err == nil {
				t.Errorf("was let in as %q", user)
			}
		}
	})
	t.Run("other ciphers", func(t *testing.T) {
		_, err := intrude(t, n, "cid-2", forged(t, ca, member, ssh.UserCert, 2, nil), func(c *ssh.ClientConfig) {
			c.Ciphers = []string{ssh.CipherChaCha20Poly1305, ssh.CipherAES256CTR}
		})
		if err == nil || !strings.Contains(err.Error(), "cipher") {
			t.Errorf("got %v, want no common cipher", err)
		}
	})
	t.Run("the right key behind others, by trying", func(t *testing.T) {
		_, err := intrude(t, n, "cid-2", member.signer, func(c *ssh.ClientConfig) {
			signers := []ssh.Signer{newKey(t).signer, newKey(t).signer, newKey(t).signer, forged(t, ca, member, ssh.UserCert, 2, nil)}
			c.Auth = []ssh.AuthMethod{ssh.PublicKeys(signers...)}
		})
		if err == nil {
			t.Error("was let in")
		}
	})
	t.Run("a password", func(t *testing.T) {
		_, err := intrude(t, n, "cid-2", member.signer, func(c *ssh.ClientConfig) { c.Auth = []ssh.AuthMethod{ssh.Password("x")} })
		if err == nil {
			t.Error("was let in")
		}
	})
}

func TestMembersGetNothingButTheGate(t *testing.T) {
	n, ca, member, _, _ := besieged(t)
	c, err := intrude(t, n, "cid-2", forged(t, ca, member, ssh.UserCert, 2, nil), nil)
	if err != nil {
		t.Fatal(err)
	}
	for _, channel := range []string{
		"session", "direct-tcpip", "direct-streamlocal@openssh.com", "x11", "auth-agent@openssh.com", joinChannel,
	} {
		if _, _, err := c.OpenChannel(channel, nil); err == nil {
			t.Errorf("a channel of type %s was opened", channel)
		}
	}
	for _, extra := range [][]byte{nil, ssh.Marshal(gateRequest{"spool"}), ssh.Marshal(gateRequest{""}), bytes.Repeat([]byte{0}, 1000)} {
		if _, _, err := c.OpenChannel(gateChannel, extra); err == nil {
			t.Errorf("a gate channel with %.20q was opened", extra)
		}
	}
	for request, want := range map[string]bool{
		keepAlive: true, "tcpip-forward": false, "streamlocal-forward@openssh.com": false, "keepalive@openssh.com": false,
	} {
		if ok, _, err := c.SendRequest(request, true, nil); err != nil || ok != want {
			t.Errorf("global request %s: %v, %v; want %v", request, ok, err, want)
		}
	}
	ch, requests, err := c.OpenChannel(gateChannel, ssh.Marshal(gateRequest{"echo"}))
	if err != nil {
		t.Fatal(err)
	}
	go ssh.DiscardRequests(requests)
	for _, request := range []string{"exec", "shell", "subsystem", "env", "pty-req"} {
		if ok, err := ch.SendRequest(request, true, ssh.Marshal(struct{ Command string }{"id"})); ok || err != nil {
			t.Errorf("%s on a gate channel: %v, %v", request, ok, err)
		}
	}
}

func TestADeletedNodeIsCutAtOnce(t *testing.T) {
	n, ca, member, _, s := besieged(t)
	c, err := intrude(t, n, "cid-2", forged(t, ca, member, ssh.UserCert, 2, nil), nil)
	if err != nil {
		t.Fatal(err)
	}
	ch, requests, err := c.OpenChannel(gateChannel, ssh.Marshal(gateRequest{"echo"}))
	if err != nil {
		t.Fatal(err)
	}
	go ssh.DiscardRequests(requests)
	n.waitUp(2)
	began := time.Now()
	n.Reload(without(s, 2))
	io.ReadAll(ch)
	c.Wait()
	if took := time.Since(began); took > time.Second {
		t.Errorf("the connection was cut after %v", took)
	}
	if _, err := intrude(t, n, "cid-2", forged(t, ca, member, ssh.UserCert, 2, nil), nil); err == nil {
		t.Error("it was let in again")
	}
	eventually(t, "the log says why", 5*time.Second, func() bool { return n.log.has("tunnel.down", "err", errCut.Error()) })
	if got := n.Peers(); len(got) != 0 {
		t.Errorf("peers are still %v", got)
	}
}

// A node whose database was put back to a time before a delete lets the deleted node in no more than before. In a newer epoch that knows
// nothing of the delete, which was lost with the master that made it, the node is a member again.
func TestADeleteOutlivesADatabaseThatWasPutBack(t *testing.T) {
	n, ca, member, _, s := besieged(t)
	s.Position = config.Position{Epoch: config.Epoch{N: 2, Owner: 1}, Serial: 10}
	n.Reload(s)
	later := without(s, 2)
	later.Position.Serial = 11
	n.Reload(later)
	letIn := func() bool {
		_, err := intrude(t, n, "cid-2", forged(t, ca, member, ssh.UserCert, 2, nil), nil)
		return err == nil
	}
	for range 2 { // the second time it is what the first has left on disk
		n.Reload(s)
		if letIn() || len(n.Peers()) != 0 {
			t.Error("the deleted node is let in")
		}
	}
	saved, err := os.ReadFile(filepath.Join(n.dir, trustFile))
	if err != nil {
		t.Fatal(err)
	}
	later.Position.Serial = 12
	n.Reload(later)
	if now, err := os.ReadFile(filepath.Join(n.dir, trustFile)); err != nil || bytes.Equal(now, saved) {
		t.Errorf("the file is as the old snapshot left it: %v", err) // its list of members is
	}
	saved, _ = os.ReadFile(filepath.Join(n.dir, trustFile))
	later.Position.Serial = 13
	n.Reload(later)
	if now, _ := os.ReadFile(filepath.Join(n.dir, trustFile)); !bytes.Equal(now, saved) {
		t.Error("the file is written for a commit that changes nothing in it")
	}
	lost := *s
	lost.Position = config.Position{Epoch: config.Epoch{N: 3, Owner: 3}, Serial: 10}
	n.Reload(&lost)
	if !letIn() {
		t.Error("the member of a newer epoch is not let in")
	}
}

func TestClocksMayDiffer(t *testing.T) {
	ca, k := newCA(t), newKey(t)
	certs, err := ca.Sign(k.Public(), 2, testCluster, time.Hour)
	if err != nil {
		t.Fatal(err)
	}
	cert, err := parseCert(certs.User)
	if err != nil {
		t.Fatal(err)
	}
	for off, want := range map[time.Duration]error{
		0: nil, -20 * 365 * 24 * time.Hour: nil, 59 * time.Minute: nil, 61 * time.Minute: errNotValid,
	} {
		self := &trust{id: Identity{ClusterID: testCluster, CID: 1}, now: func() time.Time { return time.Now().Add(off) }}
		tr, err := self.with(&config.Snapshot{
			ClusterID: testCluster, Nodes: []config.Node{{CID: 2, PublicKey: k.Public()}}, CAs: []config.CA{ca.Config(1)},
		})
		if err != nil {
			t.Fatal(err)
		}
		if err := tr.check(cert, ssh.UserCert, 2); !errors.Is(err, want) {
			t.Errorf("with a clock off by %v: %v, want %v", off, err, want)
		}
	}
}

// A node that was deleted during its handshake does not slip in behind Reload.
func TestADeletionDuringTheHandshakeCounts(t *testing.T) {
	n, ca, member, _, s := besieged(t)
	held, goOn := make(chan struct{}), make(chan struct{})
	signer := forged(t, ca, member, ssh.UserCert, 2, nil)
	slow := slowSigner{signer, func() { close(held); <-goOn }}
	result := make(chan error, 1)
	go func() {
		c, err := ssh.Dial("tcp", n.addr, &ssh.ClientConfig{
			Config: algorithms(), User: "cid-2", HostKeyCallback: ssh.InsecureIgnoreHostKey(),
			Auth: []ssh.AuthMethod{ssh.PublicKeysCallback(func() ([]ssh.Signer, error) { return []ssh.Signer{slow}, nil })},
		})
		if err == nil {
			err = c.Wait()
			c.Close()
		}
		result <- err
	}()
	<-held // it has passed the check of its key
	n.Reload(without(s, 2))
	close(goOn)
	select {
	case <-result:
	case <-time.After(5 * time.Second):
		t.Fatal("it is still connected")
	}
	if got := n.sessions(2); got != 0 {
		t.Errorf("%d sessions", got)
	}
}

type slowSigner struct {
	ssh.Signer
	before func()
}

func (s slowSigner) Sign(r io.Reader, data []byte) (*ssh.Signature, error) {
	s.before()
	return s.Signer.Sign(r, data)
}

// hostAs is a server at an address that answers with the host key, and lets everybody in.
func hostAs(t *testing.T, signer ssh.Signer) (addr string) {
	t.Helper()
	return hostWith(t, signer, &ssh.ServerConfig{Config: algorithms(), PublicKeyCallback: func(ssh.ConnMetadata, ssh.PublicKey) (*ssh.Permissions, error) {
		return &ssh.Permissions{}, nil
	}})
}

func hostWith(t *testing.T, signer ssh.Signer, c *ssh.ServerConfig) (addr string) {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	c.AddHostKey(signer)
	var served sync.WaitGroup
	served.Go(func() {
		for {
			raw, err := l.Accept()
			if err != nil {
				return
			}
			served.Go(func() {
				defer raw.Close()
				raw.SetDeadline(time.Now().Add(5 * time.Second))
				_, channels, requests, err := ssh.NewServerConn(raw, c)
				if err != nil {
					return
				}
				go ssh.DiscardRequests(requests)
				refuseChannels(channels)
			})
		}
	})
	t.Cleanup(func() { l.Close(); served.Wait() })
	return l.Addr().String()
}

func TestWhomADiallerTrusts(t *testing.T) {
	ca := newCA(t)
	n := newNode(t, Options{})
	n.enter(ca, 1)
	member, deleted := newKey(t), newKey(t)
	self, err := loadSelf(n.dir, time.Now)
	if err != nil {
		t.Fatal(err)
	}
	s := snapshot(ca, n)
	s.Nodes = append(s.Nodes, config.Node{CID: 2, PublicKey: member.Public()})
	s.Revoked = []config.Revoked{{CID: 4, PublicKey: deleted.Public()}}
	tr, err := self.with(s)
	if err != nil {
		t.Fatal(err)
	}
	n.start()
	n.Reload(s)
	connect := func(cid config.CID, signer ssh.Signer) error {
		return n.connect(context.Background(), cid, hostAs(t, signer), tr, config.TunnelSSH, useAll)
	}
	if err := connect(2, forged(t, ca, member, ssh.HostCert, 2, nil)); err != nil {
		t.Fatalf("the member itself: %v", err)
	}
	for _, c := range impostors(ssh.HostCert, ca, newCA(t), member, newKey(t), deleted) {
		t.Run(c.what, func(t *testing.T) {
			err := connect(c.cid, forged(t, c.ca, c.key, c.kind, c.cid, c.change))
			if !errors.Is(err, c.reason) || !errors.Is(err, errPeerNotTrusted) {
				t.Errorf("got %v, want %v", err, c.reason)
			}
		})
	}
	t.Run("another member at that address", func(t *testing.T) {
		if err := connect(2, forged(t, ca, newKey(t), ssh.HostCert, 3, nil)); !errors.Is(err, errPrincipal) {
			t.Errorf("got %v, want %v", err, errPrincipal)
		}
	})
	t.Run("a bare key", func(t *testing.T) {
		if err := connect(2, member.signer); err == nil {
			t.Error("was trusted")
		}
	})
}

func TestADeletedNodeLearnsThatItIsNotLetIn(t *testing.T) {
	_, nodes, s := cluster(t, 2)
	nodes[0].Reload(without(s, 2))
	eventually(t, "node 2 says why", 5*time.Second, func() bool {
		st := nodes[1].state(1)
		return strings.Contains(st.Err, errNotLetIn.Error()) && st.NotLetIn
	})
}

// Who was away for long, and was deleted before the cluster got its present CA, knows the others by their keys alone.
func TestADeletedNodeThatDoesNotKnowTheCALearnsOfItToo(t *testing.T) {
	_, nodes, s := cluster(t, 2)
	nodes[0].enter(newCA(t), 1)
	nodes[0].Reload(without(s, 2))
	cert, err := parseCert(nodes[0].trust.id.Certs.Host)
	if err != nil || nodes[1].trust.cas[string(cert.SignatureKey.Marshal())] {
		t.Fatalf("node 2 knows the CA: %v", err)
	}
	eventually(t, "node 2 says why", 5*time.Second, func() bool {
		st := nodes[1].state(1)
		return strings.Contains(st.Err, errNotLetIn.Error()) && st.NotLetIn && !st.NotTrusted
	})
}

// A no counts from the member alone, known by its key; whoever else answers at its address can make nobody leave. And who shows another CA is
// given no proof and no session.
func TestWhoIsBelievedThatANodeIsNotLetIn(t *testing.T) {
	ca, strangers := newCA(t), newCA(t)
	n := newNode(t, Options{})
	n.enter(ca, 1)
	member, deleted := newKey(t), newKey(t)
	s := snapshot(ca, n)
	s.Nodes = append(s.Nodes, config.Node{CID: 2, PublicKey: member.Public()})
	s.Revoked = []config.Revoked{{CID: 4, PublicKey: deleted.Public()}}
	n.start()
	n.Reload(s)
	proofs := 0
	allow := func(ssh.ConnMetadata, ssh.PublicKey) (*ssh.Permissions, error) { return &ssh.Permissions{}, nil }
	refuses := ssh.ServerConfig{PublicKeyCallback: func(ssh.ConnMetadata, ssh.PublicKey) (*ssh.Permissions, error) { return nil, errNotMember }}
	admits := ssh.ServerConfig{PublicKeyCallback: allow, VerifiedPublicKeyCallback: func(_ ssh.ConnMetadata, _ ssh.PublicKey, p *ssh.Permissions, _ string) (*ssh.Permissions, error) {
		proofs++
		return p, nil
	}}
	asksNothing := ssh.ServerConfig{NoClientAuth: true}
	for _, c := range []struct {
		name     string
		ca       *CA
		key      *Key
		server   ssh.ServerConfig
		notLetIn bool
	}{
		{"the member says no", ca, member, refuses, true},
		{"the member with another CA says no", strangers, member, refuses, true},
		{"another key with the member's certificate says no", ca, newKey(t), refuses, false},
		{"a stranger says no", strangers, newKey(t), refuses, false},
		{"a deleted node says no", strangers, deleted, refuses, false},
		{"the member with another CA would let us in", strangers, member, admits, false},
		{"the member with another CA lets everybody in", strangers, member, asksNothing, false},
	} {
		t.Run(c.name, func(t *testing.T) {
			server := c.server
			server.Config = algorithms()
			err := n.connect(t.Context(), 2, hostWith(t, forged(t, c.ca, c.key, ssh.HostCert, 2, nil), &server), n.trust, config.TunnelSSH, useAll)
			if errors.Is(err, errNotLetIn) != c.notLetIn || errors.Is(err, errPeerNotTrusted) == c.notLetIn {
				t.Errorf("got %v", err)
			}
		})
	}
	if proofs > 0 || n.sessions(2) > 0 {
		t.Errorf("%d proofs were given, %d sessions made", proofs, n.sessions(2))
	}
	t.Run("a connection that ends says nothing", func(t *testing.T) {
		server := ssh.ServerConfig{Config: algorithms()}
		server.PublicKeyCallback = func(c ssh.ConnMetadata, _ ssh.PublicKey) (*ssh.Permissions, error) {
			c.(io.Closer).Close()
			return nil, errNotMember
		}
		err := n.connect(t.Context(), 2, hostWith(t, forged(t, ca, member, ssh.HostCert, 2, nil), &server), n.trust, config.TunnelSSH, useAll)
		if err == nil || errors.Is(err, errNotLetIn) {
			t.Errorf("got %v", err)
		}
	})
}

func TestRightAfterAJoinTheSavedMembersCount(t *testing.T) {
	ca := newCA(t)
	master, joined := newNode(t, Options{}), newNode(t, Options{})
	master.enter(ca, 1)
	joined.cid = 2
	certs, err := ca.Sign(joined.key.Public(), 2, testCluster, time.Hour)
	if err != nil {
		t.Fatal(err)
	}
	s := snapshot(ca, master, joined)
	err = SaveIdentity(joined.dir, Identity{ClusterID: testCluster, CID: 2, Certs: certs, Nodes: s.Nodes, CAs: s.CAs})
	if err != nil {
		t.Fatal(err)
	}
	for _, n := range []*node{master, joined} {
		n.start()
	}
	master.Reload(s)
	joined.Reload(&config.Snapshot{}) // its own database is empty
	ping(t, joined.mustDial(1, "echo"), "first words")

	t.Run("then the snapshot counts", func(t *testing.T) {
		joined.Reload(without(s, 1))
		if got := joined.Peers(); len(got) != 0 {
			t.Errorf("peers are still %v", got)
		}
	})
	t.Run("and what it said is remembered when the database is lost", func(t *testing.T) {
		joined.Reload(nil)
		if got := joined.Peers(); len(got) != 0 {
			t.Errorf("the deleted node is a peer again: %v", got)
		}
	})
	t.Run("a snapshot without members has not arrived yet", func(t *testing.T) {
		joined.Reload(s)
		joined.Reload(&config.Snapshot{ClusterID: testCluster})
		if got := joined.Peers(); len(got) != 1 {
			t.Errorf("peers are %v, want node 1", got)
		}
	})
	t.Run("a snapshot of another cluster does not count", func(t *testing.T) {
		joined.Reload(s)
		foreign := *s
		foreign.ClusterID, foreign.CAs = "other", nil
		joined.Reload(&foreign)
		if got := joined.Peers(); len(got) != 1 {
			t.Errorf("peers are %v, want node 1", got)
		}
	})
}

func TestANodeThatLeavesItsClusterIsIdle(t *testing.T) {
	_, nodes, s := cluster(t, 2)
	if err := RemoveIdentity(nodes[1].dir); err != nil {
		t.Fatal(err)
	}
	nodes[1].Reload(s)
	if got := nodes[1].Peers(); len(got) != 0 {
		t.Errorf("peers are %v", got)
	}
	eventually(t, "the other sees it go", 5*time.Second, func() bool { return !nodes[0].state(2).Connected })
	if _, err := LoadIdentity(nodes[1].dir); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("identity: %v", err)
	}
}

// What cannot be read in the key directory must not keep a deleted node connected.
func TestABrokenIdentityDoesNotStopADeletion(t *testing.T) {
	_, nodes, s := cluster(t, 3)
	if err := os.WriteFile(filepath.Join(nodes[0].dir, identityFile), []byte("{"), 0o600); err != nil {
		t.Fatal(err)
	}
	nodes[0].Reload(without(s, 2))
	if got := nodes[0].Peers(); len(got) != 1 || got[0].CID != 3 {
		t.Errorf("peers are %v, want node 3", got)
	}
	eventually(t, "node 2 is cut", time.Second, func() bool { return !nodes[1].state(1).Connected })
	if !nodes[0].log.has("tunnel.config_refused", "err", identityFile) {
		t.Error("the log does not say so")
	}
	if err := nodes[0].Trouble(); err == nil || !strings.Contains(err.Error(), identityFile) || nodes[0].Off() {
		t.Errorf("trouble %v, off %v; with the identity that it had it goes on", err, nodes[0].Off())
	}
	nodes[0].enter(newCA(t), 1)
	nodes[0].Reload(without(s, 2))
	if err := nodes[0].Trouble(); err != nil {
		t.Errorf("trouble %v, after the file was put back", err)
	}
}

func TestWhatOfTheKeyDirectoryCannotBeUsedIsNamed(t *testing.T) {
	ca := newCA(t)
	for _, file := range []string{identityFile, hostCertFile, userCertFile} {
		n := newNode(t, Options{})
		n.enter(ca, 1)
		if err := os.WriteFile(filepath.Join(n.dir, file), []byte("{"), 0o600); err != nil {
			t.Fatal(err)
		}
		again := New(n.o)
		again.Reload(snapshot(ca, n))
		if err := again.Trouble(); err == nil || !strings.Contains(err.Error(), file) || !again.Off() {
			t.Errorf("%s: trouble %v, off %v", file, err, again.Off())
		}
	}
}

// The list of members is but a copy of what the database has.
func TestADamagedListOfMembersIsWrittenAnew(t *testing.T) {
	_, nodes, s := cluster(t, 2)
	file := filepath.Join(nodes[0].dir, trustFile)
	if err := os.WriteFile(file, []byte("{"), 0o600); err != nil {
		t.Fatal(err)
	}
	again := New(nodes[0].o)
	again.Reload(nil)
	if got := again.Peers(); len(got) != 0 || again.Trouble() != nil {
		t.Errorf("by a damaged list: peers %v, trouble %v", got, again.Trouble())
	}
	again.Reload(s)
	if got := again.Peers(); len(got) != 1 || again.Trouble() != nil {
		t.Errorf("peers %v, trouble %v", got, again.Trouble())
	}
	if id, err := LoadIdentity(nodes[0].dir); err != nil || len(id.Nodes) != 2 {
		t.Errorf("saved: %+v, %v", id.Nodes, err)
	}
}

// A key that cannot be read takes the tunnel away, and nothing else; one that is put back counts at the next start.
func TestANodeWithoutItsKeyRunsWithoutATunnel(t *testing.T) {
	_, nodes, s := cluster(t, 2)
	file := filepath.Join(nodes[0].dir, nodeKeyFile)
	key, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(file, key[:40], 0o600); err != nil {
		t.Fatal(err)
	}
	again := &node{t: t, cid: 1, Tunnel: New(nodes[0].o)}
	if err := again.Listen(); err != nil {
		t.Fatal(err)
	}
	again.start()
	again.Reload(s)
	if err := again.Trouble(); !errors.Is(err, ErrBadKey) || !again.Off() || len(again.Addrs()) != 0 {
		t.Errorf("trouble %v, off %v, listens at %v", err, again.Off(), again.Addrs())
	}
	if _, err := again.Dial(t.Context(), 2, "echo"); !errors.Is(err, ErrUnknownPeer) {
		t.Errorf("dial: %v", err)
	}
}

func TestAMemberRowThatCannotBeReadIsNotTrusted(t *testing.T) {
	_, nodes, s := cluster(t, 3)
	bad := *s
	bad.Nodes = append([]config.Node(nil), s.Nodes...)
	bad.Nodes[1].PublicKey = "ssh-ed25519 nonsense"
	nodes[0].Reload(&bad)
	if got := nodes[0].Peers(); len(got) != 1 || got[0].CID != 3 {
		t.Errorf("peers are %v, want node 3", got)
	}
	if !nodes[0].log.has("tunnel.config_refused", "err", "node 2") {
		t.Error("the log does not name the node")
	}
}

func TestStrangersAreBounded(t *testing.T) {
	n, ca, member, _, _ := besieged(t)
	var held []net.Conn
	for range maxStrangersPerHost {
		c, err := net.Dial("tcp", n.addr)
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		held = append(held, c)
	}
	c, err := net.Dial("tcp", n.addr)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	c.SetDeadline(time.Now().Add(time.Second))
	if got, _ := io.ReadAll(c); len(got) > 0 {
		t.Errorf("one stranger more was greeted with %q", got)
	}
	began := time.Now()
	for _, c := range held {
		c.SetDeadline(time.Now().Add(2 * quick().handshake))
		if _, err := io.ReadAll(c); err != nil && !errors.Is(err, os.ErrDeadlineExceeded) {
			continue // reset: it was cut too
		} else if err != nil {
			t.Fatal("a stranger that says nothing is kept for ever")
		}
	}
	if took := time.Since(began); took > 2*quick().handshake {
		t.Errorf("strangers were cut after %v", took)
	}
	if _, err := intrude(t, n, "cid-2", forged(t, ca, member, ssh.UserCert, 2, nil), nil); err != nil {
		t.Errorf("afterwards a member: %v", err)
	}
}
