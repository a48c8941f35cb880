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

// eximSender sends all that it takes on to one host, again every second.
const eximSender = `primary_hostname = exim.test
exim_path = ` + eximBinary + `
spool_directory = %[1]s/spool
log_file_path = %[1]s/log/%%slog
pid_file_path = %[1]s/spool/pid
local_interfaces = 127.0.0.1
daemon_smtp_ports = %[2]s
acl_smtp_rcpt = all
host_lookup =
rfc1413_query_timeout = 0s
tls_advertise_hosts =
keep_environment =
begin acl
all:
  accept
begin routers
out:
  driver = manualroute
  transport = out
  route_list = * 127.0.0.1
  self = send
begin transports
out:
  driver = smtp
  port = %[3]s
begin retry
* * F,1h,1s
`

// StartEximTo starts an instance that sends everything on to next, host:port on 127.0.0.1.
func StartEximTo(t testing.TB, next string) *Exim {
	t.Helper()
	_, port, err := net.SplitHostPort(next)
	if err != nil {
		t.Fatal(err)
	}
	e := newExim(t)
	e.start(t, fmt.Sprintf(eximSender, e.dir, e.port(), port), "-q1s")
	return e
}

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
	e := newExim(t)
	e.start(t, fmt.Sprintf(eximConfig, e.dir, e.port(), rules.Main, rules.Rcpt, rules.Data, rules.Rest))
	return e
}

// newExim makes the directories of an instance.
func newExim(t testing.TB) *Exim {
	t.Helper()
	e := &Exim{Addr: FreeAddr(t), dir: folder(t)}
	const owner = "Debian-exim" // compiled in
	give(t, owner, filepath.Join(e.dir, "spool"))
	give(t, owner, filepath.Join(e.dir, "log"))
	return e
}

func (e *Exim) port() string {
	_, port, _ := net.SplitHostPort(e.Addr) // FreeAddr has one
	return port
}

func (e *Exim) start(t testing.TB, conf string, options ...string) {
	t.Helper()
	file := filepath.Join(e.dir, "conf")
	write(t, file, conf)
	Start(t, e.Addr, eximBinary, append([]string{"-C", file, "-bdf"}, options...)...)
}

// Log gives its main log.
func (e *Exim) Log() string {
	text, err := os.ReadFile(filepath.Join(e.dir, "log", "mainlog"))
	if err != nil {
		return err.Error()
	}
	return string(text)
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
