package queue

import (
	"bufio"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"fmt"
	"math/big"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"mailproxy/config"
	"mailproxy/internal/mta"
	"mailproxy/mail"
	"mailproxy/relay"
)

// A world is a queue whose mail goes to real servers: that for b.test to the one under test, DSNs to a sink.
type world struct {
	*testQueue
	dsns *mta.Sink
}

func newWorld(t *testing.T, way config.Transport, roots *x509.CertPool) *world {
	return newWorldWith(t, way, relay.Options{Hostname: "mx.test", RootCAs: roots})
}

func newWorldWith(t *testing.T, way config.Transport, options relay.Options) *world {
	w := &world{dsns: mta.StartSink(t)}
	client := relay.New(options)
	t.Cleanup(client.Close)
	way.Name = "under-test"
	w.testQueue = openTest(t, t.TempDir(), func(o *Options) {
		o.Relay = client
		o.Route = func(p mail.Path) (config.Transport, *mail.Reply) {
			if p.Domain == "a.test" {
				return config.Transport{Name: "dsns", Hosts: []string{w.dsns.Addr}, TLS: config.TLSNone}, nil
			}
			return way, nil
		}
	})
	w.deliver = client.Deliver
	w.run(t)
	return w
}

// send queues a message with a subject.
func (w *world) send(t *testing.T, subject, text string, to ...string) {
	t.Helper()
	d := draft("from@a.test", to...)
	d.Content = strings.NewReader("Subject: " + subject + "\r\n\r\n" + text + "\r\n")
	w.mustPut(t, false, d)
}

// quiet waits until every item was tried since it came or since the last retry, and gives what is open: "local part: class code".
func (w *world) quiet(t *testing.T) (open []string) {
	t.Helper()
	waitFor(t, "every item was tried", func() bool {
		return !slices.ContainsFunc(w.List(), func(i Item) bool { return i.Busy || i.Attempts == 0 || !i.Next.After(time.Now()) })
	})
	for _, i := range w.List() {
		for _, p := range i.ForwardPaths {
			code, _, _ := strings.Cut(i.LastReply, " ")
			open = append(open, fmt.Sprintf("%s: %s %s", p.Local, i.Class, code))
		}
	}
	slices.Sort(open)
	return open
}

// failures gives what the sender was told: "local part: status", of the DSNs that came.
func (w *world) failures(t *testing.T) (told []string) {
	t.Helper()
	waitFor(t, "the DSNs are there", func() bool { return len(w.dsns.Messages(t)) == int(w.Stats().DSNs) })
	for _, m := range w.dsns.Messages(t) {
		var local string
		for line := range strings.Lines(m) {
			if rest, ok := strings.CutPrefix(line, "Final-Recipient: rfc822; "); ok {
				local, _, _ = strings.Cut(rest, "@")
			}
			if rest, ok := strings.CutPrefix(line, "Status: "); ok {
				told = append(told, local+": "+strings.TrimSpace(rest))
			}
		}
	}
	slices.Sort(told)
	return told
}

func check(t *testing.T, what string, got []string, want ...string) {
	t.Helper()
	if !slices.Equal(got, want) {
		t.Errorf("%s: got %q, want %q", what, got, want)
	}
}

// certificate makes a self-signed one for a name in a folder, and gives the files and who trusts it.
func certificate(t *testing.T, name string) (certFile, keyFile string, roots *x509.CertPool) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: name}, DNSNames: []string{name},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour), IsCA: true, BasicConstraintsValid: true}
	der, err := x509.CreateCertificate(rand.Reader, template, template, &key.PublicKey, key)
	if err != nil {
		t.Fatal(err)
	}
	private, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	dir, err := os.MkdirTemp("", "tls")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	os.Chmod(dir, 0o755)
	certFile, keyFile = filepath.Join(dir, "cert.pem"), filepath.Join(dir, "key.pem")
	for name, block := range map[string]*pem.Block{certFile: {Type: "CERTIFICATE", Bytes: der}, keyFile: {Type: "PRIVATE KEY", Bytes: private}} {
		if err := os.WriteFile(name, pem.EncodeToMemory(block), 0o644); err != nil { // servers that gave up root read it
			t.Fatal(err)
		}
	}
	leaf, _ := x509.ParseCertificate(der)
	roots = x509.NewCertPool()
	roots.AddCert(leaf)
	return certFile, keyFile, roots
}

