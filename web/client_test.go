package web

import (
	"context"
	"errors"
	"io"
	"net"
	"net/http"
	"testing"
	"testing/synctest"
	"time"

	"mailproxy/queue"
)

// A daemon that hangs is told from one that is slow with a large answer.
func TestADaemonThatDoesNotBeginToAnswerIsSilent(t *testing.T) {
	for name, c := range map[string]struct {
		answer func(net.Conn)
		want   error
		took   time.Duration
	}{
		"nothing": {func(net.Conn) {}, ErrSilent, silence},
		"bit by bit": {func(c net.Conn) {
			_, _ = io.WriteString(c, "HTTP/1.1 200 OK\r\nContent-Length: 14\r\n\r\n")
			time.Sleep(2 * silence)
			_, _ = io.WriteString(c, `{"total": 123}`)
		}, nil, 2 * silence},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				client := Control("not used")
				client.http.Transport.(*http.Transport).DialContext = func(context.Context, string, string) (net.Conn, error) {
					near, far := net.Pipe()
					go func() {
						_, _ = far.Read(make([]byte, 4096))
						c.answer(far)
					}()
					return near, nil
				}
				start := time.Now()
				list, err := client.QueueSummary(t.Context(), queue.Selection{})
				if took := time.Since(start); !errors.Is(err, c.want) || took != c.took || err == nil && list.Total != 123 {
					t.Errorf("%+v, %v after %v; want %v after %v", list, err, took, c.want, c.took)
				}
			})
		})
	}
}
