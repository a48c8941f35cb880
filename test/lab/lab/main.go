// Lab is hosts on this machine to try a cluster on, and to break it: see scripts/lab, which builds it.
package main

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"mailproxy/test/lab"
)

const usage = `lab: hosts on this machine with a real node each, and what happens to hosts

  lab up N [SIZE]      N hosts n1, n2, … as one cluster, n1 its master, each with a disk of SIZE (512m);
                       a DNS server; mail for example.test goes to a receiving MTA
  lab status           hosts and what is wrong with them by our doing; mail received; pmgcm status
  lab exec A CMD…      run a command on host A, "lab exec n1 pmgcm status"
  lab mail A [COUNT]   send messages to A for to@example.test, by Postfix's smtp-source
  lab log A            the log of A's daemon, for tail and less
  lab down             end all and remove it

  lab cut A [B…]       drop what A and B say to each other; without B: A and all other hosts
  lab slow A TIME      A's round trips take TIME longer, "200ms"; 0 ends it
  lab thin A RATE      A's line carries no more than RATE each way, "10mbit"; 0 ends it
  lab heal [A [B]]     end cut and slow: for all, for one host, or cut between two
  lab kill A           end all on A at once, as a power failure does
  lab start A          start A's daemon
  lab pause A          freeze A where it is
  lab resume A         let it go on
  lab skew A SECONDS   put A's clock forward or back from the right time, "+3600"; 0 puts it right
  lab snapshot A       copy A's database as it is now; up has made one too
  lab rollback A       kill A, put the last copy in place, start it
  lab disk-full A      leave nothing free on A's disk
  lab disk-free A      make room again

LAB_DIR is where it all is (/tmp/mailproxy-lab). Exit codes: 0 done, 1 failed, 2 usage; of exec, that of the command.
`

var errUsage = errors.New("usage")

func main() {
	if err := lab.Staged(); err != nil {
		fail(err)
	}
	dir := os.Getenv("LAB_DIR")
	if dir == "" {
		dir = "/tmp/mailproxy-lab"
	}
	if len(os.Args) < 2 || slices.Contains([]string{"help", "-h", "--help"}, os.Args[1]) {
		fmt.Print(usage)
		return
	}
	var err error
	if lab.Dir() == "" {
		err = outside(dir, os.Args[1], os.Args[2:])
	} else {
		err = inside(lab.Dir(), os.Args[1], os.Args[2:])
	}
	if err != nil {
		fail(err)
	}
}

func fail(err error) {
	exit, isExit := errors.AsType[*exec.ExitError](err)
	if isExit { // who ended has said why
		os.Exit(max(exit.ExitCode(), 1))
	}
	if errors.Is(err, errUsage) {
		fmt.Fprintf(os.Stderr, "lab: %v\nhint: \"lab help\" shows the verbs\n", err)
		os.Exit(2)
	}
	fmt.Fprintf(os.Stderr, "lab: %v\n", err)
	os.Exit(1)
}

func usagef(format string, args ...any) error {
	return fmt.Errorf("%s: %w", fmt.Sprintf(format, args...), errUsage)
}

// outside makes or ends the sandbox, or leads into it.
func outside(dir, verb string, args []string) error {
	if os.Geteuid() != 0 {
		return errors.New("it makes network namespaces: run it as root")
	}
	held, err := holder(dir)
	if err != nil {
		return err
	}
	switch {
	case verb == "down":
		return down(dir, held)
	case verb == "up" && held != 0:
		return fmt.Errorf("a lab is up in %s\nhint: \"lab down\" ends it", dir)
	case verb == "up":
		return up(dir, args)
	case !slices.Contains(verbs(), verb):
		return usagef("no verb %q", verb)
	case held == 0:
		return fmt.Errorf("no lab is up in %s\nhint: \"lab up 3\" makes one", dir)
	}
	return enter(held, dir, verb, args)
}

func pidFile(dir string) string { return filepath.Join(dir, "sandbox.pid") }

// holder gives the process that holds the sandbox of a directory; 0 where there is none.
func holder(dir string) (int, error) {
	b, err := os.ReadFile(pidFile(dir))
	if errors.Is(err, os.ErrNotExist) {
		return 0, nil
	}
	pid, convErr := strconv.Atoi(strings.TrimSpace(string(b)))
	if err = errors.Join(err, convErr); err != nil {
		return 0, err
	}
	arguments, err := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", pid))
	if err != nil || !strings.HasSuffix(string(arguments), "\x00"+dir+"\x00") {
		return 0, nil // it has ended, and the number may be another's
	}
	return pid, nil
}

