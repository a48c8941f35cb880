package main

import (
	"context"
	"errors"
	"io"
	"net"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"mailproxy/cluster"
)

// helper stands in for mailproxy-pam: it reads a question to its end, and says answer; "" hangs until it is hung up on.
func helper(t *testing.T, answer string) (socket string, question func() string) {
	t.Helper()
	socket = filepath.Join(t.TempDir(), "s")
	l, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	var asked string
	var all sync.WaitGroup
	all.Go(func() {
		c, err := l.Accept()
		if err != nil {
			return
		}
		defer c.Close()
		b, _ := io.ReadAll(c)
		asked = string(b)
		if answer == "" {
			_, _ = io.Copy(c, &forever{until: time.Now().Add(patience)})
			return
		}
		_, _ = io.WriteString(c, answer)
	})
	t.Cleanup(func() { l.Close(); all.Wait() })
	return socket, func() string { all.Wait(); return asked }
}

// forever says one byte after the other that is no answer, until the other side has gone or the time is over.
type forever struct{ until time.Time }

func (f *forever) Read(b []byte) (int, error) {
	if time.Now().After(f.until) {
		return 0, io.EOF
	}
	return copy(b, "x"), nil
}

func TestTheRootPasswordIsWhatPAMSaysItIs(t *testing.T) {
	for _, c := range []struct {
		name, answer string
		want         error // nil: right
		other        bool  // neither right nor wrong
	}{
		{"right", "right\n", nil, false},
		{"wrong", "wrong\n", cluster.ErrWrongPassword, false},
		{"it could not be asked", "error\n", nil, true},
		{"half an answer", "right", nil, true},
		{"more than an answer", "right\nright\n", nil, true},
		{"no end", "", nil, true},
	} {
		t.Run(c.name, func(t *testing.T) {
			socket, question := helper(t, c.answer)
			err := checkRootPassword(t.Context(), socket, "192.0.2.12", "a password")
			if c.other {
				if err == nil || errors.Is(err, cluster.ErrWrongPassword) || strings.Contains(err.Error(), "a password") {
					t.Errorf("%v", err)
				}
			} else if !errors.Is(err, c.want) {
				t.Errorf("%v, want %v", err, c.want)
			}
			if got := question(); got != "192.0.2.12\na password" {
				t.Errorf("asked %q", got)
			}
		})
	}
}

func TestAHelperThatHangsIsGivenUp(t *testing.T) {
	socket := filepath.Join(t.TempDir(), "s")
	l, err := net.Listen("unix", socket) // nobody accepts
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
	defer cancel()
	if err := checkRootPassword(ctx, socket, "192.0.2.12", "x"); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("%v", err)
	}
	if err := checkRootPassword(t.Context(), socket+".not", "192.0.2.12", "x"); err == nil {
		t.Error("right without anybody to ask")
	}
}
