package smtpd

import (
	"bufio"
	"io"
	"net"
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

// idleSessions opens n sessions that have said EHLO, and gives what they take in octets, the clients' ends included.
func idleSessions(t testing.TB, n int) int64 {
	g := newRig(t, with(snapshot(), "max_sessions_per_address", "2000", "max_sessions_per_network", "2000"), func(o *Options) { o.Log = zerolog.Nop() })
	before := heldMemory()
	buf := make([]byte, 4096)
	for range n {
		c, err := net.Dial("tcp", g.addr)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { c.Close() })
		for _, say := range []string{"", "EHLO client.test\r\n"} {
			if _, err := io.WriteString(c, say); err != nil {
				t.Fatal(err)
			}
			if _, err := c.Read(buf); err != nil {
				t.Fatal(err)
			}
		}
	}
	return heldMemory() - before
}

func TestIdleSessionsTakeLittleMemory(t *testing.T) {
	const bound = 30 << 20
	if got := idleSessions(t, 1000); got > bound {
		t.Errorf("1,000 idle sessions take %d octets, want at most %d", got, bound)
	}
}

func BenchmarkIdleSessions(b *testing.B) {
	for b.Loop() {
		b.ReportMetric(float64(idleSessions(b, 1000))/1000, "octets/session")
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
