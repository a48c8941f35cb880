package smtpd

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"runtime"
	"strconv"
	"strings"
	"testing"

	"github.com/rs/zerolog"
)

// heldMemory is what is in use after a collection.
func heldMemory() int64 {
	runtime.GC()
	runtime.GC()
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return int64(m.HeapInuse + m.StackInuse)
}

// idleVar makes this binary the clients of a test of idle sessions, in a process of their own.
const idleVar = "SMTPD_TEST_IDLE"

// openIdleSessions opens so many sessions that say EHLO, says so, and holds them until its standard input ends.
func openIdleSessions(addr, count string) {
	n, err := strconv.Atoi(count)
	buf := make([]byte, 4096)
	conns := make([]net.Conn, 0, n)
	for len(conns) < n && err == nil {
		var c net.Conn
		if c, err = net.Dial("tcp", addr); err != nil {
			break
		}
		conns = append(conns, c)
		for _, say := range []string{"", "EHLO client.test\r\n"} {
			if _, err = io.WriteString(c, say); err == nil {
				_, err = c.Read(buf)
			}
			if err == nil && buf[0] != '2' {
				err = errors.New(string(buf[:50]))
			}
		}
	}
	fmt.Println(err)
	_, _ = io.Copy(io.Discard, os.Stdin)
	runtime.KeepAlive(conns)
	os.Exit(0)
}

// idleSessions holds n sessions that have said EHLO, and gives what each takes in octets: what the Go runtime has in use for it.
func idleSessions(t testing.TB, n int) int64 {
	t.Helper()
	most := strconv.Itoa(n)
	g := newRig(t, with(snapshot(), "max_sessions", most, "max_sessions_per_address", most, "max_sessions_per_network", most,
		"max_connections_per_minute", "0"), func(o *Options) { o.Log = zerolog.New(io.Discard).Level(zerolog.InfoLevel) })
	before := heldMemory()
	clients := exec.Command(os.Args[0], most)
	clients.Env = append(os.Environ(), idleVar+"="+g.addr)
	in, err := clients.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out, err := clients.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := clients.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() { _ = in.Close(); _ = clients.Wait() }()
	if line, err := bufio.NewReader(out).ReadString('\n'); err != nil || line != "<nil>\n" {
		t.Fatalf("clients: %s%v", line, err)
	}
	if open := g.server.Stats().Open; open != n {
		t.Fatalf("%d sessions are open, want %d", open, n)
	}
	return (heldMemory() - before) / int64(n)
}

func TestIdleSessionsTakeLittleMemory(t *testing.T) {
	const sessions, bound = 2000, 12 << 10
	if got := idleSessions(t, sessions); got > bound {
		t.Errorf("an idle session takes %d octets, want at most %d", got, bound)
	}
}

func BenchmarkIdleSessions(b *testing.B) {
	for b.Loop() {
		b.ReportMetric(float64(idleSessions(b, 9000)), "octets/session")
	}
}

// BenchmarkCutThrough sends messages of 4 kB to a next hop in this process, on 20 sessions.
func BenchmarkCutThrough(b *testing.B) {
	for _, recipients := range []int{1, 20} {
		b.Run(strconv.Itoa(recipients)+"rcpt", func(b *testing.B) { benchmarkMessages(b, recipients, 4<<10) })
	}
	b.Run("1MB", func(b *testing.B) { benchmarkMessages(b, 1, 1<<20) })
}

func benchmarkMessages(b *testing.B, recipients, size int) {
	h := newSink(b)
	g := newRig(b, snapshot("one.test", h), func(o *Options) { o.Log = zerolog.Nop() })
	var envelope strings.Builder
	envelope.WriteString("MAIL FROM:<a@sender.test>\r\n")
	for i := range recipients {
		envelope.WriteString("RCPT TO:<x" + strconv.Itoa(i) + "@one.test>\r\n")
	}
	envelope.WriteString("DATA\r\n")
	body := "Subject: x\r\n\r\n" + strings.Repeat(strings.Repeat("x", 70)+"\r\n", size/72) + ".\r\n"
	b.SetBytes(int64(len(body)))
	b.SetParallelism(10) // times GOMAXPROCS
	b.ReportAllocs()
	b.RunParallel(func(pb *testing.PB) {
		p := g.hello()
		for pb.Next() {
			p.send(envelope.String())
			for range recipients + 1 {
				p.want("250")
			}
			p.want("354")
			p.send(body)
			p.want("250")
		}
	})
}

// newSink is a next hop that takes everything and remembers nothing.
func newSink(b *testing.B) string {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() { l.Close() })
	go func() { // ends with the listener
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			go serveSink(c) // ends with the connection
		}
	}()
	return l.Addr().String()
}

func serveSink(c net.Conn) {
	defer c.Close()
	r, w := bufio.NewReaderSize(c, 64<<10), bufio.NewWriter(c)
	_, _ = w.WriteString("220 sink\r\n")
	for inData := false; ; {
		if r.Buffered() == 0 && w.Flush() != nil {
			return
		}
		line, err := r.ReadSlice('\n')
		if err != nil {
			return
		}
		switch {
		case inData:
			if len(line) == 3 && line[0] == '.' {
				inData = false
				_, _ = w.WriteString("250 taken\r\n")
			}
		case line[0] == 'E':
			_, _ = w.WriteString("250-sink\r\n250 PIPELINING\r\n")
		case line[0] == 'D':
			inData = true
			_, _ = w.WriteString("354 go on\r\n")
		default:
			_, _ = w.WriteString("250 OK\r\n")
		}
	}
}
