package main

import (
	"cmp"
	"context"
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"os"
	"slices"
	"strings"
	"sync/atomic"
	"time"

	"github.com/rs/zerolog"

	"mailproxy/cluster"
	"mailproxy/config"
)

// expiryNotice is how long before its end a certificate is named in status.
const expiryNotice = 14 * 24 * time.Hour

// certificates are what TLS shows: by the name that a client asks for those of the configuration; else the one for the node's own name,
// or that of the node's file.
type certificates struct {
	name string // the node's
	path string // of the node's file
	log  zerolog.Logger
	live atomic.Pointer[certificateSet]
	file atomic.Pointer[tls.Certificate]
	// broken is what is wrong with the file; nil where it has what is shown.
	broken atomic.Pointer[cluster.Problem]
	seen   os.FileInfo // of the file when it was read last; look's own
}

// A certificateSet is what is in force.
type certificateSet struct {
	byName map[string]*tls.Certificate
	unused []cluster.Problem // what there is of them and is not shown
}

// tlsConfig is for a server.
func (c *certificates) tlsConfig() *tls.Config {
	return &tls.Config{
		GetCertificate: c.get,
		MinVersion:     tls.VersionTLS12,
		// Session tickets lose mail from Microsoft (golang/go#70232).
		SessionTicketsDisabled: true,
	}
}

// get chooses for one client.
func (c *certificates) get(hello *tls.ClientHelloInfo) (*tls.Certificate, error) {
	if set := c.live.Load(); set != nil {
		for _, name := range []string{hello.ServerName, c.name} {
			if cert := set.find(name); cert != nil {
				return cert, nil
			}
		}
	}
	return c.file.Load(), nil
}

// filePoll is how often the node's file is looked at.
const filePoll = 5 * time.Second

// follow shows what the node's file has until ctx ends.
func (c *certificates) follow(ctx context.Context) {
	poll := time.NewTicker(filePoll)
	defer poll.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-poll.C:
			c.look()
		}
	}
}

// look takes over the node's file where it has changed. One that is not whole, as while it is being written, changes nothing, and is tried
// again at the next look.
func (c *certificates) look() {
	info, err := os.Stat(c.path)
	if err == nil && c.seen != nil && c.broken.Load() == nil &&
		os.SameFile(c.seen, info) && c.seen.ModTime().Equal(info.ModTime()) && c.seen.Size() == info.Size() {
		return
	}
	var cert tls.Certificate
	if err == nil {
		cert, err = tls.LoadX509KeyPair(c.path, c.path)
	}
	if err != nil {
		p := &cluster.Problem{What: fmt.Sprintf("the certificate in %s is not shown: %v; the one before is", c.path, err),
			Remedy: "put the private key, the certificate and those between it and the root there, in PEM, for the daemon's user to read"}
		if was := c.broken.Swap(p); was == nil || was.What != p.What {
			c.log.Error().Str("file", c.path).Err(err).Msg("certificate.unused")
		}
		return
	}
	c.seen = info
	c.broken.Store(nil)
	if was := c.file.Swap(&cert); !was.Leaf.Equal(cert.Leaf) {
		c.log.Info().Str("file", c.path).Time("not_after", cert.Leaf.NotAfter).Msg("certificate.loaded")
	}
}

// find gives the certificate for a name, or for all names beside it; nil where there is none.
func (s *certificateSet) find(name string) *tls.Certificate {
	name = strings.ToLower(strings.TrimSuffix(name, "."))
	if cert := s.byName[name]; cert != nil {
		return cert
	}
	_, parent, _ := strings.Cut(name, ".")
	return s.byName["*."+parent]
}

// use takes over what the configuration has now. One whose key cannot be had stays what it was, where there was one.
func (c *certificates) use(list []config.Certificate, open func(name string) ([]byte, error)) {
	before := c.live.Load()
	set := &certificateSet{byName: make(map[string]*tls.Certificate, len(list))}
	for i := range list {
		x := &list[i]
		cert, err := openCertificate(x, open)
		if err != nil {
			set.unused = append(set.unused, cluster.Problem{What: fmt.Sprintf("certificate %s is not shown: %v", x.Name, err),
				Remedy: fmt.Sprintf("`mailproxy tls add %s --cert FILE --key FILE`", x.Name)})
			if before != nil {
				cert = before.byName[x.Name]
			}
		}
		if cert != nil {
			set.byName[x.Name] = cert
		}
	}
	var was []cluster.Problem
	if before != nil {
		was = before.unused
	}
	for _, p := range set.unused {
		if !slices.Contains(was, p) {
			c.log.Error().Str("reason", p.What).Msg("certificate.unused")
		}
	}
	c.live.Store(set)
}

// openCertificate puts a certificate and its key together.
func openCertificate(x *config.Certificate, open func(name string) ([]byte, error)) (*tls.Certificate, error) {
	key, err := open(x.KeySecret())
	if err != nil {
		return nil, fmt.Errorf("the secret %s %w", x.KeySecret(), err)
	}
	cert, err := tls.X509KeyPair([]byte(x.Chain), key)
	if err != nil {
		return nil, err
	}
	return &cert, nil
}

// problems names what is not shown, and what will soon be of no use.
func (c *certificates) problems(now time.Time) (all []cluster.Problem) {
	if p := c.broken.Load(); p != nil {
		all = append(all, *p)
	}
	set := c.live.Load()
	if set == nil {
		return all
	}
	all = append(all, set.unused...)
	for name, cert := range set.byName {
		if what := expiry(cert.Leaf, now); what != "" {
			all = append(all, cluster.Problem{What: fmt.Sprintf("certificate %s %s", name, what),
				Remedy: fmt.Sprintf("`mailproxy tls add %s --cert FILE --key FILE` with a new one", name)})
		}
	}
	slices.SortFunc(all, func(a, b cluster.Problem) int { return cmp.Compare(a.What, b.What) })
	return all
}

// expiry says that a certificate's time is over, or nearly; empty where it is not.
func expiry(leaf *x509.Certificate, now time.Time) string {
	day := leaf.NotAfter.UTC().Format(time.DateOnly)
	switch {
	case now.After(leaf.NotAfter):
		return "has expired on " + day
	case now.After(leaf.NotAfter.Add(-expiryNotice)):
		return "expires on " + day
	}
	return ""
}
