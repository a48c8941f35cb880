package tunnel

import (
	"net"
	"strings"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/crypto/ssh"
)

// algorithms restricts both sides to what is fast and sound: X25519 (with ML-KEM where both know it) and AES-GCM. AES-GCM needs no
// MAC; the ones that are named are for who looks at the list.
func algorithms() ssh.Config {
	return ssh.Config{
		KeyExchanges: []string{ssh.KeyExchangeMLKEM768X25519, ssh.KeyExchangeCurve25519},
		Ciphers:      []string{ssh.CipherAES256GCM, ssh.CipherAES128GCM},
		MACs:         []string{ssh.HMACSHA256ETM, ssh.HMACSHA512ETM},
	}
}

// What both sides announce; it names no version of the software to strangers. The comment (RFC 4253 §4.2) says what a connection is for.
const (
	version     = "SSH-2.0-mailproxy"
	bulkVersion = version + " bulk"
)

// A use is what a connection between members is for.
type use int

const (
	useAll   use = iota // every stream that is not told otherwise
	useBulk             // what is large, so that nothing else waits behind it
	useTheir            // another program that holds the member's certificate: it opens streams, none is opened to it
)

// useOf reads what a client announced.
func useOf(clientVersion []byte) use {
	switch strings.TrimSuffix(string(clientVersion), " "+instanceOf(clientVersion)) {
	case version:
		return useAll
	case bulkVersion:
		return useBulk
	}
	return useTheir
}

func (u use) version() string {
	if u == useBulk {
		return bulkVersion
	}
	return version
}

// timing holds the package's time constants. Tests shorten them.
type timing struct {
	keepAlive     time.Duration // silence after which a keep-alive is sent where streams are open
	measure       time.Duration // between keep-alives for the peer's clock there
	idle          time.Duration // between keep-alives where no stream is open
	dead          time.Duration // silence after which a connection with streams is cut
	dial          time.Duration // for connecting
	handshake     time.Duration // from connecting to authenticated
	backoffMin    time.Duration
	backoffMax    time.Duration
	steady        time.Duration // a connection that lasted so long resets the back-off
	second        time.Duration // how long the higher CID leaves the first attempt to the lower
	surplus       time.Duration // how long a surplus connection without channels is kept
	unlike        time.Duration // how long a connection by another carrier than the wanted one is kept beside one by that
	bulkAgain     time.Duration // after a connection for bulk could not be made
	slow          time.Duration // how long a block takes on a link that is slow, see pack.go
	kick          time.Duration // Dial starts no attempt earlier than this after the last
	linger        time.Duration // for a closed stream to send its rest
	join          time.Duration // for a whole join exchange
	startup       time.Duration // for a PostgreSQL client to send its startup message
	joinEvery     time.Duration // one more join attempt per address, after joinBurst
	repeatedEvery time.Duration // the same event in the log
}

func defaultTiming() timing {
	return timing{
		keepAlive: 3 * time.Second, measure: 10 * time.Second, idle: 30 * time.Second, dead: 9 * time.Second, dial: 5 * time.Second, handshake: 10 * time.Second,
		backoffMin: 200 * time.Millisecond, backoffMax: 15 * time.Second, steady: 10 * time.Second,
		second: 150 * time.Millisecond, surplus: time.Second, unlike: 30 * time.Second, bulkAgain: time.Minute, slow: slowBlock, kick: time.Second, linger: 5 * time.Second,
		join: time.Minute, startup: 10 * time.Second, joinEvery: 2 * time.Second, repeatedEvery: 30 * time.Second,
	}
}

// bulkPatience is how many times longer a connection for bulk may be silent.
const bulkPatience = 10

// Bounds on what peers and strangers may hold.
const (
	maxChannels          = 64 // per peer and direction
	maxConnections       = 4  // per peer
	maxStrangers         = 64 // connections that have not authenticated
	maxStrangersPerHost  = 16
	maxAuthTries         = 2
	maxJoins             = 8 // at once
	joinBurst            = 10
	maxSocketConnections = 64 // per socket of a peer
)

// tcpUserTimeout is TCP_USER_TIMEOUT of linux/tcp.h, which package syscall does not name: how long sent data may stay unacknowledged
// until the kernel gives the connection up, in milliseconds.
const tcpUserTimeout = 18

// A wire is the connection under SSH; it knows when the last bytes came in.
//
// It also keeps SSH from waiting for ever: when nothing more can be read, SSH forgets its channels, and the opening of one that is
// asked for behind that has no answer. SSH refuses it only if a write has failed before, and the write that fails first is not
// reported. So the wire, before it reports that a read failed, fails all writes and has SSH do one.
type wire struct {
	net.Conn
	start  time.Time    // with its monotonic clock
	heard  atomic.Int64 // nanoseconds since start
	broken atomic.Bool
	last   atomic.Pointer[func()] // has SSH write
}

func newWire(c net.Conn, dead time.Duration) *wire {
	if tcp, ok := c.(*net.TCPConn); ok {
		if raw, err := tcp.SyscallConn(); err == nil {
			// Best effort: our own keep-alives notice too, this one frees what the kernel holds.
			raw.Control(func(fd uintptr) { //nolint:errcheck // as above
				syscall.SetsockoptInt(int(fd), syscall.IPPROTO_TCP, tcpUserTimeout, int(dead.Milliseconds())) //nolint:errcheck // as above
			})
		}
	}
	return &wire{Conn: c, start: time.Now()}
}

func (w *wire) Read(p []byte) (int, error) {
	n, err := w.Conn.Read(p)
	if n > 0 {
		w.heard.Store(int64(time.Since(w.start)))
	}
	if err != nil {
		w.broken.Store(true)
		w.Conn.Close() // a write that is stuck ends
		if write := w.last.Load(); write != nil {
			(*write)()
		}
	}
	return n, err
}

// guard is called once SSH is up on this wire, before channels are opened.
func (w *wire) guard(c ssh.Conn) {
	write := func() {
		c.SendRequest("last@mailproxy", false, nil) //nolint:errcheck // it is there to fail
	}
	w.last.Store(&write)
	if w.broken.Load() {
		write()
	}
}

func (w *wire) Write(p []byte) (int, error) {
	if w.broken.Load() {
		return 0, net.ErrClosed
	}
	return w.Conn.Write(p)
}

// silence is how long nothing came in.
func (w *wire) silence() time.Duration { return time.Since(w.start) - time.Duration(w.heard.Load()) }

// lastHeard is when the last bytes came in.
func (w *wire) lastHeard() time.Time { return w.start.Add(time.Duration(w.heard.Load())) }

// hostOf gives the address without the port, IPv6 addresses as their /64: what one stranger can have many of.
func hostOf(addr net.Addr) string {
	tcp, ok := addr.(*net.TCPAddr)
	if !ok {
		return addr.String()
	}
	ip := tcp.AddrPort().Addr().Unmap().WithZone("")
	if ip.Is4() {
		return ip.String()
	}
	if p, err := ip.Prefix(64); err == nil {
		return p.String()
	}
	return ip.String()
}