// up makes the sandbox, and goes on in it. What fails is taken down again.
func up(dir string, args []string) error {
	if _, _, err := size(args); err != nil {
		return err
	}
	if err := os.RemoveAll(dir); err != nil { // of a lab that has ended
		return err
	}
	if err := os.Mkdir(dir, 0o755); err != nil {
		return err
	}
	pid, err := lab.Hold(dir)
	if err != nil {
		return err
	}
	err = os.WriteFile(pidFile(dir), fmt.Appendln(nil, pid), 0o644)
	if err == nil {
		err = enter(pid, dir, "up", args)
	}
	if err != nil {
		return errors.Join(err, down(dir, pid))
	}
	return nil
}

// size reads the arguments of up.
func size(args []string) (n int, disk string, err error) {
	disk = "512m"
	if len(args) < 1 || len(args) > 2 {
		return 0, "", usagef("up: want N [SIZE]")
	}
	if len(args) == 2 {
		disk = args[1]
	}
	n, err = strconv.Atoi(args[0])
	if err != nil || n < 1 || n > 100 {
		return 0, "", usagef("up: %q is no number of hosts from 1 to 100", args[0])
	}
	return n, disk, nil
}

func enter(pid int, dir, verb string, args []string) error {
	cmd, err := lab.Enter(pid, dir, append([]string{verb}, args...)...)
	if err != nil {
		return err
	}
	return cmd.Run()
}

// down ends the first process of the sandbox, and with that the kernel ends all in it.
func down(dir string, pid int) error {
	if pid != 0 {
		if err := syscall.Kill(pid, syscall.SIGKILL); err != nil {
			return err
		}
		if err := lab.Poll(func() error {
			if held, err := holder(dir); held != 0 || err != nil {
				return errors.Join(err, fmt.Errorf("process %d is there", pid))
			}
			return nil
		}); err != nil {
			return err
		}
	}
	return os.RemoveAll(dir)
}

// build is up in the sandbox.
func build(dir string, args []string) error {
	n, disk, err := size(args)
	if err != nil {
		return err
	}
	self, err := os.Executable()
	if err != nil {
		return err
	}
	l, err := lab.New(dir, filepath.Dir(self))
	if err != nil {
		return err
	}
	var hosts []*lab.Host
	for i := range n {
		id := fmt.Sprintf("n%d", i+1)
		h, err := l.Add(lab.HostOptions{ID: id, Name: id + "." + lab.Domain, Disk: disk})
		if err != nil {
			return err
		}
		hosts = append(hosts, h)
	}
	if err := l.Serve(); err != nil {
		return err
	}
	if err := lab.Form(hosts...); err != nil {
		return err
	}
	if _, err := hosts[0].Must("mailproxy", "domain", "add", lab.MailDomain, "--to", lab.Receiver); err != nil {
		return err
	}
	for _, h := range hosts {
		if err := lab.Poll(func() error { return h.SendMany(1, "up@"+lab.MailDomain) }); err != nil {
			return err
		}
		if err := h.Snapshot(); err != nil {
			return err
		}
	}
	fmt.Printf("%d hosts are up in %s: \"lab status\", \"lab exec n1 pmgcm status\"; \"lab help\" says what can happen to them\n", n, dir)
	return nil
}

// oneAtATime lets no other verb that changes something run meanwhile.
func oneAtATime(dir string) error {
	f, err := os.OpenFile(filepath.Join(dir, "verb.lock"), os.O_CREATE|os.O_RDWR, 0o644)
	if err != nil {
		return err
	}
	return syscall.Flock(int(f.Fd()), syscall.LOCK_EX) // until we end
}

// A verb is done in the sandbox, to one host where it wants one.
type verb struct {
	name string
	host func(l *lab.Lab, h *lab.Host, args []string) error
	all  func(l *lab.Lab, args []string) error
	// args is how many arguments there may be behind the host; -1 any.
	least, most int
	// looks says that nothing is changed.
	looks bool
}

func plain(name string, do func(h *lab.Host) error) verb {
	return verb{name: name, host: func(_ *lab.Lab, h *lab.Host, _ []string) error { return do(h) }}
}

