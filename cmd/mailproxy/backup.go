package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"time"

	"github.com/urfave/cli/v2"
	"golang.org/x/term"

	"mailproxy/backup"
	"mailproxy/db"
	"mailproxy/internal/durable"
	"mailproxy/internal/version"
)

// backupTimeout bounds a backup or restore of any size.
const backupTimeout = 6 * time.Hour

func backupCommand() *cli.Command {
	return &cli.Command{
		Name: "backup", Usage: "write a backup of this node", ArgsUsage: "FILE", Action: runBackup,
		Description: "Writes the configuration with its history, the node's keys, its CA, its node file and the journal to a new file, " +
			"encrypted with a passphrase; - is standard output. It runs on any node, while mail and commits go on, and reads all as of one " +
			"moment. Queued mail is not in it. The passphrase is asked for twice on the terminal. `age -d FILE | tar x` opens a backup " +
			"by hand; the README in it says what is what.",
		Flags: []cli.Flag{passphraseFlag(), &cli.BoolFlag{Name: "logs", Usage: "with what happened to mail"}, jsonFlag()},
	}
}

func passphraseFlag() cli.Flag {
	return &cli.StringFlag{Name: "passphrase-file", Usage: "read the passphrase from the first line of `FILE`, which only its owner may read"}
}

// backupView is what backup has done, in JSON.
type backupView struct {
	File  string `json:"file"`
	Bytes int64  `json:"bytes"`
	backup.Manifest
}

func runBackup(c *cli.Context) error {
	args, err := arguments(c, 1, 1)
	if err != nil {
		return err
	}
	file := args[0]
	if file == "-" && c.Bool("json") {
		return usagef("backup -: standard output is the backup's: leave --json out")
	}
	if out, ok := c.App.Writer.(*os.File); file == "-" && ok && term.IsTerminal(int(out.Fd())) {
		return usagef("backup -: standard output is a terminal: send it to a file or program")
	}
	if _, err := os.Lstat(file); file != "-" && err == nil {
		return errThere(file)
	}
	logs := db.WithoutLogs
	if c.Bool("logs") {
		logs = db.WithLogs
	}
	return withStore(c, func(_ context.Context, s *store) error {
		passphrase, err := newPassphrase(c)
		if err != nil {
			return err
		}
		ctx, cancel := context.WithTimeout(c.Context, backupTimeout) // anew: the operator took their time
		defer cancel()
		view := backupView{File: file}
		write := func(w io.Writer) (err error) {
			n := &counter{w: w}
			source := backup.Source{Local: s.local, DB: s.DB, TLSFile: tlsFile(s.local), Version: version.String()}
			view.Manifest, err = backup.Write(ctx, n, source, passphrase, logs)
			view.Bytes = n.n
			return err
		}
		if file == "-" {
			return write(c.App.Writer)
		}
		err = durable.Create(file, 0o600, write)
		if errors.Is(err, fs.ErrExist) {
			return errThere(file)
		}
		if err != nil {
			return err
		}
		if c.Bool("json") {
			return printJSON(c.App.Writer, view)
		}
		_, err = fmt.Fprintf(c.App.Writer, "%s written, %d bytes: %s\n", file, view.Bytes, describe(&view.Manifest))
		return err
	})
}

func errThere(file string) error {
	return withHint(fmt.Errorf("%s is there already, nothing was written", file), "name a new file; a backup overwrites none")
}

// describe says of which node a backup is, and where that was.
func describe(m *backup.Manifest) string {
	who := m.Name + ", in no cluster"
	if m.State.CID != 0 {
		who = fmt.Sprintf("%s(%d) of cluster %s", m.Name, m.State.CID, m.State.ClusterID)
	}
	return clean(fmt.Sprintf("%s at %v", who, m.State.Position))
}

// counter counts what is written.
type counter struct {
	w io.Writer
	n int64
}

func (c *counter) Write(b []byte) (int, error) {
	n, err := c.w.Write(b)
	c.n += int64(n)
	return n, err
}
