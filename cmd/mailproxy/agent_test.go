package main

import (
	"errors"
	"fmt"
	"io"
	"net"
	"strings"
	"syscall"
	"testing"
	"time"
)

func TestTheWeightFallsWithSessionsAndRoom(t *testing.T) {
	for _, c := range []struct {
		name  string
		room  int64
		sides []sideLoad
		want  int
	}{
		{"idle", 1 << 40, []sideLoad{{0, 2000}, {0, 2000}}, 100},
		{"half of the sessions", 1 << 40, []sideLoad{{1000, 2000}}, 50},
		{"a single session of many", 1 << 40, []sideLoad{{1, 2000}}, 99},
		{"all of them", 1 << 40, []sideLoad{{2000, 2000}}, 0},
		{"more than there may be, after the setting was lowered", 1 << 40, []sideLoad{{2000, 100}}, 0},
		{"each side has its own", 1 << 40, []sideLoad{{600, 2000}, {1500, 2000}}, 25},
		{"half a gigabyte of room", 1 << 29, []sideLoad{{0, 2000}}, 50},
		{"both: the lesser counts", 1 << 28, []sideLoad{{500, 2000}}, 25},
		{"room just used up", 0, []sideLoad{{0, 2000}}, 0},
		{"into the reserve", -1 << 20, []sideLoad{{0, 2000}}, 0},
	} {
		if got := weightOf(c.room, c.sides...); got != c.want {
			t.Errorf("%s: %d, want %d", c.name, got, c.want)
		}
	}
}

// askAgent gives the one line that an agent listener says.
func askAgent(t testing.TB, address string) string {
	t.Helper()
	c, err := net.Dial("tcp", address)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	_ = c.SetReadDeadline(time.Now().Add(10 * time.Second)) // a failure shows below
	line, err := io.ReadAll(io.LimitReader(c, 1000))
	if err != nil {
		t.Error(err)
	}
	return string(line)
}

func TestTheAgentSaysWhatTheNodeIsFitFor(t *testing.T) {
	agent := freePort(t)
	n := newNode(t, "--agent-listen", agent)
	n.start()
	if got := askAgent(t, agent); got != "ready down #smtp\n" && got != "ready up 100%\n" {
		t.Errorf("without configuration it says %q", got)
	}
	n.waitHealthy()
	n.waitAgent(agent, "ready up 100%\n")

	n.waitDatabase()
	n.must("setting", "set", "max_sessions", "4")
	n.waitAgent(agent, "ready up 100%\n")
	sessions := []*smtpSession{n.dialSMTP(), n.dialSMTP(), n.dialSMTP()}
	n.waitAgent(agent, "ready up 25%\n")
	_ = sessions[0].conn.Close()
	n.waitAgent(agent, "ready up 50%\n")

	if _, errs, code := n.run("pmgcm", "drain"); code != 0 {
		t.Fatalf("drain: exit code %d\n%s", code, errs)
	}
	if got := askAgent(t, agent); got != "drain up\n" { // at once
		t.Errorf("drained, it says %q", got)
	}
	if _, errs, code := n.run("pmgcm", "undrain"); code != 0 {
		t.Fatalf("undrain: exit code %d\n%s", code, errs)
	}
	n.waitAgent(agent, "ready up 100%\n") // all sessions were told to go
	n.stop()
}

// A daemon that stops waits for what is under way; balancers go elsewhere meanwhile.
func TestTheAgentSaysDrainWhileTheDaemonStops(t *testing.T) {
	agent := freePort(t)
	n := newNode(t, "--agent-listen", agent)
	n.start()
	n.waitDatabase()
	n.must("domain", "add", "example.test", "--to", freePort(t))
	n.waitAgent(agent, "ready up 100%\n")
	var s *smtpSession
	eventually(t, func() error { // until the domain is known
		s = n.dialSMTP()
		s.want("EHLO c.test", "250 ")
		s.want("MAIL FROM:<from@client.test>", "250 ")
		if reply := s.want("RCPT TO:<to@example.test>", ""); !strings.HasPrefix(reply, "250 ") {
			return errors.New(reply)
		}
		return nil
	})
	s.want("DATA", "354 ")
	n.signal(syscall.SIGTERM)
	n.waitAgent(agent, "drain up\n")
	if out, errs, code := n.run("mailproxy", "lb", "check"); code != 1 || !strings.Contains(errs, "is drained") {
		t.Errorf("lb check: exit code %d\n%s%s", code, out, errs)
	}
	s.want("Subject: x\r\n\r\nx\r\n.", "250 2.0.0 queued as")
	if code := n.wait(); code != 0 {
		t.Errorf("the daemon ends with %d", code)
	}
}

// waitAgent waits until the agent listener says a line.
func (n *testNode) waitAgent(address, want string) {
	n.t.Helper()
	eventually(n.t, func() error {
		if got := askAgent(n.t, address); got != want {
			return fmt.Errorf("the agent says %q, want %q", got, want)
		}
		return nil
	})
}
