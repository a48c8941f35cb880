package main

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"fmt"
	"math/big"
	"net/smtp"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/rs/zerolog"

	"mailproxy/config"
)

// A pair is a certificate and its key, and may sign others.
type pair struct {
	cert *x509.Certificate
	key  *ecdsa.PrivateKey
}

func (p *pair) chain(t *testing.T) string {
	t.Helper()
	return string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: p.cert.Raw}))
}

func (p *pair) private(t *testing.T) string {
	t.Helper()
	der, err := x509.MarshalPKCS8PrivateKey(p.key)
	if err != nil {
		t.Fatal(err)
	}
	return string(pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der}))
}

// newPair makes one, signed by another, or by itself.
func newPair(t *testing.T, by *pair, until time.Time, names ...string) *pair {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	p := &pair{key: key}
	serial, err := rand.Int(rand.Reader, big.NewInt(1<<62))
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{SerialNumber: serial, Subject: pkix.Name{CommonName: names[0]}, DNSNames: names, NotAfter: until,
		BasicConstraintsValid: true, IsCA: by == nil, KeyUsage: x509.KeyUsageDigitalSignature | x509.KeyUsageCertSign}
	parent, signer := template, key
	if by != nil {
		parent, signer = by.cert, by.key
	}
	der, err := x509.CreateCertificate(rand.Reader, template, parent, key.Public(), signer)
	if err != nil {
		t.Fatal(err)
	}
	if p.cert, err = x509.ParseCertificate(der); err != nil {
		t.Fatal(err)
	}
	return p
}

func TestACertificateIsChosenByTheNameThatIsAskedFor(t *testing.T) {
	later := time.Now().Add(1000 * time.Hour)
	own, one, wild, file := newPair(t, nil, later, "mx.test"), newPair(t, nil, later, "one.test"), newPair(t, nil, later, "*.b.test"), newPair(t, nil, later, "file")
	fileCert, err := tls.X509KeyPair([]byte(file.chain(t)), []byte(file.private(t)))
	if err != nil {
		t.Fatal(err)
	}
	c := &certificates{name: "mx.test", log: zerolog.Nop()}
	c.file.Store(&fileCert)
	shown := func(name string) string {
		t.Helper()
		cert, err := c.get(&tls.ClientHelloInfo{ServerName: name})
		if err != nil {
			t.Fatal(err)
		}
		return cert.Leaf.DNSNames[0]
	}
	if got := shown("mx.test"); got != "file" {
		t.Errorf("without a configuration: %s", got)
	}
	keys := map[string]string{"own": own.private(t), "one": one.private(t), "wild": wild.private(t)}
	open := func(name string) ([]byte, error) {
		if keys[name] == "" {
			return nil, errors.New("is not there")
		}
		return []byte(keys[name]), nil
	}
	list := []config.Certificate{{Name: "*.b.test", Chain: wild.chain(t), Key: "secret:wild"}, {Name: "one.test", Chain: one.chain(t), Key: "secret:one"}}
	c.use(list, open)
	for name, want := range map[string]string{"one.test": "one.test", "ONE.test.": "one.test", "x.b.test": "*.b.test", "b.test": "file", "x.y.b.test": "file",
		"": "file", "mx.test": "file"} {
		if got := shown(name); got != want {
			t.Errorf("%q is shown %s, want %s", name, got, want)
		}
	}
	c.use(append(list, config.Certificate{Name: "mx.test", Chain: own.chain(t), Key: "secret:own"}), open)
	for name, want := range map[string]string{"one.test": "one.test", "b.test": "mx.test", "": "mx.test", "mx.test": "mx.test"} {
		if got := shown(name); got != want {
			t.Errorf("%q is shown %s, want %s", name, got, want)
		}
	}
	// A key that is away for a while takes nothing away; one that never was there is named.
	delete(keys, "one")
	c.use(append(list, config.Certificate{Name: "new.test", Chain: one.chain(t), Key: "secret:new"}), open)
	if got := shown("one.test"); got != "one.test" {
		t.Errorf("one.test is shown %s", got)
	}
	var problems []string
	for _, p := range c.problems(time.Now()) {
		problems = append(problems, p.What)
	}
	want := "certificate new.test is not shown: the secret new is not there, certificate one.test is not shown: the secret one is not there"
	if got := strings.Join(problems, ", "); got != want {
		t.Errorf("problems: %s", got)
	}
	c.use(nil, open)
	if got := shown("one.test"); got != "file" {
		t.Errorf("removed, one.test is shown %s", got)
	}
}

