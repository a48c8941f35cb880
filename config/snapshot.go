package config

import (
	"net/netip"
	"slices"
	"strings"
	"time"
)

// A Snapshot is the replicated configuration at one position, as a value. It is immutable: whoever wants another makes one.
type Snapshot struct {
	Position   Position    `json:"position"`
	ClusterID  string      `json:"cluster_id,omitempty"` // UUID; empty for a single node
	Nodes      []Node      `json:"nodes,omitempty"`      // by CID
	CAs        []CA        `json:"cas,omitempty"`        // by fingerprint
	Revoked    []Revoked   `json:"revoked,omitempty"`    // by CID
	Settings   []Setting   `json:"settings,omitempty"`   // by name; only those that differ from their default
	Networks   []Network   `json:"networks,omitempty"`   // by prefix
	Transports []Transport `json:"transports,omitempty"` // by name
	Domains    Domains     `json:"domains,omitzero"`

	Recipients []RecipientList `json:"recipients,omitempty"` // by domain

	Certificates []Certificate `json:"certificates,omitempty"` // by name
	TLSSenders   []TLSSender   `json:"tls_senders,omitempty"`  // by domain
}

// A Node is a member of the cluster, one row of config.node.
type Node struct {
	CID        CID       `json:"cid"`
	UUID       string    `json:"uuid"`
	Name       string    `json:"name"`
	Address    string    `json:"address"`    // host:port of its tunnel
	PublicKey  string    `json:"public_key"` // authorized_keys form, without comment
	MachineID  string    `json:"machine_id"`
	Services   []string  `json:"services"` // smtp, web
	Promotable bool      `json:"promotable"`
	JoinedAt   time.Time `json:"joined_at"`
}

// A CA signs node certificates; its private key never leaves the node that made it.
type CA struct {
	Fingerprint string    `json:"fingerprint"` // SHA256:…
	PublicKey   string    `json:"public_key"`  // authorized_keys form
	CID         CID       `json:"cid"`         // the node that made it
	CreatedAt   time.Time `json:"created_at"`
}

// Revoked is a node that was deleted; its key opens nothing any more, and its CID is never given again.
type Revoked struct {
	CID       CID       `json:"cid"`
	Name      string    `json:"name"`
	PublicKey string    `json:"public_key"`
	RevokedAt time.Time `json:"revoked_at"`
}

// A Setting is a named value of the list in settings.go.
type Setting struct {
	Name  string `json:"name"`
	Value string `json:"value"`
}

// A Network is one of our own: its hosts may send to anywhere.
type Network struct {
	Prefix  netip.Prefix `json:"prefix"`
	Comment string       `json:"comment,omitempty"`
}

// A Transport is a named way out: fixed hosts, or the MX records of the recipient's domain.
type Transport struct {
	Name  string   `json:"name"`
	Hosts []string `json:"hosts,omitempty"` // host:port, IPv6 in brackets; empty: MX lookup
	Order Order    `json:"order,omitempty"` // of Hosts; empty is OrderGiven
	TLS   TLS      `json:"tls,omitempty"`   // empty is TLSMay
	// User is whom we log in as (RFC 4954), with Password, which is secret:NAME; empty: we do not.
	User     string `json:"user,omitempty"`
	Password string `json:"password,omitempty"`
	// Tell is how the hop is told who our client is; empty: it is not.
	Tell Tell `json:"tell,omitempty"`
	// QueueLife is how long mail is tried by it; 0 is the setting queue_life.
	QueueLife Duration `json:"queue_life,omitempty"`
}

// Order is which of several hosts is tried first.
type Order string

// The orders: always the first in the list; the one behind the last that was the first. A host that is out of reach goes behind the
// others in both.
const (
	OrderGiven      Order = "given"
	OrderRoundRobin Order = "round-robin"
)

// Tell is how a hop is told the address of the client that a message came from.
type Tell string

// The ways: the SMTP command XCLIENT, as Postfix has it; a header of the PROXY protocol, version 2, before the greeting.
const (
	TellXClient Tell = "xclient"
	TellProxy   Tell = "proxy"
)

// secretPrefix begins a reference to a secret, wherever one may stand.
const secretPrefix = "secret:"

// PasswordSecret is the name of the secret that has the password; empty where the transport logs in nowhere.
func (t *Transport) PasswordSecret() string {
	name, _ := strings.CutPrefix(t.Password, secretPrefix)
	if name == t.Password {
		return ""
	}
	return name
}

// Secrets gives the names of the secrets that transports and certificates refer to, sorted, each once.
func (s *Snapshot) Secrets() []string {
	var names []string
	for i := range s.Transports {
		if name := s.Transports[i].PasswordSecret(); name != "" {
			names = append(names, name)
		}
	}
	for i := range s.Certificates {
		if name := s.Certificates[i].KeySecret(); name != "" {
			names = append(names, name)
		}
	}
	slices.Sort(names)
	return slices.Compact(names)
}

// TLS is a transport's policy for STARTTLS.
type TLS string

// The TLS policies: no attempt; attempted, and in clear where it fails to be offered; required; required with a certificate
// that is valid for the host's name.
const (
	TLSNone    TLS = "none"
	TLSMay     TLS = "may"
	TLSEncrypt TLS = "encrypt"
	TLSVerify  TLS = "verify"
)

// A Domain is one that we relay for.
type Domain struct {
	Name      string   `json:"name"`                // A-labels, lower case
	Transport string   `json:"transport,omitempty"` // name of a Transport; or
	Hosts     []string `json:"hosts,omitempty"`     // fixed hosts of its own (host:port), as --to gives them
	Comment   string   `json:"comment,omitempty"`
}
