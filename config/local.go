package config

import (
	"net"
	"path/filepath"
	"strconv"
)

// The defaults of a node file.
const (
	DefaultFile       = "/etc/mailproxy/node.toml"
	DefaultUser       = "mailproxy"
	DefaultStateDir   = "/var/lib/mailproxy"
	DefaultRunDir     = "/run/mailproxy"
	DefaultTunnelPort = "7025"
)

// The services that a node can run.
const (
	ServiceSMTP = "smtp"
	ServiceWeb  = "web"
)

// Local is this node's own file: what is not replicated.
type Local struct {
	// File is where it was read from.
	File string `toml:"-"`
	// Name is the node's name, a host name as EHLO shows it.
	Name string `toml:"name"`
	// Address is where other nodes reach this one, without a port: an IP address or host name.
	Address string `toml:"address"`
	// User is whom the daemon becomes once its listeners are open, where it was started by root.
	User string `toml:"user"`
	// StateDir keeps what must not be lost: keys, spool, database, last snapshot.
	StateDir string `toml:"state_dir"`
	// RunDir keeps sockets.
	RunDir string `toml:"run_dir"`
	// Services are what runs here: smtp, web.
	Services []string `toml:"services"`
	// SMTP takes mail from the Internet to our domains, and where Internal has no listener, mail from our networks too.
	SMTP MailListen `toml:"smtp"`
	// Internal takes mail from our networks to anywhere.
	Internal MailListen `toml:"internal"`
	Web      Listen     `toml:"web"`
	// Agent answers HAProxy's agent-check; none unless it is set.
	Agent    Listen   `toml:"agent"`
	Tunnel   Listen   `toml:"tunnel"`
	Database Database `toml:"database"`
}

// Listen is a service's listeners, as host:port.
type Listen struct {
	Listen []string `toml:"listen"`
}

// MailListen is a service's listeners for mail, as host:port.
type MailListen struct {
	Listen []string `toml:"listen"`
	// TLSListen are those on which TLS begins with the first octet (RFC 8314 §3).
	TLSListen []string `toml:"tls_listen"`
}

func (l MailListen) isEmpty() bool { return len(l.Listen)+len(l.TLSListen) == 0 }

// HasInternal says whether mail from our networks has listeners of its own.
func (l *Local) HasInternal() bool { return !l.Internal.isEmpty() }

// Database says which PostgreSQL is used: a private instance (DSN empty) or any other.
type Database struct {
	// Bin is the directory of PostgreSQL's programs for a private instance; empty: Debian's newest.
	Bin string `toml:"bin"`
	// DSN is a connection string of libpq's kind, of one host or several; setting it turns the private instance off.
	DSN string `toml:"dsn"`
}

// ControlSocket is the daemon's HTTP door for its owner and root.
func (l *Local) ControlSocket() string { return filepath.Join(l.RunDir, "control.sock") }

// PostgresSocketDir is where the private instance listens.
func (l *Local) PostgresSocketDir() string { return filepath.Join(l.RunDir, "pg") }

// PostgresDataDir is the private instance's data directory.
func (l *Local) PostgresDataDir() string { return filepath.Join(l.StateDir, "pg") }

// PeerDir holds the sockets that lead to a peer's services: .s.PGSQL.5432 and control.sock.
func (l *Local) PeerDir(cid CID) string {
	return filepath.Join(l.RunDir, "peer", strconv.Itoa(int(cid)))
}

// PeerControlSocket leads to a peer's HTTP door.
func (l *Local) PeerControlSocket(cid CID) string {
	return filepath.Join(l.PeerDir(cid), "control.sock")
}

// SpoolDir holds queued mail.
func (l *Local) SpoolDir() string { return filepath.Join(l.StateDir, "spool") }

// KeyDir holds the node's key, certificates, identity and, on a node that made one, the CA's key.
func (l *Local) KeyDir() string { return filepath.Join(l.StateDir, "keys") }

// SnapshotFile keeps the last snapshot that compiled.
func (l *Local) SnapshotFile() string { return filepath.Join(l.StateDir, "snapshot.json") }

// SecretsFile keeps, sealed, what the mail path logs in with.
func (l *Local) SecretsFile() string { return filepath.Join(l.StateDir, "secrets.json") }

// LockFile is held by the one daemon of this node.
func (l *Local) LockFile() string { return filepath.Join(l.StateDir, "lock") }

// RunLockFile is held by the one daemon whose sockets are in the run directory.
func (l *Local) RunLockFile() string { return filepath.Join(l.RunDir, "lock") }

// Runs says whether a service runs here.
func (l *Local) Runs(service string) bool {
	for _, s := range l.Services {
		if s == service {
			return true
		}
	}
	return false
}

// Listeners are the listeners that are open here, as host:port, by the section of the node file: smtp, internal, web, agent, and where
// TLS begins with the first octet, "smtp tls", "internal tls".
func (l *Local) Listeners() map[string][]string {
	all := map[string][]string{}
	for _, s := range []struct {
		section string
		listen  []string
		runs    bool
	}{
		{"smtp", l.SMTP.Listen, l.Runs(ServiceSMTP)},
		{"smtp tls", l.SMTP.TLSListen, l.Runs(ServiceSMTP)},
		{"internal", l.Internal.Listen, l.Runs(ServiceSMTP)},
		{"internal tls", l.Internal.TLSListen, l.Runs(ServiceSMTP)},
		{"web", l.Web.Listen, l.Runs(ServiceWeb)},
		{"agent", l.Agent.Listen, true},
	} {
		if s.runs && len(s.listen) > 0 {
			all[s.section] = s.listen
		}
	}
	return all
}

// TunnelAddress is what config.Node.Address says of this node: its address with the port of its first tunnel listener.
func (l *Local) TunnelAddress() string {
	port := DefaultTunnelPort
	if len(l.Tunnel.Listen) > 0 {
		if _, p, err := net.SplitHostPort(l.Tunnel.Listen[0]); err == nil {
			port = p
		}
	}
	return net.JoinHostPort(l.Address, port)
}
