package main

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"regexp"
	"slices"

	"github.com/urfave/cli/v2"

	"mailproxy/config"
)

// keepalivedText is a whole keepalived.conf. A node that takes no mail is out after the second look, one that is gone after 3 s.
const keepalivedText = `# keepalived for {{.Self.Name}}, one of {{.Count}}: printed by "mailproxy lb keepalived" there at {{.Made}}.
#
#  1. On this node (Debian: package keepalived), put it at /etc/keepalived/keepalived.conf, and run:
#         keepalived -t && systemctl reload-or-restart keepalived
#  2. Run it on each other node too: every node has a file of its own.
#  3. When nodes were added or deleted, or their addresses are others, print it anew on all.
#
# The nodes themselves see who connects: no setting is needed.

global_defs {
	router_id {{.Self.Name}}
	script_user root
	enable_script_security
}

vrrp_script mailproxy {
	script "{{.Check}}"
	interval 1
	timeout 3
	fall 2
	rise 2
}
{{- range .Instances}}

vrrp_instance mailproxy_{{.ID}} {
	state BACKUP
	interface {{$.Interface}}
	virtual_router_id {{.ID}}
	# {{.Order}}
	priority {{.Priority}}
	advert_int 1
{{- if .Peers}}
	unicast_src_ip {{.Source}}
	unicast_peer {
{{- range .Peers}}
		{{.}}
{{- end}}
	}
{{- end}}
	virtual_ipaddress {
		{{.VIP}}
	}
	track_script {
		mailproxy
	}
}
{{- end}}
`

// A keepalivedFile is what keepalivedText is made from.
type keepalivedFile struct {
	*lbCluster
	Self      lbNode
	Check     string
	Interface string
	Instances []vrrpInstance
}

// A vrrpInstance is one address that moves.
type vrrpInstance struct {
	ID, Priority int
	VIP          string
	Order        string // for people
	Source       string
	Peers        []string // empty: they are found by multicast
}

func lbKeepalived(c *cli.Context) error {
	vips, err := vipFlags(c)
	if err != nil {
		return err
	}
	first := c.Int("router-id")
	if last := first + len(vips) - 1; first < 1 || last > 255 {
		return usagef("lb keepalived: --router-id %d: for %d addresses the IDs are %d to %d, want 1 to 255", first, len(vips), first, last)
	}
	return withCluster(c, func(local *config.Local, l *lbCluster) error {
		i := slices.IndexFunc(l.Nodes, func(n lbNode) bool { return n.cid == l.self })
		if i < 0 || !slices.Contains(l.Nodes[i].services, config.ServiceSMTP) {
			return withHint(fmt.Errorf("%s: %w", local.Name, errTakesNoMail), "run it on a node with the service smtp")
		}
		f := &keepalivedFile{lbCluster: l, Self: l.Nodes[i]}
		if f.Interface, err = interfaceFlag(c, f.Self); err != nil {
			return err
		}
		if f.Check, err = checkCommand(c); err != nil {
			return err
		}
		for i, vip := range vips {
			f.Instances = append(f.Instances, l.vrrp(f.Self, first+i, i, vip))
		}
		return lbPrint(c.App.Writer, keepalivedText, f)
	})
}

var errTakesNoMail = errors.New("no mail is taken here")

// vipFlags gives the addresses with their prefixes.
func vipFlags(c *cli.Context) ([]netip.Prefix, error) {
	var vips []netip.Prefix
	for _, text := range c.StringSlice("vip") {
		vip, err := netip.ParsePrefix(text)
		if err != nil {
			var ip netip.Addr
			if ip, err = netip.ParseAddr(text); err == nil {
				vip = netip.PrefixFrom(ip, ip.BitLen())
			}
		}
		if err != nil || vip.Addr().Zone() != "" || vip.Addr().IsUnspecified() {
			return nil, usagef("lb keepalived: --vip %q is no ADDRESS or ADDRESS/PREFIX", text)
		}
		vips = append(vips, vip)
	}
	if len(vips) == 0 {
		return nil, usagef("lb keepalived: --vip ADDRESS is missing")
	}
	return vips, nil
}

var interfaceName = regexp.MustCompile(`^[A-Za-z0-9._@:-]{1,15}$`)

// interfaceFlag gives the interface that is named, or has the node's address.
func interfaceFlag(c *cli.Context, self lbNode) (string, error) {
	if name := c.String("interface"); name != "" {
		if !interfaceName.MatchString(name) {
			return "", usagef("lb keepalived: --interface %q is no name of an interface", name)
		}
		return name, nil
	}
	interfaces, err := net.Interfaces()
	if err != nil {
		return "", err
	}
	for _, i := range interfaces {
		addresses, err := i.Addrs()
		if err != nil {
			return "", err
		}
		for _, a := range addresses {
			if ip, ok := a.(*net.IPNet); ok && ip.IP.String() == self.host {
				return i.Name, nil
			}
		}
	}
	return "", usagef("lb keepalived: --interface is missing: none here has the node's address, %s", self.host)
}

// checkCommand is how keepalived asks for this node's health.
func checkCommand(c *cli.Context) (string, error) {
	program, err := os.Executable()
	if err != nil {
		return "", err
	}
	command := program + " lb check"
	if file := configFile(c); file != config.DefaultFile {
		command += " --config " + file
	}
	if !regexp.MustCompile(`^[ -!#-~]+$`).MatchString(command) {
		return "", fmt.Errorf("%q cannot stand in a keepalived.conf", command)
	}
	return command, nil
}

// vrrp gives a node's part in the VRRP of an address. Its order of the nodes begins with the one whose turn it is, so that several addresses
// are spread over the nodes.
func (l *lbCluster) vrrp(self lbNode, id, turn int, vip netip.Prefix) vrrpInstance {
	var nodes []lbNode
	for _, n := range l.Nodes {
		if slices.Contains(n.services, config.ServiceSMTP) {
			nodes = append(nodes, n)
		}
	}
	me := slices.IndexFunc(nodes, func(n lbNode) bool { return n.cid == self.cid })
	place := (me - turn%len(nodes) + len(nodes)) % len(nodes)
	v := vrrpInstance{ID: id, Priority: max(1, 200-place), VIP: vip.String(), Source: self.host}
	v.Order = fmt.Sprintf("This node is number %d of those that it goes to.", place+1)
	for _, n := range nodes {
		ip, err := netip.ParseAddr(n.host)
		if err != nil || ip.Is4() != vip.Addr().Is4() { // no address to send to
			v.Peers = nil
			return v
		}
		if n.cid != self.cid {
			v.Peers = append(v.Peers, n.host)
		}
	}
	return v
}
