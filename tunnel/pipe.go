package tunnel

import (
	"context"
	"io"
	"net"
	"sync"
)

// pipe copies both ways between two connections until both directions have ended, one has failed, or ctx ends; then both are closed.
// The end of one side's stream is passed on as such.
func pipe(ctx context.Context, a, b net.Conn) {
	both := func() {
		a.Close() // closed twice at worst
		b.Close() // as above
	}
	stop := context.AfterFunc(ctx, both)
	defer stop()
	defer both()
	oneWay := func(to, from net.Conn) {
		_, err := io.Copy(to, from)
		half, ok := to.(interface{ CloseWrite() error })
		if err != nil || !ok || half.CloseWrite() != nil {
			both()
		}
	}
	var ways sync.WaitGroup
	ways.Go(func() { oneWay(a, b) })
	oneWay(b, a)
	ways.Wait()
}
