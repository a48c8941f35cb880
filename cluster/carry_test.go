package cluster

import (
	"errors"
	"net"
	"net/http"
	"path/filepath"
	"testing"

	"mailproxy/config"
)

// Whether a command may have been done is what the operator must know where it failed.
func TestACommandThatWasNotTakenIsToldFromOneThatWasLost(t *testing.T) {
	for name, c := range map[string]struct {
		answer   http.HandlerFunc
		notTaken bool
	}{
		"refused": {func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(http.StatusBadGateway) }, true},
		"lost":    {func(http.ResponseWriter, *http.Request) { panic(http.ErrAbortHandler) }, false},
	} {
		t.Run(name, func(t *testing.T) {
			socket := filepath.Join(t.TempDir(), "c")
			l, err := net.Listen("unix", socket)
			if err != nil {
				t.Fatal(err)
			}
			server := &http.Server{Handler: c.answer}
			go func() { _ = server.Serve(l) }()
			defer func() { _ = server.Close() }()
			if _, err := postCommand(t.Context(), socket, config.Command{}); err == nil || errors.Is(err, errNotTaken) != c.notTaken {
				t.Errorf("error: %v", err)
			}
		})
	}
}
