package main

import (
	"bufio"
	"flag"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"mailproxy/cluster"
	"mailproxy/config"
	"mailproxy/internal/mta"
	"mailproxy/internal/testbin"
)

var update = flag.Bool("update", false, "write the files in testdata/lb anew")

// lbRow is a node's row of a report, with the usual ports.
func lbRow(cid config.CID, address string, change ...func(*cluster.Row)) cluster.Row {
	r := cluster.Row{NodeStatus: cluster.NodeStatus{CID: cid, Name: fmt.Sprintf("mx%d.example.net", cid), Address: address + ":7025",
		Services:  []string{"smtp", "web"},
		Listeners: map[string][]string{"smtp": {":25"}, "internal": {":26"}, "web": {"127.0.0.1:8025"}, "agent": {":8026"}}}}
	for _, f := range change {
		f(&r)
	}
	return r
}

func drained(r *cluster.Row) { r.Draining = &cluster.Draining{By: "root"} }
func noAgent(r *cluster.Row) { delete(r.Listeners, "agent") }
func listens(section string, at ...string) func(*cluster.Row) {
	return func(r *cluster.Row) { r.Listeners[section] = at }
}
func runs(services ...string) func(*cluster.Row) {
	return func(r *cluster.Row) { r.Services = services }
}

// silent is a node that did not answer: nothing of it is known but what the configuration has.
func silent(r *cluster.Row) { r.Error, r.Listeners, r.Services = "timed out", nil, nil }

// lbOf is the cluster of these rows, seen from the first of them.
func lbOf(t *testing.T, backups []string, rows ...cluster.Row) *lbCluster {
	t.Helper()
	local := config.DefaultLocal()
	local.Agent.Listen, local.Internal.Listen = []string{":8026"}, []string{":26"}
	snapshot := &config.Snapshot{}
	for _, r := range rows {
		snapshot.Nodes = append(snapshot.Nodes, config.Node{CID: r.CID, Services: []string{"smtp", "web"}})
	}
	l := &lbCluster{self: rows[0].CID, By: rows[0].Name, Made: "2026-11-26 12:00 UTC"}
	if err := l.members(local, cluster.Report{Rows: rows}, snapshot); err != nil {
		t.Fatal(err)
	}
	if err := l.markBackups(backups); err != nil {
		t.Fatal(err)
	}
	l.open()
	values, err := snapshot.Values()
	if err != nil {
		t.Fatal(err)
	}
	l.bounds(values)
	return l
}

// Each kind of file, of clusters of every kind, is taken by the program that it is for.
func TestBalancersTakeTheirFiles(t *testing.T) {
	for _, c := range []struct {
		name    string
		backups []string
		rows    []cluster.Row
	}{
		{"three", nil, []cluster.Row{lbRow(1, "192.0.2.11"), lbRow(2, "192.0.2.12"), lbRow(3, "192.0.2.13")}},
		{"mixed", []string{"MX4.example.net"}, []cluster.Row{lbRow(1, "192.0.2.11", listens("web", ":8025")), lbRow(2, "192.0.2.12", drained),
			lbRow(3, "192.0.2.13", noAgent, drained, listens("web", ":8025"), listens("internal tls", ":465")), lbRow(4, "192.0.2.14", listens("smtp", "127.0.0.1:2525", "192.0.2.44:2525")),
			lbRow(5, "192.0.2.15", silent), lbRow(6, "192.0.2.16", runs("web"))}},
		{"ipv6", []string{"2"}, []cluster.Row{lbRow(1, "[2001:db8::11]"), lbRow(2, "[2001:db8::12]", drained)}},
		{"single", nil, []cluster.Row{lbRow(1, "192.0.2.11", noAgent)}},
		{"backup", []string{"1"}, []cluster.Row{lbRow(1, "192.0.2.11"), lbRow(2, "192.0.2.12", runs("web"))}},
	} {
		for kind, made := range map[string]string{
			"haproxy.cfg": printed(t, haproxyText, lbOf(t, c.backups, c.rows...)),
			"nginx.conf":  printed(t, nginxText, lbOf(t, c.backups, c.rows...)),
		} {
			t.Run(c.name+"/"+kind, func(t *testing.T) {
				golden(t, c.name+"-"+kind, made)
				taken(t, kind, made)
			})
		}
	}
}

// A node that is gone, and was not found to be yet, costs no session.
func TestHAProxyGoesToAnotherNodeWhereOneIsGone(t *testing.T) {
	address := freePort(t)
	_, port, err := net.SplitHostPort(address)
	if err != nil {
		t.Fatal(err)
	}
	node, err := net.Listen("tcp", "127.0.0.2:"+port)
	if err != nil {
		t.Fatal(err)
	}
	defer node.Close()
	go func() { // ends with the listener
		for {
			c, err := node.Accept()
			if err != nil {
				return
			}
			go func() { // ends with the connection
				defer c.Close()
				_, err := io.WriteString(c, "220 node\r\n")
				for lines := bufio.NewScanner(c); err == nil && lines.Scan(); {
					_, err = io.WriteString(c, "250 ok\r\n")
				}
			}()
		}
	}()
	mx := listens("smtp", ":"+port)
	made := printed(t, haproxyText, lbOf(t, nil, lbRow(1, "127.0.0.2", noAgent, mx), lbRow(2, "127.0.0.3", noAgent, mx)))
	mx1, _, _ := strings.Cut(made, "\nfrontend internal")
	var text strings.Builder
	for line := range strings.Lines(mx1) {
		switch word, _, _ := strings.Cut(strings.TrimSpace(line), " "); word {
		case "log", "user", "group", "stats": // of a host of its own
		case "bind":
			if !strings.Contains(line, "v6only") {
				text.WriteString("\tbind " + address + "\n")
			}
		default:
			text.WriteString(line)
		}
	}
	file := filepath.Join(shortDir(t), "haproxy.cfg")
	if err := os.WriteFile(file, []byte(text.String()), 0o600); err != nil {
		t.Fatal(err)
	}
	mta.Start(t, address, "haproxy", "-db", "-f", file)
	var all sync.WaitGroup
	for range 10 { // at once: in some seconds the checks tell
		all.Go(func() {
			c, err := net.Dial("tcp", address)
			if err != nil {
				t.Error(err)
				return
			}
			defer c.Close()
			_ = c.SetDeadline(time.Now().Add(patience))
			if line, err := bufio.NewReader(c).ReadString('\n'); line != "220 node\r\n" {
				t.Errorf("%q, %v", line, err)
			}
		})
	}
	all.Wait()
}

