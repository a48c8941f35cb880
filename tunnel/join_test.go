package tunnel

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/crypto/ssh"

	"mailproxy/config"
)

func request(k *Key) JoinRequest {
	return JoinRequest{Version: joinVersion, Token: "secret-token", Node: config.Node{
		UUID: "5f0c1c1e-0000-4000-8000-00000000000a", Name: "new.test", Address: "192.0.2.7:7025", PublicKey: k.Public(),
		MachineID: "0123456789abcdef0123456789abcdef", Services: []string{"smtp"}, Promotable: true,
	}}
}

// master is node 1, which lets in whoever asks and notes what it was asked.
func master(t *testing.T, asked *[]JoinRequest) (*node, *CA) {
	t.Helper()
	ca := newCA(t)
	var n *node
	n = newNode(t, Options{Join: func(_ context.Context, r JoinRequest) (JoinReply, error) {
		*asked = append(*asked, r)
		certs, err := ca.Sign(r.Node.PublicKey, 2, testCluster, time.Hour)
		r.Node.CID = 2
		return JoinReply{
			ClusterID: testCluster, CID: 2, Certs: certs, Nodes: []config.Node{n.row(), r.Node}, CAs: []config.CA{ca.Config(1)},
			Epoch: config.Epoch{N: 1, Owner: 1}, Position: config.Position{Epoch: config.Epoch{N: 1, Owner: 1}, Serial: 7},
		}, err
	}})
	n.enter(ca, 1)
	n.start()
	n.Reload(snapshot(ca, n))
	return n, ca
}

// ask joins at the node with quick timing.
func ask(n *node, fingerprint string, k *Key, r JoinRequest, confirm func(string) bool) (JoinReply, error) {
	return joinWith(context.Background(), n.addr, fingerprint, k, r, confirm, quick())
}

func TestAJoinMakesAMember(t *testing.T) {
	var asked []JoinRequest
	m, ca := master(t, &asked)
	joiner := newNode(t, Options{})
	joiner.cid = 2
	r := request(joiner.key)
	r.Node.Address = joiner.addr
	reply, err := ask(m, m.key.Fingerprint(), joiner.key, r, nil)
	if err != nil {
		t.Fatal(err)
	}
	if reply.CID != 2 || reply.ClusterID != testCluster || reply.Position.Serial != 7 || reply.Epoch.Owner != 1 {
		t.Errorf("reply is %+v", reply)
	}
	if len(asked) != 1 || asked[0].Token != "secret-token" || asked[0].Node.Name != "new.test" || asked[0].Node.PublicKey != joiner.key.Public() ||
		!strings.HasPrefix(asked[0].Client, "127.0.0.1:") {
		t.Errorf("the master was asked %+v", asked)
	}
	if err := SaveIdentity(joiner.dir, reply.Identity()); err != nil {
		t.Fatal(err)
	}
	joiner.start()
	joiner.Reload(nil)
	m.Reload(snapshot(ca, m, joiner))
	ping(t, joiner.mustDial(1, "echo"), "to the master")
	ping(t, m.mustDial(2, "echo"), "to the new node")
	for _, n := range []*node{m, joiner} {
		if strings.Contains(n.log.text(), "secret-token") {
			t.Error("the token is in the log")
		}
	}
}

func TestNothingIsSentToAWrongHost(t *testing.T) {
	var asked []JoinRequest
	m, _ := master(t, &asked)
	k := newKey(t)
	_, err := ask(m, newKey(t).Fingerprint(), k, request(k), nil)
	if !errors.Is(err, ErrFingerprint) || !strings.Contains(err.Error(), m.key.Fingerprint()) {
		t.Errorf("with another fingerprint: %v", err)
	}
	var shown string
	_, err = ask(m, "", k, request(k), func(f string) bool { shown = f; return false })
	if !errors.Is(err, ErrNotConfirmed) || shown != m.key.Fingerprint() {
		t.Errorf("after a no to %s: %v", shown, err)
	}
	if _, err = ask(m, "", k, request(k), nil); !errors.Is(err, ErrNotConfirmed) {
		t.Errorf("with nobody to ask: %v", err)
	}
	if len(asked) > 0 {
		t.Errorf("the master was asked %+v", asked)
	}
	if _, err = ask(m, "", k, request(k), func(string) bool { return true }); err != nil || len(asked) != 1 {
		t.Errorf("after a yes: %v, asked %d times", err, len(asked))
	}
}

