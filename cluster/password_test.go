package cluster

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	"mailproxy/config"
	"mailproxy/db"
	"mailproxy/tunnel"
)

func TestGuessesHaveToWaitLongerAndLonger(t *testing.T) {
	now := time.Now()
	type try struct {
		after  time.Duration
		source string
		want   time.Duration
	}
	sources := func(n int) (all []try) { // one wrong password from each
		for i := range n {
			all = append(all, try{0, fmt.Sprint("other ", i), 0})
		}
		return all
	}
	for _, c := range []struct {
		name  string
		tries []try
	}{
		{"three from one source are free, and then the pause doubles", []try{
			{0, "a", 0}, {0, "a", 0}, {0, "a", 0}, {0, "a", 2 * time.Second}, {time.Second, "a", time.Second}, {time.Second, "a", 0},
			{3 * time.Second, "a", time.Second}, {time.Second, "a", 0}, {0, "a", 8 * time.Second}, {0, "b", 0},
		}},
		{"a part of a second is a second", []try{{0, "a", 0}, {0, "a", 0}, {0, "a", 0}, {1500 * time.Millisecond, "a", time.Second}}},
		{"an hour without forgets", []try{{0, "a", 0}, {0, "a", 0}, {0, "a", 0}, {guessMemory + time.Second, "a", 0}, {0, "a", 0}}},
		{"ten from everywhere are free, and then all wait", append(sources(10), try{0, "a", 2 * time.Second}, try{2 * time.Second, "a", 0}, try{0, "b", 4 * time.Second})},
	} {
		t.Run(c.name, func(t *testing.T) {
			var g guesses
			at := now
			for i, s := range c.tries {
				at = at.Add(s.after)
				if got := g.take(s.source, at); got != s.want {
					t.Errorf("attempt %d, from %s: wait %v, want %v", i, s.source, got, s.want)
				}
			}
		})
	}
}

func TestGuessesStayBounded(t *testing.T) {
	var g guesses
	now, taken := time.Now(), 0
	for i := range 24 * 60 * 60 { // each second, each time from another address
		if g.take(fmt.Sprint(i), now.Add(time.Duration(i)*time.Second)) == 0 {
			taken++
		}
	}
	if taken > 1500 || len(g.sources) > 80 {
		t.Errorf("%d guesses in a day, %d sources remembered", taken, len(g.sources))
	}
	g, taken = guesses{}, 0
	for i := range 24 * 60 * 60 {
		if g.take("a", now.Add(time.Duration(i)*time.Second)) == 0 {
			taken++
		}
	}
	if taken > 250 {
		t.Errorf("%d guesses in a day from one address", taken)
	}
	for count := freeInAll + 5; count < 200; count++ {
		if longest := (guess{count: count, at: now}).wait(now, freeInAll, longestInAll); longest != longestInAll {
			t.Errorf("after %d: %v", count, longest)
		}
	}
}

func TestThePauseBeginsWithTheAnswer(t *testing.T) {
	var g guesses
	now := time.Now()
	for range freeBySource {
		g.take("a", now)
	}
	g.wrong("a", now.Add(3*time.Second))
	if wait := g.take("a", now.Add(4*time.Second)); wait != time.Second {
		t.Errorf("wait %v, want 1s", wait)
	}
	for i := range freeInAll - freeBySource {
		g.take(fmt.Sprint(i), now)
	}
	g.wrong("0", now.Add(3*time.Second))
	if wait := g.take("b", now.Add(4*time.Second)); wait != time.Second {
		t.Errorf("from elsewhere: wait %v, want 1s", wait)
	}
}

func TestARightPasswordForgives(t *testing.T) {
	var g guesses
	now := time.Now()
	for range 30 {
		if wait := g.take("a", now); wait != 0 {
			t.Fatalf("wait %v", wait)
		}
		g.giveBack("a", true)
	}
	g.take("a", now)
	g.take("a", now)
	g.giveBack("a", false) // that one could not be checked
	if g.sources["a"].count != 1 || g.all.count != 1 {
		t.Errorf("%+v, in all %+v", g.sources, g.all)
	}
}

func TestGuessesAreCountedByAddress(t *testing.T) {
	for from, want := range map[string]string{
		"192.0.2.12": "192.0.2.12", "2001:db8:1:2:3:4:5:6": "2001:db8:1:2::/64", "fe80::1%eth0": "fe80::/64", "::ffff:192.0.2.12": "192.0.2.12", "odd": "odd",
	} {
		if got := sourceOf(from); got != want {
			t.Errorf("%s: %s, want %s", from, got, want)
		}
	}
}

// passwordMaster is a master that takes a password, or answers as answer says.
func passwordMaster(t *testing.T, answer func(password string) error) (master *testNode, asked *[]string) {
	t.Helper()
	nodes := newCluster(t, 1)
	asked = new([]string)
	nodes[0].node.o.CheckPassword = func(_ context.Context, from, password string) error { // none is asked before the first join
		*asked = append(*asked, from+" "+password)
		return answer(password)
	}
	eventually(t, "the daemon has its configuration", func() bool { return nodes[0].node.o.Snapshot() != nil })
	return nodes[0], asked
}

