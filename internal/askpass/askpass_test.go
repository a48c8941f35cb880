package askpass

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

func TestAFileThatOthersMayReadIsNoSecret(t *testing.T) {
	file := filepath.Join(t.TempDir(), "f")
	for _, c := range []struct {
		name, text, want string
		mode             os.FileMode
		err              error // nil and want "": any
	}{
		{"the first line", "a b\nmore\n", "a b", 0o600, nil},
		{"without its end", "a b", "a b", 0o400, nil},
		{"with the other end", "a\r\n", "a", 0o600, nil},
		{"the group may read it", "a\n", "", 0o640, ErrReadable},
		{"others may read it", "a\n", "", 0o604, ErrReadable},
		{"an empty line", "\na\n", "", 0o600, nil},
		{"nothing", "", "", 0o600, nil},
		{"endless", strings.Repeat("x", 2*maxLine), strings.Repeat("x", maxLine), 0o600, nil},
	} {
		t.Run(c.name, func(t *testing.T) {
			if err := errors.Join(os.WriteFile(file, []byte(c.text), 0o600), os.Chmod(file, c.mode)); err != nil {
				t.Fatal(err)
			}
			got, err := ReadFile(file)
			if got != c.want || (err == nil) != (c.want != "") || c.err != nil && !errors.Is(err, c.err) {
				t.Errorf("%q, %v", got, err)
			}
		})
	}
}

func TestAPipeIsNotAsked(t *testing.T) {
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	defer w.Close()
	var shown bytes.Buffer
	if _, err := Ask(t.Context(), r, &shown, "? "); !errors.Is(err, ErrNoTerminal) || shown.Len() > 0 {
		t.Errorf("%v, shown %q", err, shown.String())
	}
	if _, err := Ask(t.Context(), strings.NewReader("x\n"), &shown, "? "); !errors.Is(err, ErrNoTerminal) {
		t.Errorf("%v", err)
	}
}

// terminal makes one, and gives both its ends (pts(4)).
func terminal(t *testing.T) (master, slave *os.File) {
	t.Helper()
	master, err := os.OpenFile("/dev/ptmx", os.O_RDWR|unix.O_NOCTTY, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { master.Close() })
	if err := unix.IoctlSetPointerInt(int(master.Fd()), unix.TIOCSPTLCK, 0); err != nil {
		t.Fatal(err)
	}
	n, err := unix.IoctlGetInt(int(master.Fd()), unix.TIOCGPTN)
	if err == nil {
		slave, err = os.OpenFile(fmt.Sprintf("/dev/pts/%d", n), os.O_RDWR|unix.O_NOCTTY, 0)
	}
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { slave.Close() })
	return master, slave
}

func echoes(t *testing.T, f *os.File) bool {
	t.Helper()
	state, err := unix.IoctlGetTermios(int(f.Fd()), unix.TCGETS)
	if err != nil {
		t.Fatal(err)
	}
	return state.Lflag&unix.ECHO != 0
}

func TestWhatIsTypedIsNotShown(t *testing.T) {
	master, slave := terminal(t)
	type answer struct {
		line string
		err  error
	}
	ask := func(ctx context.Context) <-chan answer {
		done := make(chan answer, 1)
		go func() {
			line, err := Ask(ctx, slave, &bytes.Buffer{}, "? ")
			done <- answer{line, err}
		}()
		for echoes(t, slave) {
			time.Sleep(time.Millisecond) // between two looks at a condition
		}
		return done
	}
	done := ask(t.Context())
	if _, err := master.WriteString("päss word\n"); err != nil {
		t.Fatal(err)
	}
	if a := <-done; a.line != "päss word" || a.err != nil || !echoes(t, slave) {
		t.Errorf("%+v, the terminal shows what is typed: %v", a, echoes(t, slave))
	}
	// Who interrupts it gets the terminal back as it was.
	ctx, cancel := context.WithCancel(t.Context())
	done = ask(ctx)
	cancel()
	if a := <-done; !errors.Is(a.err, context.Canceled) || !echoes(t, slave) {
		t.Errorf("%+v, the terminal shows what is typed: %v", a, echoes(t, slave))
	}
	if _, err := master.WriteString("\n"); err != nil { // for who still reads it
		t.Fatal(err)
	}
}