// The host key of the second connection counts: it must be the one that was confirmed.
func TestTheConfirmedKeyIsPinned(t *testing.T) {
	var asked []JoinRequest
	m, _ := master(t, &asked)
	other, _ := master(t, &asked)
	var target atomic.Value
	target.Store(m.addr)
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	var own owned
	own.spawn(func() {
		for {
			a, err := l.Accept()
			if err != nil {
				return
			}
			b, err := net.Dial("tcp", target.Load().(string))
			if err != nil {
				a.Close()
				continue
			}
			own.spawn(func() { pipe(context.Background(), a, b) })
		}
	})
	t.Cleanup(func() { l.Close(); own.wait() })
	k := newKey(t)
	_, err = joinWith(context.Background(), l.Addr().String(), "", k, request(k), func(string) bool {
		target.Store(other.addr)
		return true
	}, quick())
	if !errors.Is(err, ErrFingerprint) || len(asked) > 0 {
		t.Errorf("got %v, asked %d times", err, len(asked))
	}
}

func TestRefusalsTravelAsCodes(t *testing.T) {
	var answer error
	n := newNode(t, Options{Join: func(context.Context, JoinRequest) (JoinReply, error) { return JoinReply{}, answer }})
	n.start()
	k := newKey(t)
	for _, c := range []struct {
		answer error
		is     error
		code   JoinCode
		text   string
	}{
		{&JoinError{Code: CodeTokenUnknown}, ErrTokenUnknown, CodeTokenUnknown, "not known"},
		{&JoinError{Code: CodeTokenUsed, Text: "used by node 2"}, ErrTokenUsed, CodeTokenUsed, "used by node 2"},
		{fmt.Errorf("take token: %w", ErrTokenExpired), ErrTokenExpired, CodeTokenExpired, "expired"},
		{&JoinError{Code: CodeNotMaster, MasterName: "m.test", MasterAddress: "192.0.2.1:7025"}, ErrNotMaster, CodeNotMaster, ""},
		{ErrNoCluster, ErrNoCluster, CodeNoCluster, ""},
		{&JoinError{Code: CodeRevoked}, ErrRevoked, CodeRevoked, ""},
		{ErrOtherIdentity, ErrOtherIdentity, CodeOtherIdentity, ""},
		{&JoinError{Code: "name_taken", Text: "the name is taken\x1b[2J"}, nil, "name_taken", "the name is taken?[2J"},
		{errors.New("password of postgres is hunter2"), ErrJoinFailed, CodeInternal, ""},
	} {
		answer = c.answer
		n.joins = &buckets{burst: 100, every: time.Second}
		_, err := ask(n, n.key.Fingerprint(), k, request(k), nil)
		var refused *JoinError
		if !errors.As(err, &refused) || refused.Code != c.code || (c.is != nil && !errors.Is(err, c.is)) ||
			!strings.Contains(err.Error(), c.text) || strings.Contains(err.Error(), "hunter2") {
			t.Errorf("%v came back as %v", c.answer, err)
			continue
		}
		if c.code == CodeNotMaster && (refused.MasterName != "m.test" || refused.MasterAddress != "192.0.2.1:7025") {
			t.Errorf("the master is %+v", refused)
		}
	}
	if !n.log.has("join.answered", "err", "hunter2") {
		t.Error("the cause is not in the answering node's log")
	}
}

func TestJoinsAreLimited(t *testing.T) {
	n := newNode(t, Options{Join: func(context.Context, JoinRequest) (JoinReply, error) { return JoinReply{}, ErrTokenUnknown }})
	n.start()
	k := newKey(t)
	for i := range joinBurst + 1 {
		_, err := ask(n, n.key.Fingerprint(), k, request(k), nil)
		want := ErrTokenUnknown
		if i == joinBurst {
			want = ErrTooManyJoins
		}
		if !errors.Is(err, want) {
			t.Fatalf("attempt %d: %v, want %v", i+1, err, want)
		}
	}
}

