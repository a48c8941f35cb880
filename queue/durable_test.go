package queue

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/rs/zerolog"

	"mailproxy/mail"
	"mailproxy/relay"
)

// Tests that need a process of its own run this binary again with the name of a helper.
const helperVar = "QUEUE_TEST_HELPER"

func TestMain(m *testing.M) {
	helpers := map[string]func(dir string){"put": helperPut, "run": helperRun, "sync": helperSync, "release": helperRelease, "move": helperMove, "settle": helperSettle,
		"open": helperOpen}
	if h := helpers[os.Getenv(helperVar)]; h != nil {
		h(os.Args[1])
		os.Exit(0)
	}
	os.Exit(m.Run())
}

func fatal(err error) {
	if err != nil {
		fmt.Println("error", err)
		os.Exit(1)
	}
}

func helper(name, dir string, wrap ...string) *exec.Cmd {
	args := append(wrap, os.Args[0], dir)
	cmd := exec.Command(args[0], args[1:]...)
	cmd.Env = append(os.Environ(), helperVar+"="+name)
	return cmd
}

// helperPut spools without end from 8 sides, and says each ID once Put has returned.
func helperPut(dir string) {
	q, err := Open(Options{Dir: dir, Hostname: "mx.test", Route: route})
	fatal(err)
	var wg sync.WaitGroup
	for n := range 8 {
		wg.Go(func() {
			for {
				size := rand.IntN(20000)
				if n == 0 {
					size = 300000 // cut in the middle of it now and then
				}
				d := draft("from@a.test", "x@b.test")
				d.Content = bytes.NewReader(bytes.Repeat([]byte("0123456\r\n"), size/9))
				ids, err := q.Put(context.Background(), []Draft{d}, false)
				fatal(err)
				_, _ = os.Stdout.WriteString(ids[0] + "\n") // one write: it is whole or not there
			}
		})
	}
	wg.Wait()
}

func TestWhatPutReturnedIsThereAfterKill(t *testing.T) {
	dir := t.TempDir()
	var out bytes.Buffer
	all := map[string]bool{}
	for round := range 4 {
		cmd := helper("put", dir)
		pipe, err := cmd.StdoutPipe()
		if err != nil {
			t.Fatal(err)
		}
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		b := make([]byte, 4096)
		out.Reset()
		for out.Len() < 17*(20+10*round) {
			n, err := pipe.Read(b)
			if err != nil {
				t.Fatalf("%v: %s", err, out.String())
			}
			out.Write(b[:n])
		}
		if err := cmd.Process.Kill(); err != nil {
			t.Fatal(err)
		}
		for { // what it said before it died
			n, err := pipe.Read(b)
			out.Write(b[:n])
			if err != nil {
				break
			}
		}
		_ = cmd.Wait()
		for line := range strings.Lines(out.String()) {
			if len(line) == 17 {
				all[strings.TrimSpace(line)] = true
			}
		}
	}
	q := openTest(t, dir, nil)
	there := map[string]bool{}
	for _, i := range q.List() {
		there[i.ID] = true
		m, err := q.spool.Open(i.ID)
		if err != nil {
			t.Fatal(err)
		}
		if err := m.Check(); err != nil {
			t.Errorf("%s: %v", i.ID, err)
		}
		m.Close()
	}
	for id := range all {
		if !there[id] {
			t.Errorf("%s is lost", id)
		}
	}
	if left := names(t, filepath.Join(dir, "new")); len(left) > 0 || q.Stats().Damaged > 0 {
		t.Errorf("left: %v, damaged: %d", left, q.Stats().Damaged)
	}
	t.Logf("%d answered, %d there", len(all), len(there))
}

