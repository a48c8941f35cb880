package cluster

import (
	"context"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/rs/zerolog"

	"mailproxy/config"
	"mailproxy/tunnel"
)

func TestAClonedMachineShowsInStatus(t *testing.T) {
	nodes := newCluster(t, 2)
	dir := filepath.Join(t.TempDir(), "keys")
	if err := os.CopyFS(dir, os.DirFS(nodes[1].local.KeyDir())); err != nil {
		t.Fatal(err)
	}
	for _, f := range []string{"node.key", "identity.json", "trust.json"} {
		if err := os.Chmod(filepath.Join(dir, f), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	clone := tunnel.New(tunnel.Options{KeyDir: dir, Log: zerolog.Nop()})
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- clone.Run(ctx) }()
	defer func() { cancel(); <-done }()
	clone.Reload(nil) // its peers are those of its key directory
	says := func(n *testNode, cid config.CID, what string) func() bool {
		return func() bool {
			for _, p := range row(t, n.status(StatusParams{}), cid).Problems {
				if strings.Contains(p.What, what) && strings.Contains(p.Remedy, "join as a new node") {
					return true
				}
			}
			return false
		}
	}
	eventually(t, "who refused says so", says(nodes[0], 1, "two live daemons are mx2(2): the one at 127.0.0.1 came second"))
	eventually(t, "the first says so", says(nodes[1], 2, "two live daemons have this node's identity: another one at 127.0.0.1 is refused, says mx1(1)"))
	eventually(t, "the second knows", func() bool {
		for _, p := range clone.Peers() {
			if strings.Contains(twin(p), "this one came second") {
				return true
			}
		}
		return false
	})
	nodes[0].mustPutDomain("example.test")
	inSync(t, nodes...)
}
