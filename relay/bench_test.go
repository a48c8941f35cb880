package relay

import (
	"bufio"
	"bytes"
	"io"
	"net"
	"os"
	"os/exec"
	"strings"
	"testing"
	"time"

	"github.com/rs/zerolog"

	"mailproxy/config"
)

// sink takes everything as fast as it comes: it answers each command of a burst, and reads bodies to their final dot.
func sink(t testing.TB) string {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			go serveSink(c)
		}
	}()
	return l.Addr().String()
}

func serveSink(c net.Conn) {
	defer c.Close()
	r, w := bufio.NewReaderSize(c, 64<<10), bufio.NewWriter(c)
	_, _ = w.WriteString("220 sink\r\n")
	for {
		if r.Buffered() == 0 && w.Flush() != nil {
			return
		}
		line, err := r.ReadSlice('\n')
		if err != nil {
			return
		}
		switch {
		case bytes.HasPrefix(line, []byte("EHLO")):
			_, _ = w.WriteString("250-sink\r\n250-SIZE\r\n250 PIPELINING\r\n")
		case bytes.HasPrefix(line, []byte("DATA")):
			_, _ = w.WriteString("354 go\r\n")
			if w.Flush() != nil {
				return
			}
			for {
				line, err := r.ReadSlice('\n')
				if err != nil && err != bufio.ErrBufferFull {
					return
				}
				if len(line) == 3 && line[0] == '.' {
					break
				}
			}
			_, _ = w.WriteString("250 2.0.0 Ok: queued\r\n")
		case bytes.HasPrefix(line, []byte("QUIT")):
			return
		default:
			_, _ = w.WriteString("250 2.1.0 Ok\r\n")
		}
	}
}

func BenchmarkDeliver(b *testing.B) {
	line := strings.Repeat("x", 76) + "\r\n"
	for _, bb := range []struct {
		name string
		size int
		to   int
	}{{"4kB", 4 << 10, 1}, {"4kB_20rcpt", 4 << 10, 20}, {"1MB", 1 << 20, 1}} {
		b.Run(bb.name, func(b *testing.B) {
			addr := sink(b)
			c := New(Options{Hostname: "test.example", Log: zerolog.Nop()})
			defer c.Close()
			content := []byte(strings.Repeat(line, bb.size/len(line)))
			a := attempt(addr, "")
			a.Transport.TLS = config.TLSNone
			for range bb.to {
				a.Paths = append(a.Paths, path("x@b.test"))
			}
			b.SetBytes(int64(len(content)))
			b.ReportAllocs()
			b.RunParallel(func(pb *testing.PB) {
				a := a
				a.Content = bytes.NewReader(content)
				for pb.Next() {
					if r, err := c.Deliver(bg(), a); err != nil || r[0].Reply.Code != 250 {
						b.Errorf("%v, %v", r, err)
						return
					}
				}
			})
		})
	}
}

func BenchmarkStuffing(b *testing.B) {
	src := []byte(strings.Repeat(strings.Repeat("x", 76)+"\r\n", 200))
	dst := make([]byte, 0, 2*len(src))
	b.SetBytes(int64(len(src)))
	for b.Loop() {
		dst, _ = appendStuffed(dst[:0], src, true)
	}
}

// smtp-sink is Postfix's own receiving server: a foreign eye on what is sent.
func TestSMTPSink(t *testing.T) {
	bin := "/usr/sbin/smtp-sink"
	if _, err := os.Stat(bin); err != nil {
		t.Fatalf("%v (Debian package postfix)", err)
	}
	for name, args := range map[string][]string{"with PIPELINING": nil, "without": {"-p"}, "without ESMTP": {"-e"}} {
		t.Run(name, func(t *testing.T) {
			l, err := net.Listen("tcp", "127.0.0.1:0")
			if err != nil {
				t.Fatal(err)
			}
			addr := l.Addr().String()
			l.Close()
			dir := t.TempDir()
			if err := os.Chmod(dir, 0o777); err != nil {
				t.Fatal(err)
			}
			cmd := exec.Command(bin, append(args, "-u", "nobody", "-R", dir, "-d", "m.", addr, "10")...)
			var stderr bytes.Buffer
			cmd.Stderr = &stderr
			if err := cmd.Start(); err != nil {
				t.Fatal(err)
			}
			defer func() { _ = cmd.Process.Kill(); _ = cmd.Wait() }()
			waitFor(t, "smtp-sink listens", func() bool {
				c, err := net.DialTimeout("tcp", addr, time.Second)
				if err == nil {
					c.Close()
				}
				return err == nil
			})
			c := testClient(t, nil)
			body := "Subject: x\r\n\r\n.\r\n..dots\r\nend\r\n"
			for range 3 {
				got, err := c.Deliver(bg(), attempt(addr, body, "x@b.test", "y@b.test"))
				if err != nil || got[0].Reply.Code != 250 || got[1].Reply.Code != 250 {
					t.Fatalf("got %s, %v; %s", summary(got), err, stderr.String())
				}
			}
			files, err := os.ReadDir(dir)
			if err != nil || len(files) != 3 {
				t.Fatalf("%d files, %v", len(files), err)
			}
			f, err := os.Open(dir + "/" + files[0].Name())
			if err != nil {
				t.Fatal(err)
			}
			defer f.Close()
			b, err := io.ReadAll(f)
			if err != nil || !strings.HasSuffix(strings.TrimRight(string(b), "\n"), "\n.\n..dots\nend") {
				t.Errorf("arrived as %q, %v", b, err)
			}
		})
	}
}
