package config

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

const least = "name = \"mx1.example.test\"\naddress = \"192.0.2.1\"\n"

func TestLocalHasDefaultsForAllButNameAndAddress(t *testing.T) {
	l, err := ParseLocal([]byte(least))
	if err != nil {
		t.Fatal(err)
	}
	want := DefaultLocal()
	want.Name, want.Address = "mx1.example.test", "192.0.2.1"
	if diff := cmp.Diff(want, l); diff != "" {
		t.Error(diff)
	}
	if got := l.TunnelAddress(); got != "192.0.2.1:7025" {
		t.Errorf("tunnel address %s", got)
	}
}

func TestTheTemplateIsReadBack(t *testing.T) {
	for _, change := range []func(*Local){
		func(*Local) {},
		func(l *Local) { l.Database.DSN = `postgres://u:p@h/d?x="y"&z='` },
		func(l *Local) { l.Database.Bin = "/usr/lib/postgresql/15/bin" },
		func(l *Local) { l.Services, l.SMTP.Listen, l.User = []string{"web"}, nil, "" },
		func(l *Local) {
			l.SMTP, l.Internal = MailListen{TLSListen: []string{":465"}}, MailListen{[]string{":26"}, []string{":466"}}
		},
		func(l *Local) { l.Address, l.Tunnel.Listen = "2001:db8::1", []string{"[2001:db8::1]:9"} },
	} {
		want := DefaultLocal()
		want.Name, want.Address = "n", "h"
		change(want)
		got, err := ParseLocal(want.Text())
		if err != nil {
			t.Fatalf("%v\n%s", err, want.Text())
		}
		if len(want.SMTP.Listen) == 0 {
			got.SMTP.Listen = nil
		}
		if diff := cmp.Diff(want, got); diff != "" {
			t.Error(diff)
		}
	}
}

func TestLocalNamesLineAndReason(t *testing.T) {
	long := "/" + strings.Repeat("d", 90)
	for _, c := range []struct{ name, text, want string }{
		{"unknown key", "colour = 1\n", `line 3: unknown key "colour"`},
		{"unknown key in a table", "[smtp]\n\nlisten=[\":25\"]\nlisen = [\":26\"]\n", `line 6: unknown key "smtp.lisen"`},
		{"unknown table", "[smpt]\nlisten=[\":25\"]\n", `line 3: unknown key "smpt"`},
		{"not TOML", "state_dir = /var\n", "line 3: "},
		{"wrong type", "services = \"smtp\"\n", "line 3: "},
		{"relative directory", "state_dir = \"var\"\n", `line 3: state_dir: "var" is not an absolute path`},
		{"blank in a directory", "run_dir = \"/a b\"\n", `line 3: run_dir: "/a b" has a blank, comma, quote or backslash in it`},
		{"same directories", "run_dir = \"/a/\"\nstate_dir=\"/a\"\n", "line 3: run_dir: is the same as state_dir"},
		{"root directory", "run_dir = \"/\"\n", "line 3: run_dir: the root directory cannot be it"},
		{"run directory too long for sockets", "run_dir = \"" + long + "\"\n", "line 3: run_dir: is 9 octets too long: "},
		{"unknown service", "services = [\"smtp\", \"pop\"]\n", `line 3: services: unknown service "pop", want smtp or web`},
		{"service twice", "services = [\"web\", \"web\"]\n", "line 3: services: web stands there twice"},
		{"user", "user = \"a b\"\n", `line 3: user: "a b" is not a user's name`},
		{"listen without a port", "[smtp]\nlisten = [\"127.0.0.1\"]\n", `line 4: smtp.listen: "127.0.0.1" is not host:port`},
		{"listen with a wrong address", "[smtp]\nlisten = [\"300.0.0.1:25\"]\n",
			`line 4: smtp.listen: "300.0.0.1:25": "300.0.0.1" is neither an IP address nor a host name`},
		{"listen with a wrong port", "[web]\nlisten = [\":http\"]\n", `line 4: web.listen: ":http": port "http" is not a number from 1 to 65535`},
		{"nothing to listen on", "[tunnel]\nlisten = []\n", "line 4: tunnel.listen: is empty"},
		{"no listener for mail", "[smtp]\nlisten = []\n", "line 4: smtp.listen: is empty"},
		{"a listener for mail without a port", "[internal]\ntls_listen = [\"x\"]\n", `line 4: internal.tls_listen: "x" is not host:port`},
		{"the same listener twice", "[smtp]\nlisten = [\":25\"]\n[web]\nlisten = [\":25\"]\n", "line 6: web.listen: :25 is in smtp.listen too"},
		{"two databases", "[database]\nbin = \"/a\"\ndsn = \"b\"\n", "line 4: database.bin: is for a private instance, and"},
		{"relative bin", "[database]\nbin = \"a\"\n", `line 4: database.bin: "a" is not an absolute path`},
	} {
		t.Run(c.name, func(t *testing.T) {
			_, err := ParseLocal([]byte(least + c.text))
			if err == nil || !strings.HasPrefix(err.Error(), c.want) || strings.Contains(err.Error(), "\n") {
				t.Errorf("got  %v\nwant %s", err, c.want)
			}
		})
	}
}

