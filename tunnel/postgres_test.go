package tunnel

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"io"
	"net"
	"strings"
	"testing"
	"time"

	"mailproxy/config"
)

// pgStartup is a first message: its length, a code, and parameters.
func pgStartup(code uint32, params ...string) []byte {
	body := binary.BigEndian.AppendUint32(nil, code)
	for _, p := range params {
		body = append(append(body, p...), 0)
	}
	if len(params) > 0 {
		body = append(body, 0)
	}
	return append(binary.BigEndian.AppendUint32(nil, uint32(4+len(body))), body...)
}

// A backend is the local session that the gate opened: the test's end, and for whom.
type backend struct {
	net.Conn
	from config.CID
}

// gate serves one stream of node 3 and gives the client's end and the backends that were opened.
func gate(t *testing.T, startupMessages string, fail error) (client net.Conn, opened chan backend) {
	t.Helper()
	opened = make(chan backend, 1)
	handler := servePostgres(func(_ context.Context, from config.CID) (net.Conn, []byte, error) {
		if fail != nil {
			return nil, nil, fail
		}
		ours, theirs := net.Pipe()
		opened <- backend{theirs, from}
		return ours, []byte(startupMessages), nil
	}, quick().startup)
	client, server := newSSHPair(t).mustPair(t)
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		handler(context.Background(), 3, server)
		server.Close()
	}()
	t.Cleanup(func() {
		client.Close()
		select {
		case <-ended:
		case <-time.After(5 * time.Second):
			t.Error("the handler did not return")
		}
	})
	client.SetDeadline(time.Now().Add(5 * time.Second))
	return client, opened
}

// nextMessage reads one backend message.
func nextMessage(t *testing.T, r io.Reader) (kind byte, body string) {
	t.Helper()
	head := make([]byte, 5)
	if _, err := io.ReadFull(r, head); err != nil {
		t.Fatalf("read message: %v", err)
	}
	rest := make([]byte, binary.BigEndian.Uint32(head[1:])-4)
	if _, err := io.ReadFull(r, rest); err != nil {
		t.Fatalf("read message: %v", err)
	}
	return head[0], string(rest)
}

func TestTheGateDropsWhatTheStartupMessageSays(t *testing.T) {
	c, opened := gate(t, "R-and-so-on", nil)
	c.Write(pgStartup(3<<16, "user", "postgres", "database", "template1", "options", "-c session_authorization=postgres",
		"search_path", "pg_temp"))
	got := make([]byte, len("R-and-so-on"))
	if _, err := io.ReadFull(c, got); err != nil || string(got) != "R-and-so-on" {
		t.Fatalf("the client was told %q, %v", got, err)
	}
	b := <-opened
	if b.from != 3 {
		t.Errorf("the session is for node %d, want 3", b.from)
	}
	// The first bytes that the backend sees are those behind the startup message.
	go c.Write([]byte("Q-and-so-on"))
	first := make([]byte, 11)
	if _, err := io.ReadFull(b, first); err != nil || string(first) != "Q-and-so-on" {
		t.Errorf("the backend was sent %q, %v", first, err)
	}
	go b.Write([]byte("answer"))
	if _, err := io.ReadFull(c, got[:6]); err != nil || string(got[:6]) != "answer" {
		t.Errorf("the client was answered %q, %v", got[:6], err)
	}
	b.Close()
	if rest, err := io.ReadAll(c); err != nil || len(rest) > 0 {
		t.Errorf("at the session's end the client read %q, %v", rest, err)
	}
}

func TestTheGateHangsUpOnTheBackendWithItsClient(t *testing.T) {
	c, opened := gate(t, "", nil)
	c.Write(pgStartup(3<<16, "user", "x"))
	b := <-opened
	c.Close()
	if _, err := b.Read(make([]byte, 1)); err == nil {
		t.Error("the backend is still open")
	}
}

func TestTheGateSaysNoToEncryption(t *testing.T) {
	c, opened := gate(t, "", nil)
	for _, code := range []uint32{pgGSSRequest, pgSSLRequest} {
		c.Write(pgStartup(code))
		if got := []byte{0}; true {
			if _, err := io.ReadFull(c, got); err != nil || got[0] != 'N' {
				t.Fatalf("code %d was answered %q, %v; want N", code, got, err)
			}
		}
	}
	c.Write(pgStartup(3<<16, "user", "x"))
	(<-opened).Close()
}

