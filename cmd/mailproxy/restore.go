package main

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
	"time"

	"github.com/urfave/cli/v2"

	"mailproxy/backup"
	"mailproxy/db"
	"mailproxy/internal/durable"
)

func restoreCommand() *cli.Command {
	return &cli.Command{
		Name: "restore", Usage: "bring a backup back, on a fresh node", ArgsUsage: "FILE", Action: runRestore,
		Description: "Reads and checks all of the backup, says what it overwrites, and asks. The node must be a single one, with its daemon " +
			"running. Configuration, history and journal come back; who was in the cluster does not: run `pmgcm create` then, and let " +
			"new nodes join. The node file stays as it is here. With --identity the node becomes the very member that the backup is of, " +
			"with its CID, keys and CA: for a node whose cluster lives on, and which must run nowhere else. It takes no configuration, " +
			"has no vote and is not in sync before a master has pushed to it, also where it was the master itself: `pmgcm status` " +
			"says what is to be done. - reads from standard input.",
		Flags: []cli.Flag{passphraseFlag(), &cli.BoolFlag{Name: "identity", Usage: "bring back the node itself, as a member of its cluster"},
			&cli.BoolFlag{Name: "yes", Aliases: []string{"y"}, Usage: "do not ask"}},
	}
}

func runRestore(c *cli.Context) error {
	args, err := arguments(c, 1, 1)
	if err != nil {
		return err
	}
	if args[0] == "-" && !(c.Bool("yes") && c.IsSet("passphrase-file")) {
		return usagef("restore -: standard input cannot be asked: add --yes and --passphrase-file")
	}
	return withStore(c, func(ctx context.Context, s *store) error {
		if err := s.wantFresh(ctx, c.Bool("identity")); err != nil {
			return err
		}
		file, err := seekable(c, args[0])
		if err != nil {
			return err
		}
		defer file.Close()
		passphrase, err := passphrase(c, "passphrase of the backup: ")
		if err != nil {
			return err
		}
		b, err := backup.Open(file, passphrase)
		if err != nil {
			return fmt.Errorf("%s: %w", args[0], err)
		}
		return s.restore(c, b)
	})
}

// restore asks, and does it.
func (s *store) restore(c *cli.Context, b *backup.Backup) error {
	identity := c.Bool("identity")
	if identity {
		if err := b.HasIdentity(); err != nil {
			return err
		}
	}
	s.announce(c, b)
	if err := confirm(c, "go on?"); err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(c.Context, backupTimeout) // anew: the operator may have taken their time to answer
	defer cancel()
	if !identity {
		at, err := b.Single(ctx, s.DB, author())
		if err != nil {
			return s.restoreError(err)
		}
		_ = done(c, at, "configuration restored")
		_, err = fmt.Fprintln(c.App.Writer, `next: "pmgcm create" makes this node the master of a new cluster; new nodes enter it by what "pmgcm join-cmd" prints`)
		return err
	}
	if err := b.Identity(ctx, s.DB, s.local.KeyDir()); err != nil {
		return s.restoreError(err)
	}
	if err := s.restoreTLS(c, b); err != nil {
		return err
	}
	_, err := fmt.Fprintf(c.App.Writer, "this is node %d of cluster %s again; it takes no configuration before a master has pushed to it\n"+
		"next: \"pmgcm status\" says what is to be done\n", b.State.CID, b.State.ClusterID)
	return err
}

