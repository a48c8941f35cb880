package mta

import (
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

// A Postfix is a private instance.
type Postfix struct {
	// Addr is where it listens.
	Addr string
	dir  string
}

// postfixMain is main.cf: no lookups, no TLS, no flow delay, addresses as they come.
const postfixMain = `compatibility_level = 3.6
command_directory = %[2]s
daemon_directory = %[3]s
queue_directory = %[1]s/queue
data_directory = %[1]s/data
maillog_file_prefixes = %[1]s
maillog_file = %[1]s/log
mail_owner = postfix
setgid_group = postdrop
myhostname = postfix.test
mydestination =
local_recipient_maps =
alias_maps =
alias_database =
inet_interfaces = 127.0.0.1
inet_protocols = ipv4
mynetworks = 127.0.0.0/8
smtpd_relay_restrictions = permit_mynetworks, reject
smtpd_peername_lookup = no
smtp_host_lookup = native
smtpd_tls_security_level = none
smtp_tls_security_level = none
smtputf8_enable = yes
allow_percent_hack = no
swap_bangpath = no
allow_min_user = yes
append_dot_mydomain = no
in_flow_delay = 0
notify_classes =
relayhost = [%[4]s]:%[5]s
`

const postfixMaster = `%s inet n - n - - smtpd
pickup unix n - n 60 1 pickup
cleanup unix n - n - 0 cleanup
qmgr unix n - n 300 1 qmgr
rewrite unix - - n - - trivial-rewrite
bounce unix - - n - 0 bounce
defer unix - - n - 0 bounce
trace unix - - n - 0 bounce
verify unix - - n - 1 verify
flush unix n - n 1000? 0 flush
proxymap unix - - n - - proxymap
smtp unix - - n - - smtp
relay unix - - n - - smtp
error unix - - n - - error
retry unix - - n - - error
anvil unix - - n - 1 anvil
scache unix - - n - 1 scache
showq unix n - n - - showq
tlsmgr unix - - n 1000? 1 tlsmgr
postlog unix-dgram n - n - 1 postlogd
`

// PostfixFiles gives main.cf and master.cf, by their names, of an instance in dir that listens at addr, takes mail for anybody and relays
// all of it to next; both are host:port. settings are further lines of main.cf.
func PostfixFiles(dir, addr, next string, settings ...string) (map[string]string, error) {
	host, port, err := net.SplitHostPort(next)
	if err != nil {
		return nil, err
	}
	own, err := exec.Command("postconf", "-d", "-h", "command_directory", "daemon_directory").Output()
	dirs := strings.Fields(string(own))
	if err != nil {
		return nil, fmt.Errorf("postconf: %w", err)
	}
	if len(dirs) != 2 {
		return nil, fmt.Errorf("directories of Postfix: %q, want two", own)
	}
	main := without(fmt.Sprintf(postfixMain, dir, dirs[0], dirs[1], host, port), settings) + strings.Join(settings, "\n") + "\n"
	return map[string]string{"main.cf": main, "master.cf": fmt.Sprintf(postfixMaster, addr)}, nil
}

// without leaves out the lines of main.cf that settings replace. Each process warns of one that stands there twice, and postlogd waits for
// itself when what it would log of that does not fit into its own socket.
func without(main string, settings []string) string {
	replaced := make(map[string]bool)
	for line := range strings.Lines(strings.Join(settings, "\n")) {
		replaced[nameOf(line)] = true
	}
	var b strings.Builder
	for line := range strings.Lines(main) {
		if !replaced[nameOf(line)] {
			b.WriteString(line)
		}
	}
	return b.String()
}

// nameOf gives the name of a line of main.cf, which is a setting.
func nameOf(line string) string {
	name, _, _ := strings.Cut(line, "=")
	return strings.TrimSpace(name)
}

// StartPostfix starts an instance that takes mail for anybody and relays all of it to next, host:port. settings are further lines of
// main.cf.
func StartPostfix(t testing.TB, next string, settings ...string) *Postfix {
	t.Helper()
	p := &Postfix{Addr: FreeAddr(t), dir: folder(t)}
	give(t, "postfix", filepath.Join(p.dir, "data"))
	give(t, "root", filepath.Join(p.dir, "queue"))
	give(t, "root", p.etc())
	files, err := PostfixFiles(p.dir, p.Addr, next, settings...)
	if err != nil {
		t.Fatalf("%v: run scripts/deps test", err)
	}
	for name, text := range files {
		write(t, filepath.Join(p.etc(), name), text)
	}
	run(t, "postfix", "-c", p.etc(), "start")
	t.Cleanup(func() { run(t, "postfix", "-c", p.etc(), "stop") })
	await(t, p.Addr, filepath.Join(p.dir, "log"))
	return p
}

func (p *Postfix) etc() string { return filepath.Join(p.dir, "etc") }

// AwaitEmpty waits until nothing is left in any of its queues.
func (p *Postfix) AwaitEmpty(t testing.TB) {
	t.Helper()
	Until(t, func() error {
		n := 0
		for _, q := range []string{"maildrop", "incoming", "active", "deferred", "hold", "corrupt"} {
			err := filepath.WalkDir(filepath.Join(p.dir, "queue", q), func(_ string, d fs.DirEntry, err error) error {
				if err == nil && d.Type().IsRegular() {
					n++
				}
				if errors.Is(err, fs.ErrNotExist) {
					return nil // it went on to another queue while we looked
				}
				return err
			})
			if err != nil {
				return err
			}
		}
		if n > 0 {
			return fmt.Errorf("postfix: %d messages are left", n)
		}
		return nil
	})
}

// Log gives the end of its log.
func (p *Postfix) Log() string {
	text := p.WholeLog()
	return text[max(0, len(text)-4000):]
}

// WholeLog gives its log.
func (p *Postfix) WholeLog() string {
	text, err := os.ReadFile(filepath.Join(p.dir, "log"))
	if err != nil {
		return err.Error()
	}
	return string(text)
}
