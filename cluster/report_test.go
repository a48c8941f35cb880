package cluster

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/rs/zerolog"

	"mailproxy/config"
	"mailproxy/db"
	"mailproxy/tunnel"
)

func TestJudge(t *testing.T) {
	up := func(cid config.CID, role Role, p config.Position) Row {
		return Row{NodeStatus: NodeStatus{CID: cid, Role: role, Position: p, Database: true}}
	}
	dead := func(cid config.CID, p config.Position) Row {
		return Row{NodeStatus: NodeStatus{CID: cid, Position: p}, Error: "no answer in 2s"}
	}
	own := func(r Row, state Relation) Row { r.NodeStatus.State = state; return r }
	noDatabase := func(r Row) Row { r.Database = false; return r }
	for _, c := range []struct {
		name   string
		rows   []Row
		want   string // states
		roles  string
		inSync bool
	}{
		{"all in sync", []Row{up(1, Master, at(1, 1, 9, 7)), up(2, Slave, at(1, 1, 9, 7))}, "in sync,in sync", "master,slave", true},
		{"a slave behind", []Row{up(1, Master, at(1, 1, 9, 7)), up(2, Slave, at(1, 1, 8, 7))}, "in sync,behind", "master,slave", false},
		{"another digest", []Row{up(1, Master, at(1, 1, 9, 7)), up(2, Slave, at(1, 1, 9, 8))}, "in sync,drifted", "master,slave", false},
		{"the node itself says drifted", []Row{up(1, Master, at(1, 1, 9, 7)), own(up(2, Slave, at(1, 1, 9, 7)), Drifted)}, "in sync,drifted", "master,slave", false},
		{"joining", []Row{up(1, Master, at(1, 1, 9, 7)), up(2, Slave, at(0, 0, 0, 0))}, "in sync,joining", "master,slave", false},
		{"a dead slave", []Row{up(1, Master, at(1, 1, 9, 7)), dead(2, at(1, 1, 9, 7))}, "in sync,unreachable", "master,slave", false},
		{"a dead master is known by its epoch", []Row{dead(1, at(1, 1, 9, 7)), up(2, Slave, at(1, 1, 9, 7))}, "unreachable,in sync", "master,slave", false},
		{"also where it was never heard from here", []Row{dead(1, config.Position{}), up(2, Slave, at(1, 1, 9, 7))}, "unreachable,in sync", "master,slave", false},
		{"PostgreSQL down", []Row{up(1, Master, at(1, 1, 9, 7)), noDatabase(up(2, Slave, at(1, 1, 9, 7)))}, "in sync,stale", "master,slave", false},
		{"an old master that has not heard", []Row{up(1, Master, at(1, 1, 99, 7)), up(2, Master, at(2, 2, 9, 7))}, "stale,in sync", "master,master", false},
		{"a master whose store was rolled back", []Row{up(1, Master, at(1, 1, 5, 7)), up(2, Slave, at(1, 1, 9, 7))}, "in sync,ahead", "master,slave", false},
	} {
		t.Run(c.name, func(t *testing.T) {
			r := Report{Rows: c.rows}
			r.judge()
			var states, roles []string
			for _, row := range r.Rows {
				states, roles = append(states, string(row.State)), append(roles, string(row.Role))
			}
			if s, o := strings.Join(states, ","), strings.Join(roles, ","); s != c.want || o != c.roles || r.InSync != c.inSync {
				t.Errorf("states %s, roles %s, in sync %v; want %s, %s, %v", s, o, r.InSync, c.want, c.roles, c.inSync)
			}
		})
	}
}