// stranger is a raw join connection.
func stranger(t *testing.T, n *node, k *Key) ssh.Conn {
	t.Helper()
	c, err := intrude(t, n, joinUser, k.signer, nil)
	if err != nil {
		t.Fatal(err)
	}
	return c
}

func TestAJoinConnectionIsGoodForNothingElse(t *testing.T) {
	var asked []JoinRequest
	m, _ := master(t, &asked)
	c := stranger(t, m, newKey(t))
	for _, channel := range []string{gateChannel, "session", "direct-tcpip"} {
		if _, _, err := c.OpenChannel(channel, ssh.Marshal(gateRequest{"echo"})); err == nil {
			t.Errorf("a channel of type %s was opened", channel)
		}
	}
	if ok, _, err := c.SendRequest(keepAlive, true, nil); ok || err != nil {
		t.Errorf("a global request: %v, %v", ok, err)
	}
	first, requests, err := c.OpenChannel(joinChannel, nil)
	if err != nil {
		t.Fatal(err)
	}
	go ssh.DiscardRequests(requests)
	if _, _, err := c.OpenChannel(joinChannel, nil); err == nil {
		t.Error("a second join channel was opened")
	}
	first.Close()
}

func TestJoinRequestsAreChecked(t *testing.T) {
	var asked []JoinRequest
	m, _ := master(t, &asked)
	k := newKey(t)
	for what, send := range map[string]string{
		"no JSON":              "hello",
		"another version":      `{"version":2}`,
		"too long":             `{"version":1,"token":"` + strings.Repeat("x", maxRequestBytes) + `"}`,
		"another's public key": string(must(json.Marshal(request(newKey(t))))),
		"a CID":                strings.Replace(string(must(json.Marshal(request(k)))), `"cid":0`, `"cid":1`, 1),
		"a name with a blank":  strings.Replace(string(must(json.Marshal(request(k)))), "new.test", "new test", 1),
		"an address no port":   strings.Replace(string(must(json.Marshal(request(k)))), ":7025", "", 1),
	} {
		t.Run(what, func(t *testing.T) {
			m.joins = &buckets{burst: 100, every: time.Second}
			c := stranger(t, m, k)
			ch, requests, err := c.OpenChannel(joinChannel, nil)
			if err != nil {
				t.Fatal(err)
			}
			go ssh.DiscardRequests(requests)
			go func() {
				io.WriteString(ch, send)
				ch.SendRequest(finRequest, false, nil)
				ch.CloseWrite()
			}()
			got, _ := io.ReadAll(ch)
			var a joinAnswer
			if err := json.Unmarshal(got, &a); err != nil || a.Error == nil || a.Error.Code != CodeBadRequest {
				t.Errorf("was answered %q", got)
			}
			c.Close()
		})
	}
	if len(asked) > 0 {
		t.Errorf("the master was asked %+v", asked)
	}
}

func must(b []byte, err error) []byte {
	if err != nil {
		panic(err)
	}
	return b
}

func TestAJoinThatStallsIsEnded(t *testing.T) {
	n := newNode(t, Options{Join: func(context.Context, JoinRequest) (JoinReply, error) { return JoinReply{}, ErrNotMaster }})
	c := quick()
	c.join = 200 * time.Millisecond
	n.setTiming(c)
	n.start()
	conn := stranger(t, n, newKey(t))
	began := time.Now()
	conn.Wait()
	if took := time.Since(began); took > 3*time.Second {
		t.Errorf("it was ended after %v", took)
	}

	t.Run("and so is one whose answer does not come", func(t *testing.T) {
		l, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		defer l.Close()
		k := newKey(t)
		_, err = joinWith(context.Background(), l.Addr().String(), k.Fingerprint(), k, request(k), nil, c)
		if !errors.Is(err, context.DeadlineExceeded) && !errors.Is(err, os.ErrDeadlineExceeded) {
			t.Errorf("got %v", err)
		}
	})
}

func TestWithoutAJoinHandlerNobodyJoins(t *testing.T) {
	n := newNode(t, Options{})
	n.start()
	k := newKey(t)
	if _, err := ask(n, n.key.Fingerprint(), k, request(k), nil); err == nil {
		t.Error("it was let in")
	}
}

