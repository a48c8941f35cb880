//go:build lab

package e2e

import (
	"encoding/csv"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/smtp"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"mailproxy/internal/mta"
	"mailproxy/test/lab"
)

// These are the four ways of docs/BALANCING.md. What it shows is what is done here.

// guide is docs/BALANCING.md.
func guide(t *testing.T) string {
	t.Helper()
	text, err := os.ReadFile(filepath.Join("..", "..", "docs", "BALANCING.md"))
	if err != nil {
		t.Fatal(err)
	}
	return string(text)
}

// documented wants a command to be in the guide, and gives its words.
func documented(t *testing.T, command string) []string {
	t.Helper()
	if !strings.Contains(guide(t), command) {
		t.Errorf("docs/BALANCING.md does not say %q", command)
	}
	return strings.Fields(command)
}

// blocks are the guide's blocks of a kind, with the addresses of our hosts in place of mx1's, mx2's, mx3's and the balancer's.
func blocks(t *testing.T, kind string, hosts ...*node) string {
	t.Helper()
	var all strings.Builder
	for _, m := range regexp.MustCompile("(?s)\n```"+kind+"\n(.*?)```").FindAllStringSubmatch(guide(t), -1) {
		all.WriteString(m[1])
	}
	text := all.String()
	for i, h := range hosts {
		text = strings.ReplaceAll(text, []string{"192.0.2.11", "192.0.2.12", "192.0.2.13", "192.0.2.20"}[i], h.address)
	}
	if text == "" || strings.Contains(text, "192.0.2.") {
		t.Fatalf("blocks of %s: %q", kind, text)
	}
	return text
}

// launch starts a server on the host, beside a node's daemon or without one, and gives its process ID. It ends with the test.
func (n *node) launch(t *testing.T, program string, args ...string) int {
	t.Helper()
	cmd := n.command(program, args...)
	log, err := os.Create(filepath.Join(n.dir, "server.log"))
	if err != nil {
		t.Fatal(err)
	}
	defer log.Close()
	cmd.Stdout, cmd.Stderr, cmd.SysProcAttr = log, log, &syscall.SysProcAttr{Setsid: true}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = cmd.Process.Signal(syscall.SIGTERM) // a test may have ended it
		_ = cmd.Wait()                          // by a signal
		if said, _ := os.ReadFile(log.Name()); t.Failed() {
			t.Logf("%s on %s:\n%s", program, n.name, said[max(0, len(said)-3000):])
		}
	})
	return cmd.Process.Pid
}

// A haproxy is Debian's on a host of its own.
type haproxy struct {
	*node
	pid int
}

