package tunnel

import (
	"bytes"
	"context"
	"crypto/rand"
	"errors"
	"io"
	"net"
	"os"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/crypto/ssh"
	"golang.org/x/net/nettest"

	"mailproxy/config"
)

// sshPair is two ends of an SSH connection over loopback.
type sshPair struct {
	client   ssh.Conn
	server   ssh.Conn
	incoming <-chan ssh.NewChannel
	raw      net.Conn // the client's
	packed   bool
	own      owned
}

func newSSHPair(t testing.TB) *sshPair {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	key, err := LoadOrMakeKey(t.TempDir() + "/k")
	if err != nil {
		t.Fatal(err)
	}
	p := &sshPair{}
	server := &ssh.ServerConfig{Config: algorithms(), NoClientAuth: true}
	server.AddHostKey(key.signer)
	accepted := make(chan error, 1)
	var serverRequests <-chan *ssh.Request
	go func() {
		raw, err := l.Accept()
		if err == nil {
			p.server, p.incoming, serverRequests, err = ssh.NewServerConn(raw, server)
		}
		accepted <- err
	}()
	if p.raw, err = net.Dial("tcp", l.Addr().String()); err != nil {
		t.Fatal(err)
	}
	w := newWire(p.raw, time.Minute)
	c, channels, requests, err := ssh.NewClientConn(w, "x", &ssh.ClientConfig{
		Config: algorithms(), HostKeyCallback: ssh.InsecureIgnoreHostKey(),
	})
	if err != nil {
		t.Fatal(err)
	}
	w.guard(c)
	if err := <-accepted; err != nil {
		t.Fatal(err)
	}
	p.client = c
	p.own.spawn(func() { answer(requests, time.Now, func() string { return "" }) })
	p.own.spawn(func() { answer(serverRequests, time.Now, func() string { return "" }) })
	p.own.spawn(func() { refuseChannels(channels) })
	t.Cleanup(func() {
		p.client.Close()
		p.server.Close()
		p.own.wait()
	})
	return p
}

// eachConn runs a test with conns of both kinds.
func eachConn(t *testing.T, test func(t *testing.T, p *sshPair)) {
	for name, packed := range map[string]bool{"plain": false, "packed": true} {
		t.Run(name, func(t *testing.T) {
			p := newSSHPair(t)
			p.packed = packed
			test(t, p)
		})
	}
}

// noise is what cannot be packed.
func noise(n int) []byte {
	b := make([]byte, n)
	rand.Read(b) // never fails
	return b
}

func (p *sshPair) newConn(ch ssh.Channel, requests <-chan *ssh.Request, local, remote Addr) (*conn, error) {
	c := &conn{local: local, remote: remote, linger: 200 * time.Millisecond, packed: p.packed}
	return startConn(ch, requests, c, p.own.spawn, func(*conn) {})
}

// pair opens a channel and gives both ends.
func (p *sshPair) pair() (a, b *conn, err error) {
	type end struct {
		c   *conn
		err error
	}
	far := make(chan end, 1)
	go func() {
		ch, requests, err := (<-p.incoming).Accept()
		if err != nil {
			far <- end{nil, err}
			return
		}
		c, err := p.newConn(ch, requests, Addr{2, "x"}, Addr{1, "x"})
		far <- end{c, err}
	}()
	ch, requests, err := p.client.OpenChannel("x", nil)
	if err != nil {
		return nil, nil, err
	}
	if a, err = p.newConn(ch, requests, Addr{1, "x"}, Addr{2, "x"}); err != nil {
		return nil, nil, err
	}
	e := <-far
	return a, e.c, e.err
}

func (p *sshPair) mustPair(t testing.TB) (a, b *conn) {
	t.Helper()
	a, b, err := p.pair()
	if err != nil {
		t.Fatal(err)
	}
	return a, b
}

func TestConnConforms(t *testing.T) { eachConn(t, testConnConforms) }

func testConnConforms(t *testing.T, p *sshPair) {
	nettest.TestConn(t, func() (c1, c2 net.Conn, stop func(), err error) {
		a, b, err := p.pair()
		return a, b, func() { a.Close(); b.Close() }, err
	})
}

func TestADeadlineEndsWhatIsUnderWay(t *testing.T) { eachConn(t, testADeadlineEndsWhatIsUnderWay) }

func testADeadlineEndsWhatIsUnderWay(t *testing.T, p *sshPair) {
	for what, use := range map[string]func(c net.Conn) error{
		"a read that nobody answers": func(c net.Conn) error {
			c.SetReadDeadline(time.Now().Add(50 * time.Millisecond))
			_, err := c.Read(make([]byte, 1))
			return err
		},
		"a write that nobody reads": func(c net.Conn) error {
			c.SetWriteDeadline(time.Now().Add(50 * time.Millisecond))
			_, err := c.Write(noise(8 << 20)) // more than SSH's window
			return err
		},
		"a read with a deadline set meanwhile": func(c net.Conn) error {
			time.AfterFunc(50*time.Millisecond, func() { c.SetDeadline(time.Unix(1, 0)) })
			_, err := c.Read(make([]byte, 1))
			return err
		},
	} {
		t.Run(what, func(t *testing.T) {
			a, b := p.mustPair(t)
			defer a.Close()
			defer b.Close()
			began := time.Now()
			err := use(a)
			if !errors.Is(err, os.ErrDeadlineExceeded) || time.Since(began) > 2*time.Second {
				t.Errorf("got %v after %v, want %v", err, time.Since(began), os.ErrDeadlineExceeded)
			}
		})
	}
}

func TestHalfAClose(t *testing.T) { eachConn(t, testHalfAClose) }

