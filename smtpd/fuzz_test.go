package smtpd

import (
	"io"
	"net"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"
	"unicode"

	"mailproxy/config"
	"mailproxy/mail"
)

// wireReply is what may stand on the wire from us: codes and printable ASCII.
var wireReply = regexp.MustCompile(`^[2345][0-9][0-9][ -][ -~]*\r\n$`)

// FuzzSession plays a client's octets, in stretches: nothing panics, every reply is well-formed, and what the next hop gets is
// framed.
func FuzzSession(f *testing.F) {
	files, _ := filepath.Glob("testdata/*.txt")
	for _, file := range files {
		text, err := os.ReadFile(file)
		if err != nil {
			f.Fatal(err)
		}
		var said strings.Builder
		for line := range strings.SplitSeq(string(text), "\n") {
			if c, ok := strings.CutPrefix(line, "C: "); ok {
				said.WriteString(c + "\r\n")
			}
		}
		f.Add([]byte(said.String()), uint8(20))
	}
	for _, s := range notEnds {
		f.Add([]byte("HELO c\r\nMAIL FROM:<>\r\nRCPT TO:<x@one.test>\r\nDATA\r\na"+s+"b\r\n.\r\nQUIT\r\n"), uint8(1))
	}
	h := newHop(f)
	s := snapshot("one.test", h.addr())
	s.Settings = []config.Setting{{Name: "idle_timeout", Value: "1s"}}
	g := newRig(f, s, nil)
	f.Fuzz(func(t *testing.T, octets []byte, step uint8) {
		c, err := net.Dial("tcp", g.addr)
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		_ = c.SetDeadline(time.Now().Add(patience))
		go func() { // ends with the connection
			for rest := octets; len(rest) > 0; {
				n := min(len(rest), int(step)+1)
				if _, err := c.Write(rest[:n]); err != nil {
					return
				}
				rest = rest[n:]
			}
			_ = c.(*net.TCPConn).CloseWrite()
		}()
		said, err := io.ReadAll(c)
		if ne, ok := err.(net.Error); ok && ne.Timeout() {
			t.Fatal("hangs")
		}
		for line := range strings.SplitAfterSeq(string(said), "\n") {
			if line != "" && err == nil && !wireReply.MatchString(line) {
				t.Fatalf("said %q", line)
			}
		}
		for _, m := range h.messages() {
			if strings.ContainsAny(strings.ReplaceAll(m.wire, "\r\n", ""), "\r\n") || strings.Contains("\r\n"+m.wire, "\r\n.\r\n") {
				t.Fatalf("to the next hop: %q", m.wire)
			}
		}
		h.forget()
		if strings.Contains(g.log.String(), "panic") {
			t.Fatal(g.log.String())
		}
		g.log.reset()
	})
}

// FuzzCommand: the path that MAIL or RCPT gives, written down, is read as the same path, and has no controls in it.
func FuzzCommand(f *testing.F) {
	for _, s := range []string{
		`FROM:<a@b.test> SIZE=3`, `FROM:<"a> X=Y <b"@c.test>`, `FROM: <>`, `from:<@a:b@c.test> BODY=8BITMIME SMTPUTF8`, `TO:<a@b.test> NOTIFY=NEVER`,
		`TO:<"a> NOTIFY=NEVER <b"@c.test> ORCPT=rfc822;a+40b`, `to:<postmaster>`, "TO:<\u00fc@\u00fc.test>", "TO:<\"a\u009b\"@b.test>",
		`FROM:<a@b.test> RET=FULL ENVID=a+2Bb`, `TO:<a@b.test> NOTIFY=DELAY,SUCCESS ORCPT=utf-8;\x{FC}@b.test`,
	} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		keyword, parse := "FROM:<", parseMail
		if len(s) > 0 && (s[0] == 'T' || s[0] == 't') {
			keyword, parse = "TO:<", func(s string) (command, *mail.Reply) { return parseRcpt(s, true) }
		}
		cmd, refused := parse(s)
		if refused != nil {
			return
		}
		written := cmd.path.String()
		again, refused := parse(keyword + written + ">")
		if refused == replyNeedsUTF8 {
			again, refused = parse(keyword + written + "> SMTPUTF8")
		}
		if refused != nil || again.path != cmd.path {
			t.Fatalf("%q gives %q, which gives %q, %v", s, cmd.path, again.path, refused)
		}
		said := written + cmd.envID + cmd.params.Original
		if strings.ContainsFunc(said, unicode.IsControl) {
			t.Fatalf("%q gives %q", s, said)
		}
	})
}
