package tunnel

import (
	"sync"
	"time"
)

// A deadline is the one of a conn's direction. The mutex of its cond guards it.
type deadline struct {
	timer  *time.Timer
	set    int // counts calls, so that a timer that was replaced while it fired changes nothing
	passed bool
}

// setLocked moves the deadline; the zero time is none. Who waits on cond is woken when it passes.
func (d *deadline) setLocked(cond *sync.Cond, t time.Time) {
	if d.timer != nil {
		d.timer.Stop()
		d.timer = nil
	}
	d.set++
	left := time.Until(t)
	d.passed = !t.IsZero() && left <= 0
	if !t.IsZero() && left > 0 {
		mine := d.set
		d.timer = time.AfterFunc(left, func() {
			cond.L.Lock()
			defer cond.L.Unlock()
			if d.set == mine {
				d.passed = true
				cond.Broadcast()
			}
		})
	}
	cond.Broadcast()
}