// newHAProxy runs one with a file as it stands, on a host where no node runs.
func newHAProxy(t *testing.T, b *node, text string) *haproxy {
	t.Helper()
	file := filepath.Join(b.dir, "haproxy.cfg")
	if err := os.WriteFile(file, []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
	b.must("haproxy", "-c", "-f", file)
	// Its socket is in a directory that systemd makes.
	h := &haproxy{b, b.launch(t, "sh", "-ec", "mkdir -p /run/haproxy && mount -t tmpfs haproxy /run/haproxy && exec haproxy -db -f "+file)}
	b.eventually(func() error { _, err := h.servers("mx"); return err })
	return h
}

// A proxied is a server as HAProxy sees it.
type proxied struct {
	status   string // UP, DOWN, DRAIN …
	sessions int    // that it was given
	weight   int
}

// servers gives the servers of a backend.
func (h *haproxy) servers(backend string) (map[string]proxied, error) {
	c, err := net.Dial("unix", fmt.Sprintf("/proc/%d/root/run/haproxy/admin.sock", h.pid))
	if err != nil {
		return nil, err
	}
	defer c.Close()
	if _, err := io.WriteString(c, "show stat\n"); err != nil {
		return nil, err
	}
	text, err := io.ReadAll(c)
	if err != nil {
		return nil, err
	}
	rows, err := csv.NewReader(strings.NewReader(strings.TrimPrefix(string(text), "# "))).ReadAll()
	if err != nil {
		return nil, err
	}
	column := map[string]int{}
	for i, name := range rows[0] {
		column[name] = i
	}
	all := map[string]proxied{}
	for _, r := range rows[1:] {
		if name := r[column["svname"]]; r[column["pxname"]] == backend && name != "BACKEND" && name != "FRONTEND" {
			sessions, _ := strconv.Atoi(r[column["stot"]])
			weight, _ := strconv.Atoi(r[column["weight"]])
			all[name] = proxied{r[column["status"]], sessions, weight}
		}
	}
	if len(all) == 0 {
		return nil, fmt.Errorf("no backend %s: %s", backend, text)
	}
	return all, nil
}

// is waits until HAProxy sees a node so, and gives how long that took.
func (h *haproxy) is(n *node, status string) time.Duration {
	h.t.Helper()
	began := time.Now()
	h.eventually(func() error {
		all, err := h.servers("mx")
		if err == nil && !strings.HasPrefix(all[n.name].status, status) {
			err = fmt.Errorf("%s is %q to HAProxy, want %s", n.name, all[n.name].status, status)
		}
		return err
	})
	return time.Since(began)
}

// gets waits until HAProxy has given so many more sessions to all of these nodes.
func (h *haproxy) gets(more int, nodes ...*node) {
	h.t.Helper()
	before, err := h.servers("mx")
	h.done(err)
	h.eventually(func() error {
		now, err := h.servers("mx")
		for _, n := range nodes {
			if got := now[n.name].sessions - before[n.name].sessions; err == nil && got < more {
				err = fmt.Errorf("%s got %d sessions of %d", n.name, got, more)
			}
		}
		return err
	})
}

// A crowd sends mail to one address as MTAs do: what was not taken is sent again.
type crowd struct {
	to      *node
	stop    atomic.Bool
	all     sync.WaitGroup
	mu      sync.Mutex
	taken   []string // subjects that got 250
	refused atomic.Int64
}

// begin lets so many send at once, in turn to each of the domains.
func (c *crowd) begin(size int, domains ...string) {
	for i := range size {
		c.all.Go(func() {
			for n := 0; !c.stop.Load(); n++ {
				subject := fmt.Sprintf("m-%d-%d", i, n)
				to := "to@" + domains[n%len(domains)]
				for {
					if _, err := c.to.send(to, subject, 2000); err == nil {
						break
					}
					c.refused.Add(1)
					time.Sleep(50 * time.Millisecond) // before it is tried again
				}
				c.mu.Lock()
				c.taken = append(c.taken, subject)
				c.mu.Unlock()
			}
		})
	}
}

// end lets each send what it has begun, and gives the subjects that were taken.
func (c *crowd) end() []string {
	c.stop.Store(true)
	c.all.Wait()
	return c.taken
}

func TestScenarioBehindHAProxyNothingIsLost(t *testing.T) {
	t.Parallel()
	c, now, later := newLater(t, "--agent-listen", ":8026", "--internal-listen", ":26")
	drained, killed := c[1], c[2]
	balancer := newNode(t, "lb.test") // where no node runs
	// As many files as HAProxy asks for by the defaults are more than a process may have everywhere.
	c[0].must("mailproxy", "setting", "set", "max_sessions", "1000")
	c[0].must("mailproxy", "setting", "set", "internal_max_sessions", "1000")
	var text string
	drained.eventually(func() error {
		text = drained.must(documented(t, "mailproxy lb haproxy")[0], "lb", "haproxy")
		if !strings.Contains(text, "maxconn 6000\n") {
			return fmt.Errorf("not all have the settings:\n%s", text)
		}
		return nil
	})
	letProxy(t, c[0], balancer)
	h := newHAProxy(t, balancer, text)
	for _, n := range c {
		h.is(n, "UP")
	}
	crowd := crowd{to: balancer}
	crowd.begin(8, "now.test", "later.test")
	defer crowd.end()
	h.gets(20, c...)

	// The other ports.
	c[0].must("mailproxy", "network", "add", lab.HubAddress)
	for backend, answers := range map[string]func() error{
		"internal": func() error { return says(net.JoinHostPort(balancer.address, "26"), "", "220 ") },
		"web": func() error {
			return says(net.JoinHostPort(balancer.address, webPort), "GET /health HTTP/1.0\r\n\r\n", "HTTP/1.0 200 ")
		},
	} {
		c[0].eventually(func() error {
			all, err := h.servers(backend)
			for name, s := range all {
				if err == nil && s.status != "UP" {
					err = fmt.Errorf("%s of %s is %s", backend, name, s.status)
				}
			}
			return errors.Join(err, answers())
		})
	}

	// Drained, a node is out at once.
	c[0].must("pmgcm", documented(t, "pmgcm drain 2")[1:]...)
	outAfter := h.is(drained, "DRAIN")
	if outAfter > 2*time.Second {
		t.Errorf("a drained node was in for %v", outAfter)
	}
	before, err := h.servers("mx")
	drained.done(err)
	h.gets(50, c[0], killed)
	after, err := h.servers("mx")
	drained.done(err)
	if got := after[drained.name].sessions - before[drained.name].sessions; got > 0 {
		t.Errorf("a drained node got %d sessions more", got)
	}
	c[0].must("pmgcm", documented(t, "pmgcm undrain 2")[1:]...)
	h.is(drained, "UP")
	h.gets(20, drained)

	// Killed, it is out after its second failure: 2 s and 500 ms, and what the machine takes.
	killed.crash()
	downAfter := h.is(killed, "DOWN")
	if downAfter > 5*time.Second {
		t.Errorf("a killed node was in for %v", downAfter)
	}
	h.gets(50, c[0], drained)
	killed.start()
	h.is(killed, "UP")
	h.gets(20, killed)

	crowd.arrives(t, c, now, later)
	t.Logf("the drained node was out after %v, the killed one after %v", outAfter, downAfter)
	for _, n := range c { // the clients' own address, which is that of this process
		log, err := os.ReadFile(n.LogFile())
		n.done(err)
		if got := strings.Count(string(log), `"client":"`+lab.HubAddress+`"`); got < 40 {
			t.Errorf("%s has seen the client in %d sessions", n.name, got)
		}
	}
}

// says gives nil where what answers at an address begins so.
func says(address, line, want string) error {
	c, err := net.Dial("tcp", address)
	if err != nil {
		return err
	}
	defer c.Close()
	got := make([]byte, len(want))
	err = errors.Join(c.SetDeadline(time.Now().Add(patience/2)), second(io.WriteString(c, line)), second(io.ReadFull(c, got)))
	if err == nil && string(got) != want {
		err = fmt.Errorf("%s says %q, want %q", address, got, want)
	}
	return err
}

func second(_ int, err error) error { return err }

// newLater makes nodes and two domains, now.test whose next hop takes mail, and later.test whose next hop does not yet listen.
func newLater(t *testing.T, more ...string) (c []*node, now, later sink) {
	t.Helper()
	c = formCluster(t, 3, lab.HostOptions{Init: more})
	now, later = newTakingSink(t), newSink()
	c[0].addDomain("now.test", now)
	c[0].addDomain("later.test", later)
	for _, n := range c {
		n.takes("to@now.test")
		n.takes("to@later.test")
	}
	return c, now, later
}

// arrives wants all that a crowd was told is taken to arrive, once the second next hop listens.
func (c *crowd) arrives(t *testing.T, nodes []*node, now, later sink) {
	t.Helper()
	taken := c.end()
	later.listen(t)
	for _, n := range nodes {
		n.eventually(func() error { _, err := n.Must("mailproxy", "queue", "flush"); return err })
	}
	nodes[0].eventually(func() error {
		missing, first := 0, ""
		for _, s := range taken {
			if now.Count(s)+later.Count(s) == 0 {
				missing, first = missing+1, s
			}
		}
		if missing > 0 {
			return fmt.Errorf("%d of %d have not arrived, %s among them", missing, len(taken), first)
		}
		return nil
	})
	t.Logf("%d messages taken and all arrived, %d tries in vain", len(taken), c.refused.Load())
}

// goesOn waits until so many more messages were taken.
func (c *crowd) goesOn(t *testing.T, more int) {
	t.Helper()
	count := func() int {
		c.mu.Lock()
		defer c.mu.Unlock()
		return len(c.taken)
	}
	before := count()
	if err := lab.Poll(func() error {
		if got := count() - before; got < more {
			return fmt.Errorf("%d messages were taken", got)
		}
		return nil
	}); err != nil {
		t.Fatal(err)
	}
}

func TestScenarioBehindNginxNothingIsLost(t *testing.T) {
	t.Parallel()
	c, now, later := newLater(t)
	balancer := newNode(t, "lb.test") // where no node runs
	letProxy(t, c[0], balancer)
	file, conf := filepath.Join(balancer.dir, "mailproxy.conf"), filepath.Join(balancer.dir, "nginx.conf")
	printed := func() {
		t.Helper()
		text := c[0].must(documented(t, "mailproxy lb nginx")[0], "lb", "nginx")
		if err := os.WriteFile(file, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
		balancer.must("nginx", "-t", "-c", conf)
	}
	// Debian's file, and what ours says to append; what it writes goes here.
	balancer.sh(fmt.Sprintf("sed 's,^pid .*,pid %[1]s/nginx.pid;,; s,/var/log/nginx/,%[1]s/,' /etc/nginx/nginx.conf >%[2]s; echo 'include %[3]s;' >>%[2]s",
		balancer.dir, conf, file))
	printed()
	master := balancer.launch(t, "nginx", "-c", conf, "-g", "daemon off;")

	crowd := crowd{to: balancer}
	crowd.begin(6, "now.test", "later.test")
	defer crowd.end()
	crowd.goesOn(t, 50)
	c[2].crash()
	crowd.goesOn(t, 100)
	c[2].start()
	c[0].must("pmgcm", "drain", "2")
	printed()
	if err := syscall.Kill(master, syscall.SIGHUP); err != nil {
		t.Fatal(err)
	}
	refused := `(?m)^mailproxy_smtp_refused_sessions_total (\d+)$`
	c[1].eventually(func() error { // the old workers end
		before := c[1].metric(refused)
		crowd.goesOn(t, 50)
		if more := c[1].metric(refused) - before; more > 0 {
			return fmt.Errorf("a drained node got %d sessions more", more)
		}
		return nil
	})
	if c[1].metric(refused) == 0 {
		t.Error("the drained node got none before that")
	}
	crowd.arrives(t, c, now, later)
}

func TestScenarioAnAddressMovesToANodeThatTakesMail(t *testing.T) {
	t.Parallel()
	c, now, later := newLater(t)
	const vip = "10.99.254.10"
	for _, n := range c {
		file := filepath.Join(n.dir, "keepalived.conf")
		text := n.must(documented(t, "mailproxy lb keepalived --vip")[0], "lb", "keepalived", "--vip", vip+"/16")
		if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		n.must("keepalived", "-t", "-f", file)
		n.launch(t, "keepalived", "--dont-fork", "--log-console", "-f", file, "--pid", n.dir+"/k.pid", "--vrrp_pid", n.dir+"/v.pid")
	}
	moves := func(to *node, why string) {
		t.Helper()
		began := time.Now()
		to.eventually(func() error {
			if out := to.must("ip", "addr", "show", "dev", "eth0"); !strings.Contains(out, " "+vip+"/16 ") {
				return fmt.Errorf("%s does not have the address: %s", to.name, out)
			}
			return nil
		})
		t.Logf("%s: the address is at %s after %v", why, to.name, time.Since(began))
	}
	moves(c[0], "at first")
	crowd := crowd{to: &node{Host: &lab.Host{Address: vip}}}
	crowd.begin(4, "now.test", "later.test")
	defer crowd.end()
	crowd.goesOn(t, 50)
	c[0].kill()
	moves(c[1], "daemon killed")
	crowd.goesOn(t, 50)
	c[1].must("pmgcm", "drain")
	moves(c[2], "drained")
	crowd.goesOn(t, 50)
	c[0].start()
	moves(c[0], "daemon back")
	crowd.goesOn(t, 50)
	c[1].must("pmgcm", "undrain")
	c[0].die()
	moves(c[1], "no power")
	crowd.goesOn(t, 50)
	crowd.end()
	c[0].must("ip", "link", "set", "eth0", "up")
	c[0].must("ip", "addr", "del", vip+"/16", "dev", "eth0")
	c[0].start()
	crowd.arrives(t, c, now, later)
}

// letProxy makes the cluster take PROXY headers of a balancer, as the guide says.
func letProxy(t *testing.T, n, balancer *node) {
	t.Helper()
	line := documented(t, "mailproxy setting set proxy_from 192.0.2.20")
	line[len(line)-1] = balancer.address
	n.must(line[0], line[1:]...)
}

// messages is how many messages a node has taken since it started.
func (n *node) messages() int {
	n.t.Helper()
	return n.metric(`(?m)^mailproxy_smtp_messages_total (\d+)$`)
}

// metric gives the number that a pattern finds in a node's metrics.
func (n *node) metric(pattern string) int {
	n.t.Helper()
	resp, err := http.Get("http://" + net.JoinHostPort(n.address, webPort) + "/metrics")
	n.done(err)
	defer resp.Body.Close()
	text, err := io.ReadAll(resp.Body)
	n.done(err)
	m := regexp.MustCompile(pattern).FindSubmatch(text)
	if m == nil {
		n.t.Fatalf("%s has no metric %s", n.name, pattern)
	}
	count, err := strconv.Atoi(string(m[1]))
	n.done(err)
	return count
}

// die is a host whose power fails: nobody is there any more who would refuse a connection.
func (n *node) die() {
	n.t.Helper()
	n.crash()
	n.must("ip", "link", "set", "eth0", "down")
}

func TestScenarioASendingPostfixFindsTheNodesThatLive(t *testing.T) {
	t.Parallel()
	c := newCluster(t, 3)
	front := newNode(t, "front.test") // where no node runs
	s := newTakingSink(t)
	domains := []string{"equal.test", "standby.test", "pool.test", "front.test"}
	for _, d := range domains {
		c[0].addDomain(d, s)
	}
	for _, n := range c {
		n.takes("to@front.test")
	}
	hosts := append(append([]*node{}, c...), front)
	front.sh(fmt.Sprintf("ip netns exec %s sh -ec 'echo 1 >/proc/sys/net/ipv4/ip_forward'", front.ID))
	rules := filepath.Join(front.dir, "nft")
	if err := os.WriteFile(rules, []byte(blocks(t, "nft", hosts...)), 0o644); err != nil {
		t.Fatal(err)
	}
	front.must("nft", "-f", rules)
	stop, err := c[0].lab.ServeDNS(strings.Split(strings.TrimSpace(blocks(t, "zone", hosts...)), "\n")...)
	front.done(err)
	t.Cleanup(stop)

	postfix := mta.StartPostfix(t, "unused.test:25", "relayhost =", "smtp_host_lookup = dns", "smtp_connection_cache_on_demand = no",
		"smtp_connect_timeout = 2s", "queue_run_delay = 1s", "minimal_backoff_time = 1s", "maximal_backoff_time = 2s")
	const each = 30
	send := func(phase, domain string) {
		t.Helper()
		for i := range each {
			body := fmt.Sprintf("Subject: %s %s %d\r\n\r\nx\r\n", phase, domain, i)
			if err := smtp.SendMail(postfix.Addr, nil, "from@client.test", []string{"to@" + domain}, []byte(body)); err != nil {
				t.Fatal(err)
			}
		}
		c[1].eventually(func() error {
			var missing []error
			for i := range each {
				if subject := fmt.Sprintf("%s %s %d", phase, domain, i); s.Count(subject) == 0 {
					missing = append(missing, errors.New(subject))
				}
			}
			if len(missing) > 0 {
				return fmt.Errorf("%d have not arrived: %v\n%s", len(missing), missing[0], postfix.Log())
			}
			return nil
		})
	}
	got := func(nodes []*node, phase, domain string) []int {
		t.Helper()
		before := make([]int, len(nodes))
		for i, n := range nodes {
			before[i] = n.messages()
		}
		send(phase, domain)
		for i, n := range nodes {
			before[i] = n.messages() - before[i]
		}
		t.Logf("%s, %s: messages by node %v", phase, domain, before)
		return before
	}
	for _, d := range domains {
		n := got(c, "all alive", d)
		if d == "standby.test" && (n[0] != each || n[1]+n[2] > 0) {
			t.Errorf("%s: %v, want all of them at the first", d, n)
		}
		if d != "standby.test" && (n[0] == 0 || n[1] == 0 || n[2] == 0) {
			t.Errorf("%s: %v, want some everywhere", d, n)
		}
	}
	c[0].die()
	for _, d := range domains {
		n := got(c[1:], "one dead", d)
		if d == "standby.test" && (n[0] != each || n[1] > 0) {
			t.Errorf("%s: %v, want all of them at the second", d, n)
		}
		if d != "standby.test" && (n[0] == 0 || n[1] == 0) {
			t.Errorf("%s: %v, want some at both that live", d, n)
		}
	}
	postfix.AwaitEmpty(t)
}
