package main

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"fmt"
	"io/fs"
	"math/big"
	"os"
	"path/filepath"
	"time"

	"mailproxy/config"
	"mailproxy/internal/durable"
)

// selfSignedLife is how long the certificate that we make ourselves is valid; a new one is made when a tenth is left.
const selfSignedLife = 10 * 365 * 24 * time.Hour

func tlsDir(l *config.Local) string  { return filepath.Join(l.StateDir, "tls") }
func tlsFile(l *config.Local) string { return filepath.Join(tlsDir(l), "smtp.pem") }

// fileCertificate gives what TLS offers where the configuration has no certificate: the key and certificate in state_dir/tls/smtp.pem, which are made there, self-signed, where
// there are none, where they belong to another name, or where their time is nearly over. Someone else's certificate in that file
// is used as it is.
func fileCertificate(l *config.Local, now time.Time) (tls.Certificate, error) {
	cert, err := tls.LoadX509KeyPair(tlsFile(l), tlsFile(l))
	if errors.Is(err, fs.ErrNotExist) || err == nil && ownAndOld(cert.Leaf, l.Name, now) {
		if err := makeCertificate(l, now); err != nil {
			return cert, fmt.Errorf("make a certificate for STARTTLS: %w", err)
		}
		cert, err = tls.LoadX509KeyPair(tlsFile(l), tlsFile(l))
	}
	if err != nil {
		return cert, fmt.Errorf("read the certificate for STARTTLS: %w", err)
	}
	return cert, nil
}

func ownAndOld(leaf *x509.Certificate, name string, now time.Time) bool {
	return leaf != nil && selfMade(leaf) && (leaf.Subject.CommonName != name || now.After(leaf.NotAfter.Add(-selfSignedLife/10)))
}

func selfMade(leaf *x509.Certificate) bool {
	return leaf.Issuer.CommonName == leaf.Subject.CommonName && len(leaf.Subject.Organization) == 1 && leaf.Subject.Organization[0] == ownOrganization
}

// ownOrganization marks the certificates that we made ourselves.
const ownOrganization = "mailproxy self-signed"

func makeCertificate(l *config.Local, now time.Time) error {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return err
	}
	serial, err := rand.Int(rand.Reader, new(big.Int).Lsh(big.NewInt(1), 120))
	if err != nil {
		return err
	}
	template := &x509.Certificate{
		SerialNumber: serial,
		Subject:      pkix.Name{CommonName: l.Name, Organization: []string{ownOrganization}},
		DNSNames:     []string{l.Name},
		NotBefore:    now.Add(-time.Hour),
		NotAfter:     now.Add(selfSignedLife),
		KeyUsage:     x509.KeyUsageDigitalSignature,
		ExtKeyUsage:  []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth},
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		return err
	}
	keyDER, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return err
	}
	text := pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: keyDER})
	text = append(text, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})...)
	if err := os.MkdirAll(tlsDir(l), 0o700); err != nil {
		return err
	}
	return durable.WriteFile(tlsFile(l), text, 0o600)
}