func TestJudgeNamesTheRemedies(t *testing.T) {
	r := Report{Asked: 2, Rows: []Row{
		{NodeStatus: NodeStatus{CID: 1, Position: at(2, 1, 9, 7)}, Error: "gone"},
		{NodeStatus: NodeStatus{CID: 2, Role: Slave, Position: at(2, 1, 9, 7), Database: true}},
		{NodeStatus: NodeStatus{CID: 3, Role: Master, Position: at(1, 3, 9, 7), Database: true}},
	}}
	r.judge()
	if p := r.Rows[0].Problems; len(p) != 1 || !strings.Contains(p[0].Remedy, "pmgcm promote") {
		t.Errorf("a master that is gone: %+v", p)
	}
	if p := r.Rows[2].Problems; len(p) != 1 || !strings.Contains(p[0].What, "still master of epoch 1.3, but 2.1") {
		t.Errorf("an old master: %+v", p)
	}
}

func TestAMasterThatWasRolledBackToBeforeItsEpochIsNamed(t *testing.T) {
	row := func(cid config.CID, p config.Position) Row {
		return Row{NodeStatus: NodeStatus{CID: cid, Role: Slave, Position: p, Database: true}}
	}
	r := Report{Rows: []Row{row(1, at(2, 3, 8, 7)), row(2, at(2, 3, 9, 7)), row(3, at(1, 1, 7, 7))}}
	r.judge()
	if got := r.Rows[2].Problems; len(got) != 1 || !strings.HasPrefix(got[0].What, "rolled back: it began epoch 2.3") || got[0].Remedy != "`pmgcm promote` on node 2" {
		t.Errorf("problems of the node: %+v", got)
	}
	r = Report{Rows: []Row{row(1, at(2, 3, 9, 7)), row(3, at(2, 3, 9, 7))}}
	r.judge()
	if got := r.Rows[1].Problems; len(got) != 0 {
		t.Errorf("problems of a node that was not rolled back: %+v", got)
	}
}

// quietNode is a Node that is not run.
func quietNode(st db.State) *Node {
	n := New(Options{Local: &config.Local{}, Tunnel: tunnel.New(tunnel.Options{}), Log: zerolog.Nop()})
	n.state, n.stateAt = st, time.Now()
	return n
}

func TestWedged(t *testing.T) {
	e := func(n int64, o config.CID) config.Epoch { return config.Epoch{N: n, Owner: o} }
	master := db.State{CID: 1, Position: at(1, 1, 9, 7), Promised: e(1, 1)}
	gave := master
	gave.Promised = e(2, 2)
	slave := db.State{CID: 1, Position: at(1, 3, 9, 7), Promised: e(2, 2)}
	peer := func(p config.Position, promised config.Epoch, err error) *view {
		return &view{state: db.State{CID: 2, Position: p, Promised: promised}, answered: true, err: err}
	}
	for _, c := range []struct {
		name string
		own  db.State
		peer *view
		want bool
	}{
		{"a master that nobody refuses", master, peer(at(1, 1, 9, 7), e(1, 1), nil), false},
		{"a master that a slave's promise refuses", master, peer(at(1, 1, 9, 7), e(2, 2), nil), true},
		{"the slave with the promise is gone", master, peer(at(1, 1, 9, 7), e(2, 2), errDown), false},
		{"a master that gave a promise", gave, peer(at(1, 1, 9, 7), e(1, 1), nil), true},
		{"the promise was made good", gave, peer(at(2, 2, 10, 7), e(2, 2), nil), false},
		{"and its owner is gone again", gave, peer(at(2, 2, 10, 7), e(2, 2), errDown), false},
		{"who was no master leaves it to the master", slave, peer(at(1, 3, 9, 7), e(2, 2), nil), false},
	} {
		t.Run(c.name, func(t *testing.T) {
			n := quietNode(c.own)
			n.views[2] = c.peer
			if got := n.wedged(); got != c.want {
				t.Errorf("wedged = %v, want %v", got, c.want)
			}
		})
	}
}

