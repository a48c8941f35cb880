package cluster

import (
	"encoding/json"
	"fmt"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/rs/zerolog"

	"mailproxy/config"
	"mailproxy/tunnel"
)

// Twelve peers that take a connection and never answer: they are asked side by side, so that all of them cost what one does.
func TestTwelveSilentPeersCostTwoSecondsInAll(t *testing.T) {
	n := newTestNode(t, "mx1")
	self := NodeStatus{CID: 1, ClusterID: "c", Role: Master, Database: true, Position: at(1, 1, 9, 7)}
	silent := func(path string) net.Listener {
		if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
			t.Fatal(err)
		}
		l, err := net.Listen("unix", path)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = l.Close() })
		return l
	}
	seen := time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)
	for cid := config.CID(2); cid <= 13; cid++ {
		silent(n.local.PeerDir(cid) + "/control.sock")
		self.Peers = append(self.Peers, Peer{CID: cid, Name: fmt.Sprint("mx", cid), Tunnel: true, LastSeen: seen, Position: at(1, 1, 7, 7)})
	}
	server := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { _ = json.NewEncoder(w).Encode(self) })}
	control := silent(n.local.ControlSocket())
	go func() { _ = server.Serve(control) }()
	t.Cleanup(func() { _ = server.Close() })

	start := time.Now()
	r := n.status(StatusParams{})
	if took := time.Since(start); took < statusTimeout || took > 2*statusTimeout {
		t.Errorf("status took %v, want %v and little more", took, statusTimeout)
	}
	last := row(t, r, 13)
	if last.State != Unreachable || last.Error == "" || !last.Since.Equal(seen) || last.Position.Serial != 7 || last.CommitsBehind != 2 {
		t.Errorf("a node that is silent shows as %+v; want what was last known of it, and since when", last)
	}
}

func TestClocksThatDifferAreLoggedAndShown(t *testing.T) {
	nodes := newCluster(t, 2)
	nodes[1].stopDaemon()
	nodes[1].skew.Store(int64(-48 * time.Hour))
	nodes[1].start()
	eventually(t, "the clock's difference is known", func() bool {
		ms := row(t, nodes[0].status(StatusParams{}), 2).ClockMS
		return ms != nil && *ms < -40*3600*1000
	})
	eventually(t, "the log says so on both", func() bool { return nodes[0].log.has("clock.differs") && nodes[1].log.has("clock.differs") })
	problems := row(t, nodes[0].status(StatusParams{}), 1).Problems
	if !slices.ContainsFunc(problems, func(p Problem) bool {
		return strings.HasPrefix(p.What, "the clock of mx2(2) is 48h0m0s behind") && p.Remedy != ""
	}) {
		t.Errorf("problems: %+v", problems)
	}
	// Two days off changes nothing: commits arrive, the master's lease holds, and the slave can become master.
	nodes[0].mustPutDomain("skewed.test")
	inSync(t, nodes...)
	if _, err := nodes[1].operator().Promote(t.Context(), false); err != nil {
		t.Fatal(err)
	}
	nodes[1].mustPutDomain("by-the-late.test")
	inSync(t, nodes[1], nodes[0])
}

func TestAClockThatDiffersIsLoggedOnceIn30Seconds(t *testing.T) {
	log := &logBuffer{}
	n := New(Options{Local: &config.Local{}, Log: zerolog.New(log)})
	say := func() int {
		for ms := range 5 {
			n.clocks(t.Context(), []tunnel.PeerState{
				{CID: 2, Clock: tunnel.Clock{Ahead: -time.Hour + time.Duration(ms)*time.Millisecond, At: time.Now()}},
				{CID: 3, Clock: tunnel.Clock{Ahead: 2 * time.Second, Within: 1500 * time.Millisecond, At: time.Now()}}, // perhaps
			})
		}
		return len(log.lines)
	}
	if said := say(); said != 1 {
		t.Errorf("said %d times, want once: %v", said, log.lines)
	}
	n.clockSaid[2] = n.clockSaid[2].Add(-repeatEvery)
	if said := say(); said != 2 {
		t.Errorf("half a minute later: %d in all, want 2", said)
	}
}

func TestWhatARowIsBesideTheOthers(t *testing.T) {
	now := time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)
	r := Report{Asked: 1, Rows: []Row{
		{NodeStatus: NodeStatus{CID: 1, Role: Master, Position: at(1, 1, 9, 7), Database: true, Version: "1", Zone: "CET +0100", Time: now}},
		{NodeStatus: NodeStatus{CID: 2, Role: Slave, Position: at(1, 1, 7, 7), Database: true, Version: "2", Zone: "UTC +0000",
			Time: now.Add(time.Hour), PushedAt: now.Add(time.Hour - 5*time.Second)}},
		{NodeStatus: NodeStatus{CID: 3, Role: Slave, Position: at(1, 1, 9, 7), Database: true, Version: "1", Zone: "MEZ +0100"}},
	}}
	r.judge()
	if got := r.Rows[1]; got.CommitsBehind != 2 || !got.VersionDiffers || !got.ZoneDiffers || got.PushAgeSeconds != 5 {
		t.Errorf("a node that is behind, of another version and an hour ahead: %+v", got)
	}
	if got := r.Rows[2]; got.CommitsBehind != 0 || got.VersionDiffers || got.ZoneDiffers || got.PushAgeSeconds != -1 {
		t.Errorf("a node like the one that asked: %+v", got)
	}
}

func TestANodeThatHearsNobodySaysSinceWhen(t *testing.T) {
	seen := time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)
	gone := Peer{CID: 2, Error: "no route", LastSeen: seen.Add(-time.Hour)}
	if p := cutOff([]Peer{gone, {CID: 3, Error: "no route", LastSeen: seen}}); len(p) != 1 || !strings.Contains(p[0].What, "since 2026-01-02 03:04:05 UTC") {
		t.Errorf("cut off from both: %+v", p)
	}
	if p := cutOff([]Peer{gone, {CID: 3}}); len(p) != 0 {
		t.Errorf("one answers: %+v", p)
	}
	if p := cutOff([]Peer{gone}); len(p) != 0 {
		t.Errorf("one of two, which may be the one that is away: %+v", p)
	}
}

func TestCanonicalName(t *testing.T) {
	const hosts = "127.0.0.1 localhost # mx1\n192.0.2.1\tmx1.example.net mx1\n"
	for name, want := range map[string]string{"mx1": "mx1.example.net", "mx2": "mx2", "localhost": "localhost"} {
		if got := canonical(hosts, name); got != want {
			t.Errorf("canonical(%s) = %s, want %s", name, got, want)
		}
	}
}
