package tunnel

import "sync"

// owned is a group of goroutines that can be started from anywhere until its owner waits for them.
type owned struct {
	mu    sync.Mutex
	ended bool
	wg    sync.WaitGroup
}

// spawn starts f, or says no when the owner has begun to wait.
func (o *owned) spawn(f func()) bool {
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.ended {
		return false
	}
	o.wg.Go(f)
	return true
}

// wait lets nothing new start and returns when all that was started has ended.
func (o *owned) wait() {
	o.mu.Lock()
	o.ended = true
	o.mu.Unlock()
	o.wg.Wait()
}