func TestProblemsNameTheRemedy(t *testing.T) {
	master := db.State{CID: 1, Position: at(1, 1, 9, 7), Promised: config.Epoch{N: 1, Owner: 1}}
	slave := db.State{CID: 2, Position: at(1, 1, 9, 7), Promised: config.Epoch{N: 1, Owner: 1}}
	gave := master
	gave.Promised = config.Epoch{N: 2, Owner: 2}
	journalled := slave
	journalled.JournalLen = 2
	for _, c := range []struct {
		name   string
		state  db.State
		err    error
		change func(n *Node)
		want   string
	}{
		{"PostgreSQL down", slave, errDown, nil, "restart mailproxy"},
		{"drift on a slave", slave, nil, func(n *Node) { n.drift = &drift{at: slave.Position} }, "`pmgcm sync --pull` on this node"},
		{"drift on the master", master, nil, func(n *Node) { n.drift = &drift{at: master.Position} }, "gives them to every slave"},
		{"a journal", journalled, nil, nil, "pmgcm journal list"},
		{"a promise that nobody made good", gave, nil, nil, "pmgcm promote --force"},
		{"a store that was rolled back", master, nil, func(n *Node) {
			n.views[2] = &view{answered: true, state: db.State{CID: 2, Position: at(1, 1, 12, 7)}}
			n.setLease(false)
		}, "`pmgcm promote` on node 2"},
		{"no majority", master, nil, func(n *Node) { n.setLease(false) }, "bring the others back"},
		{"a slave with an older schema", master, nil, func(n *Node) {
			n.views[2] = &view{answered: true}
			n.pushErrs[2] = fmt.Errorf("push: %w", db.ErrNewer)
		}, "upgrade mailproxy on node 2"},
		{"a slave whose database was made anew", master, nil, func(n *Node) {
			n.views[2] = &view{answered: true}
			n.pushErrs[2] = fmt.Errorf("push: %w", db.ErrOtherCluster)
		}, "`pmgcm join-cmd` here, then the line that it prints on node 2"},
		{"what the daemon knows", slave, nil, func(n *Node) { n.o.Problems = func() []Problem { return []Problem{{"spool full", "make room"}} } }, "make room"},
	} {
		t.Run(c.name, func(t *testing.T) {
			n := quietNode(c.state)
			if c.change != nil {
				c.change(n)
			}
			p := append(n.problems(c.state, c.err), n.clusterProblems(c.state)...)
			if len(p) != 1 || p[0].What == "" || !strings.Contains(p[0].Remedy, c.want) {
				t.Errorf("problems: %+v; want one with the remedy %q", p, c.want)
			}
		})
	}
	if p := quietNode(slave).problems(slave, nil); len(p) != 0 {
		t.Errorf("problems of a node that is well: %+v", p)
	}
}

