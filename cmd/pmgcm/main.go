// Command pmgcm is the cluster's toolkit: it creates a cluster, takes nodes in and out, shows how they are, and makes another node
// the master. Each file holds one command: read the flags, call package cluster, print.
//
// Exit codes: 0 done, 1 failed, 2 usage, 3 asked and not in sync.
package main

import (
	"context"
	"io"
	"os"
	"os/signal"
	"syscall"

	"mailproxy/internal/cliargs"
)

func main() { os.Exit(run(os.Args, os.Stdin, os.Stdout, os.Stderr)) }

// run is main with its surroundings given.
func run(args []string, stdin io.Reader, stdout, stderr io.Writer) int {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	app := newApp(stdin, stdout, stderr)
	return report(stderr, app.RunContext(ctx, cliargs.Reorder(app, args)))
}
