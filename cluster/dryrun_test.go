package cluster

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"testing/synctest"
	"time"
)

// files are all files below a node's state directory, with their contents.
func (n *testNode) files() string {
	n.t.Helper()
	var b strings.Builder
	err := filepath.WalkDir(n.local.StateDir, func(path string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		text, err := os.ReadFile(path)
		b.WriteString(path + "\n" + string(text) + "\n")
		return err
	})
	if err != nil {
		n.t.Fatal(err)
	}
	return b.String()
}

func TestADryRunOfAJoinMakesAllChecksAndChangesNothing(t *testing.T) {
	nodes := newCluster(t, 2)
	master := nodes[0]
	n := newTestNode(t, "mx3").start()
	n.mustPutDomain("own.test")
	p := master.joinParams()
	inSync(t, nodes...)
	eventually(t, "the snapshot file is there", func() bool { return strings.Contains(n.files(), "own.test") })
	if err := os.RemoveAll(n.local.KeyDir()); err != nil { // the daemon made a key; none shall come of a dry run
		t.Fatal(err)
	}
	here, there, files := n.state(), master.state(), n.files()
	keys, err := os.ReadDir(master.local.KeyDir())
	if err != nil {
		t.Fatal(err)
	}
	for range 2 { // it can be run again, by a node that has no key yet
		out, err := n.operator().CheckJoin(t.Context(), p)
		if err != nil || out.CID != 3 || out.Members != 2 || out.ClusterID != there.ClusterID || out.Position != there.Position || out.Rows < 3 ||
			out.Own.Domains.Len() != 1 {
			t.Errorf("the outlook is %+v, %v", out, err)
		}
	}
	for name, c := range map[string]struct {
		change func(p *JoinParams)
		want   error
	}{
		"a token that was never made": {func(p *JoinParams) { p.Token = "nonsense" }, ErrTokenUnknown},
		"another fingerprint":         {func(p *JoinParams) { p.Fingerprint = "SHA256:" + strings.Repeat("A", 43) }, ErrFingerprint},
		"nothing answers there":       {func(p *JoinParams) { p.Address = freePort(t) }, ErrJoinUnreachable},
	} {
		bad := p
		c.change(&bad)
		if _, err := n.operator().CheckJoin(t.Context(), bad); !errors.Is(err, c.want) {
			t.Errorf("%s: %v, want %v", name, err, c.want)
		}
	}
	if _, err := nodes[1].operator().CheckJoin(t.Context(), p); !errors.Is(err, ErrClusterExists) {
		t.Errorf("a member: %v", err)
	}
	taken := newTestNode(t, "mx2").start()
	if _, err := taken.operator().CheckJoin(t.Context(), p); !errors.Is(err, ErrNameTaken) {
		t.Errorf("a name in use: %v", err)
	}
	if now := n.state(); now != here || n.files() != files {
		t.Errorf("the node was %+v and is %+v; files\n%s\n%s", here, now, files, n.files())
	}
	if now, err := os.ReadDir(master.local.KeyDir()); err != nil || len(now) != len(keys) || master.state().Position != there.Position {
		t.Errorf("the master was at %v and is at %v; keys %v, %v", there.Position, master.state().Position, now, err)
	}
	if cid, err := n.join(p); err != nil || cid != 3 {
		t.Errorf("the join itself: CID %d, %v", cid, err)
	}
	if _, err := taken.operator().CheckJoin(t.Context(), p); !errors.Is(err, ErrTokenUsed) {
		t.Errorf("a token that was used: %v", err)
	}
}

func TestANodeOfAnOlderVersionDoesNotJoin(t *testing.T) {
	master := newCluster(t, 1)[0]
	master.upgrade()
	n := newTestNode(t, "mx2").start()
	p := master.joinParams()
	if _, err := n.operator().CheckJoin(t.Context(), p); !errors.Is(err, ErrOlderVersion) || !strings.Contains(err.Error(), "900 on the master") {
		t.Errorf("dry run: %v", err)
	}
	if _, err := n.join(p); !errors.Is(err, ErrOlderVersion) || n.state().CID != 0 {
		t.Errorf("join: %v", err)
	}
	n.upgrade()
	if _, err := n.join(p); err != nil {
		t.Errorf("join with the same token after the upgrade: %v", err)
	}
}

func TestAJoinSaysHowFarTheRowsAre(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a := &arrival{of: 1000}
		for _, c := range []struct {
			rows, bytes int64
			err         error
			wait        time.Duration
			want        string
		}{
			{0, 0, nil, 0, ""},
			{100, 1_500_000, nil, 0, "received 100 of about 1000 rows, 1.5 MB"},
			{200, 3_000_000, nil, time.Second / 2, ""},
			{300, 4_500_000, nil, time.Second, "received 300 of about 1000 rows, 4.5 MB"},
			{300, 4_500_000, nil, time.Second, ""},
			{400, 4_500_000, errDown, time.Second, ""},
			{2000, 20_000_000, nil, time.Second, "received 2000 rows, 20.0 MB"},
		} {
			time.Sleep(c.wait) // of the bubble's clock
			if got := a.look(c.rows, c.bytes, c.err); got != c.want {
				t.Errorf("%d rows: %q, want %q", c.rows, got, c.want)
			}
		}
	})
}
