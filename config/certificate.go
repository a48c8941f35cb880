package config

import (
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"strings"
)

// A Certificate is what TLS shows to clients that ask for its name (SNI, RFC 6066 §3).
type Certificate struct {
	Name  string `json:"name"`  // A-labels, lower case; *.NAME is one label below NAME
	Chain string `json:"chain"` // PEM: the certificate, then those between it and the root
	Key   string `json:"key"`   // secret:NAME, the private key in PEM
}

// A TLSSender is a domain whose mail is taken by TLS only.
type TLSSender struct {
	Domain  string `json:"domain"`
	Comment string `json:"comment,omitempty"`
}

// KeySecret is the name of the secret that has the private key; empty where Key names none.
func (c *Certificate) KeySecret() string {
	name, ok := strings.CutPrefix(c.Key, secretPrefix)
	if !ok {
		return ""
	}
	return name
}

// Leaf gives the certificate itself.
func (c *Certificate) Leaf() (*x509.Certificate, error) {
	all, err := parseChain(c.Chain)
	if err != nil {
		return nil, err
	}
	return all[0], nil
}

// maxChain bounds a chain in PEM, in octets: a few certificates have some kB.
const maxChain = 64 << 10

func parseChain(text string) ([]*x509.Certificate, error) {
	if len(text) > maxChain {
		return nil, fmt.Errorf("chain has more than %s", FormatSize(maxChain))
	}
	var all []*x509.Certificate
	for rest := []byte(text); ; {
		var block *pem.Block
		if block, rest = pem.Decode(rest); block == nil {
			break
		}
		if block.Type != "CERTIFICATE" {
			return nil, fmt.Errorf("chain has a %s in it", strings.ToLower(block.Type))
		}
		c, err := x509.ParseCertificate(block.Bytes)
		if err != nil {
			return nil, fmt.Errorf("chain: %w", err)
		}
		all = append(all, c)
	}
	if len(all) == 0 {
		return nil, errors.New("chain has no certificate in PEM")
	}
	return all, nil
}

// NormalizeCertificateName gives a name for a Certificate as it is kept.
func NormalizeCertificateName(s string) (string, error) {
	rest, wild := strings.CutPrefix(strings.TrimSpace(s), "*.")
	name, err := NormalizeDomain(rest)
	if wild && err == nil {
		name = "*." + name
	}
	return name, err
}

func checkCertificate(c *Certificate) error {
	name, err := NormalizeCertificateName(c.Name)
	switch {
	case err != nil:
		return err
	case name != c.Name:
		return fmt.Errorf("is not in its normal form, want %s", name)
	}
	leaf, err := c.Leaf()
	if err != nil {
		return err
	}
	host := name
	if rest, wild := strings.CutPrefix(name, "*."); wild {
		host = "any." + rest // what the name is for
	}
	if err := leaf.VerifyHostname(host); err != nil {
		return fmt.Errorf("the certificate is for other names: %s", strings.Join(leaf.DNSNames, " "))
	}
	if c.KeySecret() == "" {
		return fmt.Errorf("key %q is not secret:NAME", c.Key)
	}
	return CheckSecretName(c.KeySecret())
}

func checkTLSSender(t *TLSSender) error {
	name, err := NormalizeDomain(t.Domain)
	switch {
	case err != nil:
		return err
	case name != t.Domain:
		return fmt.Errorf("is not in its normal form, want %s", name)
	}
	return checkComment(t.Comment)
}

func describeCertificate(c Certificate) (object, text string) {
	text = "no certificate"
	if leaf, err := c.Leaf(); err == nil {
		text = fmt.Sprintf("serial %x until %s, %d in all", leaf.SerialNumber, leaf.NotAfter.UTC().Format("2006-01-02"), strings.Count(c.Chain, "BEGIN"))
	}
	return "certificate " + c.Name, text + ", key " + c.Key
}

func describeTLSSender(t TLSSender) (object, text string) {
	if t.Comment == "" {
		return "tls_sender " + t.Domain, "no comment"
	}
	return "tls_sender " + t.Domain, "comment " + quote(t.Comment)
}

// isPEM says whether a text may stand between three apostrophes as it is.
func isPEM(s string) bool {
	for i := 0; i < len(s); i++ {
		c := s[i]
		if !('a' <= c && c <= 'z' || 'A' <= c && c <= 'Z' || '0' <= c && c <= '9' || strings.IndexByte("+/=- \n", c) >= 0) {
			return false
		}
	}
	return strings.HasPrefix(s, "-----BEGIN ")
}