func TestLocalChecksNameAndAddress(t *testing.T) {
	for _, c := range []struct{ text, want string }{
		{"", "name: is missing: the node's host name, as EHLO shows it\n" +
			"address: is missing: the IP address or host name at which other nodes reach this one"},
		{"name = \"a_b\"\naddress = \"h\"\n", `line 1: name: "a_b" is not a host name`},
		{"name = \"192.0.2.1\"\naddress = \"h\"\n", `line 1: name: "192.0.2.1" is not a host name`},
		{"name = \"n\"\naddress = \"192.0.2.300\"\n", `line 2: address: "192.0.2.300" is neither an IP address nor a host name` +
			" (it has no port: that is in [tunnel] listen)"},
		{"name = \"n\"\naddress = \"192.0.2.1:25\"\n", `line 2: address: "192.0.2.1:25" is neither`},
		{"name = \"n\"\naddress = \"0.0.0.0\"\n", "line 2: address: 0.0.0.0 is not an address at which other nodes can reach this one"},
	} {
		if _, err := ParseLocal([]byte(c.text)); err == nil || !strings.HasPrefix(err.Error(), c.want) {
			t.Errorf("got  %v\nwant %s", err, c.want)
		}
	}
}

func TestLoadLocalSaysFileAndLine(t *testing.T) {
	file := filepath.Join(t.TempDir(), "node.toml")
	if _, err := LoadLocal(file); err == nil || !strings.Contains(err.Error(), file) {
		t.Errorf("no file: %v", err)
	}
	for _, c := range []struct{ text, want string }{
		{least + "colour = 1\nflavour = 2\n", file + ":3: unknown key \"colour\"\n" + file + ":4: unknown key \"flavour\""},
		{"address = \"h\"\n", file + ": name: is missing: the node's host name, as EHLO shows it"},
		{least + "[database]\ndsn = \"host=h password=secret\"\n",
			file + ": has a dsn, which may hold a password, and everyone may read it (mode 0644): chmod o= " + file},
		{least + "[database]\ndsn = \"postgres://u:s3cret@h/d\"\n",
			file + ": has a dsn, which may hold a password, and everyone may read it (mode 0644): chmod o= " + file},
	} {
		if err := os.WriteFile(file, []byte(c.text), 0o644); err != nil {
			t.Fatal(err)
		}
		if _, err := LoadLocal(file); err == nil || err.Error() != c.want {
			t.Errorf("got  %v\nwant %s", err, c.want)
		}
	}
	if err := os.Chmod(file, 0o640); err != nil {
		t.Fatal(err)
	}
	l, err := LoadLocal(file)
	if err != nil || l.File != file || l.Database.DSN == "" {
		t.Errorf("%+v, %v", l, err)
	}
}

func FuzzLoadLocal(f *testing.F) {
	l := DefaultLocal()
	l.Name, l.Address = "n", "192.0.2.1"
	f.Add(l.Text())
	f.Add([]byte(least + "[smtp]\nlisten = ['''a''']\n[a.b.c]\n"))
	f.Fuzz(func(t *testing.T, text []byte) {
		l, err := ParseLocal(text)
		if err != nil {
			return
		}
		again, err := ParseLocal(l.Text())
		if err != nil {
			t.Fatalf("own text is refused: %v\n%s", err, l.Text())
		}
		if string(l.Text()) != string(again.Text()) {
			t.Fatalf("%s\nis not\n%s", l.Text(), again.Text())
		}
	})
}
