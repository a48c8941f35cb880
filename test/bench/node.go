package main

import (
	"bufio"
	"context"
	"encoding/json"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
	"time"

	"mailproxy/config"
)

// A node is one `mailproxy serve` with its own files and private PostgreSQL.
type node struct {
	*part
	local *config.Local
	b     *bench
}

const (
	smtpPort   = "2525"
	webPort    = "8025"
	tunnelPort = "7025"
)

// startNode makes and starts a node on its own loopback address, and waits until it takes mail and configuration.
func (b *bench) startNode(ctx context.Context, name, ip string) (*node, error) {
	return b.startNodeAt(ctx, name, ip, ip)
}

// startNodeAt is startNode for a node that others reach at another address than it listens on.
func (b *bench) startNodeAt(ctx context.Context, name, ip, address string) (*node, error) {
	l := config.DefaultLocal()
	dir := filepath.Join(b.dir, name)
	l.File = filepath.Join(dir, "node.toml")
	l.Name, l.Address, l.User = name+".bench.test", address, "nobody" // PostgreSQL refuses root
	l.StateDir, l.RunDir = filepath.Join(dir, "state"), filepath.Join(dir, "run")
	l.SMTP.Listen = []string{net.JoinHostPort(ip, smtpPort)}
	l.Web.Listen = []string{net.JoinHostPort(ip, webPort)}
	l.Tunnel.Listen = []string{net.JoinHostPort(ip, tunnelPort)}
	for _, d := range []string{dir, l.StateDir, l.RunDir} {
		if err := os.MkdirAll(d, 0o755); err != nil {
			return nil, err
		}
	}
	if err := os.WriteFile(l.File, l.Text(), 0o644); err != nil {
		return nil, err
	}
	n := &node{local: l, b: b}
	p, err := b.start(name, n.env(), filepath.Join(b.bin, "mailproxy"), "serve")
	if err != nil {
		return nil, err
	}
	n.part = p
	if err := p.answers(ctx, n.smtp()); err != nil {
		return nil, err
	}
	return n, poll(ctx, time.Minute, 100*time.Millisecond, func() error {
		_, err := n.mailproxy(ctx, "domain", "list")
		if err != nil && p.ended() {
			err = final{fmt.Errorf("%w\n%s", err, p.tail())}
		}
		return err
	})
}

func (n *node) env() []string { return []string{"MAILPROXY_CONFIG=" + n.local.File} }

func (n *node) smtp() string { return n.local.SMTP.Listen[0] }

// mailproxy runs one of the administrator's commands on this node.
func (n *node) mailproxy(ctx context.Context, args ...string) (string, error) {
	return n.b.output(ctx, n.env(), append([]string{filepath.Join(n.b.bin, "mailproxy")}, args...)...)
}

// pmgcm runs one of the cluster's commands on this node.
func (n *node) pmgcm(ctx context.Context, args ...string) (string, error) {
	return n.b.output(ctx, n.env(), append([]string{filepath.Join(n.b.bin, "pmgcm")}, args...)...)
}

// unlimited are the settings that let one client connect as often as it likes, which it may by Postfix's defaults, too, and ask again and
// again for a domain that is not there yet.
func unlimited() (all []config.Setting) {
	for _, name := range []string{"max_connections_per_minute", "max_unknown_recipients", "max_unknown_recipients_per_hour"} {
		all = append(all, config.Setting{Name: name, Value: "0"})
	}
	return all
}

// unlimited makes these settings.
func (n *node) unlimited(ctx context.Context) error {
	for _, s := range unlimited() {
		if _, err := n.mailproxy(ctx, "setting", "set", s.Name, s.Value); err != nil {
			return err
		}
	}
	return nil
}

// relays makes a domain's mail go to a next hop, and waits until the node's SMTP takes mail for it.
func (n *node) relays(ctx context.Context, domain, to string) error {
	if err := n.unlimited(ctx); err != nil { // whoever makes the load is one client
		return err
	}
	if _, err := n.mailproxy(ctx, "domain", "add", domain, "--to", to); err != nil {
		return err
	}
	p := newProbe(n.smtp())
	defer p.close()
	return poll(ctx, 10*time.Second, 20*time.Millisecond, func() error { return p.takes(domain) })
}

// queued says how many items the node's queue holds.
func (n *node) queued(ctx context.Context) (int, error) {
	out, err := n.mailproxy(ctx, "queue", "summary", "--json")
	if err != nil {
		return 0, err
	}
	var list struct {
		Total *int `json:"total"`
	}
	if err := json.Unmarshal([]byte(out), &list); err != nil {
		return 0, fmt.Errorf("queue summary --json: %w", err)
	}
	if list.Total == nil {
		return 0, fmt.Errorf("queue summary --json: no total in %s", out)
	}
	return *list.Total, nil
}

// A probe asks a node's SMTP, over one connection, whether it takes mail for a domain.
type probe struct {
	addr string
	conn net.Conn
	r    *bufio.Reader
}

func newProbe(addr string) *probe { return &probe{addr: addr} }

// probeTimeout bounds one question.
const probeTimeout = 10 * time.Second

// takes gives nil where RCPT to the domain is answered with 250. The connection is made anew when the node has ended it.
func (p *probe) takes(domain string) error {
	if p.conn == nil {
		if err := p.open(); err != nil {
			return err
		}
	}
	_ = p.conn.SetDeadline(time.Now().Add(probeTimeout)) // an error shows in what follows
	if _, err := fmt.Fprintf(p.conn, "RSET\r\nMAIL FROM:<probe@client.bench.test>\r\nRCPT TO:<user@%s>\r\n", domain); err != nil {
		p.close()
		return err
	}
	for _, command := range []string{"RSET", "MAIL", "RCPT"} {
		reply, err := p.reply()
		if err != nil {
			p.close()
			return fmt.Errorf("%s: %w", command, err)
		}
		if !strings.HasPrefix(reply, "250") {
			if strings.HasPrefix(reply, "4") { // 421 ends the session
				p.close()
			}
			return fmt.Errorf("%s at %s: %s", command, p.addr, reply)
		}
	}
	return nil
}

func (p *probe) open() error {
	conn, err := net.DialTimeout("tcp", p.addr, probeTimeout)
	if err != nil {
		return err
	}
	p.conn, p.r = conn, bufio.NewReader(conn)
	_ = conn.SetDeadline(time.Now().Add(probeTimeout)) // an error shows in what follows
	if err = p.greet(); err != nil {
		p.close()
	}
	return err
}

func (p *probe) greet() error {
	if err := p.wants("220"); err != nil {
		return err
	}
	if _, err := fmt.Fprint(p.conn, "EHLO client.bench.test\r\n"); err != nil {
		return err
	}
	return p.wants("250")
}

// wants reads one reply, which must have a code.
func (p *probe) wants(code string) error {
	reply, err := p.reply()
	if err != nil {
		return fmt.Errorf("%s: %w", p.addr, err)
	}
	if !strings.HasPrefix(reply, code) {
		return fmt.Errorf("%s answered %s, want %s", p.addr, reply, code)
	}
	return nil
}

// reply reads one reply and gives its last line.
func (p *probe) reply() (string, error) {
	for {
		line, err := p.r.ReadString('\n')
		if err != nil {
			return "", err
		}
		if len(line) < 4 || line[3] != '-' {
			return strings.TrimRight(line, "\r\n"), nil
		}
	}
}

func (p *probe) close() {
	if p.conn != nil {
		_ = p.conn.Close() // nothing was to be kept
		p.conn = nil
	}
}
