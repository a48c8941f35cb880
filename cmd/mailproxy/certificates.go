package main

import (
	"context"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"encoding/hex"
	"encoding/pem"
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"
	"time"

	"github.com/urfave/cli/v2"

	"mailproxy/config"
	"mailproxy/db"
)

func tlsCommand() *cli.Command {
	return &cli.Command{
		Name: "tls", Usage: "TLS of clients that send mail to us",
		Description: "TLS 1.2 and later, by STARTTLS or from the first octet where the node file has such a listener.",
		Subcommands: []*cli.Command{
			{Name: "add", Usage: "show a certificate to clients that ask for a name, or a new one in its place", ArgsUsage: "NAME", Action: tlsAdd,
				Flags: []cli.Flag{
					&cli.StringFlag{Name: "cert", Usage: "`FILE` with the certificate in PEM, and behind it those between it and the root; - is standard input"},
					&cli.StringFlag{Name: "key", Usage: "`FILE` with the private key in PEM, which only its owner may read; without it, --cert has it too"},
				},
				Description: "All nodes show it at once; no restart is needed. *.NAME is every name one label below NAME. The one for a node's own name " +
					"is what clients see there that ask for no name, or for another. The key is stored as a secret, tls-NAME. " +
					"Example: mailproxy tls add mx1.example.net --cert fullchain.pem --key privkey.pem"},
			{Name: "remove", Usage: "show certificates no longer", ArgsUsage: "NAME...", Action: onMaster(tlsRemove),
				Description: "Their keys are forgotten, and are in no history."},
			{Name: "list", Usage: "show the certificates", Flags: []cli.Flag{jsonFlag()}, Action: tlsList, Description: "One line each, by name."},
			tlsSenderCommand(),
		},
	}
}

// keySecret is the name of the secret for a certificate's key: of a length that secrets' names may have.
func keySecret(name string) string {
	secret := "tls-" + strings.Replace(name, "*", "_", 1)
	if config.CheckSecretName(secret) != nil {
		sum := sha256.Sum256([]byte(name))
		secret = "tls-" + hex.EncodeToString(sum[:16])
	}
	return secret
}

func tlsAdd(c *cli.Context) error {
	args, err := arguments(c, 1, 1)
	if err != nil {
		return err
	}
	name, err := config.NormalizeCertificateName(args[0])
	if err != nil {
		return usagef("tls add: %v", err)
	}
	if !c.IsSet("cert") {
		return usagef("tls add: --cert is missing")
	}
	chain, key, err := readKeyPair(c)
	if err != nil {
		return err
	}
	var slave bool
	err = withStore(c, func(ctx context.Context, s *store) (err error) {
		if slave, err = s.isSlave(ctx); err == nil && slave {
			err = s.carry(c, config.Command{Args: []string{"tls", "add", name, "--cert", "-"}, Secret: append(slices.Clone(key), chain...)})
			if err == nil {
				err = s.takenUp(c, keySecret(name), key)
			}
		}
		return err
	})
	if err != nil || slave {
		return err
	}
	at, err := edit(c, func(ctx context.Context, tx *db.Tx, _ *config.Snapshot) error {
		if err := tx.PutSecret(ctx, keySecret(name), key); err != nil {
			return err
		}
		return tx.PutCertificate(ctx, config.Certificate{Name: name, Chain: string(chain), Key: "secret:" + keySecret(name)})
	})
	if err != nil {
		return err
	}
	if err := withStore(c, func(_ context.Context, s *store) error { return s.takenUp(c, keySecret(name), key) }); err != nil {
		return err
	}
	return done(c, at, "certificate %s set", name)
}