// helperRun delivers to a next hop that writes each message's path to a synced file before it answers.
func helperRun(dir string) {
	q, err := Open(Options{Dir: filepath.Join(dir, "spool"), Hostname: "mx.test", Route: route, Log: zerolog.New(os.Stdout)})
	fatal(err)
	taken, err := os.OpenFile(filepath.Join(dir, "taken"), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	fatal(err)
	q.deliver = func(_ context.Context, a relay.Attempt) ([]relay.Result, error) {
		var lines strings.Builder
		for _, p := range a.Paths {
			lines.WriteString(p.String() + "\n")
		}
		_, err := taken.WriteString(lines.String())
		fatal(err)
		time.Sleep(10 * time.Millisecond) // the answer is on its way: here the kill makes a duplicate
		return answers(a)
	}
	fatal(q.Run(context.Background()))
}

// Killed while it drains, again and again: everything arrives, and what arrives twice is named by attempt.cut.
func TestDrainThatIsKilledLosesNothingAndNamesDuplicates(t *testing.T) {
	dir := t.TempDir()
	spool := filepath.Join(dir, "spool")
	q := openTest(t, spool, nil)
	const count = 200
	ids := map[string]string{} // path -> item
	for i := range count {
		d := draft("", fmt.Sprintf("x%d@b.test", i), fmt.Sprintf("y%d@c.test", i))
		id := q.mustPut(t, false, d)[0]
		for _, p := range d.Envelope.ForwardPaths {
			ids[p.String()] = id
		}
	}
	q.Close()
	lines := func() []string {
		b, _ := os.ReadFile(filepath.Join(dir, "taken"))
		return strings.Fields(string(b))
	}
	var log bytes.Buffer
	for round := 1; round <= 5; round++ {
		cmd := helper("run", dir)
		cmd.Stdout = &log
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		waitFor(t, "some are taken", func() bool { return len(lines()) >= round*2*count/6 })
		if err := cmd.Process.Kill(); err != nil {
			t.Fatal(err)
		}
		_ = cmd.Wait()
	}
	q = openTest(t, spool, nil)
	cut := q.log.String() + log.String()
	q.hop.set(func(a relay.Attempt) ([]relay.Result, error) {
		f, err := os.OpenFile(filepath.Join(dir, "taken"), os.O_APPEND|os.O_WRONLY, 0o600)
		if err != nil {
			t.Error(err)
		}
		defer f.Close()
		for _, p := range a.Paths {
			fmt.Fprintln(f, p)
		}
		return answers(a)
	})
	stop := q.run(t)
	waitFor(t, "the queue is empty", func() bool { return len(q.List()) == 0 })
	stop()
	got := map[string]int{}
	for _, p := range lines() {
		got[p]++
	}
	doubled := 0 // some are: 20 attempts were under way at each kill
	for p, id := range ids {
		if got[p] == 0 {
			t.Errorf("%s is lost", p)
		}
		if got[p] > 1 {
			doubled++
			if !named(cut, id) {
				t.Errorf("%s came %d times, and no attempt.cut names %s", p, got[p], id)
			}
		}
	}
	if t.Logf("%d of %d came twice", doubled, len(ids)); doubled == 0 {
		t.Error("no attempt was cut: the test shows nothing")
	}
}

func named(log, id string) bool {
	for line := range strings.Lines(log) {
		if strings.Contains(line, `"item":"`+id+`"`) && strings.Contains(line, "attempt.cut") {
			return true
		}
	}
	return false
}

// tmpfs is a file system of 1 MB with so many inodes.
func tmpfs(t *testing.T, inodes int) string {
	t.Helper()
	dir := t.TempDir()
	if err := syscall.Mount("tmpfs", dir, "tmpfs", 0, fmt.Sprintf("size=1m,nr_inodes=%d", inodes)); err != nil {
		t.Fatalf("mount: %v (the test needs root)", err)
	}
	t.Cleanup(func() {
		if err := syscall.Unmount(dir, 0); err != nil {
			t.Error(err)
		}
	})
	return dir
}

func TestFullSpool(t *testing.T) {
	big := func(size int) Draft {
		d := draft("from@a.test", "x@b.test")
		d.Content = bytes.NewReader(make([]byte, size))
		return d
	}
	isFull := func(t *testing.T, err error) {
		t.Helper()
		var r *mail.Reply
		if !errors.Is(err, ErrFull) || !errors.As(err, &r) || r.Code != 452 || r.Status() != "4.3.1" {
			t.Errorf("error %v", err)
		}
	}
	t.Run("MinFree is kept free", func(t *testing.T) {
		dir := tmpfs(t, 1000)
		q := openTest(t, dir, func(o *Options) { o.MinFree = 600 << 10 })
		q.mustPut(t, false, big(200<<10))
		_, err := q.Put(context.Background(), []Draft{big(300 << 10)}, false)
		isFull(t, err)
		if len(q.List()) != 1 || len(names(t, filepath.Join(dir, "new"))) != 0 {
			t.Error("something is left")
		}
		if err := q.Healthy(); err != nil {
			t.Errorf("Healthy: %v", err) // it was only that message
		}
		q.mustPut(t, false, big(150<<10))
		q.Close()
	})
	t.Run("inodes are kept free", func(t *testing.T) {
		dir := tmpfs(t, 69) // the root and the four directories have one each, and so has the first segment
		q := openTest(t, dir, nil)
		q.mustPut(t, false, big(10))
		_, err := q.Put(context.Background(), []Draft{big(10)}, false)
		if isFull(t, err); len(q.List()) != 1 || !errors.Is(q.Healthy(), ErrFull) {
			t.Errorf("%d there, Healthy: %v", len(q.List()), q.Healthy())
		}
		q.Close()
	})
	t.Run("the kernel says ENOSPC", func(t *testing.T) {
		dir := tmpfs(t, 1000)
		q := openTest(t, dir, nil)
		q.o.MinFree = -1 << 40 // the gate is open: the write itself has to end well
		before := freeOctets(t, dir)
		for name, drafts := range map[string][]Draft{
			"of its own file": {big(100 << 10), big(2 << 20)}, "of the log": {big(700 << 10), big(700 << 10)},
		} {
			_, err := q.Put(context.Background(), drafts, false)
			isFull(t, err)
			if after := freeOctets(t, dir); len(q.List()) != 0 || !spoolIsEmpty(t, dir) || before-after > 8<<10 { // a segment's first page
				t.Errorf("%s: something is left: %d octets free, were %d", name, after, before)
			}
		}
		q.mustPut(t, false, big(500<<10)) // there is room again
		if err := os.WriteFile(filepath.Join(dir, "fill"), make([]byte, 2<<20), 0o600); !errors.Is(err, syscall.ENOSPC) {
			t.Errorf("fill: %v", err)
		}
		// A drain goes on although nothing can be written: delivered items are removed.
		q.run(t)
		waitFor(t, "the queue is empty", func() bool { return len(q.List()) == 0 })
		if !spoolIsEmpty(t, dir) {
			t.Error("something is left")
		}
		q.Close()
	})
}

func freeOctets(t *testing.T, dir string) int64 {
	t.Helper()
	var st syscall.Statfs_t
	if err := syscall.Statfs(dir, &st); err != nil {
		t.Fatal(err)
	}
	return int64(st.Bavail) * st.Bsize
}

// helperSync puts one message and says what came of it.
func helperSync(dir string) {
	q, err := Open(Options{Dir: dir, Hostname: "mx.test", Route: route})
	fatal(err)
	fmt.Println("opened")
	ids, err := q.Put(context.Background(), []Draft{draft("from@a.test", "x@b.test")}, false)
	fmt.Println("put", len(ids), err)
	fmt.Println("healthy", q.Healthy())
	fmt.Println("items", len(q.List()))
	_, err = q.Put(context.Background(), []Draft{draft("from@a.test", "x@b.test")}, false)
	fmt.Println("again", err)
}

// The disk's errors, made by strace: of a segment, and of its name.
func TestSyncErrorRefusesTheMailAndLeavesNothing(t *testing.T) {
	for name, inject := range map[string][]string{
		"of the segment": {"-e", "inject=fdatasync:error=EIO"}, "of its name": {"-P", "spool/log", "-e", "inject=fsync:error=EIO"},
	} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			for i, arg := range inject {
				if arg == "spool/log" {
					inject[i] = filepath.Join(dir, arg)
				}
			}
			spool := filepath.Join(dir, "spool")
			if err := os.MkdirAll(filepath.Join(spool, "log"), 0o700); err != nil { // a path to look for must be there
				t.Fatal(err)
			}
			cmd := helper("sync", dir, append([]string{"strace", "-f", "-o", filepath.Join(dir, "trace")}, inject...)...)
			cmd.Args[len(cmd.Args)-1] = spool
			out, err := cmd.CombinedOutput()
			if err != nil {
				t.Fatalf("%v: %s (Debian package strace)", err, out)
			}
			for _, want := range []string{
				"opened\n", "put 0 451 4.3.0 local error", "healthy spool does not keep what is written", "input/output error", "items 0\n",
				"again 451 4.3.0",
			} {
				if !strings.Contains(string(out), want) {
					t.Errorf("no %q in:\n%s", want, out)
				}
			}
			if !spoolIsEmpty(t, spool) {
				t.Errorf("left: %v", names(t, filepath.Join(spool, "log")))
			}
		})
	}
}

