package config

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/pem"
	"math/big"
	"strings"
	"testing"
	"time"
)

// certificateFor gives a chain of one, for names.
func certificateFor(t *testing.T, names ...string) string {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{SerialNumber: big.NewInt(255), DNSNames: names, NotAfter: time.Date(2050, 1, 2, 0, 0, 0, 0, time.UTC)}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	return string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}))
}

func TestCertificatesAreChecked(t *testing.T) {
	chain := certificateFor(t, "mx.test", "*.b.test")
	key := string(pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: []byte("x")}))
	for _, c := range []struct{ name, chain, key, want string }{
		{"mx.test", chain, "secret:k", ""},
		{"*.b.test", chain, "secret:k", ""},
		{"one.b.test", chain + chain, "secret:k", ""},
		{"MX.test", chain, "secret:k", "certificate MX.test: is not in its normal form, want mx.test"},
		{"a b", chain, "secret:k", `certificate a b: "a b" is not a domain name`},
		{"c.test", chain, "secret:k", "certificate c.test: the certificate is for other names: mx.test *.b.test"},
		{"*.test", chain, "secret:k", "certificate *.test: the certificate is for other names: mx.test *.b.test"},
		{"mx.test", "", "secret:k", "certificate mx.test: chain has no certificate in PEM"},
		{"mx.test", chain + key, "secret:k", "certificate mx.test: chain has a private key in it"},
		{"mx.test", strings.Replace(chain, "MI", "MA", 1), "secret:k", "certificate mx.test: chain: x509: "},
		{"mx.test", chain + strings.Repeat("\n", maxChain), "secret:k", "certificate mx.test: chain has more than 64kB"},
		{"mx.test", chain, "k", `certificate mx.test: key "k" is not secret:NAME`},
		{"mx.test", chain, "secret:A b", `certificate mx.test: "A b" is no name for a secret`},
	} {
		err := Validate(&Snapshot{Certificates: []Certificate{{c.name, c.chain, c.key}}})
		if (err == nil) != (c.want == "") || err != nil && !strings.HasPrefix(err.Error(), c.want) {
			t.Errorf("got  %v\nwant %s", err, c.want)
		}
	}
	s := &Snapshot{Certificates: []Certificate{{"mx.test", chain, "secret:k"}}, TLSSenders: []TLSSender{{Domain: "B.test"}}}
	if err := Validate(s); err == nil || err.Error() != "tls_sender B.test: is not in its normal form, want b.test" {
		t.Error(err)
	}
	text := string(s.Text())
	if !strings.Contains(text, "chain = '''\n"+chain+"'''\nkey = \"secret:k\"\n") {
		t.Errorf("not to be read:\n%s", text)
	}
	d := Diff(new(Snapshot), s)
	if len(d) != 2 || d[0].String() != "+ certificate mx.test: serial ff until 2050-01-02, 1 in all, key secret:k" {
		t.Errorf("difference %v", d)
	}
}