// readKeyPair reads what --cert and --key name: the chain and the key, each in PEM and nothing else.
func readKeyPair(c *cli.Context) (chain, key []byte, err error) {
	var text []byte
	if c.IsSet("key") {
		if text, err = os.ReadFile(c.String("cert")); err != nil {
			return nil, nil, fmt.Errorf("read certificate: %w", err)
		}
		more, err := readSecret(c, c.String("key"))
		if err != nil {
			return nil, nil, err
		}
		text = append(append(text, '\n'), more...)
	} else if text, err = readSecret(c, c.String("cert")); err != nil {
		return nil, nil, err
	}
	if chain, key, err = splitPEM(text); err == nil {
		err = checkKeyPair(chain, key, time.Now())
	}
	if err != nil {
		return nil, nil, withHint(fmt.Errorf("nothing was changed: %w", err), "want the certificate, behind it those between it and the root, and its key, in PEM")
	}
	return chain, key, nil
}

// splitPEM gives certificates and key of a text.
func splitPEM(text []byte) (chain, key []byte, err error) {
	for {
		var block *pem.Block
		if block, text = pem.Decode(text); block == nil {
			break
		}
		block.Headers = nil
		switch {
		case block.Type == "CERTIFICATE":
			chain = append(chain, pem.EncodeToMemory(block)...)
		case strings.HasSuffix(block.Type, "PRIVATE KEY") && key == nil:
			key = pem.EncodeToMemory(block)
		case strings.HasSuffix(block.Type, "PRIVATE KEY"):
			return nil, nil, errors.New("there are two private keys")
		}
	}
	switch {
	case chain == nil:
		return nil, nil, errors.New("there is no certificate")
	case key == nil:
		return nil, nil, errors.New("there is no private key")
	}
	return chain, key, nil
}

// leastRSA is the least number of bits of an RSA key (NIST SP 800-57: 112 bits of strength).
const leastRSA = 2048

// checkKeyPair says what is wrong with what clients would be shown.
func checkKeyPair(chain, key []byte, now time.Time) error {
	pair, err := tls.X509KeyPair(chain, key)
	if err != nil {
		return errors.New(strings.TrimPrefix(err.Error(), "tls: "))
	}
	if key, ok := pair.Leaf.PublicKey.(*rsa.PublicKey); ok && key.N.BitLen() < leastRSA {
		return fmt.Errorf("the RSA key has %d bits, want at least %d", key.N.BitLen(), leastRSA)
	}
	if now.After(pair.Leaf.NotAfter) {
		return errors.New("the certificate " + expiry(pair.Leaf, now))
	}
	signed := pair.Leaf
	for _, der := range pair.Certificate[1:] {
		by, err := x509.ParseCertificate(der)
		if err != nil {
			return err
		}
		if signed.CheckSignatureFrom(by) != nil {
			return fmt.Errorf("the certificate of %q is not signed by the next one, of %q", signed.Subject.CommonName, by.Subject.CommonName)
		}
		signed = by
	}
	return nil
}

func tlsRemove(c *cli.Context) error {
	names, err := arguments(c, 1, -1)
	if err != nil {
		return err
	}
	for i, n := range names {
		if names[i], err = config.NormalizeCertificateName(n); err != nil {
			return usagef("tls remove: %v", err)
		}
	}
	at, err := edit(c, func(ctx context.Context, tx *db.Tx, now *config.Snapshot) error {
		for _, name := range names {
			i := slices.IndexFunc(now.Certificates, func(x config.Certificate) bool { return x.Name == name })
			if i < 0 {
				return withHint(fmt.Errorf("certificate %s: %w", name, errNoSuch), "mailproxy tls list")
			}
			if err := tx.DeleteCertificate(ctx, name); err != nil {
				return err
			}
			// One that the text of the configuration names is not ours to forget.
			if now.Certificates[i].KeySecret() != keySecret(name) {
				continue
			}
			if err := tx.DeleteSecret(ctx, keySecret(name)); err != nil && !errors.Is(err, db.ErrNoSuch) {
				return err
			}
		}
		return nil
	})
	if err != nil {
		return err
	}
	return done(c, at, "certificate %s removed", strings.Join(names, " "))
}

