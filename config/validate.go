package config

import (
	"fmt"
	"slices"
	"strings"
	"time"
	"unicode"
	"unicode/utf8"
)

// maxHosts bounds the fixed hosts of one transport or domain: all of them may be tried inside one client's transaction.
const maxHosts = 32

// maxTransportLife bounds how long mail is tried by a transport with a life of its own.
const maxTransportLife = 14 * day

// Validate says everything that is wrong with what an administrator can change, as *Problem values joined into one error
// (see Problems). Nodes, CAs and revocations are the cluster's own and are not looked at.
func Validate(s *Snapshot) error { return ValidateAfter(nil, s) }

// ValidateAfter is Validate of what came of a snapshot that is sound: one that Validate takes, or nil. It passes over the domains and
// recipients that s shares with it, of which there may be many.
func ValidateAfter(sound, s *Snapshot) error {
	if sound == nil || !slices.EqualFunc(sound.Transports, s.Transports, func(a, b Transport) bool { return a.Name == b.Name }) {
		sound = new(Snapshot) // domains name transports
	}
	var c collector
	var v Values
	s.values(&v, &c)
	transports := make(map[string]bool, len(s.Transports))
	for i := range s.Transports {
		transports[s.Transports[i].Name] = true
	}
	if v.OutboundTransport != "" && !transports[v.OutboundTransport] {
		c.add("setting outbound_transport", "no such transport: %s", v.OutboundTransport)
	}
	checkUnique(&c, s)
	for _, n := range s.Networks {
		if err := checkNetwork(n); err != nil {
			c.add("network "+n.Prefix.String(), "%v", err)
		}
	}
	hosts := hostChecker{}
	for _, t := range s.Transports {
		if err := checkTransport(t, hosts); err != nil {
			c.add("transport "+t.Name, "%v", err)
		}
	}
	checkDomains(&c, sound.Domains, s.Domains, transports, hosts)
	for i := range s.Certificates {
		if err := checkCertificate(&s.Certificates[i]); err != nil {
			c.add("certificate "+s.Certificates[i].Name, "%v", err)
		}
	}
	for i := range s.TLSSenders {
		if err := checkTLSSender(&s.TLSSenders[i]); err != nil {
			c.add("tls_sender "+s.TLSSenders[i].Domain, "%v", err)
		}
	}
	checkRecipients(&c, sound, s)
	return c.err()
}

// checkUnique finds names that stand twice; rows of a database cannot, a text can.
func checkUnique(c *collector, s *Snapshot) {
	seen := make(map[string]bool)
	once := func(object string) {
		if seen[object] {
			c.add(object, "stands there twice")
		}
		seen[object] = true
	}
	for _, x := range s.Settings {
		once("setting " + x.Name)
	}
	for _, x := range s.Networks {
		once("network " + x.Prefix.String())
	}
	for _, x := range s.Transports {
		once("transport " + x.Name)
	}
	for i := range s.Certificates {
		once("certificate " + s.Certificates[i].Name)
	}
	for _, x := range s.TLSSenders {
		once("tls_sender " + x.Domain)
	}
}

func checkNetwork(n Network) error {
	switch {
	case !n.Prefix.IsValid():
		return fmt.Errorf("not a network")
	case n.Prefix.Addr().Is4In6():
		return fmt.Errorf("write an IPv4 network as IPv4")
	case n.Prefix != n.Prefix.Masked():
		return fmt.Errorf("has bits set behind its length, want %v", n.Prefix.Masked())
	case n.Prefix.Bits() == 0:
		return fmt.Errorf("is everyone: all the world could send through this node")
	}
	return checkComment(n.Comment)
}

