package mta

import (
	"os"
	"path/filepath"
	"testing"
)

// A Sink is Postfix's smtp-sink, which keeps each message in a file.
type Sink struct {
	// Addr is where it listens.
	Addr string
	dir  string
}

// StartSink starts one. options stand in front of its address.
func StartSink(t testing.TB, options ...string) *Sink {
	t.Helper()
	s := &Sink{Addr: FreeAddr(t), dir: filepath.Join(folder(t), "mail")}
	give(t, "nobody", s.dir)
	args := append([]string{"-u", "nobody", "-h", "sink.test", "-d", s.dir + "/m."}, options...)
	Start(t, s.Addr, "smtp-sink", append(args, s.Addr, "100")...)
	return s
}

// Messages gives what it has taken, each with the envelope in X- fields in front, and CRLF line ends.
func (s *Sink) Messages(t testing.TB) (all []string) {
	t.Helper()
	files, err := filepath.Glob(filepath.Join(s.dir, "*"))
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range files {
		b, err := os.ReadFile(f)
		if err != nil {
			t.Fatal(err)
		}
		all = append(all, string(b))
	}
	return all
}