func TestRepliesAreChecked(t *testing.T) {
	ca, k, host := newCA(t), newKey(t), newKey(t)
	good := func() JoinReply {
		certs, err := ca.Sign(k.Public(), 2, testCluster, time.Hour)
		if err != nil {
			t.Fatal(err)
		}
		return JoinReply{
			ClusterID: testCluster, CID: 2, Certs: certs, CAs: []config.CA{ca.Config(1)},
			Nodes: []config.Node{{CID: 1, PublicKey: host.Public()}, {CID: 2, PublicKey: k.Public()}},
		}
	}
	decode := func(a joinAnswer) error {
		_, err := decodeReply(must(json.Marshal(a)), k.signer.PublicKey(), host.signer.PublicKey())
		return err
	}
	r := good()
	if err := decode(joinAnswer{Reply: &r}); err != nil {
		t.Fatalf("a good one: %v", err)
	}
	for what, change := range map[string]func(r *JoinReply){
		"another CID":                         func(r *JoinReply) { r.CID = 3 },
		"another cluster":                     func(r *JoinReply) { r.ClusterID = "other" },
		"host and user certificate exchanged": func(r *JoinReply) { r.Certs.Host, r.Certs.User = r.Certs.User, r.Certs.Host },
		"no certificate":                      func(r *JoinReply) { r.Certs.User = "" },
		"a CA that is not listed":             func(r *JoinReply) { r.CAs = []config.CA{newCA(t).Config(1)} },
		"this node is not listed":             func(r *JoinReply) { r.Nodes = r.Nodes[:1] },
		"this node under another CID":         func(r *JoinReply) { r.Nodes[1].CID = 5 },
		"the other node is not listed":        func(r *JoinReply) { r.Nodes = r.Nodes[1:] },
	} {
		r := good()
		change(&r)
		if err := decode(joinAnswer{Reply: &r}); !errors.Is(err, ErrBadReply) {
			t.Errorf("%s: %v, want %v", what, err, ErrBadReply)
		}
	}
	if err := decode(joinAnswer{}); !errors.Is(err, ErrBadReply) {
		t.Errorf("an empty one: %v", err)
	}
	if err := decode(joinAnswer{Reply: &r, Error: &JoinError{}}); !errors.Is(err, ErrBadReply) {
		t.Errorf("one with both: %v", err)
	}
}

func FuzzJoinRequest(f *testing.F) {
	k := newKeyAt(f, f.TempDir())
	f.Add(must(json.Marshal(request(k))))
	f.Add([]byte(`{"version":1}`))
	f.Fuzz(func(t *testing.T, data []byte) {
		r, err := decodeRequest(data)
		if err != nil {
			if !errors.Is(err, ErrBadRequest) {
				t.Fatalf("%v is no %v", err, ErrBadRequest)
			}
			return
		}
		if _, _, err := net.SplitHostPort(r.Node.Address); err != nil || r.Node.CID != 0 || len(r.Token) > 256 ||
			strings.ContainsFunc(r.Token+r.Node.Name+r.Node.Address+r.Node.UUID+r.Node.MachineID, func(c rune) bool { return c <= ' ' || c > '~' }) {
			t.Fatalf("was taken: %+v", r)
		}
	})
}

func FuzzJoinAnswer(f *testing.F) {
	k := newKeyAt(f, f.TempDir())
	f.Add([]byte(`{"error":{"code":"token_used","text":"x"}}`))
	f.Add([]byte(`{"reply":{"cluster_id":"x","cid":2}}`))
	f.Fuzz(func(t *testing.T, data []byte) {
		_, err := decodeReply(data, k.signer.PublicKey(), k.signer.PublicKey())
		var refused *JoinError
		switch {
		case err == nil:
			t.Fatalf("was taken without certificates: %q", data)
		case errors.As(err, &refused):
			if cleaned(refused.Text, 500) != refused.Text {
				t.Fatalf("text is not clean: %q", refused.Text)
			}
		case !errors.Is(err, ErrBadReply):
			t.Fatalf("%v is no %v", err, ErrBadReply)
		}
	})
}

