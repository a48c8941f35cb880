package main

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"os"
	"os/user"
	"path/filepath"
	"strconv"

	"github.com/urfave/cli/v2"

	"mailproxy/config"
	"mailproxy/db"
	"mailproxy/internal/durable"
)

func initCommand() *cli.Command {
	d := config.DefaultLocal()
	return &cli.Command{
		Name: "init", Usage: "write this node's own file",
		Description: "Writes the file that --config names, with comments, and checks what can be checked: names, addresses, directories, " +
			"the user, PostgreSQL's programs. It overwrites nothing. To be run as root, once.",
		Flags: []cli.Flag{
			&cli.StringFlag{Name: "name", Usage: "host `NAME` of the node, as EHLO shows it (default: that of the host)"},
			&cli.StringFlag{Name: "address", Usage: "where other nodes reach this one: `IP` or host name (default: the host's first)"},
			&cli.StringFlag{Name: "state-dir", Usage: "`DIR` for what must not be lost", Value: d.StateDir},
			&cli.StringFlag{Name: "run-dir", Usage: "`DIR` for sockets", Value: d.RunDir},
			&cli.StringSliceFlag{Name: "smtp-listen", Usage: "`HOST:PORT` to take mail from the Internet on", Value: cli.NewStringSlice(d.SMTP.Listen...)},
			&cli.StringSliceFlag{Name: "internal-listen", Usage: "`HOST:PORT` to take mail from our networks on (default: \"" + defaultInternal +
				"\"; with --smtp-listen alone, that takes both)"},
			&cli.StringSliceFlag{Name: "web-listen", Usage: "`HOST:PORT` of /health and /metrics", Value: cli.NewStringSlice(d.Web.Listen...)},
			&cli.StringSliceFlag{Name: "agent-listen", Usage: "`HOST:PORT` for HAProxy's agent-check (default: none)"},
			&cli.StringSliceFlag{Name: "tunnel-listen", Usage: "`HOST:PORT` for the other nodes", Value: cli.NewStringSlice(d.Tunnel.Listen...)},
			&cli.StringFlag{Name: "user", Usage: "`USER` that the daemon becomes", Value: d.User},
			&cli.StringSliceFlag{Name: "services", Usage: "what runs here: `smtp,web`", Value: cli.NewStringSlice(d.Services...)},
			&cli.StringFlag{Name: "dsn", Usage: "connection `STRING` of a PostgreSQL of your own, in place of a private instance"},
			&cli.StringFlag{Name: "postgres-bin", Usage: "`DIR` of PostgreSQL's programs (default: Debian's newest)"},
		},
		Action: initNode,
	}
}

// defaultInternal is the port for mail from our networks, beside 25.
const defaultInternal = ":26"

func initNode(c *cli.Context) error {
	if _, err := arguments(c, 0, 0); err != nil {
		return err
	}
	file := configFile(c)
	if _, err := os.Lstat(file); err == nil {
		return withHint(fmt.Errorf("%s is there already, nothing was changed", file), "edit it, or name another with --config")
	} else if !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	local, err := localFromFlags(c)
	if err != nil {
		return err
	}
	if local, err = config.ParseLocal(local.Text()); err != nil {
		return flagProblems(err)
	}
	if err := checkHost(local); err != nil {
		return err
	}
	if err := os.MkdirAll(filepath.Dir(file), 0o755); err != nil {
		return err
	}
	if err := writeNodeFile(file, local.Text(), local.User); err != nil {
		return fmt.Errorf("write node file: %w", err)
	}
	printInit(c.App.Writer, file)
	return nil
}

func printInit(w io.Writer, file string) {
	option := ""
	if file != config.DefaultFile {
		option = " --config " + file
	}
	_, _ = fmt.Fprintf(w, "%s written\n", file)
	_, _ = fmt.Fprintf(w, "next: start the daemon, \"systemctl enable --now mailproxy\" or \"mailproxy%s serve\";\n", option)
	_, _ = fmt.Fprintf(w, "then \"pmgcm%s create\" for a new cluster, or \"pmgcm%s join MASTER_IP\" to enter one\n", option, option)
}