// greylist is a policy server of Postfix's that puts off whom it sees for the first time.
func greylist(t *testing.T) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	var all sync.WaitGroup
	seen := map[string]bool{}
	var mu sync.Mutex
	all.Go(func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			all.Go(func() {
				defer c.Close()
				to := ""
				for s := bufio.NewScanner(c); s.Scan(); {
					if rest, ok := strings.CutPrefix(s.Text(), "recipient="); ok {
						to = rest
					}
					if s.Text() != "" {
						continue
					}
					mu.Lock()
					action := "action=dunno\n\n"
					if strings.HasPrefix(to, "grey") && !seen[to] {
						action = "action=defer_if_permit greylisted, come again\n\n"
					}
					seen[to] = true
					mu.Unlock()
					fmt.Fprint(c, action)
				}
			})
		}
	})
	t.Cleanup(func() { l.Close() })
	return l.Addr().String()
}

// The same mail by Postfix and Exim with the same rules: refusals at RCPT and after DATA, greylisting, a limit of size.
func TestRealServersThatRefuse(t *testing.T) {
	type server struct {
		addr  string
		later string // its code for what it puts off
		big   string // its status for what is too big
		taken func() int
	}
	for name, start := range map[string]func(t *testing.T) server{
		"postfix": func(t *testing.T) server {
			behind := mta.StartSink(t)
			p := mta.StartPostfix(t, behind.Addr, "smtpd_recipient_restrictions = check_recipient_access inline:{ {no@b.test = 550 5.1.1 no such user}, "+
				"{later@b.test = 450 4.2.0 later} }, check_policy_service inet:"+greylist(t),
				"header_checks = regexp:{ {/^Subject: spam/ REJECT spam} }", "message_size_limit = 20000")
			return server{p.Addr, "450", "5.3.4", func() int { p.AwaitEmpty(t); return len(behind.Messages(t)) }}
		},
		"exim": func(t *testing.T) server {
			dir := t.TempDir()
			grey := filepath.Join(dir, "grey")
			os.Chmod(dir, 0o777)
			os.Chmod(filepath.Dir(dir), 0o755)
			e := mta.StartEximWith(t, mta.EximRules{Main: "tls_advertise_hosts =\nmessage_size_limit = 20000",
				Rcpt: "  deny message = 5.1.1 no such user\n    local_parts = no\n  defer message = 4.2.0 later\n    local_parts = later\n" +
					"  defer message = 4.2.0 greylisted\n    local_parts = grey\n    condition = ${if exists{" + grey + "}{no}{yes}}\n",
				Data: "  deny message = 5.7.1 spam\n    condition = ${if match{$h_subject:}{^spam}}\n"})
			t.Cleanup(func() { os.Remove(grey) })
			passed := false
			return server{e.Addr, "451", "5.0.0", func() int {
				if !passed {
					passed = true
					os.WriteFile(grey, nil, 0o644)
				}
				return len(e.Messages(t))
			}}
		},
	} {
		t.Run(name, func(t *testing.T) {
			s := start(t)
			w := newWorld(t, config.Transport{Hosts: []string{s.addr}, TLS: config.TLSNone}, nil)
			w.send(t, "mixed", "hello", "ok@b.test", "no@b.test", "later@b.test")
			w.send(t, "grey", "hello", "grey@b.test")
			w.send(t, "spam", "hello", "spam1@b.test", "spam2@b.test")
			w.send(t, "big", strings.Repeat("0123456789\r\n", 3000), "big@b.test")
			check(t, "open after the first attempts", w.quiet(t), "grey: rcpt "+s.later, "later: rcpt "+s.later)
			check(t, "DSNs", w.failures(t), "big: "+s.big, "no: 5.1.1", "spam1: 5.7.1", "spam2: 5.7.1")
			if n := s.taken(); n != 1 {
				t.Errorf("%d messages taken", n)
			}
			w.Flush()
			check(t, "open after the second attempts", w.quiet(t), "later: rcpt "+s.later)
			if n := s.taken(); n != 2 || w.Stats().Sent < 2 {
				t.Errorf("%d messages taken in the end, %+v", n, w.Stats())
			}
		})
	}
}