// certificateView is a certificate in JSON.
type certificateView struct {
	Name     string    `json:"name"`
	Names    []string  `json:"names"` // all that it is for
	Issuer   string    `json:"issuer"`
	NotAfter time.Time `json:"not_after"`
	Key      string    `json:"key"` // secret:NAME
}

func tlsList(c *cli.Context) error {
	views := func(s *config.Snapshot) []certificateView {
		all := []certificateView{}
		for i := range s.Certificates {
			v := certificateView{Name: s.Certificates[i].Name, Names: []string{}, Key: s.Certificates[i].Key}
			if leaf, err := s.Certificates[i].Leaf(); err == nil {
				v.Names, v.Issuer, v.NotAfter = nonNil(leaf.DNSNames), leaf.Issuer.String(), leaf.NotAfter.UTC()
			}
			all = append(all, v)
		}
		return all
	}
	return show(c, func(s *config.Snapshot) any { return views(s) }, func(s *config.Snapshot) error {
		t := newTable(c.App.Writer, "NAME", "UNTIL", "ISSUER", "KEY")
		for _, v := range views(s) {
			t.row(v.Name, v.NotAfter.Format(time.DateOnly), clean(v.Issuer), v.Key)
		}
		return t.flush()
	})
}

func tlsSenderCommand() *cli.Command {
	return &cli.Command{
		Name: "sender", Usage: "domains whose mail is taken by TLS only",
		Description: "A message whose sender is of such a domain, and that comes in clear, is refused with 530 5.7.0. Domains below it are others.",
		Subcommands: []*cli.Command{
			{Name: "add", Usage: "take a domain's mail by TLS only", ArgsUsage: "DOMAIN", Action: onMaster(tlsSenderAdd),
				Flags:       []cli.Flag{&cli.StringFlag{Name: "comment", Usage: "`TEXT` for people"}},
				Description: "Example: mailproxy tls sender add bank.example"},
			{Name: "remove", Usage: "take a domain's mail in clear again", ArgsUsage: "DOMAIN...", Action: onMaster(tlsSenderRemove)},
			{Name: "list", Usage: "show these domains", Flags: []cli.Flag{jsonFlag()}, Action: tlsSenderList, Description: "One line each, by name."},
		},
	}
}

func tlsSenderAdd(c *cli.Context) error {
	name, err := domainArgument(c)
	if err != nil {
		return err
	}
	at, err := edit(c, func(ctx context.Context, tx *db.Tx, now *config.Snapshot) error {
		if hasTLSSender(now, name) {
			return withHint(fmt.Errorf("tls sender %s: %w", name, errExists), "mailproxy tls sender list")
		}
		return tx.PutTLSSender(ctx, config.TLSSender{Domain: name, Comment: c.String("comment")})
	})
	if err != nil {
		return err
	}
	return done(c, at, "tls sender %s added", name)
}

func tlsSenderRemove(c *cli.Context) error {
	names, err := domainArguments(c)
	if err != nil {
		return err
	}
	at, err := edit(c, func(ctx context.Context, tx *db.Tx, now *config.Snapshot) error {
		for _, name := range names {
			if !hasTLSSender(now, name) {
				return noSuch("tls sender", name)
			}
			if err := tx.DeleteTLSSender(ctx, name); err != nil {
				return err
			}
		}
		return nil
	})
	if err != nil {
		return err
	}
	return done(c, at, "tls sender %s removed", strings.Join(names, " "))
}

func tlsSenderList(c *cli.Context) error {
	return show(c, func(s *config.Snapshot) any { return nonNil(s.TLSSenders) }, func(s *config.Snapshot) error {
		t := newTable(c.App.Writer, "DOMAIN", "COMMENT")
		for _, x := range s.TLSSenders {
			t.row(x.Domain, x.Comment)
		}
		return t.flush()
	})
}

func hasTLSSender(s *config.Snapshot, name string) bool {
	return slices.ContainsFunc(s.TLSSenders, func(t config.TLSSender) bool { return t.Domain == name })
}
