package main

import (
	"cmp"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"slices"
	"strings"
	"text/template"
	"time"

	"github.com/rs/zerolog"
	"github.com/urfave/cli/v2"

	"mailproxy/cluster"
	"mailproxy/config"
	"mailproxy/db"
	"mailproxy/internal/version"
	"mailproxy/web"
)

func lbCommand() *cli.Command {
	backup := func() cli.Flag {
		return &cli.StringSliceFlag{Name: "backup", Usage: "`NODE`, by its name or CID, that gets mail only while none of the others can be reached"}
	}
	return &cli.Command{
		Name: "lb", Usage: "files for load balancers in front of the nodes",
		Description: "Each prints a whole file for the nodes that there are now, with their ports, which begins with where to put it. When nodes were " +
			"added or deleted, or their addresses or ports are others, print it anew. Where one of the nodes does not answer, it is taken to have this node's ports.",
		Subcommands: []*cli.Command{
			{Name: "haproxy", Usage: "print a haproxy.cfg", Flags: []cli.Flag{backup()}, Action: lbHAProxy,
				Description: "Mail goes to the node with the fewest connections for its weight, with the client's address in a PROXY header. Nodes with " +
					"an [agent] listener say themselves that they are drained or unfit, and how loaded they are; the others are asked for their SMTP greeting alone."},
			{Name: "nginx", Usage: "print a file for nginx with its stream module", Flags: []cli.Flag{backup()}, Action: lbNginx,
				Description: "nginx asks no node how it is: it goes on to the next one where a connection fails, and a drained node is out when the file is printed anew."},
			{Name: "keepalived", Usage: "print a keepalived.conf for this node", Action: lbKeepalived,
				Flags: []cli.Flag{
					&cli.StringSliceFlag{Name: "vip", Usage: "`ADDRESS[/PREFIX]` that moves to a node which takes mail; several are spread over the nodes"},
					&cli.StringFlag{Name: "interface", Usage: "`NAME` of the network interface (default: the one with this node's address)"},
					&cli.IntFlag{Name: "router-id", Usage: "virtual router `ID` of the first address, 1 to 255: no other on that network may have it", Value: 51},
				},
				Description: "For addresses that move between the nodes by VRRP, without a balancer. Run it on every node: each has a file of its own. " +
					"Example: mailproxy lb keepalived --vip 192.0.2.10/24"},
			{Name: "check", Usage: "say whether this node takes mail", Action: lbCheck,
				Description: "For keepalived and other balancers' scripts. Prints one line, and ends with 0 where it does, or with 1: where the node is drained, unfit or down."},
		},
	}
}

// An lbCluster is what the files are made from.
type lbCluster struct {
	self     config.CID
	By       string // this node's name
	Made     string // when
	Nodes    []lbNode
	Doors    []lbDoor
	Sessions int           // most that all nodes together take
	Idle     time.Duration // how long a session may be silent, at most
	// Unlisted are nodes that have no door for balancers' questions.
	Unlisted []string
	// Unseen are nodes that did not answer.
	Unseen []string
	Drain  []string // nodes that are drained
}

// An lbNode is a member.
type lbNode struct {
	cid       config.CID
	Name      string
	host      string // where it is reached
	services  []string
	listeners map[string][]string
	drained   bool
	backup    bool
}

// An lbDoor is one port of the balancer, and the servers behind it.
type lbDoor struct {
	// Name is mx, mx_tls, internal, internal_tls or web.
	Name    string
	Port    string
	Servers []lbServer
	// Closed are nodes whose door there is for their own host alone.
	Closed []string
}

// Mail says whether it is one for mail, TLS whether that begins with TLS.
func (d lbDoor) Mail() bool { return d.Name != "web" }

// TLS is described with Mail.
func (d lbDoor) TLS() bool { return strings.HasSuffix(d.Name, "_tls") }

// An lbServer is a node behind a door.
type lbServer struct {
	Name    string
	Address string // host:port
	Agent   string // port of its agent listener; empty: it has none
	Drained bool
	Backup  bool
}

