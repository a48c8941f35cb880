package main

import (
	"os"
	"path/filepath"
	"testing"

	"github.com/rs/zerolog"
)

func TestTheSwitchStaysOverARestart(t *testing.T) {
	dir := t.TempDir()
	open := func() *drainer { return openDrainer(dir, nil, zerolog.Nop()) }
	d := open()
	if d.On() || d.status() != nil {
		t.Fatal("a fresh node is draining")
	}
	for range 2 { // the second changes nothing
		if err := d.Begin("root"); err != nil {
			t.Fatal(err)
		}
	}
	if err := d.Begin("another"); err != nil {
		t.Fatal(err)
	}
	if s := open().status(); s == nil || s.By != "root" || s.Since.IsZero() {
		t.Errorf("after a restart: %+v", s)
	}
	info, err := os.Stat(filepath.Join(dir, "draining"))
	if err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("the file: %v, %v", info, err)
	}
	d = open()
	for range 2 {
		if err := d.End("root"); err != nil {
			t.Fatal(err)
		}
	}
	if d.On() || open().On() {
		t.Error("still draining after the end")
	}
	if err := os.WriteFile(filepath.Join(dir, "draining"), []byte("{half"), 0o600); err != nil {
		t.Fatal(err)
	}
	if d := open(); !d.On() {
		t.Error("a file that cannot be read lets mail in")
	} else if err := d.End("root"); err != nil || open().On() {
		t.Errorf("and cannot be ended: %v", err)
	}
}

func TestANodeThatCannotKeepTheSwitchSaysSoAndGoesOn(t *testing.T) {
	d := openDrainer(filepath.Join(t.TempDir(), "gone"), nil, zerolog.Nop())
	if err := d.Begin("root"); err == nil || d.On() {
		t.Errorf("drained without a file: %v, %v", err, d.On())
	}
}