func checkTransport(t Transport, hosts hostChecker) error {
	if err := checkTransportName(t.Name); err != nil {
		return err
	}
	switch t.TLS {
	case "", TLSNone, TLSMay, TLSEncrypt, TLSVerify:
	default:
		return fmt.Errorf("tls %q is none of none, may, encrypt, verify", t.TLS)
	}
	switch t.Order {
	case "", OrderGiven, OrderRoundRobin:
	default:
		return fmt.Errorf("order %q is none of given, round-robin", t.Order)
	}
	switch t.Tell {
	case "", TellXClient, TellProxy:
	default:
		return fmt.Errorf("tell %q is none of xclient, proxy", t.Tell)
	}
	if err := checkLogin(t); err != nil {
		return err
	}
	if life := time.Duration(t.QueueLife); life != 0 && (life < time.Minute || life > maxTransportLife) {
		return fmt.Errorf("queue_life %v is out of bounds, want %s to %s", t.QueueLife, FormatDuration(time.Minute), FormatDuration(maxTransportLife))
	}
	return hosts.check(t.Hosts)
}

// checkLogin: a password goes to known hosts only, and never in clear.
func checkLogin(t Transport) error {
	name, isSecret := strings.CutPrefix(t.Password, secretPrefix)
	switch {
	case t.User == "" && t.Password == "":
		return nil
	case t.User == "":
		return fmt.Errorf("has a password and no user")
	case t.Password == "":
		return fmt.Errorf("has a user and no password")
	case !isSecret:
		return fmt.Errorf("password is not secret:NAME: store it by \"mailproxy secret set NAME\", and name it here") // never quoted: it may be one
	case len(t.Hosts) == 0:
		return fmt.Errorf("has a user and no hosts: no password is shown to whoever stands in the DNS")
	case t.TLS != TLSEncrypt && t.TLS != TLSVerify:
		return fmt.Errorf("has a user, and tls is neither verify nor encrypt: a password never goes in clear")
	case len(t.User) > 255 || !utf8.ValidString(t.User) || strings.ContainsFunc(t.User, unicode.IsControl):
		return fmt.Errorf("user is longer than 255 octets or has control characters in it")
	}
	return CheckSecretName(name)
}

func checkDomains(c *collector, sound, domains Domains, transports map[string]bool, hosts hostChecker) {
	var before *Domain
	for piece, known := range domains.besides(sound) {
		for i := range piece {
			d := &piece[i]
			if before != nil && before.Name == d.Name {
				c.add("domain "+d.Name, "stands there twice")
			}
			if before = d; known { // but for where it begins
				before = &piece[len(piece)-1]
				break
			}
			if err := checkDomain(d, transports, hosts); err != nil {
				c.add("domain "+d.Name, "%v", err)
			}
		}
	}
}

func checkDomain(d *Domain, transports map[string]bool, hosts hostChecker) error {
	name, err := NormalizeDomain(d.Name)
	switch {
	case err != nil:
		return err
	case name != d.Name:
		return fmt.Errorf("is not in its normal form, want %s", name)
	case d.Transport == "" && len(d.Hosts) == 0:
		return fmt.Errorf("has neither hosts nor a transport")
	case d.Transport != "" && len(d.Hosts) > 0:
		return fmt.Errorf("has both hosts and a transport")
	case d.Transport != "" && !transports[d.Transport]:
		return fmt.Errorf("no such transport: %s", d.Transport)
	}
	if err := hosts.check(d.Hosts); err != nil {
		return err
	}
	return checkComment(d.Comment)
}

// A hostChecker checks each host once: many domains go to the same few.
type hostChecker map[string]error

func (c hostChecker) check(hosts []string) error {
	if len(hosts) > maxHosts {
		return fmt.Errorf("%d hosts, want at most %d", len(hosts), maxHosts)
	}
	for i, h := range hosts {
		err, known := c[h]
		if !known {
			err = checkHost(h)
			c[h] = err
		}
		if err != nil {
			return err
		}
		if slices.Contains(hosts[:i], h) {
			return fmt.Errorf("host %s stands there twice", h)
		}
	}
	return nil
}

func checkHost(h string) error {
	normal, err := NormalizeHost(h, "25")
	if err == nil && normal != h {
		err = fmt.Errorf("host %s is not in its normal form, want %s", h, normal)
	}
	return err
}
