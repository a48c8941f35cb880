package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/user"
	"strings"
	"time"

	"github.com/rs/zerolog"
	"github.com/urfave/cli/v2"

	"mailproxy/cluster"
	"mailproxy/config"
	"mailproxy/db"
	"mailproxy/filter"
)

// commandTimeout bounds what one command asks of the database.
const commandTimeout = 30 * time.Second

// store is the node's database as a command sees it.
type store struct {
	*db.DB
	local  *config.Local
	author db.Author
	at     config.Position  // of a carried command: where it is not zero, only this configuration may be changed
	sound  *config.Snapshot // one that compiles; nil where none is known
}

// withStore runs do with the database of the node that --config names.
func withStore(c *cli.Context, do func(ctx context.Context, s *store) error) error {
	if s := carriedStore(c.Context); s != nil {
		return do(c.Context, s)
	}
	local, err := config.LoadLocal(configFile(c))
	if err != nil {
		return noNodeFile(err)
	}
	d, err := db.Open(db.Options{DSN: databaseDSN(local), NodeKey: nodeKey(local), Log: zerolog.Nop()})
	if err != nil {
		return err
	}
	defer d.Close()
	ctx, cancel := context.WithTimeout(c.Context, commandTimeout)
	defer cancel()
	o := &cluster.Operator{Local: local, DB: d}
	if err = o.AwaitDatabase(ctx); err == nil {
		err = d.Ping(ctx)
	}
	if err != nil {
		return fmt.Errorf("%w: %w", errNoDatabase, err)
	}
	if err = do(ctx, &store{DB: d, local: local, author: author()}); errors.Is(err, db.ErrNoSchema) {
		return fmt.Errorf("%w: %w", errNoDatabase, err)
	}
	return err
}

// errNoDatabase is what a command says that cannot reach the node's PostgreSQL.
var errNoDatabase = errors.New("the node's database does not answer")

func noNodeFile(err error) error {
	if errors.Is(err, os.ErrNotExist) {
		return withHint(err, `make one: "mailproxy init --name %s --address IP", or name another with --config`, hostName())
	}
	return err
}

func hostName() string {
	if name, err := os.Hostname(); err == nil {
		return name
	}
	return "NAME"
}

// edit changes the configuration in one commit, on the master. change sees the configuration as it is in that transaction.
func edit(c *cli.Context, change func(ctx context.Context, tx *db.Tx, now *config.Snapshot) error) (config.Position, error) {
	var at config.Position
	err := withStore(c, func(ctx context.Context, s *store) (err error) {
		if err := s.wantMaster(ctx); err != nil {
			return err
		}
		at, err = s.commit(ctx, func(ctx context.Context, tx *db.Tx) error {
			now, err := tx.Snapshot(ctx)
			if err != nil {
				return err
			}
			return change(ctx, tx, now)
		})
		return err
	})
	return at, err
}

// commit is one configuration commit that passes compiles. What change or compiles refuse is given as it is, without words about
// the database.
func (s *store) commit(ctx context.Context, change func(context.Context, *db.Tx) error) (config.Position, error) {
	var refused error
	at, err := s.Commit(ctx, s.author, func(ctx context.Context, tx *db.Tx) error {
		refused = change(ctx, tx)
		return refused
	}, func(after *config.Snapshot) error {
		refused = compiles(s.sound, after)
		return refused
	})
	if err != nil && refused != nil && !errors.Is(refused, db.ErrNotMaster) {
		return at, refused
	}
	return at, s.explain(ctx, err)
}

// compiles is what every change must pass before it is committed: the mail path of each node can be built from it.
func compiles(sound, s *config.Snapshot) error {
	_, err := compile(sound, s)
	return asProblems(err)
}

// asProblems gives what the mail path could not compile the shape of what config refuses, so that it can be found in a text.
func asProblems(err error) error {
	if joined, ok := err.(interface{ Unwrap() []error }); ok {
		var all []error
		for _, e := range joined.Unwrap() {
			all = append(all, asProblems(e))
		}
		return errors.Join(all...)
	}
	if e, ok := errors.AsType[*filter.CompileError](err); ok {
		return &config.Problem{Object: e.Object, Reason: e.Reason}
	}
	return err
}

// wantMaster gives the error that says where the master is, on any other node.
func (s *store) wantMaster(ctx context.Context) error {
	state, err := s.State(ctx)
	if err != nil {
		return err
	}
	if state.IsMaster() {
		return nil
	}
	return s.notMaster(ctx, state)
}

// explain turns the guard's refusal, of a node that stopped being master between the question and the commit, into the same.
func (s *store) explain(ctx context.Context, err error) error {
	if !errors.Is(err, db.ErrNotMaster) {
		return err
	}
	state, stateErr := s.State(ctx)
	if stateErr != nil {
		return err
	}
	return s.notMaster(ctx, state)
}

func (s *store) notMaster(ctx context.Context, state db.State) error {
	owner := state.Promised.Owner
	if restored, err := s.Restored(ctx); err == nil && restored != nil {
		return withHint(fmt.Errorf("%w: this node was restored from a backup, and no master has pushed to it yet", db.ErrNotMaster),
			`"pmgcm status" says what is to be done`)
	}
	if owner == state.CID { // promised to ourselves and not in force yet
		return withHint(fmt.Errorf("%w: a promote is under way here", db.ErrNotMaster), `"pmgcm status" shows how far it is`)
	}
	master := fmt.Sprintf("the node with CID %d", owner)
	if snapshot, err := s.Load(ctx); err == nil {
		for _, n := range snapshot.Nodes {
			if n.CID == owner {
				master = fmt.Sprintf("%s (CID %d, %s)", n.Name, n.CID, n.Address)
			}
		}
	}
	return withHint(fmt.Errorf("%w: configuration is changed on the master, %s", db.ErrNotMaster, master), "run there: %s", commandLine())
}

// author says who changes the configuration, and by which command.
func author() db.Author {
	who := os.Getenv("SUDO_USER")
	if who == "" {
		who = "uid " + fmt.Sprint(os.Getuid())
		if u, err := user.Current(); err == nil {
			who = u.Username
		}
	}
	return db.Author{Who: who, Command: commandLine()}
}

// commandLine is this command as it can be pasted.
func commandLine() string {
	words := []string{"mailproxy"}
	for _, a := range ownArgs() {
		words = append(words, shellQuote(a))
	}
	return strings.Join(words, " ")
}

// ownArgs are the words of this command without --config, which is this node's own.
func ownArgs() []string {
	var words []string
	args := os.Args[1:]
	for i := 0; i < len(args); i++ {
		if name := strings.TrimLeft(args[i], "-"); name == configFlag && strings.HasPrefix(args[i], "-") {
			i++
			continue
		} else if strings.HasPrefix(args[i], "-") && strings.HasPrefix(name, configFlag+"=") {
			continue
		}
		words = append(words, args[i])
	}
	return words
}

func shellQuote(s string) string {
	if s != "" && !strings.ContainsFunc(s, func(r rune) bool {
		return !('a' <= r && r <= 'z' || 'A' <= r && r <= 'Z' || '0' <= r && r <= '9' || strings.ContainsRune("-_./:=@,+%[]", r))
	}) {
		return s
	}
	return "'" + strings.ReplaceAll(s, "'", `'\''`) + "'"
}

// done prints what a command changed, and where the configuration is now.
func done(c *cli.Context, at config.Position, format string, args ...any) error {
	_, err := fmt.Fprintf(c.App.Writer, "%s (configuration %v)\n", fmt.Sprintf(format, args...), at)
	return err
}
