package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/urfave/cli/v2"

	"mailproxy/config"
	"mailproxy/internal/durable"
	"mailproxy/mail"
	"mailproxy/spool"
)

func spoolCommand() *cli.Command {
	return &cli.Command{
		Name: "spool", Usage: "the files of the queue, also while the daemon does not run",
		Description: "These commands only read this node's files. Beside a daemon that takes mail they may find what is being written just then, " +
			"and show it as the log's tail.",
		Subcommands: []*cli.Command{
			{Name: "check", Usage: "read all of it through", Flags: []cli.Flag{jsonFlag()}, Action: spoolCheck,
				Description: "Exit code 1 where something is damaged. What is damaged is never delivered; the daemon sets it aside in the directory " +
					"damaged of the spool, where it stays until you remove it."},
			{Name: "export", Usage: "write messages to files", ArgsUsage: "[ID...]", Action: spoolExport,
				Flags: []cli.Flag{&cli.StringFlag{Name: "to", Usage: "into this `DIR`, which is made"}, jsonFlag()},
				Description: "All, or those that are named: each as ID.eml, the message as it is sent, and ID.json, from whom and to whom it goes " +
					"and what became of it so far. Nothing is overwritten. They stay in the queue."},
		},
	}
}

// errSpoolDamaged ends a check that has said what is wrong.
var errSpoolDamaged = errors.New("the spool is damaged")

// inspectSpool reads the spool of the node that --config names.
func inspectSpool(c *cli.Context) (string, *spool.Spool, spool.Report, error) {
	local, err := config.LoadLocal(configFile(c))
	if err != nil {
		return "", nil, spool.Report{}, noNodeFile(err)
	}
	dir := local.SpoolDir()
	if _, err := os.Stat(dir); err != nil {
		return "", nil, spool.Report{}, fmt.Errorf("no spool yet: %w", err)
	}
	s, report, err := spool.Inspect(dir)
	return dir, s, report, err
}

func spoolCheck(c *cli.Context) error {
	if _, err := arguments(c, 0, 0); err != nil {
		return err
	}
	dir, s, r, err := inspectSpool(c)
	if err != nil {
		return err
	}
	if err := s.Close(); err != nil {
		return err
	}
	if c.Bool("json") {
		err = printJSON(c.App.Writer, r)
	} else {
		err = printReport(c.App.Writer, dir, r)
	}
	if err == nil && len(r.Bad)+len(r.Aside) > 0 {
		err = errSpoolDamaged
	}
	return err
}

func printReport(w io.Writer, dir string, r spool.Report) error {
	var b strings.Builder
	fmt.Fprintf(&b, "%s: %s of %d octets, and %d whose client has no answer yet; the log has %d octets in %s\n", dir, count(r.Messages, "message"), r.Octets, r.Held, r.LogSize,
		count(r.Segments, "segment"))
	if r.Tail > 0 {
		fmt.Fprintf(&b, "tail: %d octets at the log's end are no whole record; nobody was told that they are there\n", r.Tail)
	}
	for _, bad := range r.Bad {
		what := bad.Error
		if bad.ID != "" {
			what = "message " + bad.ID + ": " + what
		}
		fmt.Fprintf(&b, "damaged: %s, %d octets from %d: %s\n", bad.File, bad.Octets, bad.Offset, what)
	}
	for _, name := range r.Aside {
		fmt.Fprintf(&b, "set aside: %s\n", filepath.Join(dir, "damaged", name))
	}
	_, err := io.WriteString(w, b.String())
	return err
}

func count(n int, what string) string {
	if n == 1 {
		return "1 " + what
	}
	return fmt.Sprintf("%d %ss", n, what)
}

// An exported message, as ID.json has it.
type exported struct {
	ID       string          `json:"id"`
	Envelope *mail.Envelope  `json:"envelope"`
	Held     bool            `json:"held,omitempty"`
	State    json.RawMessage `json:"state,omitempty"`
}

func spoolExport(c *cli.Context) error {
	ids, to := c.Args().Slice(), c.String("to")
	if to == "" {
		return usagef("spool export: --to is missing")
	}
	_, s, _, err := inspectSpool(c)
	if err != nil {
		return err
	}
	defer func() { _ = s.Close() }() // it is only read
	if err := os.MkdirAll(to, 0o700); err != nil {
		return err
	}
	var failed error
	done := []string{}
	fail := func(id string, err error) error {
		failed = errors.Join(failed, fmt.Errorf("message %s: %w", id, err))
		return nil
	}
	seen := map[string]bool{}
	err = s.Each(func(f spool.Found) error {
		if len(ids) > 0 && !slices.Contains(ids, f.ID) {
			return nil
		}
		seen[f.ID] = true
		if err := exportMessage(s, f, to); err != nil {
			return fail(f.ID, err)
		}
		done = append(done, f.ID)
		return nil
	}, func(id string, err error) error {
		if len(ids) > 0 && !slices.Contains(ids, id) {
			return nil
		}
		seen[id] = true
		return fail(id, err)
	})
	if err != nil {
		return err
	}
	for _, id := range ids {
		if !seen[id] {
			_ = fail(id, spool.ErrNoSuch) // nil
		}
	}
	slices.Sort(done)
	if c.Bool("json") {
		err = printJSON(c.App.Writer, map[string]any{"exported": done})
	} else {
		_, err = fmt.Fprintf(c.App.Writer, "%s written to %s\n", count(len(done), "message"), to)
	}
	return errors.Join(failed, err)
}

func exportMessage(s *spool.Spool, f spool.Found, to string) error {
	m, err := s.Open(f.ID)
	if err != nil {
		return err
	}
	defer m.Close()
	if err := m.Check(); err != nil {
		return err
	}
	err = durable.Create(filepath.Join(to, f.ID+".eml"), 0o600, func(w io.Writer) error {
		_, err := io.Copy(w, m.Content)
		return err
	})
	if errors.Is(err, fs.ErrExist) {
		return errThere(filepath.Join(to, f.ID+".eml"))
	}
	if err != nil {
		return err
	}
	return durable.Create(filepath.Join(to, f.ID+".json"), 0o600, func(w io.Writer) error {
		return printJSON(w, exported{f.ID, m.Envelope, f.Held, f.State})
	})
}