func localFromFlags(c *cli.Context) (*config.Local, error) {
	l := &config.Local{
		Name: c.String("name"), Address: c.String("address"), User: c.String("user"),
		StateDir: c.String("state-dir"), RunDir: c.String("run-dir"), Services: c.StringSlice("services"),
		SMTP:     config.MailListen{Listen: c.StringSlice("smtp-listen")},
		Internal: config.MailListen{Listen: c.StringSlice("internal-listen")},
		Web:      config.Listen{Listen: c.StringSlice("web-listen")},
		Agent:    config.Listen{Listen: c.StringSlice("agent-listen")},
		Tunnel:   config.Listen{Listen: c.StringSlice("tunnel-listen")},
		Database: config.Database{DSN: c.String("dsn"), Bin: c.String("postgres-bin")},
	}
	if !c.IsSet("internal-listen") && !c.IsSet("smtp-listen") {
		l.Internal.Listen = []string{defaultInternal}
	}
	if l.Name == "" {
		l.Name = hostName()
	}
	if l.Address == "" {
		address, err := firstAddress()
		if err != nil {
			return nil, err
		}
		l.Address = address
	}
	return l, nil
}

// firstAddress gives the first global address of the host.
func firstAddress() (string, error) {
	addrs, err := net.InterfaceAddrs()
	if err != nil {
		return "", err
	}
	for _, a := range addrs {
		if ip, ok := a.(*net.IPNet); ok && ip.IP.IsGlobalUnicast() {
			return ip.IP.String(), nil
		}
	}
	return "", usagef("init: --address is missing: this host has none but its loopback")
}

// flagProblems gives a node file's problems without the lines of a text that was not written.
func flagProblems(err error) error {
	var all []error
	for _, p := range config.Problems(err) {
		all = append(all, &config.Problem{Object: p.Object, Reason: p.Reason})
	}
	if all == nil {
		return err
	}
	return errors.Join(all...)
}

// checkHost checks what the host must have for this node file.
func checkHost(l *config.Local) error {
	var who *account
	if l.User != "" {
		var err error
		if who, err = accountOf(l); err != nil {
			return err
		}
		if err := checkUnprivileged(l, who); err != nil {
			return err
		}
	}
	for _, dir := range []string{l.StateDir, l.RunDir} {
		if err := checkDir(dir); err != nil {
			return err
		}
		if who == nil || os.Geteuid() != 0 {
			continue // nobody else's rights can be told
		}
		if err := who.checkEnter(dir); err != nil {
			return err
		}
	}
	if err := checkLocks(l); err != nil {
		return err
	}
	if l.Database.DSN != "" {
		d, err := db.Open(db.Options{DSN: l.Database.DSN})
		if err != nil {
			return fmt.Errorf("dsn: %w", err)
		}
		d.Close()
		return nil
	}
	_, _, err := db.FindPostgres(l.Database.Bin)
	return err
}

// checkDir: the directory is one that we may write in, or can be made.
func checkDir(dir string) error {
	info, err := os.Stat(dir)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return checkParent(dir)
	case err != nil:
		return err
	case !info.IsDir():
		return fmt.Errorf("%s: is not a directory", dir)
	}
	return tryWrite(dir)
}

func checkParent(dir string) error {
	for parent := filepath.Dir(dir); ; parent = filepath.Dir(parent) {
		info, err := os.Stat(parent)
		switch {
		case errors.Is(err, fs.ErrNotExist) && parent != "/":
			continue
		case err != nil:
			return err
		case !info.IsDir():
			return fmt.Errorf("%s: cannot be made: %s is not a directory", dir, parent)
		}
		if err := tryWrite(parent); err != nil {
			return fmt.Errorf("%s: cannot be made: %w", dir, err)
		}
		return nil
	}
}

func tryWrite(dir string) error {
	f, err := os.CreateTemp(dir, ".mailproxy-*")
	if err != nil {
		return fmt.Errorf("%s: cannot be written: %w", dir, errors.Unwrap(err))
	}
	_ = f.Close()
	return os.Remove(f.Name())
}

// writeNodeFile: it may hold a password, so it is for root and the daemon's group alone.
func writeNodeFile(file string, text []byte, owner string) error {
	if err := durable.WriteFile(file, text, 0o640); err != nil {
		return err
	}
	if os.Geteuid() != 0 || owner == "" {
		return nil
	}
	u, err := user.Lookup(owner)
	if err != nil {
		return err
	}
	gid, err := strconv.Atoi(u.Gid)
	if err != nil {
		return err
	}
	return os.Chown(file, 0, gid)
}
