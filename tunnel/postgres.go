package tunnel

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"strings"
	"time"

	"mailproxy/config"
)

// Codes of PostgreSQL's first message (its documentation, "Message Formats").
const (
	pgCancelRequest = 1234<<16 | 5678
	pgSSLRequest    = 1234<<16 | 5679
	pgGSSRequest    = 1234<<16 | 5680
	pgProtocol3     = 3

	// maxStartupBytes is PostgreSQL's own bound for the startup message.
	maxStartupBytes = 10000
)

var (
	errCancelRequest = errors.New("cancel request")
	errStartup       = errors.New("malformed startup message")
	errReplication   = errors.New("replication connection")
)

// startup is what the gate needs to know of a StartupMessage. User, database and every other parameter are dropped: the gate sets
// its own.
type startup struct {
	minor   int      // of protocol 3
	options []string // protocol options (_pq_.…), none of which we know
}

// ServePostgres is the gate for PostgreSQL. It reads the startup message, drops all that it says, refuses replication and cancel
// requests, and connects the stream with a session that backend opens for this peer: its connection, idle after startup, and the
// backend's messages of the startup, which the peer is told.
func ServePostgres(backend func(ctx context.Context, from config.CID) (net.Conn, []byte, error)) Handler {
	return servePostgres(backend, defaultTiming().startup)
}

func servePostgres(backend func(ctx context.Context, from config.CID) (net.Conn, []byte, error), limit time.Duration) Handler {
	return func(ctx context.Context, from config.CID, conn net.Conn) {
		stop := context.AfterFunc(ctx, func() { conn.Close() }) // closed twice at worst
		defer stop()
		conn.SetDeadline(time.Now().Add(limit)) //nolint:errcheck // a closed conn fails below
		wants, err := negotiate(conn)
		switch {
		case errors.Is(err, errReplication):
			conn.Write(errorResponse("28000", "replication is not open to peers")) //nolint:errcheck // refused either way
			return
		case errors.Is(err, errStartup):
			conn.Write(errorResponse("08P01", err.Error())) //nolint:errcheck // as above
			return
		case err != nil:
			return // a cancel request gets no answer, as in PostgreSQL
		}
		conn.SetDeadline(time.Time{}) //nolint:errcheck // a closed conn fails below
		local, messages, err := backend(ctx, from)
		if err != nil {
			// The cause is this node's business: it stands in its own status and log.
			conn.Write(errorResponse("57P03", fmt.Sprintf("node %s: PostgreSQL is not ready", conn.LocalAddr()))) //nolint:errcheck // as above
			return
		}
		defer local.Close() // closed twice at worst
		if _, err := conn.Write(append(wants.negotiated(), messages...)); err != nil {
			return
		}
		pipe(ctx, conn, local)
	}
}

// negotiate reads up to the startup message. Encryption is answered with no: the tunnel has it.
func negotiate(conn io.ReadWriter) (startup, error) {
	for asked := 0; ; asked++ {
		packet, err := readStartup(conn)
		if err != nil {
			return startup{}, err
		}
		code := binary.BigEndian.Uint32(packet)
		if code != pgSSLRequest && code != pgGSSRequest {
			return parseStartup(packet)
		}
		if asked == 2 || len(packet) != 4 {
			return startup{}, errStartup
		}
		if _, err := conn.Write([]byte{'N'}); err != nil {
			return startup{}, err
		}
	}
}

// readStartup reads a first message: its length is checked before anything is read by it.
func readStartup(r io.Reader) ([]byte, error) {
	var head [4]byte
	if _, err := io.ReadFull(r, head[:]); err != nil {
		return nil, err
	}
	n := binary.BigEndian.Uint32(head[:])
	if n < 8 || n > maxStartupBytes {
		return nil, fmt.Errorf("%w: length %d", errStartup, n)
	}
	packet := make([]byte, n-4)
	_, err := io.ReadFull(r, packet)
	return packet, err
}

// parseStartup reads a StartupMessage or CancelRequest, without its length.
func parseStartup(packet []byte) (startup, error) {
	if len(packet) < 4 {
		return startup{}, errStartup
	}
	code, rest := binary.BigEndian.Uint32(packet), packet[4:]
	if code == pgCancelRequest {
		return startup{}, errCancelRequest
	}
	if code>>16 != pgProtocol3 {
		return startup{}, fmt.Errorf("%w: protocol %d.%d", errStartup, code>>16, code&0xffff)
	}
	s := startup{minor: int(code & 0xffff)}
	for {
		key, after, ok := bytes.Cut(rest, []byte{0})
		if !ok {
			return startup{}, fmt.Errorf("%w: no terminator", errStartup)
		}
		if len(key) == 0 {
			if len(after) > 0 {
				return startup{}, fmt.Errorf("%w: data behind the terminator", errStartup)
			}
			return s, nil
		}
		value, after, ok := bytes.Cut(after, []byte{0})
		if !ok {
			return startup{}, fmt.Errorf("%w: parameter without value", errStartup)
		}
		switch name := string(key); {
		case name == "replication" && !isFalse(string(value)):
			return startup{}, errReplication
		case strings.HasPrefix(name, "_pq_."):
			s.options = append(s.options, name)
		}
		rest = after
	}
}

// isFalse knows PostgreSQL's words for false, no more: anything else may ask for replication.
func isFalse(s string) bool {
	switch strings.ToLower(s) {
	case "false", "off", "no", "0":
		return true
	}
	return false
}

// negotiated is the NegotiateProtocolVersion message for a client that asked for more than protocol 3.0; empty for one that did not.
func (s startup) negotiated() []byte {
	if s.minor == 0 && len(s.options) == 0 {
		return nil
	}
	body := binary.BigEndian.AppendUint32(nil, pgProtocol3<<16)
	body = binary.BigEndian.AppendUint32(body, uint32(len(s.options)))
	for _, o := range s.options {
		body = append(append(body, o...), 0)
	}
	return pgMessage('v', body)
}

// errorResponse is a fatal ErrorResponse.
func errorResponse(sqlstate, text string) []byte {
	var body []byte
	for _, f := range []string{"SFATAL", "VFATAL", "C" + sqlstate, "M" + strings.ReplaceAll(text, "\x00", "?")} {
		body = append(append(body, f...), 0)
	}
	return pgMessage('E', append(body, 0))
}

func pgMessage(kind byte, body []byte) []byte {
	m := binary.BigEndian.AppendUint32([]byte{kind}, uint32(4+len(body)))
	return append(m, body...)
}
