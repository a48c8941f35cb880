package config

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/BurntSushi/toml"
)

// maxSocketPath is what fits into a Unix socket's address (sun_path, less its final NUL).
const maxSocketPath = 107

// DefaultLocal is a node file in which nothing is written but what must be.
func DefaultLocal() *Local {
	return &Local{
		User:     DefaultUser,
		StateDir: DefaultStateDir,
		RunDir:   DefaultRunDir,
		Services: []string{ServiceSMTP, ServiceWeb},
		SMTP:     MailListen{Listen: []string{":25"}},
		Web:      Listen{Listen: []string{"127.0.0.1:8025"}},
		Tunnel:   Listen{Listen: []string{":" + DefaultTunnelPort}},
	}
}

// LoadLocal reads a node file over the defaults and checks every field. Unknown keys are errors. Each line of the error says
// file, line and what is wrong.
func LoadLocal(file string) (*Local, error) {
	data, err := os.ReadFile(file)
	if err != nil {
		return nil, fmt.Errorf("read node file: %w", err)
	}
	l, err := ParseLocal(data)
	if err != nil {
		return nil, inFile(file, err)
	}
	l.File = file
	if err := checkFileMode(file, l); err != nil {
		return nil, inFile(file, err)
	}
	return l, nil
}

// inFile puts "file:line:" in front of each problem.
func inFile(file string, err error) error {
	var located []error
	for _, p := range Problems(err) {
		where := file
		if p.Line > 0 {
			where = fmt.Sprintf("%s:%d", file, p.Line)
		}
		reason := p.Reason
		if p.Object != "" {
			reason = p.Object + ": " + reason
		}
		located = append(located, fmt.Errorf("%s: %s", where, reason))
	}
	if len(located) == 0 {
		return fmt.Errorf("%s: %w", file, err)
	}
	return errors.Join(located...)
}

// checkFileMode: a password is not for everyone on the host, and a DSN has many ways to hold one.
func checkFileMode(file string, l *Local) error {
	info, err := os.Stat(file)
	if err != nil {
		return err
	}
	if info.Mode().Perm()&0o007 != 0 && l.Database.DSN != "" {
		return fmt.Errorf("has a dsn, which may hold a password, and everyone may read it (mode %#o): chmod o= %s", info.Mode().Perm(), file)
	}
	return nil
}

// ParseLocal is LoadLocal for a text. The error joins a *Problem for each thing that is wrong; its Object is the key.
func ParseLocal(text []byte) (*Local, error) {
	l := DefaultLocal()
	meta, err := toml.Decode(string(text), l)
	if err != nil {
		return nil, decodeProblem(err)
	}
	index := indexLines(string(text))
	c := &localChecker{index: index}
	for _, key := range meta.Undecoded() {
		path := strings.Join(key, ".")
		if parent := strings.Join(key[:len(key)-1], "."); parent == "" || meta.IsDefined(parent) && !isUndecoded(meta, parent) {
			c.errs = append(c.errs, &Problem{Reason: fmt.Sprintf("unknown key %q", path), Line: index.line(path, 0)})
		}
	}
	c.check(l)
	if err := errors.Join(c.errs...); err != nil {
		return nil, err
	}
	return l, nil
}

func isUndecoded(meta toml.MetaData, path string) bool {
	return slices.ContainsFunc(meta.Undecoded(), func(k toml.Key) bool { return strings.Join(k, ".") == path })
}

// localChecker gathers what is wrong with a node file.
type localChecker struct {
	index *lineIndex
	errs  []error
}

func (c *localChecker) add(key, format string, args ...any) {
	c.errs = append(c.errs, &Problem{Object: key, Reason: fmt.Sprintf(format, args...), Line: c.index.line(key, 0)})
}

func (c *localChecker) check(l *Local) {
	if l.Name == "" {
		c.add("name", "is missing: the node's host name, as EHLO shows it")
	} else if name, err := NodeName(l.Name); err != nil {
		c.add("name", "%v", err)
	} else {
		l.Name = name
	}
	if l.Address == "" {
		c.add("address", "is missing: the IP address or host name at which other nodes reach this one")
	} else if address, err := NodeAddress(l.Address); err != nil {
		c.add("address", "%v", err)
	} else {
		l.Address = address
	}
	if l.User != "" && !isUserName(l.User) {
		c.add("user", "%q is not a user's name", l.User)
	}
	c.dirs(l)
	for i, s := range l.Services {
		switch {
		case s != ServiceSMTP && s != ServiceWeb:
			c.add("services", "unknown service %q, want %s or %s", s, ServiceSMTP, ServiceWeb)
		case slices.Contains(l.Services[:i], s):
			c.add("services", "%s stands there twice", s)
		}
	}
	c.listeners(l)
	if l.Database.DSN != "" && l.Database.Bin != "" {
		c.add("database.bin", "is for a private instance, and database.dsn names another server: take one of them away")
	}
	if l.Database.Bin != "" && !filepath.IsAbs(l.Database.Bin) {
		c.add("database.bin", "%q is not an absolute path", l.Database.Bin)
	}
}