func table() []verb {
	return []verb{
		{name: "status", all: status, looks: true},
		{name: "heal", all: heal, most: 2},
		{name: "exec", host: execute, least: 1, most: -1, looks: true},
		{name: "log", host: func(_ *lab.Lab, h *lab.Host, _ []string) error { fmt.Println(h.LogFile()); return nil }, looks: true},
		{name: "mail", host: mail, most: 1, looks: true},
		{name: "cut", host: cut, most: -1},
		{name: "slow", host: slow, least: 1, most: 1},
		{name: "thin", host: thin, least: 1, most: 1},
		{name: "skew", host: skew, least: 1, most: 1},
		plain("kill", (*lab.Host).Kill),
		plain("start", (*lab.Host).Start),
		plain("pause", (*lab.Host).Pause),
		plain("resume", (*lab.Host).Resume),
		plain("snapshot", (*lab.Host).Snapshot),
		plain("rollback", (*lab.Host).Rollback),
		plain("disk-full", (*lab.Host).FillDisk),
		plain("disk-free", (*lab.Host).FreeDisk),
	}
}

func verbs() []string {
	var names []string
	for _, v := range table() {
		names = append(names, v.name)
	}
	return names
}

func inside(dir, name string, args []string) error {
	if name == "up" {
		return build(dir, args)
	}
	i := slices.IndexFunc(table(), func(v verb) bool { return v.name == name })
	v := table()[i] // outside has looked
	if !v.looks {
		if err := oneAtATime(dir); err != nil {
			return err
		}
	}
	l, err := lab.Open(dir)
	if err != nil {
		return err
	}
	var h *lab.Host
	if v.host != nil {
		if len(args) == 0 {
			return usagef("%s: which host?", name)
		}
		if h, err = l.Host(args[0]); err != nil {
			return err
		}
		args = args[1:]
	}
	if len(args) < v.least || v.most >= 0 && len(args) > v.most {
		return usagef("%s: %d arguments are too few or too many", name, len(args))
	}
	if v.host == nil {
		return v.all(l, args)
	}
	return v.host(l, h, args)
}

func execute(_ *lab.Lab, h *lab.Host, args []string) error {
	cmd := h.Command(args[0], args[1:]...)
	cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
	return cmd.Run()
}

func mail(_ *lab.Lab, h *lab.Host, args []string) error {
	count := 1
	if len(args) > 0 {
		var err error
		if count, err = strconv.Atoi(args[0]); err != nil || count < 1 {
			return usagef("mail: %q is no number of messages", args[0])
		}
	}
	return h.SendMany(count, "to@"+lab.MailDomain)
}

func cut(l *lab.Lab, h *lab.Host, args []string) error {
	if len(args) == 0 {
		return l.Isolate(h)
	}
	others, err := named(l, args)
	for _, other := range others {
		err = errors.Join(err, l.Cut(h, other))
	}
	return err
}

func named(l *lab.Lab, ids []string) ([]*lab.Host, error) {
	var hosts []*lab.Host
	for _, id := range ids {
		h, err := l.Host(id)
		if err != nil {
			return nil, err
		}
		hosts = append(hosts, h)
	}
	return hosts, nil
}

func heal(l *lab.Lab, args []string) error {
	hosts, err := named(l, args)
	if err != nil {
		return err
	}
	switch len(hosts) {
	case 0:
		return l.Heal()
	case 2:
		return l.Join(hosts[0], hosts[1])
	}
	err = errors.Join(l.Rejoin(hosts[0]), hosts[0].Slow(0))
	for _, other := range l.Hosts() {
		if other != hosts[0] {
			err = errors.Join(err, l.Join(hosts[0], other))
		}
	}
	return err
}

func slow(_ *lab.Lab, h *lab.Host, args []string) error {
	d, err := time.ParseDuration(args[0])
	if err != nil || d < 0 {
		return usagef("slow: %q is no time like 200ms", args[0])
	}
	return h.Slow(d)
}

func thin(_ *lab.Lab, h *lab.Host, args []string) error {
	if args[0] == "0" {
		return h.Thin("")
	}
	return h.Thin(args[0])
}

func skew(_ *lab.Lab, h *lab.Host, args []string) error {
	seconds, err := strconv.ParseInt(args[0], 10, 32)
	if err != nil {
		return usagef("skew: %q is no number of seconds like +3600", args[0])
	}
	return h.SetSkew(time.Duration(seconds) * time.Second)
}