func TestANodeThatIsNotLetInSaysSoAndWhatToDo(t *testing.T) {
	no := Peer{CID: 1, Name: "mx1", Address: "192.0.2.1:7025", Error: "node does not let this one in", NotLetIn: true}
	away := Peer{CID: 3, Name: "mx3", Error: "connection refused"}
	up := Peer{CID: 4, Name: "mx4", Tunnel: true}
	other := Peer{CID: 5, Name: "mx5", Address: "192.0.2.5:7025", Error: "node at that address is not trusted", NotTrusted: true}
	for _, c := range []struct {
		name         string
		peers        []Peer
		deleted      bool
		what, remedy []string // the beginnings, of one problem each
	}{
		{"one says no, and no other answers", []Peer{no, away}, true,
			[]string{"this node was deleted from the cluster, or its key is another now: it is not let in by mx1(1)"}, []string{"`pmgcm leave` here, which keeps"}},
		{"one says no, and another lets it in", []Peer{no, away, up}, false, []string{"this node is not let in by mx1(1)"}, []string{"if `pmgcm status` on the master"}},
		{"nobody answers", []Peer{away, {CID: 2, Error: "no answer"}}, false, []string{"no other node answers here"}, []string{"see to this host's network first"}},
		{"something else answers, which proves nothing", []Peer{away, other}, false,
			[]string{"what answers is not trusted to be mx5(5) at 192.0.2.5:7025"}, []string{"see that the address is still that node's; if the cluster"}},
		{"all is well", []Peer{up}, false, nil, nil},
	} {
		t.Run(c.name, func(t *testing.T) {
			if got := deleted(c.peers); got != c.deleted {
				t.Errorf("deleted: %v", got)
			}
			problems := append(append(shutOut(c.peers), cutOff(c.peers)...), strangers(c.peers)...)
			if len(problems) != len(c.what) {
				t.Fatalf("problems: %+v", problems)
			}
			for i, p := range problems {
				if !strings.HasPrefix(p.What, c.what[i]) || !strings.HasPrefix(p.Remedy, c.remedy[i]) {
					t.Errorf("problem %+v", p)
				}
			}
		})
	}
	for _, c := range []struct {
		peers []Peer
		told  bool
	}{{[]Peer{no}, false}, {[]Peer{{CID: 1}, {CID: 3, NotLetIn: true}}, false}, {[]Peer{{CID: 1}, {CID: 3}}, true}} { // nobody may be led to promote a deleted node
		r := Report{Asked: 2, Rows: []Row{
			{NodeStatus: NodeStatus{CID: 1, Position: at(1, 1, 9, 7)}, Error: "away"},
			{NodeStatus: NodeStatus{CID: 2, Position: at(1, 1, 9, 7), Role: Slave, Database: true, Peers: c.peers}},
		}}
		r.judge()
		if got := len(r.Rows[0].Problems) > 0; got != c.told {
			t.Errorf("%+v; problems of the master: %+v", c.peers, r.Rows[0].Problems)
		}
	}
}

func TestANodeWhoseTunnelIsOffSaysWhyAndLeadsNobodyToPromote(t *testing.T) {
	slave := db.State{CID: 2, Position: at(1, 1, 9, 7), Promised: config.Epoch{N: 1, Owner: 1}}
	for _, c := range []struct {
		name   string
		file   string
		mode   os.FileMode
		state  db.State
		what   string
		remedy string
		off    bool
	}{
		{"a key that is damaged", "node.key", 0o600, slave, "node.key: not an Ed25519 key", "`pmgcm delete 2` on the master, then here stop the daemon", true},
		{"a key that others can read", "node.key", 0o644, slave, "node.key: private key is readable by others", "chmod 600 ", true},
		{"a key of a node in no cluster", "node.key", 0o600, db.State{}, "node.key: not an Ed25519 key", "since this node is in no cluster, move ", true},
		{"an identity that is damaged", "identity.json", 0o600, slave, "identity.json: unexpected end", "put the file back", true},
		{"a list of members that is damaged", "trust.json", 0o600, slave, "", "", false},
	} {
		t.Run(c.name, func(t *testing.T) {
			n := quietNode(c.state)
			n.o.Local.StateDir = t.TempDir()
			dir := n.o.Local.KeyDir()
			if _, err := tunnel.LoadOrMakeKey(dir); err != nil {
				t.Fatal(err)
			}
			file := filepath.Join(dir, c.file)
			if err := errors.Join(os.WriteFile(file, []byte("{"), c.mode), os.Chmod(file, c.mode)); err != nil {
				t.Fatal(err)
			}
			n.o.Tunnel = tunnel.New(tunnel.Options{KeyDir: dir})
			if err := n.o.Tunnel.Listen(); err != nil {
				t.Fatalf("listen: %v", err)
			}
			n.o.Tunnel.Reload(nil)
			if off := n.o.Tunnel.Off(); off != c.off {
				t.Errorf("off: %v", off)
			}
			p := n.problems(c.state, nil)
			if c.what == "" {
				if len(p) != 0 {
					t.Errorf("problems: %+v", p)
				}
				return
			}
			if len(p) != 1 || !strings.Contains(p[0].What, "the tunnel is off") || !strings.Contains(p[0].What, "in "+dir+": "+c.what) ||
				!strings.Contains(p[0].Remedy, c.remedy) {
				t.Errorf("problems: %+v", p)
			}
		})
	}
	for _, off := range []bool{true, false} {
		r := Report{Asked: 2, Rows: []Row{
			{NodeStatus: NodeStatus{CID: 1, Position: slave.Position}, Error: "away"},
			{NodeStatus: NodeStatus{CID: 2, Position: slave.Position, Role: Slave, Database: true, TunnelOff: off}},
		}}
		r.judge()
		if got := len(r.Rows[0].Problems); (got == 0) != off {
			t.Errorf("tunnel off: %v; problems of the master: %+v", off, r.Rows[0].Problems)
		}
	}
}

