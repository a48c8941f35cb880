package relay

import (
	"bytes"
	"errors"
	"net"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"mailproxy/config"
)

// FuzzHop plays a next hop that says whatever a fuzzer finds, and then no more: nothing panics, every recipient has an answer, one that is
// positive only where the dot was sent, and the dot only behind a 354.
func FuzzHop(f *testing.F) {
	for _, s := range []string{
		"", "220 hop\r\n", "220 hop\r\n250 hop\r\n250 ok\r\n250 ok\r\n354 go\r\n250 taken\r\n",
		"220 hop\r\n250-hop\r\n250-PIPELINING\r\n250-LIMITS RCPTMAX=1 MAILMAX=1\r\n250 SIZE\r\n250 ok\r\n250 ok\r\n354 go\r\n250 taken\r\n",
		"220 hop\r\n250-hop\r\n250 PIPELINING\r\n250 ok\r\n250 ok\r\n550 5.1.1 no\r\n354 go\r\n452 4.5.3 more\r\n",
		"220 hop\r\n250-hop\r\n250-XCLIENT ADDR\r\n250 AUTH PLAIN\r\n220 hop\r\n250 hop\r\n250 ok\r\n250 ok\r\n250 ok\r\n354 go\r\n554 no\r\n",
		"421 busy\r\n", "220-a\r\n220 b\r\n500 what\r\n250 ok\r\n530 5.7.0 TLS\r\n", "220 hop\r\n250 hop\r\n354 go\r\n250 ok\r\n",
		"220 hop\r\n250-hop\r\n250-PIPELINING\r\n250 DSN\r\n250 ok\r\n421 4.3.2 bye\r\n",
	} {
		f.Add([]byte(s), uint8(3))
	}
	l, err := net.Listen("unix", filepath.Join(f.TempDir(), "s")) // TCP would run out of ports
	if err != nil {
		f.Fatal(err)
	}
	f.Cleanup(func() { l.Close() })
	f.Fuzz(func(t *testing.T, said []byte, step uint8) {
		if len(said) > 16<<10 {
			return
		}
		got := make(chan []byte, 1)
		go func() {
			c, err := l.Accept()
			if err != nil {
				return
			}
			defer c.Close()
			go func() {
				for rest := said; len(rest) > 0; {
					n := min(len(rest), int(step)+1)
					if _, err := c.Write(rest[:n]); err != nil {
						return
					}
					rest = rest[n:]
				}
				_ = c.(*net.UnixConn).CloseWrite()
			}()
			_ = c.SetReadDeadline(time.Now().Add(10 * time.Second))
			var b bytes.Buffer
			_, _ = b.ReadFrom(c)
			got <- b.Bytes()
		}()
		c := testClient(t, nil)
		raw, err := net.Dial("unix", l.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		cn := newConn(hop{addr: "hop.test:25", tls: config.TLSNone}, "hop.test:25", raw, &c.t)
		if _, err := cn.hello(c, "hop.test", config.TLSNone); err != nil {
			cn.abort()
			<-got
			return
		}
		a := attempt("hop.test:25", "hello\r\n", "x@b.test", "y@c.test")
		results := make([]Result, len(a.Paths))
		x := newTransaction(cn, &a, results)
		err = x.deliver(bg())
		x.end()
		cn.abort()
		wire := string(<-got)
		dot := strings.HasSuffix(wire, "\r\n.\r\n")
		if dot && !bytes.Contains(said, []byte("354")) {
			t.Fatalf("a dot without a 354: %q", wire)
		}
		if err != nil && !errors.Is(err, ErrNoAnswer) {
			if un := new(unansweredError); !errors.As(err, &un) && !isOutOfReach(err) {
				t.Fatalf("%v", err)
			}
			if dot {
				t.Fatalf("%v, and yet the dot was sent", err)
			}
			return
		}
		for _, r := range results {
			switch {
			case r.Reply == nil:
				t.Fatalf("no answer for %s", r.Path)
			case r.Reply.Positive() && !dot:
				t.Fatalf("%s was taken without a dot: %s", r.Path, r.Reply)
			case r.Reply.Code < 200 || r.Reply.Code > 599 || strings.ContainsFunc(r.Reply.Text, func(c rune) bool { return c != '\n' && (c < ' ' || c > '~') }):
				t.Fatalf("%s: %q", r.Path, r.Reply)
			}
		}
	})
}

// FuzzCapabilities: whatever EHLO is answered, limits are numbers of RFC 9422.
func FuzzCapabilities(f *testing.F) {
	for _, s := range []string{"MAILMAX=5 RCPTMAX=100", "RCPTMAX", "RCPTMAX=-1", "RCPTMAX=99999999999999999999", "RCPTMAX=1 RCPTMAX=x", "="} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, text string) {
		var c capabilities
		c.limits(text)
		for _, n := range []int{c.mailMax, c.rcptMax, c.rcptDomainMax} {
			if n < 0 || n > 999_999 {
				t.Fatalf("%+v", c)
			}
		}
	})
}