func TestTheGateRefuses(t *testing.T) {
	long := strings.Repeat("x", maxStartupBytes)
	for what, c := range map[string]struct {
		send  []byte
		state string // SQLSTATE of the answer; empty: no answer
	}{
		"replication":                        {pgStartup(3<<16, "user", "x", "replication", "true"), "28000"},
		"replication of a database":          {pgStartup(3<<16, "replication", "database"), "28000"},
		"replication by any other word":      {pgStartup(3<<16, "replication", ""), "28000"},
		"a cancel request":                   {append(pgStartup(pgCancelRequest)[:0:0], 0, 0, 0, 16, 4, 210, 22, 46, 0, 0, 0, 1, 0, 0, 0, 2), ""},
		"a startup message that is too long": {pgStartup(3<<16, "user", long), "08P01"},
		"a length of 2 GiB":                  {[]byte{0x7f, 0xff, 0xff, 0xff, 0, 3, 0, 0}, "08P01"},
		"a length of none":                   {[]byte{0, 0, 0, 0, 0, 3, 0, 0}, "08P01"},
		"protocol 2":                         {pgStartup(2<<16, "x"), "08P01"},
		"no terminator":                      {[]byte{0, 0, 0, 13, 0, 3, 0, 0, 'u', 's', 'e', 'r', 0}, "08P01"},
		"data behind the terminator":         {[]byte{0, 0, 0, 10, 0, 3, 0, 0, 0, 'x'}, "08P01"},
		"three questions for encryption":     {bytes.Repeat(pgStartup(pgSSLRequest), 3), "08P01"},
		"HTTP":                               {[]byte("GET / HTTP/1.1\r\n\r\n"), "08P01"},
		"a startup message that stops":       {[]byte{0, 0, 0, 100, 0, 3}, ""},
		"nothing":                            {nil, ""},
	} {
		t.Run(what, func(t *testing.T) {
			client, opened := gate(t, "", nil)
			client.Write(c.send)
			got, err := io.ReadAll(client)
			if err != nil {
				t.Fatalf("read: %v", err)
			}
			got = bytes.TrimLeft(got, "N")
			if c.state == "" {
				if len(got) > 0 {
					t.Errorf("was answered %q", got)
				}
			} else if kind, body := nextMessage(t, bytes.NewReader(got)); kind != 'E' || !strings.Contains(body, "C"+c.state+"\x00") {
				t.Errorf("was answered %c %q, want an error %s", kind, body, c.state)
			}
			select {
			case <-opened:
				t.Error("a session was opened")
			default:
			}
		})
	}
}

func TestTheGateKeepsItsCausesToItself(t *testing.T) {
	c, _ := gate(t, "", errors.New("password of peer_3 is hunter2"))
	c.Write(pgStartup(3<<16, "user", "x"))
	kind, body := nextMessage(t, c)
	if kind != 'E' || !strings.Contains(body, "C57P03\x00") || strings.Contains(body, "hunter2") {
		t.Errorf("got %c %q", kind, body)
	}
}

func TestTheGateSpeaksProtocol30(t *testing.T) {
	c, opened := gate(t, "", nil)
	c.Write(pgStartup(3<<16|2, "user", "x", "_pq_.command_tag", "1"))
	kind, body := nextMessage(t, c)
	want := "\x00\x03\x00\x00" + "\x00\x00\x00\x01" + "_pq_.command_tag\x00"
	if kind != 'v' || body != want {
		t.Errorf("got %c %q, want v %q", kind, body, want)
	}
	(<-opened).Close()
}

func FuzzStartup(f *testing.F) {
	f.Add(pgStartup(3<<16, "user", "x", "database", "y")[4:])
	f.Add(pgStartup(pgCancelRequest)[4:])
	f.Add(pgStartup(3<<16|1, "_pq_.x", "1", "replication", "off")[4:])
	f.Fuzz(func(t *testing.T, packet []byte) {
		s, err := parseStartup(packet)
		if err != nil {
			return
		}
		if binary.BigEndian.Uint32(packet)>>16 != pgProtocol3 || packet[len(packet)-1] != 0 {
			t.Fatalf("%q was taken", packet)
		}
		if lower := strings.ToLower(string(packet)); strings.Contains(lower, "\x00replication\x00true\x00") &&
			!strings.Contains(lower, "\x00\x00") && strings.HasPrefix(lower[4:], "replication") {
			t.Fatalf("replication was taken: %q", packet)
		}
		if out := s.negotiated(); len(out) > 0 && int(binary.BigEndian.Uint32(out[1:])) != len(out)-1 {
			t.Fatalf("malformed answer %q", out)
		}
	})
}
