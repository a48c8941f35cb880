package queue

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
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
	helpers := map[string]func(dir string){"put": helperPut, "run": helperRun, "sync": helperSync, "release": helperRelease}
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
		m, err := q.files.open(i.ID)
		if err != nil {
			t.Fatal(err)
		}
		if err := m.check(); err != nil {
			t.Errorf("%s: %v", i.ID, err)
		}
		m.close()
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
		dir := tmpfs(t, 70)
		q := openTest(t, dir, nil)
		taken := 0
		for taken < 100 {
			if _, err := q.Put(context.Background(), []Draft{big(10)}, false); err != nil {
				isFull(t, err)
				break
			}
			taken++
		}
		// The root and the three directories have one each.
		if taken != 70-4-64+1 || len(q.List()) != taken || !errors.Is(q.Healthy(), ErrFull) {
			t.Errorf("%d taken, %d there, Healthy: %v", taken, len(q.List()), q.Healthy())
		}
		q.Close()
	})
	t.Run("the kernel says ENOSPC", func(t *testing.T) {
		dir := tmpfs(t, 1000)
		q := openTest(t, dir, nil)
		q.o.MinFree = -1 << 40 // the gate is open: the write itself has to end well
		before := freeOctets(t, dir)
		_, err := q.Put(context.Background(), []Draft{big(100 << 10), big(2 << 20)}, false)
		isFull(t, err)
		if after := freeOctets(t, dir); len(q.List()) != 0 || !spoolIsEmpty(t, dir) || after != before {
			t.Errorf("something is left: %d octets free, were %d", after, before)
		}
		id := q.mustPut(t, false, big(500<<10))[0] // there is room again
		if err := os.WriteFile(filepath.Join(dir, "fill"), make([]byte, 2<<20), 0o600); !errors.Is(err, syscall.ENOSPC) {
			t.Errorf("fill: %v", err)
		}
		// A drain goes on although nothing can be written: delivered items are removed.
		q.run(t)
		waitFor(t, "the queue is empty", func() bool { return len(q.List()) == 0 })
		if _, err := os.Stat(filepath.Join(dir, "item", id)); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("item: %v", err)
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
	runtime.LockOSThread() // strace counts calls by thread
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

// The disk's errors at fsync, made by strace: of the file (the first sync behind the two of Open), and of the directory (the next).
func TestSyncErrorRefusesTheMailAndLeavesNothing(t *testing.T) {
	for name, when := range map[string]string{"of the file": "3", "of the directory": "4"} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			cmd := helper("sync", dir, "strace", "-f", "-o", filepath.Join(dir, "trace"), "-e", "trace=fsync", "-e", "inject=fsync:error=EIO:when="+when)
			spool := filepath.Join(dir, "spool")
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
				t.Errorf("left: %v", names(t, filepath.Join(spool, "item")))
			}
		})
	}
}

// helperRelease holds a message, releases it, and says what came of that.
func helperRelease(dir string) {
	runtime.LockOSThread() // strace counts calls by thread
	q, err := Open(Options{Dir: dir, Hostname: "mx.test", Route: route})
	fatal(err)
	ids, err := q.Put(context.Background(), []Draft{draft("from@a.test", "x@b.test")}, true)
	fatal(err)
	fmt.Println("release", q.Release(ids))
	fmt.Println("drop", q.Drop(ids))
	fmt.Println("items", len(q.List()))
}

// The disk's error behind the final dot: what is released and not durable is not accepted. Two syncs are Open's, two Put's.
func TestReleaseThatIsNotDurableIsAnError(t *testing.T) {
	dir := t.TempDir()
	spool := filepath.Join(dir, "spool")
	cmd := helper("release", spool, "strace", "-f", "-o", filepath.Join(dir, "trace"), "-e", "trace=fsync", "-e", "inject=fsync:error=EIO:when=5")
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("%v: %s (Debian package strace)", err, out)
	}
	if got := string(out); !strings.HasPrefix(got, "release 451 4.3.0 ") || !strings.HasSuffix(got, "\ndrop <nil>\nitems 0\n") || !spoolIsEmpty(t, spool) {
		t.Errorf("left: %v, said:\n%s", names(t, filepath.Join(spool, "item")), got)
	}
}

func TestConcurrentPutsShareTheSyncOfTheDirectory(t *testing.T) {
	d, err := os.Open(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	defer d.Close()
	s := dirSync{dir: d}
	s.run.Lock() // a sync under way
	var wg sync.WaitGroup
	for range 20 {
		wg.Go(func() {
			if err := s.sync(); err != nil {
				t.Error(err)
			}
		})
	}
	waitFor(t, "somebody waits", func() bool { s.mu.Lock(); defer s.mu.Unlock(); return s.waiting != nil })
	first := s.waiting
	s.run.Unlock()
	wg.Wait()
	if !first.done {
		t.Error("the batch was not synced")
	}
	d.Close()
	if err := s.sync(); err == nil {
		t.Error("the sync's error was lost")
	}
}

// What is kept in memory of an item does not depend on its size, and is small.
func TestMemoryOfAnItem(t *testing.T) {
	dir := t.TempDir()
	openTest(t, dir, nil).Close()
	const count = 20000
	var b bytes.Buffer
	for i := range count {
		b.Reset()
		d := draft("from@a.test", fmt.Sprintf("user%d@b.test", i))
		d.Content = bytes.NewReader(make([]byte, 2000))
		if err := writeItem(&b, &d.Envelope, d.Content); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(dir, "item", mail.NewID(time.Now())), b.Bytes(), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	heapNow := func() uint64 {
		runtime.GC()
		var m runtime.MemStats
		runtime.ReadMemStats(&m)
		return m.HeapAlloc
	}
	before := heapNow()
	start := time.Now()
	q := openTest(t, dir, nil)
	took := time.Since(start)
	each := (heapNow() - before) / count
	if n := len(q.List()); n != count || each > 1000 {
		t.Errorf("%d items, %d octets each", n, each)
	}
	t.Logf("%d octets an item, %v an item to open", each, took/count)
}
