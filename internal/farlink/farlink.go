// Package farlink is a link with long round trips, for tests and measurements.
package farlink

import (
	"net"
	"sync"
	"time"
)

// Serve passes the connections that come in at l on to an address, each piece of data half a round trip later, until l is closed. Then it
// ends what is open, and returns.
func Serve(l net.Listener, to string, roundTrip time.Duration) {
	var all sync.WaitGroup
	defer all.Wait()
	ended := make(chan struct{})
	var open []net.Conn
	defer func() {
		close(ended)
		for _, c := range open {
			_ = c.Close()
		}
	}()
	for {
		near, err := l.Accept()
		if err != nil {
			return
		}
		far, err := net.Dial("tcp", to)
		if err != nil {
			_ = near.Close() // it never came to be
			continue
		}
		open = append(open, near, far)
		all.Go(func() { carry(far, near, roundTrip/2, ended) })
		all.Go(func() { carry(near, far, roundTrip/2, ended) })
	}
}

// carry copies what comes, each piece d later.
func carry(to, from net.Conn, d time.Duration, ended <-chan struct{}) {
	type piece struct {
		due  time.Time
		data []byte
	}
	way := make(chan piece, 4096)
	var writer sync.WaitGroup
	writer.Go(func() {
		defer func() { _ = to.Close() }()
		for p := range way {
			select {
			case <-ended:
			case <-time.After(time.Until(p.due)):
			}
			if _, err := to.Write(p.data); err != nil {
				_ = from.Close()
			}
		}
	})
	buf := make([]byte, 32<<10)
	for {
		n, err := from.Read(buf)
		if n > 0 {
			way <- piece{time.Now().Add(d), append([]byte(nil), buf[:n]...)}
		}
		if err != nil {
			break
		}
	}
	close(way)
	writer.Wait()
}