func TestTheNodesFileIsFollowed(t *testing.T) {
	later := time.Now().Add(1000 * time.Hour)
	first, second := newPair(t, nil, later, "first"), newPair(t, nil, later, "second")
	path, at := filepath.Join(t.TempDir(), "smtp.pem"), time.Now()
	write := func(text string) {
		t.Helper()
		at = at.Add(time.Second) // the kernel's clock for files is a coarse one
		if err := errors.Join(os.WriteFile(path, []byte(text), 0o600), os.Chtimes(path, at, at)); err != nil {
			t.Fatal(err)
		}
	}
	write(first.private(t) + first.chain(t))
	cert, err := tls.LoadX509KeyPair(path, path)
	if err != nil {
		t.Fatal(err)
	}
	var log bytes.Buffer
	synctest.Test(t, func(t *testing.T) {
		c := &certificates{name: "mx.test", path: path, log: zerolog.New(&log)}
		c.file.Store(&cert)
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan struct{})
		go func() { defer close(done); c.follow(ctx) }()
		defer func() { cancel(); <-done }()
		// wants waits for one look more than there was.
		wants := func(what, name, problem string) {
			t.Helper()
			time.Sleep(filePoll)
			synctest.Wait()
			shown, _ := c.get(&tls.ClientHelloInfo{})
			if shown.Leaf.DNSNames[0] != name {
				t.Errorf("%s: %s is shown, want %s", what, shown.Leaf.DNSNames[0], name)
			}
			all := c.problems(time.Now())
			if (len(all) > 0) != (problem != "") || problem != "" && !strings.Contains(all[0].What, problem) {
				t.Errorf("%s: problems %v, want %s", what, all, problem)
			}
		}
		wants("as it was", "first", "")
		write(second.private(t))
		wants("half written", "first", "failed to find certificate PEM data")
		write(second.private(t) + first.chain(t))
		wants("a key that is another's", "first", "private key does not match public key")
		if err := os.Remove(path); err != nil {
			t.Fatal(err)
		}
		wants("gone", "first", "no such file")
		wants("gone for longer", "first", "no such file")
		write(second.private(t) + second.chain(t))
		wants("another", "second", "")
		write(first.private(t) + first.chain(t))
		wants("and back", "first", "")
		move := func(from, to string) {
			if err := os.Rename(from, to); err != nil {
				t.Fatal(err)
			}
		}
		move(path, path+".away")
		wants("moved away", "first", "no such file")
		move(path+".away", path)
		wants("moved back", "first", "")
	})
	if n := strings.Count(log.String(), "certificate.unused"); n != 4 {
		t.Errorf("%d times in the log that it is not shown, want 4:\n%s", n, &log)
	}
	if n := strings.Count(log.String(), "certificate.loaded"); n != 2 {
		t.Errorf("%d times in the log that it was loaded, want 2:\n%s", n, &log)
	}
}

func TestACertificateWhoseTimeIsNearlyOverIsNamed(t *testing.T) {
	p := newPair(t, nil, time.Date(2030, 3, 20, 12, 0, 0, 0, time.UTC), "one.test")
	c := &certificates{log: zerolog.Nop()}
	c.use([]config.Certificate{{Name: "one.test", Chain: p.chain(t), Key: "secret:k"}}, func(string) ([]byte, error) { return []byte(p.private(t)), nil })
	for day, want := range map[int]string{5: "[]", 7: "[certificate one.test expires on 2030-03-20]", 21: "[certificate one.test has expired on 2030-03-20]"} {
		got := []string{}
		for _, x := range c.problems(time.Date(2030, 3, day, 0, 0, 0, 0, time.UTC)) {
			got = append(got, x.What)
		}
		if fmt.Sprint(got) != want {
			t.Errorf("on day %d: %v, want %s", day, got, want)
		}
	}
}