func TestKeepalivedTakesItsFile(t *testing.T) {
	check := testbin.Path(t, "mailproxy") + " lb check --config /etc/other.toml"
	for _, c := range []struct {
		name string
		vips []string
		rows []cluster.Row
		want []int // priorities
	}{
		{"one address", []string{"192.0.2.10/24"}, []cluster.Row{lbRow(2, "192.0.2.12"), lbRow(1, "192.0.2.11"), lbRow(3, "192.0.2.13")}, []int{200}},
		{"addresses are spread", []string{"192.0.2.10/24", "192.0.2.9/24", "192.0.2.8/24"},
			[]cluster.Row{lbRow(1, "192.0.2.11"), lbRow(2, "192.0.2.12"), lbRow(3, "192.0.2.13"), lbRow(4, "192.0.2.14", runs("web"))}, []int{200, 198, 199}},
		{"both families", []string{"192.0.2.10/24", "2001:db8::10/64"}, []cluster.Row{lbRow(1, "192.0.2.11"), lbRow(2, "192.0.2.12")}, []int{200, 199}},
		{"nodes with names", []string{"192.0.2.10/24"}, []cluster.Row{lbRow(1, "mx1.example.net"), lbRow(2, "mx2.example.net")}, []int{200}},
	} {
		t.Run(c.name, func(t *testing.T) {
			l := lbOf(t, nil, c.rows...)
			f := &keepalivedFile{lbCluster: l, Self: l.Nodes[0], Check: check, Interface: "eth0"}
			var got []int
			for i, vip := range c.vips {
				v := l.vrrp(f.Self, 51+i, i, netip.MustParsePrefix(vip))
				f.Instances, got = append(f.Instances, v), append(got, v.Priority)
			}
			if !slices.Equal(got, c.want) {
				t.Errorf("priorities %v, want %v", got, c.want)
			}
			made := printed(t, keepalivedText, f)
			golden(t, strings.ReplaceAll(c.name, " ", "-")+"-keepalived.conf", strings.ReplaceAll(made, testbin.Dir(), "/usr/local/bin"))
			taken(t, "keepalived.conf", made)
		})
	}
}

// Of each address every node has another priority, so that there is no tie.
func TestNoTwoNodesWantAnAddressAlike(t *testing.T) {
	var rows []cluster.Row
	for i := range 7 {
		rows = append(rows, lbRow(config.CID(i+1), fmt.Sprintf("192.0.2.%d", 11+i)))
	}
	l := lbOf(t, nil, rows...)
	for turn := range 10 {
		seen := map[int]bool{}
		for _, n := range l.Nodes {
			seen[l.vrrp(n, 51, turn, netip.MustParsePrefix("192.0.2.10/24")).Priority] = true
		}
		if len(seen) != len(l.Nodes) || !seen[200] {
			t.Errorf("address %d: priorities %v", turn, seen)
		}
	}
}

func printed(t *testing.T, text string, data any) string {
	t.Helper()
	var b strings.Builder
	if err := lbPrint(&b, text, data); err != nil {
		t.Fatal(err)
	}
	return b.String()
}

// golden compares with a file in testdata/lb.
func golden(t *testing.T, name, got string) {
	t.Helper()
	file := filepath.Join("testdata", "lb", name)
	if *update {
		if err := os.WriteFile(file, []byte(got), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	if got != string(want) {
		t.Errorf("%s is not what was printed:\n%s", file, got)
	}
}

// taken lets the program that a file is for check it, in a network of its own with an eth0.
func taken(t *testing.T, kind, text string) {
	t.Helper()
	dir := shortDir(t)
	file := filepath.Join(dir, kind)
	if err := os.WriteFile(file, []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
	command := map[string]string{
		"haproxy.cfg": "haproxy -c -f " + file,
		"nginx.conf": fmt.Sprintf("cat /etc/nginx/nginx.conf >%[1]s/all; echo 'include %[2]s;' >>%[1]s/all; "+
			"nginx -t -c %[1]s/all -g 'pid %[1]s/pid;'", dir, file),
		"keepalived.conf": "ip link add eth0 type veth peer name eth1 && keepalived -t -f " + file,
	}[kind]
	if kind == "nginx.conf" { // Debian's file names one
		command = strings.ReplaceAll(command, "cat /etc/nginx/nginx.conf", "sed '/^pid /d' /etc/nginx/nginx.conf")
	}
	if out, err := exec.Command("unshare", "--net", "sh", "-ec", command).CombinedOutput(); err != nil {
		t.Errorf("%s: %v: %s", command, err, out)
	}
}