// lbDoors are the balancer's ports, by the section of the node file that they lead to.
var lbDoors = []struct{ name, section, service string }{
	{"mx", "smtp", config.ServiceSMTP},
	{"mx_tls", "smtp tls", config.ServiceSMTP},
	{"internal", "internal", config.ServiceSMTP},
	{"internal_tls", "internal tls", config.ServiceSMTP},
	{"web", "web", config.ServiceWeb},
}

// withCluster gathers what the nodes say of themselves and runs do with it.
func withCluster(c *cli.Context, do func(local *config.Local, l *lbCluster) error) error {
	if _, err := arguments(c, 0, 0); err != nil {
		return err
	}
	local, err := config.LoadLocal(configFile(c))
	if err != nil {
		return noNodeFile(err)
	}
	if _, err := web.Control(local.ControlSocket()).Health(c.Context); err != nil { // without the daemon nothing is known of the others
		return err
	}
	d, err := db.Open(db.Options{DSN: databaseDSN(local), NodeKey: nodeKey(local), Log: zerolog.Nop()})
	if err != nil {
		return err
	}
	defer d.Close()
	o := &cluster.Operator{Local: local, DB: d, Version: version.Version}
	report, err := o.Status(c.Context, cluster.StatusParams{})
	if err != nil && !errors.Is(err, cluster.ErrNoCluster) {
		return err
	}
	snapshot, err := config.LoadSnapshot(local.SnapshotFile())
	if err != nil {
		return fmt.Errorf("%w: %w", errNoConfiguration, err)
	}
	l := &lbCluster{self: report.Asked, By: local.Name, Made: time.Now().UTC().Format("2006-01-02 15:04 UTC")}
	if err := l.members(local, report, snapshot); err != nil {
		return err
	}
	if err := l.markBackups(c.StringSlice("backup")); err != nil {
		return err
	}
	l.open()
	values, _ := snapshot.Values() // what is out of bounds has its default
	l.bounds(values)
	return do(local, l)
}

// bounds notes what the nodes' settings mean for who is in front of them.
func (l *lbCluster) bounds(v config.Values) {
	l.Idle = v.IdleTimeout
	for _, n := range l.Nodes {
		if slices.Contains(n.services, config.ServiceSMTP) {
			l.Sessions += v.MaxSessions + v.Internal.MaxSessions
		}
	}
}

// errNoConfiguration is what a command says that finds no configuration on this node.
var errNoConfiguration = errors.New("this node has no configuration yet")

// members are the nodes of a report. Of one that does not answer, the configuration says what runs there.
func (l *lbCluster) members(local *config.Local, report cluster.Report, snapshot *config.Snapshot) error {
	for _, row := range report.Rows {
		n := lbNode{cid: row.CID, services: row.Services, listeners: row.Listeners, drained: row.Draining != nil}
		var err error
		if n.Name, err = config.NodeName(row.Name); err == nil {
			n.host, err = nodeHost(row.Address)
		}
		if err != nil {
			return fmt.Errorf("node %d: %w", row.CID, err)
		}
		if row.Error != "" || n.listeners == nil {
			l.Unseen = append(l.Unseen, n.Name)
			n.listeners = local.Listeners()
			if i := slices.IndexFunc(snapshot.Nodes, func(m config.Node) bool { return m.CID == row.CID }); i >= 0 {
				n.services = snapshot.Nodes[i].Services
			}
		}
		if n.drained {
			l.Drain = append(l.Drain, n.Name)
		}
		l.Nodes = append(l.Nodes, n)
	}
	return nil
}

// nodeHost is the host of a tunnel's address.
func nodeHost(address string) (string, error) {
	host, _, err := net.SplitHostPort(address)
	if err != nil {
		return "", err
	}
	return config.NodeAddress(host)
}

func (l *lbCluster) markBackups(names []string) error {
	for _, name := range names {
		i := slices.IndexFunc(l.Nodes, func(n lbNode) bool { return n.Name == strings.ToLower(name) || fmt.Sprint(n.cid) == name })
		if i < 0 {
			return withHint(fmt.Errorf("--backup %s: %w", name, cluster.ErrNoSuchNode), "pmgcm status")
		}
		l.Nodes[i].backup = true
	}
	if !slices.ContainsFunc(l.Nodes, func(n lbNode) bool { return !n.backup }) {
		return usagef("--backup: all nodes are named: leave one out")
	}
	return nil
}