// What the policy wants and the server does not give queues the mail; nothing of it goes in clear, though the server would take it.
func TestRealServersAndTheirTLS(t *testing.T) {
	cert, key, roots := certificate(t, "localhost")
	for _, tt := range []struct {
		name     string
		settings []string
		policy   config.TLS
		host     string // in place of the address
		roots    *x509.CertPool
		open     []string
		sent     string // the protocol in Postfix's Received field
	}{
		{"verify, the right certificate", []string{"smtpd_tls_security_level = encrypt"}, config.TLSVerify, "localhost", roots, nil, "ESMTPS"},
		{"encrypt, any certificate", []string{"smtpd_tls_security_level = encrypt"}, config.TLSEncrypt, "", nil, nil, "ESMTPS"},
		{"verify, another name", []string{"smtpd_tls_security_level = may"}, config.TLSVerify, "127.0.0.1", roots, []string{"x: tls 451"}, ""},
		{"verify, an issuer that is not known", []string{"smtpd_tls_security_level = may"}, config.TLSVerify, "localhost", x509.NewCertPool(), []string{"x: tls 451"}, ""},
		{"encrypt, not offered", []string{"smtpd_tls_security_level = none"}, config.TLSEncrypt, "", nil, []string{"x: tls 451"}, ""},
		{"encrypt, a handshake that fails", []string{"smtpd_tls_security_level = may", "smtpd_tls_mandatory_protocols = !TLSv1.2, !TLSv1.3", "smtpd_tls_protocols = !TLSv1.2, !TLSv1.3"},
			config.TLSEncrypt, "", nil, []string{"x: tls 451"}, ""},
		{"none, and the server wants TLS", []string{"smtpd_tls_security_level = encrypt"}, config.TLSNone, "", nil, []string{"x: mail 451"}, ""},
		{"may, a handshake that fails", []string{"smtpd_tls_security_level = may", "smtpd_tls_protocols = !TLSv1.2, !TLSv1.3"}, config.TLSMay, "", nil, nil, "ESMTP"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			behind := mta.StartSink(t)
			p := mta.StartPostfix(t, behind.Addr, append(tt.settings, "smtpd_tls_cert_file = "+cert, "smtpd_tls_key_file = "+key)...)
			addr := p.Addr
			if tt.host != "" {
				_, port, _ := net.SplitHostPort(addr)
				addr = net.JoinHostPort(tt.host, port)
			}
			w := newWorld(t, config.Transport{Hosts: []string{addr}, TLS: tt.policy}, tt.roots)
			w.send(t, "hello", "hello", "x@b.test")
			if len(tt.open) == 0 {
				waitFor(t, "it was taken", func() bool { return len(w.List()) == 0 })
			}
			check(t, "open", w.quiet(t), tt.open...)
			check(t, "DSNs", w.failures(t))
			p.AwaitEmpty(t)
			m := behind.Messages(t)
			if tt.sent == "" && len(m) != 0 || tt.sent != "" && (len(m) != 1 || !strings.Contains(m[0], " with "+tt.sent+" id ")) {
				t.Errorf("the server has %q; log:\n%s", m, w.log.String())
			}
		})
	}
}

// A login at a real server, inside TLS that is verified, by each of the two ways.
func TestARealServerThatWantsALogin(t *testing.T) {
	cert, key, roots := certificate(t, "localhost")
	for _, way := range []string{"PLAIN", "LOGIN"} {
		prompts := map[string]string{"PLAIN": ":", "LOGIN": "<| Username: | Password:"}[way]
		user, password := map[string]string{"PLAIN": "$auth2", "LOGIN": "$auth1"}[way], map[string]string{"PLAIN": "$auth3", "LOGIN": "$auth2"}[way]
		e := mta.StartEximWith(t, mta.EximRules{
			Main: "tls_advertise_hosts = *\ntls_certificate = " + cert + "\ntls_privatekey = " + key + "\nauth_advertise_hosts = ${if eq{$tls_in_cipher}{}{}{*}}",
			Rcpt: "  deny message = 5.7.1 log in first\n    !authenticated = *\n",
			Rest: "begin authenticators\nown:\n  driver = plaintext\n  public_name = " + way + "\n  server_prompts = " + prompts +
				"\n  server_condition = ${if and{{eq{" + user + "}{us@a.test}}{eq{" + password + "}{hunter2}}}}\n  server_set_id = " + user + "\n",
		})
		_, port, _ := net.SplitHostPort(e.Addr)
		t.Run(way, func(t *testing.T) {
			password := "wrong"
			var mu sync.Mutex
			w := newWorldWith(t, config.Transport{Hosts: []string{"localhost:" + port}, TLS: config.TLSVerify, User: "us@a.test", Password: "secret:smtp"},
				relay.Options{Hostname: "mx.test", RootCAs: roots, Secret: func(string) ([]byte, error) {
					mu.Lock()
					defer mu.Unlock()
					return []byte(password), nil
				}})
			w.send(t, "hello", "hello", "x@b.test")
			check(t, "open with a wrong password", w.quiet(t), "x: auth 451")
			if i := w.List()[0]; !strings.Contains(i.LastReply, "535") {
				t.Errorf("last reply %q", i.LastReply)
			}
			mu.Lock()
			password = "hunter2"
			mu.Unlock()
			w.Flush()
			check(t, "open with the right one", w.quiet(t))
			if n := len(e.Messages(t)); n != 1 {
				t.Errorf("%d messages taken", n)
			}
			if log := w.log.String(); strings.Contains(log, "hunter2") || strings.Contains(log, "aHVudGVyMg") {
				t.Errorf("the password is in the log: %s", log)
			}
		})
	}
}