func newKeyAt(t testing.TB, dir string) *Key {
	t.Helper()
	k, err := LoadOrMakeKey(dir + "/k")
	if err != nil {
		t.Fatal(err)
	}
	return k
}

func TestAPasswordIsWhatCanBeTyped(t *testing.T) {
	k := newKey(t)
	for _, c := range []struct {
		name, password, token string
		ok                    bool
	}{
		{"any characters", "ä b€c\"\\", "", true},
		{"the longest", strings.Repeat("x", maxPassword), "", true},
		{"longer", strings.Repeat("x", maxPassword+1), "", false},
		{"two lines", "secret\nline", "", false},
		{"a NUL", "secret\x00line", "", false},
		{"beside a token", "secret", "t", false},
	} {
		r := request(k)
		r.Version, r.Token, r.Password, r.Node.PublicKey = joinVersion, c.token, c.password, k.Public()
		got, err := decodeRequest(must(json.Marshal(r)))
		if (err == nil) != c.ok || c.ok && got.Password != c.password || err != nil && strings.Contains(err.Error(), "secret") {
			t.Errorf("%s: %v", c.name, err)
		}
	}
}

func TestAKeyIsPinnedBeforeAnythingIsAsked(t *testing.T) {
	m, _ := master(t, &[]JoinRequest{})
	yes := func(string) bool { return true }
	no := func(string) bool { return false }
	for _, c := range []struct {
		name, wanted string
		confirm      func(string) bool
		want         error
	}{
		{"the wanted one", m.key.Fingerprint(), no, nil},
		{"another one", newKey(t).Fingerprint(), yes, ErrFingerprint},
		{"a yes", "", yes, nil},
		{"a no", "", no, ErrNotConfirmed},
		{"nobody to ask", "", nil, ErrNotConfirmed},
	} {
		found, err := Pin(t.Context(), m.addr, c.wanted, c.confirm)
		if !errors.Is(err, c.want) || err == nil && found != m.key.Fingerprint() {
			t.Errorf("%s: %s, %v", c.name, found, err)
		}
	}
}

// A node of a version without dry runs wants version 1, and must not take one for a join.
func TestADryRunIsOfAnotherVersionOfTheExchange(t *testing.T) {
	k := newKey(t)
	for _, c := range []struct {
		version int
		dryRun  bool
		ok      bool
	}{{1, false, true}, {2, true, true}, {1, true, false}, {2, false, false}} {
		r := request(k)
		r.Version, r.DryRun, r.Node.PublicKey = c.version, c.dryRun, k.Public()
		if _, err := decodeRequest(must(json.Marshal(r))); (err == nil) != c.ok {
			t.Errorf("version %d, dry run %v: %v", c.version, c.dryRun, err)
		}
	}
	if v := versionOf(JoinRequest{DryRun: true}); v == joinVersion {
		t.Error("a dry run is asked for in the version of a join")
	}
}

func TestOutcomesOfADryRunAreChecked(t *testing.T) {
	good := JoinCheck{ClusterID: testCluster, CID: 2}
	if _, err := decodeCheck(must(json.Marshal(joinAnswer{Check: &good}))); err != nil {
		t.Fatal(err)
	}
	for what, a := range map[string]joinAnswer{
		"none":           {},
		"a join's reply": {Reply: &JoinReply{CID: 2}},
		"no CID":         {Check: &JoinCheck{ClusterID: testCluster}},
		"a long cluster": {Check: &JoinCheck{ClusterID: strings.Repeat("x", 65), CID: 2}},
		"and an error":   {Check: &good, Error: &JoinError{Code: CodeInternal}},
	} {
		if _, err := decodeCheck(must(json.Marshal(a))); !errors.Is(err, ErrBadReply) {
			t.Errorf("%s: %v", what, err)
		}
	}
}

func TestALentKeyIsNotKept(t *testing.T) {
	dir := t.TempDir() + "/keys"
	a, err := LoadOrLendKey(dir)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(dir); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the directory: %v", err)
	}
	kept, err := LoadOrMakeKey(dir)
	if err != nil {
		t.Fatal(err)
	}
	if b, err := LoadOrLendKey(dir); err != nil || b.Public() != kept.Public() || b.Public() == a.Public() {
		t.Errorf("with a key there: %v", err)
	}
}