// helperRelease holds a message, releases it when it is told to, and says what came of that.
func helperRelease(dir string) {
	q, err := Open(Options{Dir: dir, Hostname: "mx.test", Route: route})
	fatal(err)
	ids, err := q.Put(context.Background(), []Draft{draft("from@a.test", "x@b.test")}, true)
	fatal(err)
	fmt.Println("held")
	_, err = os.Stdin.Read(make([]byte, 1))
	fatal(err)
	fmt.Println("release", q.Release(ids))
	fmt.Println("drop", q.Drop(ids))
	fmt.Println("items", len(q.List()))
}

// The disk's error behind the final dot: what is released and not durable is not accepted.
func TestReleaseThatIsNotDurableIsAnError(t *testing.T) {
	dir := t.TempDir()
	cmd := helper("release", dir)
	tell, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	said, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	lines := bufio.NewReader(said)
	if line, err := lines.ReadString('\n'); line != "held\n" {
		t.Fatal(line, err)
	}
	trace := exec.Command("strace", "-f", "-p", strconv.Itoa(cmd.Process.Pid), "-e", "trace=fdatasync", "-e", "inject=fdatasync:error=EIO")
	attached, err := trace.StderrPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := trace.Start(); err != nil {
		t.Fatalf("%v (Debian package strace)", err)
	}
	if _, err := attached.Read(make([]byte, 1)); err != nil { // "strace: Process N attached"
		t.Fatal(err)
	}
	go func() { _, _ = io.Copy(io.Discard, attached) }()
	if _, err := tell.Write([]byte("\n")); err != nil {
		t.Fatal(err)
	}
	rest, err := io.ReadAll(lines)
	if err := errors.Join(err, cmd.Wait()); err != nil {
		t.Fatal(err)
	}
	_ = trace.Wait()
	if got := string(rest); !strings.HasPrefix(got, "release 451 4.3.0 ") || !strings.HasSuffix(got, "\ndrop <nil>\nitems 0\n") {
		t.Errorf("said:\n%s", got)
	}
	if q := openTest(t, dir, nil); len(q.List()) != 0 {
		t.Errorf("the next start finds %v", q.List())
	}
}

// What is kept in memory of an item does not depend on its size, and is small.
func TestMemoryOfAnItem(t *testing.T) {
	dir := t.TempDir()
	q := openTest(t, dir, nil)
	const count = 20000
	for i := range count / 100 {
		drafts := make([]Draft, 100)
		for j := range drafts {
			drafts[j] = draft("from@a.test", fmt.Sprintf("user%d@b.test", 100*i+j))
			drafts[j].Content = bytes.NewReader(make([]byte, 2000))
		}
		q.mustPut(t, false, drafts...)
	}
	q.Close()
	q = nil
	heapNow := func() uint64 {
		runtime.GC()
		var m runtime.MemStats
		runtime.ReadMemStats(&m)
		return m.HeapAlloc
	}
	before := heapNow()
	start := time.Now()
	q = openTest(t, dir, nil)
	took := time.Since(start)
	each := (heapNow() - before) / count
	if n := len(q.List()); n != count || each > 1000 {
		t.Errorf("%d items, %d octets each", n, each)
	}
	t.Logf("%d octets an item, %v an item to open", each, took/count)
}
