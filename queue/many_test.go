package queue

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"os"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"
)

// opened is what helperOpen says.
type opened struct {
	Items   int
	Open    time.Duration
	List    time.Duration
	Summary time.Duration
	Hold    time.Duration
	// Resident is the most memory that the process had, in octets, and Before what it had before it opened the queue.
	Before, Resident int64
	// Listed is the most that listing and ordering added to that.
	Listed int64
}

// resident reads the process's peak memory.
func resident() int64 {
	text, _ := os.ReadFile("/proc/self/status")
	_, rest, _ := strings.Cut(string(text), "VmHWM:")
	kb, _, _ := strings.Cut(strings.TrimSpace(rest), " ")
	n, _ := strconv.ParseInt(kb, 10, 64)
	return n << 10
}

// helperOpen opens a queue, looks at all of it, puts all on hold and ends that, and says what it took.
func helperOpen(dir string) {
	var o opened
	o.Before = resident()
	start := time.Now()
	q, err := Open(Options{Dir: dir, Hostname: "mx.test", Route: route})
	fatal(err)
	o.Open, o.Resident = time.Since(start), resident()
	runtime.GC()
	start = time.Now()
	_, err = q.Each(Selection{}, -1, func(Item) error { o.Items++; return nil })
	fatal(err)
	o.List, start = time.Since(start), time.Now()
	_, err = q.Summary(Selection{})
	fatal(err)
	o.Summary, start = time.Since(start), time.Now()
	fatal(q.Do(context.Background(), Order{Deed: PutOnHold}, func(_ string, err error) error { return err }))
	o.Hold = time.Since(start)
	o.Listed = resident() - o.Resident
	b, err := json.Marshal(o)
	fatal(err)
	fmt.Println(string(b))
}

// Many items cost seconds at start and little memory, then and when all are listed or ordered about. QUEUE_ITEMS=100000 without the race
// detector, which multiplies both, gives the figures of docs/SCALE.md.
func TestManyItems(t *testing.T) {
	count := 20_000
	if text := os.Getenv("QUEUE_ITEMS"); text != "" {
		var err error
		if count, err = strconv.Atoi(text); err != nil {
			t.Fatal(err)
		}
	}
	dir := t.TempDir()
	q := openTest(t, dir, nil)
	var all sync.WaitGroup
	for worker := range 50 {
		all.Go(func() {
			for i := range count / 50 / 20 {
				drafts := make([]Draft, 20)
				for n := range drafts {
					drafts[n] = draft("from@a.test", fmt.Sprintf("x%d-%d-%d@b%d.test", worker, i, n, n))
				}
				q.mustPut(t, false, drafts...)
			}
		})
	}
	all.Wait()
	q.Close()
	cmd := helper("open", dir)
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &out
	if err := cmd.Run(); err != nil {
		t.Fatalf("%v: %s", err, out.String())
	}
	var o opened
	if err := json.Unmarshal(out.Bytes(), &o); err != nil {
		t.Fatalf("%v: %s", err, out.String())
	}
	t.Logf("%d items: opened in %v with %d MB more than the %d MB before; listed in %v, counted in %v, held in %v with %d MB more", o.Items, o.Open, (o.Resident-o.Before)>>20,
		o.Before>>20, o.List, o.Summary, o.Hold, o.Listed>>20)
	if o.Items != count || o.Open > 20*time.Second || o.Resident-o.Before > int64(count)*8_000 || o.Listed > 160<<20 {
		t.Errorf("%+v", o)
	}
}