func TestKeyPairsAreCheckedBeforeTheyAreStored(t *testing.T) {
	now := time.Now()
	ca, other := newPair(t, nil, now.Add(time.Hour), "ca"), newPair(t, nil, now.Add(time.Hour), "other")
	leaf, old := newPair(t, ca, now.Add(time.Hour), "mx.test"), newPair(t, ca, now.Add(-time.Hour), "mx.test")
	small, err := rsa.GenerateKey(rand.Reader, 1024)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{SerialNumber: big.NewInt(1), DNSNames: []string{"mx.test"}, NotAfter: now.Add(time.Hour)}
	der, err := x509.CreateCertificate(rand.Reader, template, template, small.Public(), small)
	if err != nil {
		t.Fatal(err)
	}
	weak := string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})) +
		string(pem.EncodeToMemory(&pem.Block{Type: "RSA PRIVATE KEY", Bytes: x509.MarshalPKCS1PrivateKey(small)}))
	for _, c := range []struct{ name, text, want string }{
		{"a key, a certificate, the one between", leaf.private(t) + leaf.chain(t) + ca.chain(t), ""},
		{"text around", "Bag Attributes\n" + leaf.chain(t) + "x\n" + leaf.private(t), ""},
		{"no key", leaf.chain(t), "there is no private key"},
		{"no certificate", leaf.private(t), "there is no certificate"},
		{"two keys", leaf.chain(t) + leaf.private(t) + ca.private(t), "there are two private keys"},
		{"another's key", leaf.chain(t) + ca.private(t), "private key does not match public key"},
		{"in another order", ca.chain(t) + leaf.chain(t) + leaf.private(t), "private key does not match public key"},
		{"a chain that is none", leaf.chain(t) + other.chain(t) + leaf.private(t), `the certificate of "mx.test" is not signed by the next one, of "other"`},
		{"its time is over", old.chain(t) + old.private(t), "the certificate has expired on "},
		{"a small key", weak, "the RSA key has 1024 bits, want at least 2048"},
	} {
		chain, key, err := splitPEM([]byte(c.text))
		if err == nil {
			err = checkKeyPair(chain, key, now)
		}
		if (err == nil) != (c.want == "") || err != nil && !strings.HasPrefix(err.Error(), c.want) {
			t.Errorf("%s: got %v, want %s", c.name, err, c.want)
		}
		if err == nil && (strings.Contains(string(chain), "KEY") || strings.Contains(string(key), "CERT")) {
			t.Errorf("%s: not taken apart", c.name)
		}
	}
}

func TestTheSecretOfACertificateHasANameThatASecretMayHave(t *testing.T) {
	seen := map[string]bool{}
	for _, name := range []string{"mx.test", "*.mx.test", "_x.mx.test", strings.Repeat("a.", 40) + "test", strings.Repeat("b.", 40) + "test"} {
		secret := keySecret(name)
		if err := config.CheckSecretName(secret); err != nil || seen[secret] {
			t.Errorf("%s: %s, %v", name, secret, err)
		}
		seen[secret] = true
	}
}

func TestCertificatesAreCarriedAsTheirInput(t *testing.T) {
	for _, args := range [][]string{{"tls", "add", "x", "--cert", "-"}, {"tls", "remove", "x"}, {"tls", "sender", "add", "x"}} {
		if !mayCarry(args) {
			t.Errorf("%v is not carried", args)
		}
	}
	for _, args := range [][]string{{"tls", "add", "x", "--cert", "/etc/shadow"}, {"tls", "add", "--key=/etc/shadow", "--cert", "-"},
		{"tls", "add", "x", "--cert", "-", "--key", "/etc/shadow"}, {"tls", "list"}} {
		if mayCarry(args) {
			t.Errorf("%v is carried", args)
		}
	}
}

// files writes certificate and key of a pair.
func (p *pair) files(t *testing.T) (cert, key string) {
	t.Helper()
	dir := t.TempDir()
	cert, key = filepath.Join(dir, "cert.pem"), filepath.Join(dir, "key.pem")
	if err := errors.Join(os.WriteFile(cert, []byte(p.chain(t)), 0o644), os.WriteFile(key, []byte(p.private(t)), 0o600)); err != nil {
		t.Fatal(err)
	}
	return cert, key
}