func testHalfAClose(t *testing.T, p *sshPair) {
	a, b := p.mustPair(t)
	defer a.Close()
	defer b.Close()
	io.WriteString(a, "all I have to say")
	if err := a.CloseWrite(); err != nil {
		t.Fatal(err)
	}
	if got, err := io.ReadAll(b); err != nil || string(got) != "all I have to say" {
		t.Fatalf("got %q, %v", got, err)
	}
	if _, err := io.WriteString(a, "more"); !errors.Is(err, syscall.EPIPE) {
		t.Errorf("a write behind CloseWrite: %v, want %v", err, syscall.EPIPE)
	}
	io.WriteString(b, "the answer")
	b.Close()
	if got, err := io.ReadAll(a); err != nil || string(got) != "the answer" {
		t.Errorf("the other way: %q, %v", got, err)
	}
}

func TestCloseSendsWhatWasWritten(t *testing.T) { eachConn(t, testCloseSendsWhatWasWritten) }

func testCloseSendsWhatWasWritten(t *testing.T, p *sshPair) {
	for range 50 {
		a, b := p.mustPair(t)
		data := bytes.Repeat([]byte("x"), 1<<20)
		if _, err := a.Write(data); err != nil {
			t.Fatal(err)
		}
		a.Close()
		if got, err := io.ReadAll(b); err != nil || len(got) != len(data) {
			t.Fatalf("%d bytes of %d arrived, %v", len(got), len(data), err)
		}
		b.Close()
	}
}

func TestCloseGivesUpOnAPeerThatDoesNotRead(t *testing.T) {
	eachConn(t, testCloseGivesUpOnAPeerThatDoesNotRead)
}

func testCloseGivesUpOnAPeerThatDoesNotRead(t *testing.T, p *sshPair) {
	a, b := p.mustPair(t)
	for n := 1; n > 0; { // until SSH's window is full
		a.SetWriteDeadline(time.Now().Add(100 * time.Millisecond))
		n, _ = a.Write(noise(1 << 20))
	}
	a.Close()
	// Only now does it read: what it gets is marked as not whole.
	eventually(t, "channel is closed", 5*time.Second, func() bool {
		b.SetWriteDeadline(time.Now().Add(time.Second))
		_, err := b.Write([]byte("x"))
		return err != nil
	})
	if _, err := io.Copy(io.Discard, b); !errors.Is(err, ErrLost) {
		t.Errorf("the reader got %v, want %v", err, ErrLost)
	}
	b.Close()
}

func TestABrokenConnectionIsNoEndOfFile(t *testing.T) {
	eachConn(t, testABrokenConnectionIsNoEndOfFile)
}

func testABrokenConnectionIsNoEndOfFile(t *testing.T, p *sshPair) {
	a, b := p.mustPair(t)
	io.WriteString(a, "half of it")
	got := make([]byte, 10)
	if _, err := io.ReadFull(b, got); err != nil {
		t.Fatal(err)
	}
	p.raw.Close()
	if _, err := b.Read(got); !errors.Is(err, ErrLost) {
		t.Errorf("read %v, want %v", err, ErrLost)
	}
	if _, err := io.Copy(b, strings.NewReader(strings.Repeat("x", 1<<20))); err == nil {
		t.Error("a write into a broken connection succeeded")
	}
}

func TestConcurrentWritesDoNotMix(t *testing.T) { eachConn(t, testConcurrentWritesDoNotMix) }

func testConcurrentWritesDoNotMix(t *testing.T, p *sshPair) {
	a, b := p.mustPair(t)
	defer b.Close()
	var writers sync.WaitGroup
	const size = 100_000
	for _, letter := range []string{"a", "b", "c"} {
		writers.Go(func() { io.WriteString(a, strings.Repeat(letter, size)) })
	}
	go func() { writers.Wait(); a.Close() }()
	got, err := io.ReadAll(b)
	if err != nil || len(got) != 3*size {
		t.Fatalf("%d bytes, %v", len(got), err)
	}
	for i := range 3 {
		part := got[i*size : (i+1)*size]
		if bytes.Count(part, part[:1]) != size {
			t.Fatal("two writes are mixed")
		}
	}
}

// What is opened while the connection ends must not wait for ever (see wire).
func TestOpeningWhileTheConnectionEnds(t *testing.T) {
	for range 150 {
		p := newSSHPair(t)
		p.own.spawn(func() { refuseChannels(p.incoming) })
		var all sync.WaitGroup
		for range 4 {
			all.Go(func() {
				for {
					var refused *ssh.OpenChannelError
					if _, _, err := p.client.OpenChannel("x", nil); !errors.As(err, &refused) {
						return
					}
				}
			})
		}
		p.server.Close()
		done := make(chan struct{})
		go func() { all.Wait(); close(done) }()
		select {
		case <-done:
		case <-time.After(10 * time.Second):
			t.Fatal("the opening of a channel hangs")
		}
	}
}

// BenchmarkConn is the stream's bulk speed over loopback TCP.
func BenchmarkConn(b *testing.B) {
	x, y := newSSHPair(b).mustPair(b)
	buf := make([]byte, 64<<10)
	b.SetBytes(int64(len(buf)))
	done := make(chan struct{})
	go func() { io.Copy(io.Discard, y); close(done) }()
	for b.Loop() {
		if _, err := x.Write(buf); err != nil {
			b.Fatal(err)
		}
	}
	x.Close()
	<-done
}

// BenchmarkRoundTrip is one byte there and back.
func BenchmarkRoundTrip(b *testing.B) {
	x, y := newSSHPair(b).mustPair(b)
	go echo(context.Background(), config.CID(1), y)
	buf := make([]byte, 1)
	for b.Loop() {
		x.Write(buf)
		io.ReadFull(x, buf)
	}
	x.Close()
}