// announce says what the backup is, and what becomes of what is here.
func (s *store) announce(c *cli.Context, b *backup.Backup) {
	w := c.App.Writer
	fmt.Fprintf(w, "backup of %s: %s\n", b.MadeAt.Format(time.RFC3339), describe(&b.Manifest))
	fmt.Fprintf(w, "in it: %s\n", clean(rowsOf(b)))
	ctx, cancel := context.WithTimeout(c.Context, commandTimeout)
	defer cancel()
	here, err := s.Load(ctx)
	secrets, secretsErr := s.SecretNames(ctx)
	if err == nil && secretsErr == nil { // what fails here fails again, with more to say
		fmt.Fprintf(w, "overwritten: the configuration here at %v, with %s, %s, and its history\n",
			here.Position, here.Counts(), count(len(secrets), "secret"))
	}
	if !c.Bool("identity") {
		fmt.Fprintln(w, "left out: cluster and node identity, the node file")
		return
	}
	fmt.Fprintf(w, "overwritten: the keys in %s; this node becomes node %d, which must run nowhere else\n", s.local.KeyDir(), b.State.CID)
	if b.Name != s.local.Name || b.Address != s.local.TunnelAddress() {
		fmt.Fprintf(w, "note: the others know it as %s at %s; the node file here says %s at %s\n", clean(b.Name), clean(b.Address),
			s.local.Name, s.local.TunnelAddress())
	}
}

// rowsOf gives "domain 3, network 1": the tables that have rows.
func rowsOf(b *backup.Backup) string {
	var words []string
	for _, t := range b.Tables {
		if t.Rows > 0 {
			words = append(words, fmt.Sprintf("%s %d", strings.TrimPrefix(t.Name, "config."), t.Rows))
		}
	}
	if words == nil {
		return "no rows"
	}
	return strings.Join(words, ", ")
}

// wantFresh refuses on a node in a cluster, but for one on which a restore of its identity was begun.
func (s *store) wantFresh(ctx context.Context, identity bool) error {
	state, err := s.State(ctx)
	if err != nil || state.CID == 0 {
		return err
	}
	restored, err := s.Restored(ctx)
	if err != nil || identity && restored != nil {
		return err
	}
	return s.notFresh(fmt.Errorf("%w: this is node %d of cluster %s", db.ErrExists, state.CID, state.ClusterID))
}

// notFresh gives the way to a fresh node.
func (s *store) notFresh(err error) error {
	rows := "pg pg.made"
	if s.local.Database.DSN != "" {
		rows = "and the contents of its database"
	}
	return withHint(fmt.Errorf("nothing was restored: %w", err), `"pmgcm sync" gives a member its master's configuration; to begin anew, stop the daemon, `+
		"remove keys snapshot.json %s in %s, start it, and run this again", rows, s.local.StateDir)
}

func (s *store) restoreError(err error) error {
	if errors.Is(err, db.ErrExists) {
		return s.notFresh(err)
	}
	return err
}

// restoreTLS puts back a certificate that somebody else made; our own is made anew where it is missing.
func (s *store) restoreTLS(c *cli.Context, b *backup.Backup) error {
	cert, err := tls.X509KeyPair(b.TLS(), b.TLS())
	if err != nil || cert.Leaf == nil || selfMade(cert.Leaf) {
		return nil
	}
	if err := os.MkdirAll(tlsDir(s.local), 0o700); err != nil {
		return err
	}
	if err := durable.WriteFile(tlsFile(s.local), b.TLS(), 0o600); err != nil {
		return fmt.Errorf("put the certificate back: %w", err)
	}
	_, err = fmt.Fprintf(c.App.Writer, "%s put back; \"systemctl restart mailproxy\" takes it\n", tlsFile(s.local))
	return err
}

// seekable opens a file; of standard input, and of a pipe, it makes one without a name, encrypted as it comes.
func seekable(c *cli.Context, name string) (*os.File, error) {
	in := c.App.Reader
	if name != "-" {
		f, err := os.Open(name)
		if err != nil {
			return nil, fmt.Errorf("read backup: %w", err)
		}
		if info, err := f.Stat(); err == nil && info.Mode().IsRegular() {
			return f, nil
		}
		defer f.Close()
		in = f
	}
	tmp, err := os.CreateTemp("", "mailproxy-restore-*")
	if err != nil {
		return nil, err
	}
	_ = os.Remove(tmp.Name()) // the descriptor is enough
	if _, err := io.Copy(tmp, in); err != nil {
		_ = tmp.Close()
		return nil, fmt.Errorf("read backup: %w", err)
	}
	return tmp, nil
}
