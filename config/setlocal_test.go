package config

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
)

func TestSetLocalChangesOneValueAndNothingElse(t *testing.T) {
	const before = "# name = \"no\"\nname = \"mx1.test\" # the old one\naddress='192.0.2.1'\n\n[smtp]\nlisten = [\":25\"]\n"
	const after = "# name = \"no\"\nname = \"mx9.test\" # the old one\naddress=\"192.0.2.9\"\n\n[smtp]\nlisten = [\":25\"]\n"
	file := filepath.Join(t.TempDir(), "node.toml")
	link := filepath.Join(t.TempDir(), "link.toml")
	if err := os.WriteFile(file, []byte(before), 0o640); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink(file, link); err != nil {
		t.Fatal(err)
	}
	for key, value := range map[string]string{"name": "mx9.test", "address": "192.0.2.9"} {
		for range 2 {
			if err := SetLocal(link, key, value); err != nil {
				t.Fatal(err)
			}
		}
	}
	text, err := os.ReadFile(file)
	if err != nil || string(text) != after {
		t.Errorf("%v:\n%s\nwant:\n%s", err, text, after)
	}
	if info, err := os.Lstat(file); err != nil || info.Mode() != 0o640 {
		t.Errorf("mode %v, %v", info.Mode(), err)
	}
	for _, bad := range []struct{ key, value, want string }{
		{"name", "not a name", "is not a host name"}, {"state_dir", "/x", "does not stand in a line of its own"},
	} {
		if err := SetLocal(file, bad.key, bad.value); err == nil || !strings.Contains(err.Error(), bad.want) {
			t.Errorf("%s = %s: %v", bad.key, bad.value, err)
		}
	}
	if again, _ := os.ReadFile(file); string(again) != after {
		t.Errorf("what was refused changed the file:\n%s", again)
	}
}
