package smtpd

import (
	"context"
	"crypto/rand"
	"crypto/rsa"
	"crypto/tls"
	"crypto/x509"
	"encoding/xml"
	"fmt"
	"math/big"
	"net"
	"os/exec"
	"slices"
	"strings"
	"testing"
	"time"
)

// A scan is what sslscan says in XML.
type scan struct {
	Protocols []struct {
		Type    string `xml:"type,attr"`
		Version string `xml:"version,attr"`
		Enabled int    `xml:"enabled,attr"`
	} `xml:"ssltest>protocol"`
	Renegotiation struct {
		Supported int `xml:"supported,attr"`
		Secure    int `xml:"secure,attr"`
	} `xml:"ssltest>renegotiation"`
	Compression struct {
		Supported int `xml:"supported,attr"`
	} `xml:"ssltest>compression"`
	Heartbleed []struct {
		Vulnerable int `xml:"vulnerable,attr"`
	} `xml:"ssltest>heartbleed"`
	Ciphers []struct {
		Version  string `xml:"sslversion,attr"`
		Cipher   string `xml:"cipher,attr"`
		Bits     int    `xml:"bits,attr"`
		Strength string `xml:"strength,attr"`
		Curve    string `xml:"curve,attr"`
	} `xml:"ssltest>cipher"`
}

// weak names what a mail server shall not offer: protocols before TLS 1.2, ciphers of less than 128 bits or without forward secrecy
// or that sslscan calls weak, compression, insecure renegotiation.
func (s *scan) weak() (all []string) {
	for _, p := range s.Protocols {
		if name := p.Type + " " + p.Version; p.Enabled != 0 && name != "tls 1.2" && name != "tls 1.3" {
			all = append(all, name)
		}
	}
	for _, c := range s.Ciphers {
		forward := c.Version == "TLSv1.3" || strings.HasPrefix(c.Cipher, "ECDHE-")
		if !slices.Contains([]string{"acceptable", "strong"}, c.Strength) || c.Bits < 128 || !forward || c.Curve == "" {
			all = append(all, c.Version+" "+c.Cipher)
		}
	}
	if s.Compression.Supported != 0 {
		all = append(all, "compression")
	}
	if s.Renegotiation.Supported != 0 && s.Renegotiation.Secure == 0 {
		all = append(all, "renegotiation")
	}
	for _, h := range s.Heartbleed {
		if h.Vulnerable != 0 {
			all = append(all, "heartbleed")
		}
	}
	return all
}

// protocols names those that are offered.
func (s *scan) protocols() (all []string) {
	for _, p := range s.Protocols {
		if p.Enabled != 0 {
			all = append(all, p.Type+" "+p.Version)
		}
	}
	return all
}

func sslscan(t *testing.T, args ...string) *scan {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Minute)
	defer cancel()
	out, err := exec.CommandContext(ctx, "sslscan", append([]string{"--no-colour", "--xml=-"}, args...)...).Output()
	if err != nil {
		t.Fatalf("sslscan: %v: %s", err, out)
	}
	s := new(scan)
	if err := xml.Unmarshal(out, s); err != nil {
		t.Fatalf("sslscan: %v: %s", err, out)
	}
	return s
}

func rsaSigned(t *testing.T) *tls.Config {
	t.Helper()
	key, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{SerialNumber: big.NewInt(1), DNSNames: []string{"mx.test"}, NotAfter: time.Now().Add(time.Hour)}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	return &tls.Config{Certificates: []tls.Certificate{{Certificate: [][]byte{der}, PrivateKey: key}}}
}

func TestSSLScanFindsNothingWeak(t *testing.T) {
	for name, cfg := range map[string]*tls.Config{"ECDSA": selfSigned(t), "RSA": rsaSigned(t)} {
		cfg.MinVersion = tls.VersionTLS10 // whatever is given
		g := newRig(t, snapshot(), func(o *Options) { o.TLS = cfg })
		l := g.listen()
		g.serveKind(l, Kind{TLS: true})
		for _, args := range [][]string{{"--starttls-smtp", g.addr}, {l.Addr().String()}} {
			t.Run(fmt.Sprint(name, args[:len(args)-1]), func(t *testing.T) {
				s := sslscan(t, args...)
				if weak := s.weak(); len(weak) > 0 {
					t.Errorf("weak: %s", strings.Join(weak, ", "))
				}
				if got := strings.Join(s.protocols(), ", "); got != "tls 1.2, tls 1.3" || len(s.Ciphers) < 6 {
					t.Errorf("offered: %s with %d ciphers", got, len(s.Ciphers))
				}
			})
		}
	}
}

// What the test above would find.
func TestSSLScanFindsWhatIsWeak(t *testing.T) {
	cfg := rsaSigned(t)
	cfg.MinVersion, cfg.MaxVersion = tls.VersionTLS10, tls.VersionTLS12
	cfg.CipherSuites = []uint16{tls.TLS_RSA_WITH_3DES_EDE_CBC_SHA, tls.TLS_RSA_WITH_AES_128_CBC_SHA, tls.TLS_ECDHE_RSA_WITH_AES_128_GCM_SHA256}
	l, err := tls.Listen("tcp", "127.0.0.1:0", cfg)
	if err != nil {
		t.Fatal(err)
	}
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			go func(c net.Conn) { // ends with the scan
				defer c.Close()
				_, _ = c.Read(make([]byte, 1))
			}(c)
		}
	}()
	weak := strings.Join(sslscan(t, l.Addr().String()).weak(), ", ")
	_ = l.Close()
	<-ended
	for _, want := range []string{"tls 1.0", "TLSv1.2 AES128-SHA"} {
		if !strings.Contains(weak, want) {
			t.Errorf("%s was not found: %s", want, weak)
		}
	}
}
