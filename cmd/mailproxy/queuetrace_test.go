package main

import (
	"strings"
	"testing"
)

func TestATraceHasTheLinesAboutItsItem(t *testing.T) {
	log := `{"session":"S","time":"1","message":"session.open"}
{"session":"S","item":"OTHER","time":"2","message":"mail.queued"}
{"session":"S","item":"ID","time":"3","message":"mail.queued"}
ID, and no JSON
{"item":"DSN","about":"ID","time":"4","message":"dsn.queued"}
{"item":"OTHER","time":"5","message":"item.done"}
{"item":"ID","reply":"\u001b[2Jtwo\nlines","code":451,"time":"6","message":"attempt.done"}
{"message":"daemon.stopped"}
`
	var got []string
	for _, line := range pickLines(strings.NewReader(log), "ID", "S") {
		got = append(got, logText(line))
	}
	want := []string{
		`1  session.open session="S"`, `3  mail.queued session="S" item="ID"`, `4  dsn.queued item="DSN" about="ID"`,
		`6  attempt.done item="ID" reply="\u001b[2Jtwo\nlines" code=451`,
	}
	if strings.Join(got, "\n") != strings.Join(want, "\n") {
		t.Errorf("got\n%s\nwant\n%s", strings.Join(got, "\n"), strings.Join(want, "\n"))
	}
	if lines := pickLines(strings.NewReader(log), "ID", ""); len(lines) != 3 {
		t.Errorf("without a session: %s", lines)
	}
	if lines := pickLines(strings.NewReader(strings.Repeat(`{"item":"ID"}`+"\n", maxLogLines+1)), "ID", ""); len(lines) != maxLogLines {
		t.Errorf("%d lines", len(lines))
	}
}
