package main

import (
	"fmt"
	"os"
	"os/exec"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"mailproxy/internal/testbin"
)

// openTerminal gives both sides of a pseudo terminal (pts(4)).
func openTerminal(t *testing.T) (keyboard, terminal *os.File) {
	t.Helper()
	keyboard, err := os.OpenFile("/dev/ptmx", os.O_RDWR|unix.O_NOCTTY, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = keyboard.Close() })
	if err := unix.IoctlSetPointerInt(int(keyboard.Fd()), unix.TIOCSPTLCK, 0); err != nil {
		t.Fatal(err)
	}
	number, err := unix.IoctlGetInt(int(keyboard.Fd()), unix.TIOCGPTN)
	if err != nil {
		t.Fatal(err)
	}
	terminal, err = os.OpenFile(fmt.Sprintf("/dev/pts/%d", number), os.O_RDWR|unix.O_NOCTTY, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = terminal.Close() })
	return keyboard, terminal
}

func TestApplyIsRefusedWhereTheConfigurationChangedWhileItAsked(t *testing.T) {
	n := newNode(t)
	n.start()
	n.waitHealthy()
	n.must("domain", "add", "old.test", "--to", "192.0.2.1")
	keyboard, terminal := openTerminal(t)
	file := n.dir + "/new.toml"
	if err := os.WriteFile(file, []byte("[[domain]]\nname = \"new.test\"\nhosts = [\"192.0.2.2\"]\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	var out, errs syncBuffer
	apply := exec.CommandContext(t.Context(), testbin.Path(t, "mailproxy"), "--config", n.file, "config", "apply", file)
	apply.Stdin, apply.Stdout, apply.Stderr = terminal, &out, &errs
	if err := apply.Start(); err != nil {
		t.Fatal(err)
	}
	eventually(t, func() error {
		if !strings.HasSuffix(out.String(), "apply 2 changes? [y/N] ") {
			return fmt.Errorf("it asks %q, %s", out.String(), errs.String())
		}
		return nil
	})
	n.must("domain", "add", "meanwhile.test", "--to", "192.0.2.3")
	before := n.must("config", "show")
	if _, err := keyboard.WriteString("y\n"); err != nil {
		t.Fatal(err)
	}
	_ = apply.Wait() // its exit code is looked at
	want := "mailproxy: the configuration was changed meanwhile\nhint: run it again to see the difference from what there is now\n"
	if code := apply.ProcessState.ExitCode(); code != 1 || errs.String() != want {
		t.Errorf("exit code %d, %q, want %q", code, errs.String(), want)
	}
	if after := n.must("config", "show"); after != before {
		t.Errorf("before\n%s\nafter\n%s", before, after)
	}
	n.stop()
}
