package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/rs/zerolog"

	"mailproxy/cluster"
	"mailproxy/config"
	"mailproxy/db"
)

// join makes slave a member of master's cluster, by the command that join-cmd prints.
func join(t *testing.T, master, slave *testNode) {
	t.Helper()
	out, errs, code := master.run("pmgcm", "join-cmd")
	if code != 0 {
		t.Fatalf("pmgcm join-cmd: %d %s%s", code, out, errs)
	}
	var words []string
	for line := range strings.Lines(out) {
		if rest, ok := strings.CutPrefix(strings.TrimSpace(line), "pmgcm "); ok {
			words = strings.Fields(rest)
		}
	}
	if out, errs, code := slave.run("pmgcm", words...); code != 0 {
		t.Fatalf("pmgcm %s: %d %s%s", strings.Join(words, " "), code, out, errs)
	}
}

func TestConfigurationIsChangedOnAnyNode(t *testing.T) {
	master, slave := newNode(t), newNode(t, "--name", "n2.test")
	for _, n := range []*testNode{master, slave} {
		n.start()
		n.waitHealthy()
	}
	if out, errs, code := master.run("pmgcm", "create"); code != 0 {
		t.Fatalf("pmgcm create: %d %s%s", code, out, errs)
	}
	master.must("domain", "add", "example.test", "--to", freePort(t))
	join(t, master, slave)
	for _, c := range []struct {
		args []string
		out  string
	}{
		{[]string{"domain", "add", "b.test", "--to", "192.0.2.1", "--comment", "two words"}, "domain b.test added"},
		{[]string{"domain", "set", "b.test", "--comment", "three words now"}, "domain b.test changed"},
		{[]string{"setting", "set", "max_errors", "3"}, "max_errors"},
		{[]string{"network", "add", "10.0.0.0/8"}, "10.0.0.0/8"},
		{[]string{"transport", "add", "t", "--mx"}, "transport t"},
		{[]string{"domain", "remove", "example.test"}, "domain example.test removed"},
	} {
		out, errs, code := slave.run("mailproxy", append([]string{"--config", slave.file}, c.args...)...)
		if code != 0 || !strings.Contains(out, c.out) || errs != "" {
			t.Errorf("%v: exit code %d, %s%s", c.args, code, out, errs)
		}
		if mine, its := slave.must("config", "show"), master.must("config", "show"); mine != its {
			t.Errorf("%v: the command ended before this node held the change:\n%s\nthe master has\n%s", c.args, mine, its)
		}
	}
	history := master.must("config", "history")
	for _, want := range []string{"mailproxy domain add b.test --to 192.0.2.1 --comment 'two words'", "root"} {
		if !strings.Contains(history, want) {
			t.Errorf("history has no %q:\n%s", want, history)
		}
	}
	var entries []struct {
		Node int    `json:"node"`
		Who  string `json:"who"`
	}
	if err := json.Unmarshal([]byte(master.must("config", "history", "--limit", "1", "--json")), &entries); err != nil || entries[0].Node != 2 {
		t.Errorf("the newest commit was typed on node %+v, %v", entries, err)
	}
	t.Run("a whole text", func(t *testing.T) {
		text := slave.must("config", "show") + "\n[[domain]]\nname = \"c.test\"\nhosts = [\"192.0.2.3\"]\n"
		file := filepath.Join(t.TempDir(), "c.toml")
		if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		slave.must("config", "apply", "--yes", "--empty", "/dev/null")
		if mine, its := slave.must("domain", "list"), master.must("domain", "list"); mine != its || strings.Contains(mine, "b.test") {
			t.Errorf("config apply --empty leaves\n%s\nthe master has\n%s", mine, its)
		}
		if out := slave.must("config", "apply", "--yes", file); !strings.Contains(out, "+ domain c.test") || !strings.Contains(out, " changes applied") ||
			strings.Count(out, "domain c.test") != 1 {
			t.Errorf("config apply: %s", out)
		}
	})
	t.Run("a file of recipients", func(t *testing.T) {
		file := filepath.Join(t.TempDir(), "r") // of this node's host alone
		if err := os.WriteFile(file, []byte("info@c.test OK\nsales\n"), 0o600); err != nil {
			t.Fatal(err)
		}
		if out := slave.must("domain", "recipients", "import", "c.test", file); !strings.HasPrefix(out, "recipients of c.test: 2, were 0 ") {
			t.Errorf("import: %s", out)
		}
		if mine, its := slave.must("domain", "recipients", "list"), master.must("domain", "recipients", "list"); mine != its || mine != "info@c.test\nsales@c.test\n" {
			t.Errorf("the list is\n%s\nthe master has\n%s", mine, its)
		}
		slave.must("domain", "recipients", "import", "--empty", "c.test", "/dev/null")
		if out := master.must("domain", "recipients", "list"); out != "" {
			t.Errorf("left: %s", out)
		}
	})
	t.Run("what is refused there fails here the same way", func(t *testing.T) {
		for _, c := range []struct {
			args []string
			errs string
			code int
		}{
			{[]string{"domain", "add", "b.test", "--to", "192.0.2.1"}, "mailproxy: domain b.test: is there already\nhint: mailproxy domain set b.test …\n", 1},
			{[]string{"domain", "add", "x.test", "--transport", "none"}, "none", 1},
			{[]string{"domain", "add", "x.test"}, "mailproxy: domain add: --to or --transport is missing\nhint: mailproxy --help\n", 2},
		} {
			out, errs, code := slave.run("mailproxy", append([]string{"--config", slave.file}, c.args...)...)
			if code != c.code || !strings.Contains(errs, c.errs) {
				t.Errorf("%v: exit code %d, %s%s", c.args, code, out, errs)
			}
		}
	})
	t.Run("what was confirmed beside another configuration is not done", func(t *testing.T) {
		d, err := db.Open(db.Options{DSN: databaseDSN(slave.local), Log: zerolog.Nop()})
		if err != nil {
			t.Fatal(err)
		}
		defer d.Close()
		st, err := d.State(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		o := &cluster.Operator{Local: slave.local, DB: d}
		cmd := config.Command{Args: []string{"domain", "add", "seen.test", "--to", "192.0.2.1"}, At: st.Position}
		cmd.At.Serial--
		if reply, err := o.Carry(t.Context(), cmd); err != nil || reply.Code != 1 || reply.Error != errMeanwhile.Error() {
			t.Errorf("beside an older one: %+v, %v", reply, err)
		}
		cmd.At = st.Position
		if reply, err := o.Carry(t.Context(), cmd); err != nil || reply.Code != 0 {
			t.Errorf("beside today's: %+v, %v", reply, err)
		}
	})
	holdsTheSame := func() {
		t.Helper()
		eventually(t, func() error {
			if mine, its := slave.must("config", "show"), master.must("config", "show"); mine != its {
				return errors.New(mine)
			}
			return nil
		})
	}
	t.Run("a whole text of a version that does not know all of it", func(t *testing.T) {
		master.must("tls", "sender", "add", "bank.example")
		d, err := db.Open(db.Options{DSN: databaseDSN(slave.local), Log: zerolog.Nop()})
		if err != nil {
			t.Fatal(err)
		}
		defer d.Close()
		for _, schema := range []int64{1, db.OwnSchema() - 1, db.OwnSchema()} {
			holdsTheSame()
			st, err := d.State(t.Context())
			if err != nil {
				t.Fatal(err)
			}
			o := &cluster.Operator{Local: slave.local, DB: d}
			reply, err := o.Carry(t.Context(), config.Command{Args: []string{"config", "apply", "-", "--yes"}, At: st.Position, Schema: schema,
				Text: "[[domain]]\nname = \"c.test\"\nhosts = [\"192.0.2.3\"]\n"})
			left := master.must("tls", "sender", "list")
			if schema == db.OwnSchema() {
				if err != nil || reply.Code != 0 || strings.Contains(left, "bank.example") {
					t.Errorf("of the same version: %+v, %v; left: %s", reply, err, left)
				}
				continue
			}
			if err != nil || reply.Code != 1 || reply.Error != "node n2.test: "+errOlderProgram.Error() || !strings.HasPrefix(reply.Hint, "upgrade mailproxy on n2.test;") ||
				!strings.Contains(left, "bank.example") {
				t.Errorf("schema %d: %+v, %v; left: %s", schema, reply, err, left)
			}
		}
	})
	t.Run("a whole text beside what came between", func(t *testing.T) {
		d, err := db.Open(db.Options{DSN: databaseDSN(master.local), Log: zerolog.Nop()})
		if err != nil {
			t.Fatal(err)
		}
		defer d.Close()
		st, err := d.State(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		master.must("domain", "add", "between.test", "--to", "192.0.2.1")
		var out strings.Builder
		ctx := context.WithValue(t.Context(), carriedKey{}, &store{DB: d, local: master.local, author: db.Author{Who: "root"}, at: st.Position})
		err = newApp(strings.NewReader(""), &out, &out).RunContext(ctx, []string{"mailproxy", "config", "apply", "--yes", "-"})
		if !errors.Is(err, errMeanwhile) || !strings.Contains(master.must("domain", "list"), "between.test") {
			t.Errorf("%v %s", err, out.String())
		}
		holdsTheSame()
	})
	t.Run("with the master away", func(t *testing.T) {
		before := slave.must("config", "show")
		master.stop()
		eventually(t, func() error {
			_, errs, code := slave.run("mailproxy", "--config", slave.file, "domain", "add", "d.test", "--to", "192.0.2.1")
			want := fmt.Sprintf("mailproxy: configuration cannot be changed now: the master n1.test(1) at %s does not answer since 20", master.local.Address)
			if code != 1 || !strings.HasPrefix(errs, want) || !strings.Contains(errs, "hint: wait until it is back; or, where it is lost, run \"pmgcm promote\"") {
				return fmt.Errorf("exit code %d, %s", code, errs)
			}
			return nil
		})
		if after := slave.must("config", "show"); after != before {
			t.Errorf("the slave has now\n%s", after)
		}
	})
	slave.stop()
}

func TestOnlyConfigurationCommandsAreCarried(t *testing.T) {
	for _, args := range [][]string{{"domain", "recipients", "import", "a.test", "-"}, {"domain", "recipients", "import", "a.test", "-", "--empty"},
		{"domain", "recipients", "add", "x@a.test"}} {
		if !mayCarry(args) {
			t.Errorf("%v is not carried", args)
		}
	}
	for _, args := range [][]string{
		nil, {"serve"}, {"init", "x"}, {"queue", "delete"}, {"config", "apply", "/etc/passwd", "--yes"}, {"config", "apply", "-"},
		{"config", "show"}, {"config", "apply", "-", "--yes", "--config", "x"},
		{"domain", "recipients", "import", "a.test", "/etc/passwd"}, {"domain", "recipients", "import", "a.test", "-", "/etc/passwd"},
		{"domain", "recipients", "import", "--empty", "/etc/passwd", "-"}, {"domain", "recipients", "import", "a.test"},
	} {
		if mayCarry(args) {
			t.Errorf("%v is carried", args)
		}
	}
}
