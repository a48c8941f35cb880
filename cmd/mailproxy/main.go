// Command mailproxy is the mail gateway's daemon (`mailproxy serve`) and the administrator's commands on its configuration
// and queue. The cluster's commands are pmgcm's.
//
// Exit codes: 0 done, 1 failed, 2 usage, 3 queue move: an earlier order has an item on its way.
package main

import (
	"io"
	"os"

	"github.com/rs/zerolog"

	"mailproxy/internal/cliargs"
)

func main() {
	zerolog.ErrorFieldName = "err"                            // one spelling in all events
	zerolog.TimeFieldFormat = "2006-01-02T15:04:05.000Z07:00" // RFC 3339 to the millisecond: two events of one session differ
	os.Exit(run(os.Args, os.Stdin, os.Stdout, os.Stderr))
}

// run is main with its surroundings given.
func run(args []string, stdin io.Reader, stdout, stderr io.Writer) int {
	app := newApp(stdin, stdout, stderr)
	err := app.Run(cliargs.Reorder(app, args))
	return report(stderr, err)
}
