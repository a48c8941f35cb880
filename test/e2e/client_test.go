package e2e

import (
	"fmt"
	"io"
	"net"
	"regexp"
	"strings"
	"testing"
	"time"
)

// rough says the parts one after the other, each when something has come, and gives all that came until the server hung up or has
// said enough. A server that hangs up on what it has not read resets the connection, and its last words may be lost with that.
func (n *node) rough(enough *regexp.Regexp, parts ...string) (string, error) {
	c, err := net.Dial("tcp", net.JoinHostPort(n.address, smtpPort))
	if err != nil {
		return "", err
	}
	defer c.Close()
	if err := c.SetDeadline(time.Now().Add(patience / 2)); err != nil {
		return "", err
	}
	var all []byte
	buffer := make([]byte, 4096)
	for {
		got, err := c.Read(buffer)
		all = append(all, buffer[:got]...)
		if len(parts) == 0 && enough.Match(all) {
			return string(all), nil
		}
		if err != nil {
			return string(all), err
		}
		if len(parts) > 0 {
			if _, err := io.WriteString(c, parts[0]); err != nil {
				return string(all), err
			}
			parts = parts[1:]
		}
	}
}

func TestRoughClientsAreRefusedAndDisturbNobody(t *testing.T) {
	t.Parallel()
	n := newNode(t, "n1.test")
	n.startHealthy()
	sink := newSink()
	sink.listen(t)
	n.must("mailproxy", "domain", "add", "example.test", "--to", sink.Address)
	n.takes("to@example.test")
	const ehlo = "EHLO c.test\r\n"
	const envelope = "MAIL FROM:<a@b.test>\r\nRCPT TO:<to@example.test>\r\nDATA\r\n"
	for _, c := range []struct {
		name   string
		parts  []string
		want   string
		hangUp bool // is as good
	}{
		{"garbage", []string{strings.Repeat("\x00\xff\x13garbage\r\n", 100)}, `(?m)^5\d\d `, true},
		{"a line without end", []string{ehlo, strings.Repeat("x", 1<<20)}, `(?m)^5\d\d `, true},
		{"commands before the greeting was answered", []string{ehlo + envelope}, `(?m)^554 5\.5\.0 `, true},
		{"commands out of order", []string{ehlo, "DATA\r\n", "RCPT TO:<to@example.test>\r\n"}, `(?ms)^503 .*^503 `, false},
		{"somebody else's domain", []string{ehlo, "MAIL FROM:<a@b.test>\r\n", "RCPT TO:<to@elsewhere.test>\r\n"}, `(?m)^554 5\.7\.1 `, false},
		{"an end with bare newlines, and commands behind it", []string{ehlo, envelope,
			"Subject: bare\r\n\r\nx\n.\nMAIL FROM:<x@b.test>\n.\r\nx\r\n.\r\n", "QUIT\r\n"}, `(?ms)^354 .*^250 [^\n]*\n221 `, false},
	} {
		t.Run(c.name, func(t *testing.T) {
			want := regexp.MustCompile(c.want)
			got, err := n.rough(want, c.parts...)
			if !want.MatchString(got) && (err == nil || !c.hangUp) {
				t.Errorf("got %q, %v, want %s", got, err, c.want)
			}
		})
	}
	if got := sink.Count("bare"); got != 1 {
		t.Errorf("the message with bare newlines came %d times", got)
	}
	// A body that never ends stands in nobody's way.
	endless, err := net.Dial("tcp", net.JoinHostPort(n.address, smtpPort))
	if err != nil {
		t.Fatal(err)
	}
	defer endless.Close()
	_ = endless.SetDeadline(time.Now().Add(patience / 2)) // a failure shows below
	for _, part := range []string{ehlo, envelope, "Subject: endless\r\n\r\n" + strings.Repeat("more\r\n", 1000)} {
		if _, err := endless.Read(make([]byte, 4096)); err != nil {
			t.Fatal(err)
		}
		if _, err := io.WriteString(endless, part); err != nil {
			t.Fatal(err)
		}
	}
	n.mustSend("to@example.test", "after all that")
	if sink.Count("after all that") != 1 || sink.Count("endless") != 0 {
		t.Error("the next client's message has not arrived, or the endless one has")
	}
	if err := n.healthy(); err != nil {
		t.Error(err)
	}
}

func TestNextHopsThatMisbehave(t *testing.T) {
	t.Parallel()
	n := newNode(t, "n1.test")
	n.startHealthy()
	for i, c := range []struct {
		name    string
		replies map[string]string
		want    string // what the client is told
	}{
		{"talks nonsense", map[string]string{"": "hello there"}, `^2\.0\.0 queued as`},
		{"closes at once", map[string]string{"": ""}, `^2\.0\.0 queued as`},
		{"closes at EHLO", map[string]string{"EHLO": "", "HELO": ""}, `^2\.0\.0 queued as`},
		{"closes at MAIL", map[string]string{"MAIL": ""}, `^2\.0\.0 queued as`},
		{"refuses the sender", map[string]string{"MAIL": "550 5.7.27 not from you"}, ` S: 550 5\.7\.27 `},
		{"refuses the recipient", map[string]string{"RCPT": "550 5.1.1 nobody"}, `^C: RCPT .* S: 550 5\.1\.1 `},
		{"closes at DATA", map[string]string{"DATA": ""}, ` S: 451 `},
		{"refuses the message", map[string]string{".": "554 5.6.0 not this"}, ` S: 554 5\.6\.0 `},
		{"wants it later", map[string]string{".": "451 4.3.0 later"}, ` S: 451 4\.3\.0 `},
		{"shuts down", map[string]string{".": "421 4.3.2 shutting down"}, ` S: 451 4\.3\.2 `},
		{"closes behind the final dot", map[string]string{".": ""}, ` S: 451 `},
	} {
		domain := fmt.Sprintf("hop%d.test", i)
		hop := newSink()
		hop.Replies = c.replies
		hop.listen(t)
		n.must("mailproxy", "domain", "add", domain, "--to", hop.Address)
		n.eventually(func() error { // until it is known, the domain is somebody else's
			reply, err := n.send("to@"+domain, "x", 0)
			if err != nil {
				reply = err.Error()
			}
			if strings.Contains(reply, "554 5.7.1") {
				return err
			}
			if !regexp.MustCompile(c.want).MatchString(reply) {
				t.Errorf("a next hop that %s: %s, want %s", c.name, reply, c.want)
			}
			return nil
		})
	}
	if err := n.healthy(); err != nil {
		t.Error(err)
	}
}