// What Postfix logs and refuses by is the client that the message came from.
func TestARealServerIsToldWhoTheClientIs(t *testing.T) {
	for tell, setting := range map[config.Tell]string{
		config.TellXClient: "smtpd_authorized_xclient_hosts = 127.0.0.0/8", config.TellProxy: "smtpd_upstream_proxy_protocol = haproxy",
	} {
		t.Run(string(tell), func(t *testing.T) {
			behind := mta.StartSink(t)
			p := mta.StartPostfix(t, behind.Addr, setting, "mynetworks = static:all", "inet_protocols = all", "smtpd_client_port_logging = yes",
				"smtpd_client_restrictions = check_client_access inline:{ {192.0.2.66 = 554 5.7.1 not from there} }")
			w := newWorld(t, config.Transport{Hosts: []string{p.Addr}, TLS: config.TLSNone, Tell: tell}, nil)
			for to, client := range map[string]string{"good@b.test": "192.0.2.1", "six@b.test": "2001:db8::1", "bad@b.test": "192.0.2.66", "own@b.test": ""} {
				d := draft("from@a.test", to)
				if client != "" {
					d.Envelope.Client, d.Envelope.Helo = netip.MustParseAddr(client), "client.example"
					d.Envelope.Port, d.Envelope.Name = 4097, "mail.example"
				}
				w.mustPut(t, false, d)
			}
			check(t, "open", w.quiet(t))
			check(t, "DSNs", w.failures(t), "bad: 5.7.1")
			p.AwaitEmpty(t)
			text := strings.Join(behind.Messages(t), "\n")
			wants := []string{"[192.0.2.1]", "[IPv6:2001:db8::1]", "[127.0.0.1]"}
			if tell == config.TellXClient {
				wants = append(wants, "from client.example (mail.example [192.0.2.1])")
			} else if log := p.Log(); !strings.Contains(log, "[192.0.2.1]:4097") {
				t.Errorf("no port in\n%s", log)
			}
			for _, want := range wants {
				if !strings.Contains(text, want) {
					t.Errorf("no %s in\n%s", want, text)
				}
			}
			if n := len(behind.Messages(t)); n != 3 {
				t.Errorf("%d messages taken", n)
			}
		})
	}
}

// What Postfix with postgrey puts off at first is tried again from the queue, and taken then; nobody is told of it.
func TestARealGreylistIsWaitedFor(t *testing.T) {
	const delay = time.Second
	behind := mta.StartSink(t)
	p := mta.StartPostfix(t, behind.Addr, "mynetworks = static:all",
		"smtpd_client_restrictions = check_policy_service inet:"+mta.StartPostgrey(t, delay))
	w := newWorld(t, config.Transport{Hosts: []string{p.Addr}, TLS: config.TLSNone}, nil)
	w.send(t, "grey", "body", "x@b.test", "y@b.test")
	check(t, "open", w.quiet(t), "x: rcpt 450", "y: rcpt 450")
	if reply := w.List()[0].LastReply; !strings.Contains(reply, "Greylisted") {
		t.Errorf("put off by %q", reply)
	}
	first := time.Now()
	waitFor(t, "postgrey would take it", func() bool { return time.Since(first) > 2*delay }) // it counts whole seconds
	if n := w.Flush(); n != 1 {                                                              // by itself it would be in a minute
		t.Errorf("%d items are due", n)
	}
	check(t, "open", w.quiet(t))
	check(t, "DSNs", w.failures(t))
	p.AwaitEmpty(t)
	if all := strings.Join(behind.Messages(t), "\n"); strings.Count(all, "Subject: grey") != 1 || !strings.Contains(all, "X-Greylist: delayed ") {
		t.Errorf("behind Postfix:\n%s", all)
	}
}