// open makes the doors.
func (l *lbCluster) open() {
	for _, n := range l.Nodes {
		if slices.Contains(n.services, config.ServiceSMTP) && len(n.listeners["agent"]) == 0 {
			l.Unlisted = append(l.Unlisted, n.Name)
		}
	}
	for _, kind := range lbDoors {
		d := lbDoor{Name: kind.name}
		for _, n := range l.Nodes {
			if !slices.Contains(n.services, kind.service) || len(n.listeners[kind.section]) == 0 {
				continue
			}
			address, port := n.reach(kind.section)
			if address == "" {
				d.Closed = append(d.Closed, n.Name)
				continue
			}
			d.Port = cmp.Or(d.Port, port)
			_, agent := n.reach("agent")
			d.Servers = append(d.Servers, lbServer{Name: n.Name, Address: address, Agent: agent, Drained: n.drained, Backup: n.backup})
		}
		if !slices.ContainsFunc(d.Servers, func(s lbServer) bool { return !s.Backup }) { // there is nobody here that they stand behind
			for i := range d.Servers {
				d.Servers[i].Backup = false
			}
		}
		l.Doors = append(l.Doors, d)
	}
}

// reach gives the address of the first listener of a section that other hosts reach, and its port; empty where there is none.
func (n lbNode) reach(section string) (address, port string) {
	for _, listen := range n.listeners[section] {
		host, port, err := net.SplitHostPort(listen)
		if err != nil {
			continue
		}
		if ip, err := netip.ParseAddr(host); err == nil && ip.IsLoopback() || host == "localhost" {
			continue
		} else if err != nil || ip.IsUnspecified() {
			host = n.host
		}
		if address, err := config.NormalizeHost(net.JoinHostPort(host, port), ""); err == nil {
			return address, port
		}
	}
	return "", ""
}

// needMail wants a node that takes mail from other hosts.
func (l *lbCluster) needMail() error {
	if !slices.ContainsFunc(l.Doors, func(d lbDoor) bool { return d.Mail() && len(d.Servers) > 0 }) {
		return withHint(errNoMailDoor, `"pmgcm status --long" shows which services run; listen in the node files, on which addresses`)
	}
	return nil
}

var errNoMailDoor = errors.New("no node takes mail from other hosts")

// Timeout is how long a balancer waits for a client or a node to say something: longer than they do themselves, so that they end a
// session in order. RFC 5321 §4.5.3.2.6: 10 minutes for the reply to a message.
func (l *lbCluster) Timeout() string {
	return fmt.Sprintf("%dm", int((max(l.Idle, 10*time.Minute) + time.Minute).Minutes()))
}

// Count is "1 node", "3 nodes".
func (l *lbCluster) Count() string { return count(len(l.Nodes), "node") }

// lbPrint writes a file.
func lbPrint(w io.Writer, text string, data any) error {
	t, err := template.New("").Funcs(template.FuncMap{"join": func(s []string) string { return strings.Join(s, ", ") }}).Parse(text)
	if err != nil {
		return err
	}
	var b strings.Builder // all of it, or nothing
	if err := t.Execute(&b, data); err != nil {
		return err
	}
	_, err = io.WriteString(w, b.String())
	return err
}

func lbCheck(c *cli.Context) error {
	if _, err := arguments(c, 0, 0); err != nil {
		return err
	}
	local, err := config.LoadLocal(configFile(c))
	if err != nil {
		return noNodeFile(err)
	}
	h, err := web.Control(local.ControlSocket()).Health(c.Context)
	if err != nil {
		return err
	}
	switch h.Status {
	case "ok", "degraded":
		_, err = fmt.Fprintf(c.App.Writer, "%s takes mail\n", h.Node)
		return err
	case "draining":
		return withHint(fmt.Errorf("%s is drained, or about to stop", h.Node), `"pmgcm undrain" puts it back into service`)
	}
	var why []string
	for _, r := range h.Checks {
		if r.Critical && !r.OK {
			why = append(why, r.Name+": "+clean(r.Error))
		}
	}
	return withHint(fmt.Errorf("%s takes no mail: %s", h.Node, strings.Join(why, "; ")), `"pmgcm status" shows the remedy`)
}
