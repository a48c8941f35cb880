package main

import (
	"io"
	"strings"
	"testing"

	"github.com/urfave/cli/v2"
)

// Each question gets its own line of what is piped in, and no answer is no.
func TestQuestionsAreAnsweredLineByLine(t *testing.T) {
	app := cli.NewApp()
	app.Reader, app.Writer = strings.NewReader("yes\n Y \nno\n\nyess\nyes"), io.Discard
	c := cli.NewContext(app, nil, nil)
	for i, want := range []bool{true, true, false, false, false, true, false} {
		if got := asked(c, "question %d", i); got != want {
			t.Errorf("question %d: %v, want %v", i, got, want)
		}
	}
}
