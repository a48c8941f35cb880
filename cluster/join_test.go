package cluster

import (
	"bufio"
	"context"
	"errors"
	"io"
	"os"
	"os/exec"
	"strings"
	"sync"
	"testing"
	"time"

	"mailproxy/config"
	"mailproxy/tunnel"
)

func TestCreateTwice(t *testing.T) {
	n := newTestNode(t, "mx1").start()
	n.mustPutDomain("kept.test")
	made, err := n.operator().Create(t.Context(), CreateParams{})
	if err != nil || made.CID != 1 || !strings.HasPrefix(made.Fingerprint, "SHA256:") {
		t.Fatalf("create: %+v, %v", made, err)
	}
	before := n.state()
	if before.ClusterID != made.ClusterID || !before.IsMaster() || !n.hasDomain("kept.test") {
		t.Errorf("after create: %+v", before)
	}
	if _, err := n.operator().Create(t.Context(), CreateParams{}); !errors.Is(err, ErrClusterExists) {
		t.Errorf("create twice: %v, want ErrClusterExists", err)
	}
	if n.state().Position != before.Position {
		t.Error("the refused create changed something")
	}
}

func TestCreateThatDiedBeforeItsRowGoesOn(t *testing.T) {
	n := newTestNode(t, "mx1")
	// What a create leaves that died with keys and identity written: all but the database.
	other := newTestNode(t, "other").start()
	made, err := other.operator().Create(t.Context(), CreateParams{})
	if err != nil {
		t.Fatal(err)
	}
	if err := os.CopyFS(n.local.KeyDir(), os.DirFS(other.local.KeyDir())); err != nil {
		t.Fatal(err)
	}
	for _, f := range []string{"node.key", "ca.key"} {
		if err := os.Chmod(n.local.KeyDir()+"/"+f, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	n.start()
	again, err := n.operator().Create(t.Context(), CreateParams{})
	if err != nil || again != made {
		t.Errorf("create again: %+v, %v; want %+v", again, err, made)
	}
}

// The master's database is gone for good, its keys are there, and its slaves go on; a create would make a second cluster beside theirs.
func TestCreateOnTheKeysOfAClusterWithOtherNodesIsRefused(t *testing.T) {
	nodes := newCluster(t, 2)
	for _, c := range []struct {
		name   string
		damage string // file of the keys that is damaged too
	}{{"whole", ""}, {"without the list of members", "trust.json"}} {
		t.Run(c.name, func(t *testing.T) {
			n := newTestNode(t, "mx1")
			dir := n.local.KeyDir()
			if err := os.CopyFS(dir, os.DirFS(nodes[0].local.KeyDir())); err != nil {
				t.Fatal(err)
			}
			for _, f := range []string{"node.key", "ca.key"} {
				if err := os.Chmod(dir+"/"+f, 0o600); err != nil {
					t.Fatal(err)
				}
			}
			if c.damage != "" {
				if err := os.WriteFile(dir+"/"+c.damage, nil, 0o600); err != nil {
					t.Fatal(err)
				}
			}
			if made, err := n.start().operator().Create(t.Context(), CreateParams{}); !errors.Is(err, ErrWasMember) || n.state().CID != 0 {
				t.Errorf("create: %+v, %v, as node %d", made, err, n.state().CID)
			}
			if err := os.RemoveAll(dir); err != nil {
				t.Fatal(err)
			}
			if made, err := n.operator().Create(t.Context(), CreateParams{}); err != nil || made.ClusterID == nodes[0].state().ClusterID {
				t.Errorf("create without the keys: %+v, %v", made, err)
			}
		})
	}
}

func TestJoinRefusals(t *testing.T) {
	nodes := newCluster(t, 2)
	master := nodes[0]
	lone := newTestNode(t, "lone").start()
	good := master.joinParams()
	dead := JoinParams{Address: freePort(t), Fingerprint: good.Fingerprint, Token: good.Token}
	with := func(change func(p *JoinParams)) JoinParams { p := good; change(&p); return p }
	slaveKey, err := tunnel.LoadOrMakeKey(nodes[1].local.KeyDir())
	if err != nil {
		t.Fatal(err)
	}
	loneKey, err := tunnel.LoadOrMakeKey(lone.local.KeyDir())
	if err != nil {
		t.Fatal(err)
	}
	expired, err := master.operator().JoinCommand(t.Context(), -time.Minute)
	if err != nil {
		t.Fatal(err)
	}
	used := master.joinParams()
	third := newTestNode(t, "mx3").start()
	if _, err := third.join(used); err != nil {
		t.Fatal(err)
	}
	fresh := func(name string) *testNode { return newTestNode(t, name).start() }
	stranger := fresh("mx4")
	for _, c := range []struct {
		name string
		node *testNode
		p    JoinParams
		want error
		text string
	}{
		{"a token that was never made", stranger, with(func(p *JoinParams) { p.Token = "nonsense" }), ErrTokenUnknown, ""},
		{"a token that another node used", stranger, used, ErrTokenUsed, ""},
		{"a token that has expired", stranger, with(func(p *JoinParams) { p.Token = strings.Fields(expired)[6] }), ErrTokenExpired, ""},
		{"another fingerprint", stranger, with(func(p *JoinParams) { p.Fingerprint = "SHA256:" + strings.Repeat("A", 43) }), ErrFingerprint, ""},
		{"a fingerprint that was not confirmed", stranger, with(func(p *JoinParams) {
			p.Fingerprint, p.Confirm = "", func(string) bool { return false }
		}), ErrKeyNotConfirmed, ""},
		{"nothing answers there", stranger, dead, ErrJoinUnreachable, "connection refused"},
		{"a slave is asked", stranger, with(func(p *JoinParams) {
			p.Address, p.Fingerprint = nodes[1].local.TunnelAddress(), slaveKey.Fingerprint()
		}), ErrTargetNotMaster, "mx1 at 127.0.0.1"},
		{"a single node is asked", stranger, with(func(p *JoinParams) {
			p.Address, p.Fingerprint = lone.local.TunnelAddress(), loneKey.Fingerprint()
		}), ErrTargetNotMaster, ""},
		{"a name in use", fresh("mx2"), good, ErrNameTaken, "mx2(2)"},
		{"a member", nodes[1], good, ErrClusterExists, "node 2"},
		{"the master itself", master, good, ErrClusterExists, "node 1"},
	} {
		t.Run(c.name, func(t *testing.T) {
			before := c.node.state()
			_, err := c.node.join(c.p)
			if !errors.Is(err, c.want) || !strings.Contains(err.Error(), c.text) {
				t.Errorf("join: %v; want %v with %q", err, c.want, c.text)
			}
			if strings.Contains(err.Error(), good.Token) {
				t.Errorf("the token is in the error: %v", err)
			}
			if after := c.node.state(); after.CID != before.CID || after.ClusterID != before.ClusterID {
				t.Errorf("a refused join changed %+v to %+v", before, after)
			}
		})
	}
	if _, err := stranger.join(good); err != nil {
		t.Errorf("a token that was only refused elsewhere: %v", err)
	}
	if _, err := nodes[1].operator().JoinCommand(t.Context(), time.Hour); !errors.Is(err, ErrNotMaster) || !strings.Contains(err.Error(), "mx1(1)") {
		t.Errorf("join-cmd on a slave: %v", err)
	}
	for _, n := range []*testNode{master, stranger} {
		if n.log.contains(good.Token) {
			t.Errorf("the token is in the log of %s", n.local.Name)
		}
	}
}

func TestJoinAfterDelete(t *testing.T) {
	nodes := newCluster(t, 2)
	if _, err := nodes[0].operator().Delete(t.Context(), 2, nil); err != nil {
		t.Fatal(err)
	}
	// The machine is set up anew but for its key.
	again := newTestNode(t, "mx2")
	if err := os.CopyFS(again.local.KeyDir(), os.DirFS(nodes[1].local.KeyDir())); err != nil {
		t.Fatal(err)
	}
	if err := tunnel.RemoveIdentity(again.local.KeyDir()); err != nil {
		t.Fatal(err)
	}
	nodes[1].stopDaemon()
	if err := os.Chmod(again.local.KeyDir()+"/node.key", 0o600); err != nil {
		t.Fatal(err)
	}
	again.start()
	if _, err := again.join(nodes[0].joinParams()); !errors.Is(err, ErrKeyRevoked) || !strings.Contains(err.Error(), "mx2(2)") {
		t.Errorf("join with a deleted node's key: %v", err)
	}
	fresh := newTestNode(t, "mx2").start()
	if cid, err := fresh.join(nodes[0].joinParams()); err != nil || cid != 3 {
		t.Errorf("join with a new key: CID %d, %v; want 3, since no CID is given twice", cid, err)
	}
}

func TestJoinKilledHalfWayRunsAgain(t *testing.T) {
	outer := t
	master := newCluster(t, 1)[0]
	request := func(n *testNode, p JoinParams) tunnel.JoinReply {
		t.Helper()
		key, err := tunnel.LoadOrMakeKey(n.local.KeyDir())
		if err != nil {
			t.Fatal(err)
		}
		if err := n.operator().beginJoin(p); err != nil {
			t.Fatal(err)
		}
		reply, err := tunnel.Join(t.Context(), p.Address, p.Fingerprint, key,
			tunnel.JoinRequest{Token: p.Token, Node: selfNode(n.local, key.Public(), time.Now())}, nil)
		if err != nil {
			t.Fatal(err)
		}
		return reply
	}
	for i, c := range []struct {
		name string
		die  func(n *testNode, p JoinParams)
	}{
		{"after the master wrote its row", func(n *testNode, p JoinParams) { request(n, p) }},
		{"with the identity saved", func(n *testNode, p JoinParams) {
			if err := tunnel.SaveIdentity(n.local.KeyDir(), request(n, p).Identity()); err != nil {
				t.Fatal(err)
			}
		}},
		{"with the cluster entered", func(n *testNode, p JoinParams) {
			if err := n.operator().enter(t.Context(), request(n, p)); err != nil {
				t.Fatal(err)
			}
		}},
		{"while it waited", func(n *testNode, p JoinParams) {
			ctx, cancel := context.WithCancel(t.Context())
			o := n.operator()
			o.Say = func(line string) {
				if strings.Contains(line, "waiting for the tunnel") {
					cancel()
				}
			}
			if _, err := o.Join(ctx, p); err == nil {
				t.Fatal("the join was not interrupted")
			}
		}},
	} {
		t.Run(c.name, func(t *testing.T) {
			n := newTestNode(outer, "mx"+string(rune('2'+i))).start() // it stays a member of the next joins' cluster
			n.mustPutDomain("destroyed.test")
			p := master.joinParams()
			c.die(n, p)
			cid, err := n.join(p) // the very same command, with the very same token
			if err != nil || cid != config.CID(i+2) {
				t.Fatalf("join again: CID %d, %v; want %d", cid, err, i+2)
			}
			inSync(t, master, n)
			if n.hasDomain("destroyed.test") {
				t.Error("the joining node kept its own configuration")
			}
			if _, err := n.join(p); !errors.Is(err, ErrClusterExists) {
				t.Errorf("join once more: %v, want ErrClusterExists", err)
			}
		})
	}
}

func TestJoinSaysWhoDoesNotKnowOfItYet(t *testing.T) {
	nodes := newCluster(t, 2)
	nodes[1].stopDaemon()
	n := newTestNode(t, "mx3").start()
	o := n.operator()
	var said []string
	o.Patience, o.Say = 3*pollEvery, func(line string) { said = append(said, line) }
	if _, err := o.Join(t.Context(), nodes[0].joinParams()); err != nil {
		t.Fatal(err)
	}
	if last := said[len(said)-1]; last != "not told yet (they learn of it when they are back): mx2(2)" {
		t.Errorf("said last: %q", last)
	}
}

// locked holds the node's position row, so that no push is applied, until it is released.
func (n *testNode) locked() (release func()) {
	n.t.Helper()
	cmd := exec.Command("psql", "-v", "ON_ERROR_STOP=1", "-qAt", n.dsn)
	in, err := cmd.StdinPipe()
	if err != nil {
		n.t.Fatal(err)
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		n.t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		n.t.Fatal(err)
	}
	release = sync.OnceFunc(func() {
		_ = in.Close()
		_ = cmd.Wait()
	})
	n.t.Cleanup(release)
	if _, err := io.WriteString(in, "BEGIN; SELECT 'locked' FROM node.position FOR UPDATE;\n"); err != nil {
		n.t.Fatal(err)
	}
	if line, err := bufio.NewReader(out).ReadString('\n'); err != nil || line != "locked\n" {
		n.t.Fatalf("psql: %q, %v", line, err)
	}
	return release
}

func TestJoinEndsOnlyWhereTheMasterIs(t *testing.T) {
	nodes := newCluster(t, 2)
	release := nodes[1].locked()
	at := nodes[0].mustPutDomain("late.test") // after the first push
	o, reply := nodes[1].operator(), tunnel.JoinReply{CID: 2, Epoch: at.Epoch}
	ctx, cancel := context.WithTimeout(t.Context(), 5*pollEvery)
	defer cancel()
	if err := o.firstPush(ctx, reply); !errors.Is(err, ErrNoFirstPush) || nodes[1].state().Position == at {
		t.Errorf("ended behind the master: %v, at %v, the master at %v", err, nodes[1].state().Position, at)
	}
	release()
	if err := o.firstPush(t.Context(), reply); err != nil || nodes[1].state().Position != at {
		t.Errorf("ended with %v, at %v, the master at %v", err, nodes[1].state().Position, at)
	}
}

func TestUnfinishedJoinStandsInTheWayOfAnother(t *testing.T) {
	nodes := newCluster(t, 1)
	other := newCluster(t, 1)
	n := newTestNode(t, "mx2").start()
	o := n.operator()
	ctx, cancel := context.WithCancel(t.Context())
	o.Say = func(line string) {
		if strings.Contains(line, "waiting for the tunnel") {
			cancel()
		}
	}
	if _, err := o.Join(ctx, nodes[0].joinParams()); err == nil {
		t.Fatal("the join was not interrupted")
	}
	if _, err := n.join(other[0].joinParams()); !errors.Is(err, ErrOtherJoin) {
		t.Errorf("join to another cluster: %v, want ErrOtherJoin", err)
	}
	if _, err := n.operator().Create(t.Context(), CreateParams{}); !errors.Is(err, ErrClusterExists) {
		t.Errorf("create: %v, want ErrClusterExists", err)
	}
}

func TestCommandsThatNeedTheDaemonSayThatItDoesNotRun(t *testing.T) {
	nodes := newCluster(t, 2)
	p := nodes[0].joinParams()
	lone := newTestNode(t, "mx3")
	nodes[1].stopDaemon()
	for name, f := range map[string]func() error{
		"join":    func() error { _, err := lone.join(p); return err },
		"promote": func() error { _, err := nodes[1].operator().Promote(t.Context(), false); return err },
		"sync":    func() error { _, err := nodes[1].operator().Sync(t.Context(), nil); return err },
	} {
		if err := f(); !errors.Is(err, ErrNoDaemon) {
			t.Errorf("%s: %v, want ErrNoDaemon", name, err)
		}
	}
}

func TestCommandsOnASingleNode(t *testing.T) {
	n := newTestNode(t, "mx1").start()
	o := n.operator()
	for name, f := range map[string]func() error{
		"join-cmd": func() error { _, err := o.JoinCommand(t.Context(), time.Hour); return err },
		"promote":  func() error { _, err := o.Promote(t.Context(), false); return err },
		"sync":     func() error { _, err := o.Sync(t.Context(), nil); return err },
		"sync -m":  func() error { _, err := o.SyncWith(t.Context(), "x"); return err },
		"delete":   func() error { _, err := o.Delete(t.Context(), 1, nil); return err },
	} {
		if err := f(); !errors.Is(err, ErrNoCluster) {
			t.Errorf("%s: %v, want ErrNoCluster", name, err)
		}
	}
}