// shows gives the certificate that a node shows to a client of STARTTLS that asks for a name.
func (n *testNode) shows(name string) (*x509.Certificate, error) {
	c, err := smtp.Dial(n.smtp)
	if err != nil {
		return nil, err
	}
	defer c.Close()
	if err := c.StartTLS(&tls.Config{ServerName: name, InsecureSkipVerify: true}); err != nil {
		return nil, err
	}
	state, _ := c.TLSConnectionState()
	return state.PeerCertificates[0], nil
}

func (n *testNode) awaitShown(name string, want *pair) {
	n.t.Helper()
	eventually(n.t, func() error {
		got, err := n.shows(name)
		if err == nil && got.Equal(want.cert) != true {
			err = fmt.Errorf("%s shows the certificate %v of %v", n.local.Name, got.SerialNumber, got.DNSNames)
		}
		return err
	})
}

// A certificate that is set on one node is shown on all without a restart; and after one, with PostgreSQL gone.
func TestCertificatesAreShownOnAllNodes(t *testing.T) {
	master, slave := newNode(t), newNode(t, "--name", "n2.test")
	for _, n := range []*testNode{master, slave} {
		n.start()
		n.waitHealthy()
	}
	if out, errs, code := master.run("pmgcm", "create"); code != 0 {
		t.Fatalf("pmgcm create: %d %s%s", code, out, errs)
	}
	join(t, master, slave)
	own, err := slave.shows("mail.test")
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(tlsFile(master.local), []byte("half of it"), 0o600); err != nil {
		t.Fatal(err)
	}
	later := time.Now().Add(1000 * time.Hour)
	first, second := newPair(t, nil, later, "mail.test"), newPair(t, nil, later, "mail.test")
	for _, p := range []*pair{first, second} { // the second takes its place
		cert, key := p.files(t)
		if out := slave.must("tls", "add", "mail.test", "--cert", cert, "--key", key); !strings.HasPrefix(out, "certificate mail.test set ") {
			t.Errorf("tls add: %s", out)
		}
		file := opened{file: slave.local.SecretsFile(), keyDir: slave.local.KeyDir()}
		if err := file.start(); err != nil || string(file.values["tls-mail.test"]) != p.private(t) {
			t.Errorf("the key is not in the file of the node where it was set: %v", err)
		}
		for _, n := range []*testNode{master, slave} {
			n.awaitShown("mail.test", p)
			if got, err := n.shows("other.test"); err != nil || got.Equal(p.cert) {
				t.Errorf("%s: for another name: %v", n.local.Name, err)
			}
		}
	}
	for _, n := range []*testNode{master, slave} {
		if in := n.holds(strings.Split(second.private(t), "\n")[1]); in != nil {
			t.Errorf("the key is in clear in %v", in)
		}
	}
	if out := master.must("tls", "list"); !strings.Contains(out, "mail.test") || !strings.Contains(out, "secret:tls-mail.test") {
		t.Errorf("tls list: %s", out)
	}
	if _, errs, code := master.run("mailproxy", "secret", "remove", "tls-mail.test"); code != 1 || !strings.Contains(errs, "hint: mailproxy tls remove mail.test\n") {
		t.Errorf("secret remove: exit code %d, %s", code, errs)
	}
	slave.stop()
	if err := os.Rename(slave.local.PostgresDataDir(), slave.local.PostgresDataDir()+".away"); err != nil {
		t.Fatal(err)
	}
	slave.start()
	slave.awaitShown("mail.test", second)
	slave.stop()
	master.must("tls", "remove", "mail.test")
	eventually(t, func() error {
		got, err := master.shows("mail.test")
		if err == nil && got.Equal(second.cert) {
			err = errors.New("it is still shown")
		}
		return err
	})
	eventually(t, func() error {
		if out, _, code := master.run("pmgcm", "status"); !strings.Contains(out, "the certificate in "+tlsFile(master.local)+" is not shown: ") {
			return fmt.Errorf("status: exit code %d\n%s", code, out)
		}
		return nil
	})
	renewed := newPair(t, nil, later, "n1.test")
	if err := os.WriteFile(tlsFile(master.local), []byte(renewed.private(t)+renewed.chain(t)), 0o600); err != nil {
		t.Fatal(err)
	}
	master.awaitShown("", renewed)
	if out := master.must("secret", "list"); strings.Contains(out, "tls-mail.test") {
		t.Errorf("the key is still there: %s", out)
	}
	if own.Equal(second.cert) {
		t.Error("it was shown before it was set")
	}
}
