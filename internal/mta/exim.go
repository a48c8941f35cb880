package mta

import (
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// eximBinary is where scripts/deps unpacks it.
const eximBinary = "/usr/local/lib/mailproxy-test/exim4-daemon-light/usr/sbin/exim4"

const eximConfig = `primary_hostname = exim.test
spool_directory = %[1]s/spool
log_file_path = %[1]s/log/%%slog
pid_file_path = %[1]s/spool/pid
local_interfaces = 127.0.0.1
daemon_smtp_ports = %[2]s
acl_smtp_rcpt = all
acl_smtp_data = data
host_lookup =
rfc1413_query_timeout = 0s
smtputf8_advertise_hosts = *
keep_environment =
queue_only
%[3]s
begin acl
all:
%[4]s
  accept
data:
%[5]s
  accept
%[6]s
`

// EximRules are what an instance does besides taking everything: Main are options, Rcpt and Data statements of the ACLs, Rest further
// sections.
type EximRules struct {
	Main, Rcpt, Data, Rest string
}

// An Exim is a private instance that takes mail for anybody and keeps it in its spool.
type Exim struct {
	// Addr is where it listens.
	Addr string
	dir  string
}

// StartExim starts an instance.
func StartExim(t testing.TB) *Exim {
	return StartEximWith(t, EximRules{Main: "tls_advertise_hosts ="})
}

// StartEximWith starts an instance with rules.
func StartEximWith(t testing.TB, rules EximRules) *Exim {
	t.Helper()
	e := &Exim{Addr: FreeAddr(t), dir: folder(t)}
	const owner = "Debian-exim" // compiled in
	give(t, owner, filepath.Join(e.dir, "spool"))
	give(t, owner, filepath.Join(e.dir, "log"))
	_, port, err := net.SplitHostPort(e.Addr)
	if err != nil {
		t.Fatal(err)
	}
	conf := filepath.Join(e.dir, "conf")
	write(t, conf, fmt.Sprintf(eximConfig, e.dir, port, rules.Main, rules.Rcpt, rules.Data, rules.Rest))
	Start(t, e.Addr, eximBinary, "-C", conf, "-bdf")
	return e
}

// A Kept is a message in Exim's spool.
type Kept struct {
	// From is its envelope's sender, without brackets.
	From string
	// Header is its -H file: envelope and header. Body is what stands behind the header, with LF line ends.
	Header, Body string
}

// Messages gives what it has taken.
func (e *Exim) Messages(t testing.TB) (all []Kept) {
	t.Helper()
	heads, err := filepath.Glob(filepath.Join(e.dir, "spool", "input", "*-H"))
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range heads {
		head, err := os.ReadFile(name)
		if err != nil {
			t.Fatal(err)
		}
		body, err := os.ReadFile(strings.TrimSuffix(name, "-H") + "-D")
		if err != nil {
			t.Fatal(err)
		}
		// The first line of either is its own name; the third of -H is the sender.
		_, text, _ := strings.Cut(string(body), "\n")
		lines := strings.SplitN(string(head), "\n", 4)
		all = append(all, Kept{From: strings.Trim(lines[2], "<>"), Header: string(head), Body: text})
	}
	return all
}
