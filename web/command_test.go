package web

import (
	"context"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"mailproxy/config"
)

// patientRecorder is a recorder whose deadlines can be set.
type patientRecorder struct{ *httptest.ResponseRecorder }

func (patientRecorder) SetReadDeadline(time.Time) error  { return nil }
func (patientRecorder) SetWriteDeadline(time.Time) error { return nil }

func TestCommandsRunOneAtATime(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		entered, release := 0, make(chan struct{})
		s := &Server{commands: make(chan struct{}, 1)}
		s.opts.Command = func(context.Context, config.CID, config.Command) config.CommandReply {
			entered++
			<-release
			return config.CommandReply{}
		}
		ask := func(ctx context.Context) *httptest.ResponseRecorder {
			w := httptest.NewRecorder()
			s.command(patientRecorder{w}, httptest.NewRequestWithContext(ctx, http.MethodPost, "/command", strings.NewReader("{}")))
			return w
		}
		var all sync.WaitGroup
		gone, leave := context.WithCancel(t.Context())
		for _, ctx := range []context.Context{t.Context(), t.Context(), gone} {
			all.Go(func() { ask(ctx) })
			synctest.Wait()
		}
		if entered != 1 {
			t.Errorf("%d commands run at once", entered)
		}
		leave() // who does not wait any more is not run
		synctest.Wait()
		close(release)
		all.Wait()
		if entered != 2 {
			t.Errorf("%d of two commands that were waited for ran", entered)
		}
	})
}
