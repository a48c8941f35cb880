package spool

import (
	"bufio"
	"bytes"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
)

// Tests that need a process of its own run this binary again with the name of a helper.
const helperVar = "SPOOL_TEST_HELPER"

func TestMain(m *testing.M) {
	switch os.Getenv(helperVar) {
	case "work":
		helperWork(os.Args[1])
	case "large":
		helperLarge(os.Args[1])
	}
	os.Exit(m.Run())
}

// helperWork puts, changes and removes without end from 8 sides, and says what has returned without error: "+ID size", "=ID state", "-ID",
// and "?ID" before a removal, which may or may not be done until it is said.
func helperWork(dir string) {
	s, err := openSized(dir, 256<<10)
	fatal(err)
	say := func(format string, a ...any) {
		_, _ = fmt.Fprintf(os.Stdout, format, a...) // one write: it is whole or not there
	}
	var all sync.WaitGroup
	for side := range 8 {
		all.Go(func() {
			var mine []string
			for n := 0; ; n++ {
				id := fmt.Sprintf("P%d_%d_%d", os.Getpid(), side, n)
				size := rand.IntN(4 << 10)
				if rand.IntN(100) == 0 {
					size = ownSize + rand.IntN(1000)
				}
				fatal(s.Put([]Draft{draft(id, bytes.Repeat([]byte{byte(size)}, size))}, false))
				say("+%s %d\n", id, size)
				mine = append(mine, id)
				if n%3 == 0 {
					fatal(s.SetState(id, []byte(id), false))
					say("=%s %s\n", id, id)
				}
				if len(mine) > 5 {
					at := rand.IntN(len(mine))
					say("?%s\n", mine[at])
					fatal(s.Remove(mine[at]))
					say("-%s\n", mine[at])
					mine = append(mine[:at], mine[at+1:]...)
				}
			}
		})
	}
	all.Wait()
}

// helperLarge puts one large message, says so, and does nothing more.
func helperLarge(dir string) {
	s, err := Open(dir)
	fatal(err)
	fatal(s.Put([]Draft{draft("LARGE", bytes.Repeat([]byte("x"), ownSize))}, false))
	fmt.Println("+LARGE")
	select {}
}

func fatal(err error) {
	if err != nil {
		fmt.Println("error", err)
		os.Exit(1)
	}
}

func run(t *testing.T, name string, args ...string) {
	t.Helper()
	if out, err := exec.Command(name, args...).CombinedOutput(); err != nil {
		t.Fatalf("%s %s: %v: %s (the test needs root)", name, strings.Join(args, " "), err, out)
	}
}

// mount mounts an image until the end of the test, or until the function that it gives is called.
func mount(t *testing.T, image string) (dir string, unmount func()) {
	t.Helper()
	dir = t.TempDir()
	run(t, "mount", "-o", "loop", image, dir)
	var once sync.Once
	unmount = func() { once.Do(func() { run(t, "umount", dir) }) }
	t.Cleanup(unmount)
	return dir, unmount
}

// newDisk makes an image with a file system.
func newDisk(t *testing.T) string {
	t.Helper()
	disk := filepath.Join(t.TempDir(), "disk")
	run(t, "truncate", "-s", "48M", disk)
	run(t, "mkfs.ext4", "-q", "-F", "-J", "size=4", disk)
	return disk
}

// helperOn starts a helper on a spool in dir.
func helperOn(t *testing.T, name, dir string) (*exec.Cmd, io.Reader) {
	t.Helper()
	cmd := exec.Command(os.Args[0], filepath.Join(dir, "spool"))
	cmd.Env = append(os.Environ(), helperVar+"="+name)
	pipe, err := cmd.StdoutPipe()
	must(t, err)
	must(t, cmd.Start())
	return cmd, pipe
}

// cutPower copies the disk as it is at this instant, and ends the helper and the disk that it worked on.
func cutPower(t *testing.T, cmd *exec.Cmd, disk string, unmount func()) (after string) {
	t.Helper()
	must(t, cmd.Process.Signal(syscall.SIGSTOP))
	after = disk + "'"
	run(t, "cp", "--sparse=always", disk, after)
	must(t, cmd.Process.Kill())
	_, _ = cmd.Process.Wait()
	unmount()
	must(t, os.Remove(disk))
	return after
}

// No other sync helps it.
func TestALargeMessageIsThereAfterThePowerWent(t *testing.T) {
	disk := newDisk(t)
	dir, unmount := mount(t, disk)
	cmd, pipe := helperOn(t, "large", dir)
	if line, err := bufio.NewReader(pipe).ReadString('\n'); line != "+LARGE\n" {
		t.Fatal(line, err)
	}
	dir, unmount = mount(t, cutPower(t, cmd, disk, unmount))
	s := openTest(t, filepath.Join(dir, "spool"))
	if got := content(t, s, "LARGE"); len(got) != ownSize {
		t.Errorf("%d octets", len(got))
	}
	must(t, s.Close())
	unmount()
}

// The power goes: of all that was written only what the file system had given to the disk is left. The disk is an image, which is copied
// while the writers stand still; what waits in the kernel's memory is not in the copy.
func TestWhatWasSaidIsThereAfterThePowerWent(t *testing.T) {
	disk := newDisk(t)
	said := map[string]string{} // by ID: its size, and behind a blank its state
	for round := range 6 {
		dir, unmount := mount(t, disk)
		cmd, pipe := helperOn(t, "work", dir)
		var out bytes.Buffer
		for wanted := int64(2000 + rand.IntN(8000)); int64(out.Len()) < wanted; {
			if _, err := io.CopyN(&out, pipe, 100); err != nil {
				t.Fatalf("%v: %s", err, out.String())
			}
		}
		disk = cutPower(t, cmd, disk, unmount)
		_, _ = out.ReadFrom(pipe) // what it had said before it stood still

		lines := strings.Split(out.String(), "\n")
		for _, line := range lines[:len(lines)-1] {
			id, rest, _ := strings.Cut(line[1:], " ")
			switch line[0] {
			case '+':
				said[id] = rest
			case '=':
				said[id] += " " + rest
			case '?':
				delete(said, id)
			case '-':
				said[id] = "removed"
			default:
				t.Fatal(line)
			}
		}
		dir, unmount = mount(t, disk)
		s := openTest(t, filepath.Join(dir, "spool"))
		found := all(t, s)
		lost, back := 0, 0
		for id, what := range said {
			f, there := found[id]
			size, state, _ := strings.Cut(what, " ")
			switch {
			case what == "removed":
				if there {
					back++
				}
				delete(said, id)
			case !there:
				lost++
				t.Logf("round %d: %s is lost", round, id)
			case size != fmt.Sprint(f.Size) || state != "" && state != string(f.State):
				t.Errorf("round %d, %s: %q, found %d octets, state %q", round, id, what, f.Size, f.State)
			default:
				if got := content(t, s, id); len(got) > 0 && !bytes.Equal(got, bytes.Repeat([]byte{byte(len(got))}, len(got))) {
					t.Errorf("round %d, %s: other content", round, id)
				}
			}
		}
		if lost > 0 || back > 0 {
			t.Fatalf("round %d: of %d that were said to be there %d are not, and %d that were removed are", round, len(said), lost, back)
		}
		t.Logf("round %d: %d said to be there, %d found, %d damaged", round, len(said), len(found), s.Damaged())
		must(t, s.Close())
		for id := range found { // one that was not said to be removed may be on its way; the next process does not know it
			said[id] = strings.TrimSpace(fmt.Sprint(found[id].Size, " ", string(found[id].State)))
		}
		unmount()
	}
}
