package smtpd

import (
	"context"
	"errors"
	"os"
	"sync/atomic"
	"time"
)

// watch looks after the client while its message is on the way to the next hop: when it is gone, cancel is called. What the
// client sends meanwhile is kept for later; when there is no more room for it, it is there, and is not watched any longer. The
// caller must call stop, which says whether the client is gone, before it touches the input again.
func (c *conn) watch(cancel context.CancelFunc) (stop func() (gone bool)) {
	var stopping atomic.Bool
	gone := false
	done := make(chan struct{})
	go func() {
		defer close(done)
		_ = c.base.SetReadDeadline(time.Time{})
		for !stopping.Load() {
			room := c.in.free()
			if len(room) == 0 {
				return
			}
			n, err := c.stream.Read(room)
			c.in.w += n
			switch {
			case err == nil:
			case errors.Is(err, os.ErrDeadlineExceeded):
				// To stop, or someone else's: that one is put away before stopping is looked at, so stop's is not lost.
				_ = c.base.SetReadDeadline(time.Time{})
			default:
				gone = true
				cancel()
				c.log.Debug().Err(err).Msg("session.client_gone")
				return
			}
		}
	}()
	return func() bool {
		stopping.Store(true)
		_ = c.base.SetReadDeadline(longAgo)
		<-done
		if !gone {
			_, gone = c.unread.peek() // it may have gone just now
		}
		return gone
	}
}