// NodeName gives a node's name in lower case: a host name.
func NodeName(s string) (string, error) {
	name := strings.ToLower(s)
	if !isLowerHost(name, false) || isIP(name) {
		return "", fmt.Errorf("%q is not a host name", s)
	}
	return name, nil
}

// NodeAddress gives where other nodes reach a node: an IP address or a host name, without a port.
func NodeAddress(s string) (string, error) {
	if addr, err := netip.ParseAddr(s); err == nil {
		if addr.IsUnspecified() || addr.IsMulticast() || addr.Zone() != "" {
			return "", fmt.Errorf("%s is not an address at which other nodes can reach this one", s)
		}
		return addr.Unmap().String(), nil
	}
	name := strings.ToLower(s)
	if !isLowerHost(name, false) || looksNumeric(name) {
		return "", fmt.Errorf("%q is neither an IP address nor a host name (it has no port: that is in [tunnel] listen)", s)
	}
	return name, nil
}

// looksNumeric: 300.1.2.3 is no host name but an IP address that was mistyped (RFC 3696 §2: a top-level label is not numeric).
func looksNumeric(s string) bool {
	last := s[strings.LastIndexByte(s, '.')+1:]
	return strings.Trim(last, "0123456789") == ""
}

func isIP(s string) bool {
	_, err := netip.ParseAddr(s)
	return err == nil
}

func isUserName(s string) bool {
	for i := 0; i < len(s); i++ {
		c := s[i]
		if !('a' <= c && c <= 'z' || 'A' <= c && c <= 'Z' || '0' <= c && c <= '9' || c == '_' || i > 0 && (c == '-' || c == '.')) {
			return false
		}
	}
	return len(s) <= 32
}

// dirs: PostgreSQL takes socket directories as a list with commas, and connection strings quote; so no such characters.
func (c *localChecker) dirs(l *Local) {
	for _, d := range []struct {
		key  string
		path *string
	}{{"state_dir", &l.StateDir}, {"run_dir", &l.RunDir}} {
		switch {
		case !filepath.IsAbs(*d.path):
			c.add(d.key, "%q is not an absolute path", *d.path)
			continue
		case strings.ContainsAny(*d.path, " ,'\"\\\t\r\n"):
			c.add(d.key, "%q has a blank, comma, quote or backslash in it", *d.path)
			continue
		}
		*d.path = filepath.Clean(*d.path)
		if *d.path == "/" {
			c.add(d.key, "the root directory cannot be it")
		}
	}
	if l.StateDir == l.RunDir {
		c.add("run_dir", "is the same as state_dir")
	}
	// The longest socket that a node makes: that of a peer with a CID of five digits.
	longest := filepath.Join(l.PeerDir(99999), ".s.PGSQL.5432")
	if over := len(longest) - maxSocketPath; over > 0 {
		c.add("run_dir", "is %d octets too long: %s must have at most %d", over, longest, maxSocketPath)
	}
}

func (c *localChecker) listeners(l *Local) {
	seen := map[string]string{}
	mayBeEmpty := map[string]bool{"smtp.listen": !l.SMTP.isEmpty() || l.HasInternal(), "smtp.tls_listen": true,
		"internal.listen": true, "internal.tls_listen": true}
	for _, s := range []struct {
		key    string
		listen []string
		needed bool
	}{
		{"smtp.listen", l.SMTP.Listen, l.Runs(ServiceSMTP)},
		{"smtp.tls_listen", l.SMTP.TLSListen, l.Runs(ServiceSMTP)},
		{"internal.listen", l.Internal.Listen, l.Runs(ServiceSMTP)},
		{"internal.tls_listen", l.Internal.TLSListen, l.Runs(ServiceSMTP)},
		{"web.listen", l.Web.Listen, l.Runs(ServiceWeb)},
		{"agent.listen", l.Agent.Listen, len(l.Agent.Listen) > 0},
		{"tunnel.listen", l.Tunnel.Listen, true},
	} {
		if s.needed && len(s.listen) == 0 && !mayBeEmpty[s.key] {
			c.add(s.key, "is empty")
		}
		for _, a := range s.listen {
			if err := checkListen(a); err != nil {
				c.add(s.key, "%v", err)
			}
			if other, twice := seen[a]; twice && s.needed {
				c.add(s.key, "%s is in %s too", a, other)
			}
			if s.needed {
				seen[a] = s.key
			}
		}
	}
}

// checkListen: "host:port", "[v6]:port", ":port"; a host name is resolved when the listener is opened.
func checkListen(s string) error {
	host, port, err := net.SplitHostPort(s)
	if err != nil {
		return fmt.Errorf("%q is not host:port", s)
	}
	if err := checkPort(port, 1); err != nil {
		return fmt.Errorf("%q: %w", s, err)
	}
	if host == "" || isIP(host) {
		return nil
	}
	if !isLowerHost(strings.ToLower(host), false) || looksNumeric(host) {
		return fmt.Errorf("%q: %q is neither an IP address nor a host name", s, host)
	}
	return nil
}
