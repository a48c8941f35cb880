package durable

import (
	"errors"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"syscall"
	"testing"
)

func TestWriteFileReplacesContentAndSetsTheMode(t *testing.T) {
	old := syscall.Umask(0o777)
	defer syscall.Umask(old)
	path := filepath.Join(t.TempDir(), "f")
	for _, content := range []string{"one", "two, longer", ""} {
		if err := WriteFile(path, []byte(content), 0o640); err != nil {
			t.Fatal(err)
		}
		got, err := os.ReadFile(path)
		if err != nil || string(got) != content {
			t.Fatalf("read %q, %v; want %q", got, err, content)
		}
	}
	info, err := os.Stat(path)
	if err != nil || info.Mode() != 0o640 {
		t.Fatalf("mode %v, %v; want 0640", info.Mode(), err)
	}
}

func TestWriteFileLeavesNothingBehindWhenItFails(t *testing.T) {
	dir := t.TempDir()
	target := filepath.Join(dir, "target")
	if err := os.MkdirAll(filepath.Join(target, "not-empty"), 0o700); err != nil { // a directory: rename over it fails
		t.Fatal(err)
	}
	if err := WriteFile(target, []byte("x"), 0o600); err == nil {
		t.Fatal("a file was written over a directory")
	}
	broken := errors.New("broken")
	err := Replace(filepath.Join(target, "file"), 0o600, func(f *os.File) error { _, err := f.WriteString("x"); return errors.Join(err, broken) })
	if !errors.Is(err, broken) {
		t.Errorf("got %v, want what write said", err)
	}
	for where, want := range map[string]int{dir: 1, target: 1} {
		entries, err := os.ReadDir(where)
		if err != nil || len(entries) != want {
			t.Fatalf("left behind: %v, %v", entries, err)
		}
	}
}

func TestAFileThatRootWritesBelongsToTheOwnerOfItsDirectory(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Fatal("these tests run as root")
	}
	dir := filepath.Join(t.TempDir(), "d")
	if err := os.Mkdir(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.Chown(dir, 65534, 65533); err != nil {
		t.Fatal(err)
	}
	if err := WriteFile(filepath.Join(dir, "f"), []byte("x"), 0o600); err != nil {
		t.Fatal(err)
	}
	info, err := os.Stat(filepath.Join(dir, "f"))
	if err != nil {
		t.Fatal(err)
	}
	if s := info.Sys().(*syscall.Stat_t); s.Uid != 65534 || s.Gid != 65533 {
		t.Errorf("belongs to %d:%d", s.Uid, s.Gid)
	}
}

func TestCreateMakesAFileOnceAndWhole(t *testing.T) {
	old := syscall.Umask(0)
	defer syscall.Umask(old)
	dir := t.TempDir()
	path := filepath.Join(dir, "f")
	names := func() (all []string) {
		entries, err := os.ReadDir(dir)
		if err != nil {
			t.Fatal(err)
		}
		for _, e := range entries {
			all = append(all, e.Name())
		}
		return all
	}
	content := func(s string) func(io.Writer) error {
		return func(w io.Writer) error {
			if _, err := os.Lstat(path); s == "one" && !errors.Is(err, fs.ErrNotExist) {
				t.Errorf("it is there before it is whole: %v", err)
			}
			_, err := io.WriteString(w, s)
			return err
		}
	}
	broken := errors.New("broken")
	if err := Create(path, 0o600, func(w io.Writer) error { return errors.Join(content("one")(w), broken) }); !errors.Is(err, broken) {
		t.Errorf("got %v, want what write said", err)
	}
	if left := names(); left != nil {
		t.Errorf("left behind: %v", left)
	}
	if err := Create(path, 0o600, content("one")); err != nil {
		t.Fatal(err)
	}
	if info, err := os.Stat(path); err != nil || info.Mode() != 0o600 {
		t.Errorf("mode %v, %v; want 0600", info.Mode(), err)
	}
	if err := Create(path, 0o600, content("two")); !errors.Is(err, fs.ErrExist) {
		t.Errorf("over a file: %v, want fs.ErrExist", err)
	}
	// Somebody makes it in the meantime, or it is a link that leads nowhere.
	other := filepath.Join(dir, "g")
	err := Create(other, 0o600, func(io.Writer) error { return os.Symlink("nowhere", other) })
	if !errors.Is(err, fs.ErrExist) {
		t.Errorf("over a link: %v, want fs.ErrExist", err)
	}
	if got, err := os.ReadFile(path); err != nil || string(got) != "one" {
		t.Errorf("read %q, %v", got, err)
	}
	if left := names(); len(left) != 2 {
		t.Errorf("left behind: %v", left)
	}
}