// smtp-sink as it comes with Postfix, in each of its moods: nothing is lost, and nobody is told what is not so.
func TestAHostileSink(t *testing.T) {
	for _, tt := range []struct {
		options string
		open    []string // of x and y
		told    []string
	}{
		{"-q ehlo,helo", []string{"x: greeting 451", "y: greeting 451"}, nil},
		{"-q mail", []string{"x: mail 451", "y: mail 451"}, nil},
		{"-q rcpt", []string{"x: rcpt 451", "y: rcpt 451"}, nil},
		{"-q data", []string{"x: rcpt 451", "y: rcpt 451"}, nil},
		{"-q .", []string{"x: final 451", "y: final 451"}, nil},
		{"-Q ehlo,helo", []string{"x: greeting 451", "y: greeting 451"}, nil},
		{"-Q mail", []string{"x: mail 451", "y: mail 451"}, nil},
		{"-Q rcpt", []string{"x: rcpt 451", "y: rcpt 451"}, nil},
		{"-Q data", []string{"x: data 451", "y: data 451"}, nil},
		{"-Q .", []string{"x: final 451", "y: final 451"}, nil},
		{"-r ehlo,helo", []string{"x: greeting 451", "y: greeting 451"}, nil},
		{"-r mail", []string{"x: mail 450", "y: mail 450"}, nil},
		{"-r rcpt", []string{"x: rcpt 450", "y: rcpt 450"}, nil},
		{"-r data", []string{"x: data 450", "y: data 450"}, nil},
		{"-r .", []string{"x: final 450", "y: final 450"}, nil},
		{"-f ehlo,helo", []string{"x: greeting 451", "y: greeting 451"}, nil}, // about us, not about the message
		{"-f ehlo", nil, nil}, // it takes HELO
		{"-f mail", nil, []string{"x: 5.3.0", "y: 5.3.0"}},
		{"-f rcpt", nil, []string{"x: 5.3.0", "y: 5.3.0"}},
		{"-f data", nil, []string{"x: 5.3.0", "y: 5.3.0"}},
		{"-f .", nil, []string{"x: 5.3.0", "y: 5.3.0"}},
		{"-p", nil, nil},    // PIPELINING is not offered
		{"-8 -e", nil, nil}, // no 8BITMIME, no ESMTP
		{"-w 1", nil, nil},  // slow
		{"-W .:1:50", nil, nil},
		{"-T 512", nil, nil}, // a small window
	} {
		t.Run(tt.options, func(t *testing.T) {
			t.Parallel()
			s := mta.StartSink(t, strings.Fields(tt.options)...)
			w := newWorld(t, config.Transport{Hosts: []string{s.Addr}, TLS: config.TLSNone}, nil)
			w.send(t, "hello", strings.Repeat(".hello\r\n", 5000), "x@b.test", "y@b.test")
			if len(tt.open) == 0 {
				waitFor(t, "it is done with", func() bool { return len(w.List()) == 0 })
			}
			check(t, "open", w.quiet(t), tt.open...)
			check(t, "DSNs", w.failures(t), tt.told...)
			m := s.Messages(t)
			if taken := len(tt.open)+len(tt.told) == 0; taken && (len(m) != 1 || !strings.Contains(m[0], strings.Repeat(".hello\n", 5000))) {
				t.Errorf("the sink has %d messages, the first %.300q", len(m), append(m, "")[0])
			}
		})
	}
}

// A sink that disconnects in the middle of everything, now and then: each message is there in the end, and what came twice is counted.
func TestASinkThatDropsConnectionsLosesNothing(t *testing.T) {
	const count = 60
	s := mta.StartSink(t, "-q", "quit", "-W", "data:1:5")
	w := newWorld(t, config.Transport{Hosts: []string{s.Addr}, TLS: config.TLSNone}, nil)
	for i := range count {
		w.send(t, fmt.Sprintf("number %d.", i), "hello", "x@b.test", "y@b.test")
	}
	waitFor(t, "all are taken", func() bool { return len(w.List()) == 0 })
	text := strings.Join(s.Messages(t), "\n")
	for i := range count {
		if n := strings.Count(text, fmt.Sprintf("Subject: number %d.\n", i)); n != 1 {
			t.Errorf("message %d came %d times", i, n)
		}
	}
	check(t, "DSNs", w.failures(t))
}