func (n *testNode) setSetting(name, value string) {
	n.t.Helper()
	_, err := n.db.Commit(n.t.Context(), db.Author{Who: "tester", Command: "setting set"}, func(ctx context.Context, tx *db.Tx) error {
		return tx.PutSetting(ctx, config.Setting{Name: name, Value: value})
	}, nil)
	if err != nil {
		n.t.Fatal(err)
	}
	eventually(n.t, "the daemon knows the setting", func() bool {
		for _, s := range n.node.o.Snapshot().Settings {
			if s.Name == name && s.Value == value {
				return true
			}
		}
		return false
	})
}

func TestAJoinByPassword(t *testing.T) {
	const right = "right password"
	odd := errors.New("odd: dial unix /run/x.sock")
	master, asked := passwordMaster(t, func(password string) error {
		switch password {
		case right:
			return nil
		case "odd":
			return odd
		}
		return ErrWrongPassword
	})
	n := newTestNode(t, "mx2").start()
	with := func(password string) JoinParams {
		p := master.joinParams()
		p.Token, p.Password = "", func() (string, error) { return password, nil }
		return p
	}
	refused := func(password string, want error) {
		t.Helper()
		if _, err := n.operator().CheckJoin(t.Context(), with(password)); !errors.Is(err, want) {
			t.Errorf("a dry run with %q: %v, want %v", password, err, want)
		}
		_, err := n.join(with(password))
		if !errors.Is(err, want) || n.state().CID != 0 || n.operator().joinBegun() {
			t.Errorf("with %q: %v, want %v", password, err, want)
		}
		if err != nil && strings.Contains(err.Error(), "/run/") {
			t.Errorf("a stranger is told %v", err)
		}
	}
	refused("guessed", ErrWrongPassword)
	refused("odd", ErrPasswordUnchecked)
	if !master.log.contains(odd.Error()) {
		t.Error("the log does not say why a password could not be checked")
	}
	if len(*asked) != 4 || (*asked)[0] != "127.0.0.1 guessed" {
		t.Errorf("asked: %q", *asked)
	}
	refused("", ErrWrongPassword) // this side does not even ask
	master.setSetting("join_password", "no")
	refused(right, ErrPasswordsOff)
	if len(*asked) != 4 {
		t.Errorf("asked, and passwords are off: %q", *asked)
	}
	master.setSetting("join_password", "yes")
	p := with(right)
	before := master.state().Position
	if out, err := n.operator().CheckJoin(t.Context(), p); err != nil || out.CID != 2 || master.state().Position != before || n.state().CID != 0 {
		t.Errorf("a dry run: %+v, %v", out, err)
	}
	if cid, err := n.join(with(right)); err != nil || cid != 2 {
		t.Fatalf("join: %d, %v", cid, err)
	}
	inSync(t, master, n)
	for _, text := range []string{right, "guessed"} {
		if master.log.contains(text) || n.log.contains(text) {
			t.Errorf("%q is in a log", text)
		}
	}
	if !master.log.has("join.password") {
		t.Error("who came with a password is not in the log")
	}
}

func TestGuessingIsSlowedDown(t *testing.T) {
	master, asked := passwordMaster(t, func(string) error { return ErrWrongPassword })
	key, err := tunnel.LoadOrMakeKey(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	guess := func(client string) error {
		_, err := master.node.HandleJoin(t.Context(), tunnel.JoinRequest{
			Password: "guessed", Client: client, Node: config.Node{Name: "x", UUID: "x", Address: "127.0.0.1:1", PublicKey: key.Public()},
		})
		return err
	}
	code := func(err error) tunnel.JoinCode {
		je, _ := errors.AsType[*tunnel.JoinError](err)
		if je == nil {
			return ""
		}
		return je.Code
	}
	for i := range freeBySource + 2 {
		want := codeWrongPassword
		if i >= freeBySource {
			want = codeManyPasswords
		}
		if err := guess(fmt.Sprintf("192.0.2.1:%d", 1000+i)); code(err) != want {
			t.Errorf("guess %d: %v, want %s", i, err, want)
		}
	}
	if err := guess("192.0.2.2:1000"); code(err) != codeWrongPassword {
		t.Errorf("from another address: %v", err)
	}
	if len(*asked) != freeBySource+1 {
		t.Errorf("PAM was asked %d times", len(*asked))
	}
	// Who is slowed down can still come with a token, and who comes with neither gets nowhere.
	if _, err := master.node.HandleJoin(t.Context(), tunnel.JoinRequest{
		Client: "192.0.2.1:1", Node: config.Node{Name: "x", UUID: "x", Address: "127.0.0.1:1", PublicKey: key.Public()},
	}); code(err) != tunnel.CodeTokenUnknown {
		t.Errorf("with neither: %v", err)
	}
}