func TestJoinErrorsCrossTheWire(t *testing.T) {
	for _, c := range joinCodes {
		je := joinError(fmt.Errorf("deep: %w", c.from))
		if je.Code != c.code {
			t.Errorf("%v travels as %q, want %q", c.from, je.Code, c.code)
		}
		if err := fromJoinError(je); !errors.Is(err, c.to) {
			t.Errorf("%q arrives as %v, want %v", je.Code, err, c.to)
		}
	}
	je := joinError(errors.New("pq: password secret"))
	if je.Code != tunnel.CodeInternal || strings.Contains(je.Text, "secret") {
		t.Errorf("our own trouble travels as %+v", je)
	}
	if err := fromJoinError(&tunnel.JoinError{Code: "new in a later version", Text: "why\x1b[2J"}); !errors.Is(err, ErrJoinFailed) || strings.Contains(err.Error(), "\x1b") {
		t.Errorf("an unknown code arrives as %q", err)
	}
}

func TestARefusedJoinSaysItsTextOnce(t *testing.T) {
	d := newTestNode(t, "mx1").db
	for _, c := range []struct {
		name string
		err  error
		want string
	}{
		{"a refusal with more to say", fmt.Errorf("%w: mx2(2)", ErrNameTaken), "node name already in use: mx2(2)"},
		{"a bare one", ErrGhost, "this machine is known as another node"},
		{"one of the tunnel's", &tunnel.JoinError{Code: tunnel.CodeTooMany, Text: "too many join attempts from this address; try again"},
			"too many join attempts from this address; try again"},
		{"one that reads otherwise on the other side", &db.NotMasterError{Master: 2}, "the node there is not the master: that is CID 2"},
	} {
		t.Run(c.name, func(t *testing.T) {
			_, err := d.Commit(t.Context(), db.Author{Who: "t"}, func(context.Context, *db.Tx) error { return c.err }, nil)
			je := joinError(err)
			if known, ok := errors.AsType[*tunnel.JoinError](c.err); ok {
				je = known // it never was in a commit
			}
			if got := fromJoinError(je).Error(); got != c.want || strings.Contains(je.Text, "commit") {
				t.Errorf("%q arrives as %q, want %q", je.Text, got, c.want)
			}
		})
	}
}

func TestSetAsideHasItsPlural(t *testing.T) {
	for n, want := range map[int]string{1: "1 commit that the master does not have was set aside", 2: "2 commits that the master does not have were set aside"} {
		if got := aside(n); got != want {
			t.Errorf("%q, want %q", got, want)
		}
	}
}

func TestWarningsAreRepeatedSparingly(t *testing.T) {
	log := &logBuffer{}
	now := time.Now()
	n := New(Options{Local: &config.Local{}, Log: zerolog.New(log), Now: func() time.Time { return now }})
	for range 5 {
		n.warn(context.Background(), "push.refused", 2, errDown)
	}
	n.warn(context.Background(), "push.refused", 3, errDown)
	now = now.Add(repeatEvery)
	n.warn(context.Background(), "push.refused", 2, errDown)
	if len(log.lines) != 3 || !strings.Contains(log.lines[2], `"count":5`) {
		t.Errorf("log:\n%s", strings.Join(log.lines, ""))
	}
}
