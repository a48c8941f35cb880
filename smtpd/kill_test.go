package smtpd

import (
	"bufio"
	"bytes"
	"context"
	"fmt"
	"net"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/rs/zerolog"

	"mailproxy/config"
	"mailproxy/filter"
	"mailproxy/mail"
	"mailproxy/queue"
	"mailproxy/relay"
	"mailproxy/spool"
)

// The server that is killed is this binary again, with a spool and the next hops' addresses; it kills itself at the point named.
const killVar = "SMTPD_TEST_KILL"

// atDot is a point at which the test does it: nothing in the log says so.
const atDot = "at the dot"

func TestMain(m *testing.M) {
	if point := os.Getenv(killVar); point != "" {
		serveUntilKilled(point, os.Args[1], os.Args[2], os.Args[3])
	}
	if addr := os.Getenv(idleVar); addr != "" {
		openIdleSessions(addr, os.Args[1])
	}
	os.Exit(m.Run())
}

// killer kills the process when the log says a word.
type killer string

func (k killer) Write(p []byte) (int, error) {
	if bytes.Contains(p, []byte(k)) {
		_ = syscall.Kill(os.Getpid(), syscall.SIGKILL)
		select {}
	}
	return len(p), nil
}

func serveUntilKilled(point, dir, one, two string) {
	fatal := func(err error) {
		if err != nil {
			fmt.Println("error", err)
			os.Exit(1)
		}
	}
	rules, err := filter.Compile(snapshot("one.test", one, "two.test", two))
	fatal(err)
	client := relay.New(relay.Options{Hostname: "mx.test", Log: zerolog.Nop()})
	qo := queue.Options{
		Dir: dir, Relay: client, Hostname: "mx.test", Log: zerolog.New(killer(point)),
		Route: func(p mail.Path) (config.Transport, *mail.Reply) { return rules.Route(p) },
	}
	if point == "released" {
		qo.Now = func() time.Time {
			if s, r, err := spool.Inspect(dir); err == nil {
				_ = s.Close()
				if r.Messages > 0 { // and none is held any more
					_, _ = killer("").Write(nil)
				}
			}
			return time.Now()
		}
	}
	q, err := queue.Open(qo)
	fatal(err)
	l, err := net.Listen("tcp", "127.0.0.1:0")
	fatal(err)
	fmt.Println(l.Addr())
	fatal(New(Options{
		Hostname: "mx.test", Rules: func() *filter.Ruleset { return rules }, Relay: client, Queue: q, TempDir: dir, Log: zerolog.Nop(),
	}).Serve(context.Background(), l, Kind{}))
}

// Killed between any two steps of a message to four recipients at two next hops, of which at delivery b is refused and a put off: the
// client has no 250, and nobody is missing when it has come again.
func TestKillBetweenTheStepsOfADelivery(t *testing.T) {
	for _, c := range []struct {
		name, point string
		taken       int    // by the first next hop
		queued      string // found by the next start
		reported    string
	}{
		{"behind holding what is for others, before the dot", `"unanswered":true`, 0, "", ""},
		{"while the dot is not answered", atDot, 1, "", ""},
		{"behind the release, before the DSN", "released", 1, "ac", ""},
		{"behind the DSN, before the 250", "dsn.queued", 1, "ac", "b"},
	} {
		t.Run(c.name, func(t *testing.T) {
			dir := t.TempDir()
			first, second := newHop(t), newHop(t)
			if c.point == atDot {
				first.holdDot = make(chan struct{})
			}
			cmd := exec.Command(os.Args[0], dir, first.addr(), second.addr())
			cmd.Env = append(os.Environ(), killVar+"="+c.point)
			out, err := cmd.StdoutPipe()
			if err != nil {
				t.Fatal(err)
			}
			if err := cmd.Start(); err != nil {
				t.Fatal(err)
			}
			addr, err := bufio.NewReader(out).ReadString('\n')
			if err != nil {
				t.Fatal(err)
			}
			p := dialTo(t, strings.TrimSpace(addr))
			p.want("220")
			p.ask("EHLO client.test", "250")
			p.begin("postmaster@one.test", "a@one.test", "b@one.test", "c@two.test")
			first.answerAs("a=451 b=550")
			p.send("Subject: x\r\n\r\nbody\r\n.\r\n")
			if c.point == atDot {
				<-first.dotSeen
				if err := cmd.Process.Kill(); err != nil {
					t.Fatal(err)
				}
			}
			if got := p.read(); got != "EOF" && got != "RESET" {
				t.Errorf("the client has the answer %q", got)
			}
			_ = cmd.Wait()
			if c.point == atDot {
				close(first.holdDot)
				waitFor(t, "the next hop has it all the same", func() bool { return len(first.messages()) == 1 })
			}
			g := newRigWithQueue(t, snapshot("one.test", first.addr(), "two.test", second.addr()), nil, func(o *queue.Options) { o.Dir = dir })
			if queued, reported := spooled(t, g); queued != c.queued || reported != c.reported {
				t.Errorf("the next start finds %q to be tried and %q reported, want %q and %q", queued, reported, c.queued, c.reported)
			}
			if n := len(first.messages()); n != c.taken {
				t.Errorf("the first next hop has %d messages", n)
			}
			first.forget()
			p = g.hello()
			p.ask("MAIL FROM:<a@sender.test>", "250")
			p.ask("RCPT TO:<postmaster@one.test>", "250")
			p.ask("RCPT TO:<a@one.test>", "451")
			p.ask("RCPT TO:<b@one.test>", "550")
			p.ask("RCPT TO:<c@two.test>", "250")
			p.ask("DATA", "354")
			p.send("Subject: x\r\n\r\nbody\r\n.\r\n")
			p.want("250")
			if queued, _ := spooled(t, g); !strings.Contains(queued, "c") || len(first.messages()) != 1 {
				t.Errorf("when the client came again: %q to be tried, %d taken", queued, len(first.messages()))
			}
		})
	}
}
