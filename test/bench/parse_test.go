package main

import (
	"bytes"
	"strings"
	"testing"
)

func TestLastCountOfTheSink(t *testing.T) {
	for name, c := range map[string]struct {
		text string
		want int
		bad  bool
	}{
		"the last of several":                  {"sess=1 quit=0 mesg=1\rsess=1 quit=0 mesg=2\r", 2, false},
		"one that is not whole does not count": {"sess=1 quit=0 mesg=17\rsess=1 quit=0 mesg=18", 17, false},
		"the first may be cut off":             {"uit=0 mesg=41\rsess=2 quit=0 mesg=42\r", 42, false},
		"nothing has come yet":                 {"", 0, false},
		"the first is not whole":               {"sess=1 quit=0 me", 0, false},
		"an error of smtp-sink":                {"smtp-sink: fatal: bind 127.0.0.30 port 2600: Address already in use\n", 0, true},
	} {
		t.Run(name, func(t *testing.T) {
			got, err := lastCount(c.text)
			if got != c.want || (err != nil) != c.bad {
				t.Errorf("lastCount(%q) = %d, %v; want %d", c.text, got, err, c.want)
			}
		})
	}
}

func TestJoinLineIsFoundInWhatJoinCmdSays(t *testing.T) {
	said := "on the new node run, within an hour:\n\n  pmgcm join 127.0.0.21 --fingerprint SHA256:abc --token t\n"
	if got, want := joinLine(said), "pmgcm join 127.0.0.21 --fingerprint SHA256:abc --token t"; got != want {
		t.Errorf("%q, want %q", got, want)
	}
	if got := joinLine("no cluster defined"); got != "" {
		t.Errorf("%q in a text without one", got)
	}
}

func TestPushEventsAreReadFromTheLog(t *testing.T) {
	var log strings.Builder
	log.WriteString(`{"level":"info","message":"config.loaded","bytes":9}` + "\nnot JSON\n")
	log.WriteString(`{"level":"info","node":2,"bytes":700,"full":false,"message":"push.done"}` + "\n")
	log.WriteString(`{"level":"info","node":3,"bytes":900,"full":true,"message":"push.done"}` + "\n" + `{"message":"push.done","bytes":1`)
	var l pushLog
	if err := l.read(bytes.NewBufferString(log.String())); err != nil {
		t.Fatal(err)
	}
	if len(l.bytes) != 2 || l.bytes[0] != 700 || l.bytes[1] != 900 || l.full != 1 {
		t.Fatalf("read %v bytes, %d full; want 700 and 900, one full", l.bytes, l.full)
	}
	if err := l.read(bytes.NewBufferString("000}\n")); err != nil {
		t.Fatal(err)
	}
	if len(l.bytes) != 3 || l.bytes[2] != 1000 {
		t.Errorf("a line that came in two pieces: %v bytes, want 1000 as the third", l.bytes)
	}
}
