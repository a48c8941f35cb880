package lab

import (
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
)

// Names that the DNS server of a lab knows, besides those of the hosts.
const (
	// Domain is the lab's own; the host n1 of a node n1.lab.test has an address there.
	Domain = "lab.test"
	// MailDomain has the receiving MTA as its MX.
	MailDomain = "example.test"
	// Receiver is the receiving MTA.
	Receiver = "receiver." + Domain
)

// Serve starts Debian's unbound, which knows the hosts that are there, and Postfix's smtp-sink as a receiving MTA on port 25. Both
// are the hub's.
func (l *Lab) Serve() error {
	records := []string{fmt.Sprintf("%s. A %s", Receiver, HubAddress), fmt.Sprintf("%s. MX 10 %s.", MailDomain, Receiver)}
	for _, h := range l.Hosts() {
		records = append(records, fmt.Sprintf("%s. A %s", h.Name, h.Address))
	}
	if _, err := l.ServeDNS(records...); err != nil {
		return err
	}
	mail := l.MailDir()
	if err := os.MkdirAll(mail, 0o777); err != nil {
		return err
	}
	if err := os.Chmod(mail, 0o777); err != nil { // smtp-sink becomes nobody
		return err
	}
	return l.serve("receiver", HubAddress+":25", "smtp-sink", "-u", User, "-h", Receiver, "-d", mail+"/%H%M%S.", HubAddress+":25", "100")
}

// MailDir is where the receiving MTA keeps each message in a file, with its envelope in X- fields.
func (l *Lab) MailDir() string { return filepath.Join(l.dir, "mail") }

// ServeDNS starts Debian's unbound at the hub, which is what every program in the sandbox asks. It knows these records, as a zone file has
// them with whole names, and no other host.
func (l *Lab) ServeDNS(records ...string) (stop func(), err error) {
	conf := filepath.Join(l.dir, "unbound.conf")
	if err := os.WriteFile(conf, []byte(l.zones(records)), 0o644); err != nil {
		return nil, err
	}
	// It goes down on what it cannot read, so that nothing of the machine's own is read.
	if err := l.serve("dns", HubAddress+":53", "unbound", "-d", "-c", conf); err != nil {
		return nil, err
	}
	l.mu.Lock()
	pid := l.state.Servers["dns"]
	l.mu.Unlock()
	return func() { _ = syscall.Kill(pid, syscall.SIGKILL) }, nil // it may have ended
}

// zones is what unbound serves.
func (l *Lab) zones(records []string) string {
	var b strings.Builder
	fmt.Fprintf(&b, "server:\n  interface: %s\n  access-control: 0.0.0.0/0 allow\n  do-daemonize: no\n  username: \"\"\n  chroot: \"\"\n"+
		"  pidfile: \"\"\n  directory: %q\n  use-syslog: no\n  logfile: \"\"\n  module-config: \"iterator\"\n", HubAddress, l.dir)
	b.WriteString("  local-zone: \".\" static\n")
	for _, r := range records {
		fmt.Fprintf(&b, "  local-data: %q\n", r)
	}
	b.WriteString("remote-control:\n  control-enable: no\n")
	return b.String()
}

// serve starts a server of the hub and waits until it listens.
func (l *Lab) serve(name, address, program string, args ...string) error {
	log, err := os.Create(filepath.Join(l.dir, name+".log"))
	if err != nil {
		return err
	}
	defer log.Close()
	cmd := exec.Command(program, args...)
	cmd.Stdout, cmd.Stderr, cmd.SysProcAttr = log, log, &syscall.SysProcAttr{Setsid: true}
	if err := cmd.Start(); err != nil {
		return err
	}
	go func() { _ = cmd.Wait() }() // ends with the sandbox, or fails to listen
	if err := l.change(func() { l.state.Servers[name] = cmd.Process.Pid }); err != nil {
		return err
	}
	return Poll(func() error {
		c, err := net.Dial("tcp", address)
		if err == nil {
			_ = c.Close()
		} else if !alive(cmd.Process.Pid) {
			said, _ := os.ReadFile(log.Name())
			return fmt.Errorf("%s has ended: %s", program, said)
		}
		return err
	})
}

// SendMany sends messages to a host by Postfix's smtp-source; the error says what was answered to one that was not taken.
func (h *Host) SendMany(count int, to string) error {
	return command("smtp-source", "-c", "-s", strconv.Itoa(min(count, 5)), "-m", strconv.Itoa(count), "-l", "2000", "-f", "from@client.test", "-t", to,
		"inet:"+net.JoinHostPort(h.Address, SMTPPort))
}
