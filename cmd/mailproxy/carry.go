package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"

	"github.com/urfave/cli/v2"

	"mailproxy/cluster"
	"mailproxy/config"
	"mailproxy/db"
	"mailproxy/internal/cliargs"
	"mailproxy/internal/version"
)

// onMaster makes an action that changes the configuration one that works on every node: on a slave the command is carried to the master
// and runs there, by the same code.
func onMaster(action cli.ActionFunc) cli.ActionFunc {
	return func(c *cli.Context) error {
		var slave bool
		err := withStore(c, func(ctx context.Context, s *store) (err error) {
			slave, err = s.isSlave(ctx)
			if err == nil && slave {
				err = s.carry(c, config.Command{Args: ownArgs()})
			}
			return err
		})
		if err != nil || slave {
			return err
		}
		return action(c)
	}
}

// isSlave says whether the configuration is changed elsewhere.
func (s *store) isSlave(ctx context.Context) (bool, error) {
	st, err := s.State(ctx)
	return err == nil && !st.IsMaster() && st.Promised.Owner != st.CID, err
}

// carry lets the master run a command, prints what that printed, and fails as it failed.
func (s *store) carry(c *cli.Context, cmd config.Command) error {
	cmd.Who, cmd.Line = s.author.Who, s.author.Command
	o := &cluster.Operator{Local: s.local, DB: s.DB, Version: version.Version,
		Say: func(line string) { _, _ = fmt.Fprintln(c.App.ErrWriter, "mailproxy: "+line) }}
	reply, err := o.Carry(c.Context, cmd)
	if err != nil {
		return err
	}
	_, _ = fmt.Fprint(c.App.Writer, reply.Output)
	switch reply.Code {
	case 0:
		return nil
	case 2:
		return usagef("%s", reply.Error)
	}
	return withHint(errors.New(reply.Error), "%s", reply.Hint)
}

// carriedKey is the key of the store that a carried command works on, in its context.
type carriedKey struct{}

func carriedStore(ctx context.Context) *store {
	s, _ := ctx.Value(carriedKey{}).(*store)
	return s
}

// mayCarry says whether a command may come from another node: it changes the configuration, and reads no file of this one.
func mayCarry(args []string) bool {
	if len(args) < 2 {
		return false
	}
	switch args[0] {
	case "domain":
		return args[1] != "recipients" || len(args) < 3 || args[2] != "import" ||
			len(args) >= 5 && args[4] == "-" && (len(args) == 5 || len(args) == 6 && args[5] == "--empty")
	case "tls":
		return args[1] == "sender" || args[1] == "remove" ||
			args[1] == "add" && len(args) == 5 && !strings.HasPrefix(args[2], "-") && slices.Equal(args[3:], []string{"--cert", "-"})
	case "transport", "network", "setting":
		return true
	case "secret":
		return args[1] == "remove" ||
			args[1] == "set" && len(args) == 5 && !strings.HasPrefix(args[2], "-") && slices.Equal(args[3:], []string{"--file", "-"})
	case "config":
		return slices.Equal(args[1:], []string{"apply", "-", "--yes"}) || slices.Equal(args[1:], []string{"note"})
	}
	return false
}

// Bounds of what the history keeps of a carried command.
const (
	maxWho  = 100
	maxLine = 4096
)

// runCommand runs an administrator's command that was typed here (from 0) or on another member. Whoever may not be trusted with this
// is no member.
func (d *daemon) runCommand(ctx context.Context, from config.CID, cmd config.Command) config.CommandReply {
	out, err := d.tryCommand(ctx, from, cmd)
	reply := config.CommandReply{Output: out}
	if err != nil {
		reply.Error, reply.Hint, reply.Code = err.Error(), hintFor(from, err), 1
		if _, usage := errors.AsType[*usageError](err); usage {
			reply.Code = 2
		}
	}
	if st, err := d.db.State(ctx); err == nil {
		reply.At = st.Position
	}
	d.log.Info().Int("node", int(from)).Str("who", clean(cmd.Who)).Strs("command", cmd.Args).Int("code", reply.Code).Msg("command.carried")
	return reply
}

func (d *daemon) tryCommand(ctx context.Context, from config.CID, cmd config.Command) (string, error) {
	if !mayCarry(cmd.Args) {
		return "", usagef("this command is not carried from node to node: %s", strings.Join(cmd.Args, " "))
	}
	if err := d.knowsAll(from, cmd); err != nil {
		return "", err
	}
	st, err := d.db.State(ctx)
	if err != nil {
		return "", err
	}
	if !st.IsMaster() {
		return "", withHint(fmt.Errorf("%w: it is not %s any more", db.ErrNotMaster, d.local.Name), `"pmgcm status" shows which node is`)
	}
	if cmd.At != (config.Position{}) && cmd.At != st.Position {
		return "", withHint(errMeanwhile, againHint)
	}
	who := db.Author{Who: cut(clean(cmd.Who), maxWho), Command: cut(clean(cmd.Line), maxLine), Node: from}
	ctx = context.WithValue(ctx, carriedKey{}, &store{DB: d.db, local: d.local, author: who, at: cmd.At, sound: d.config.inForce()})
	var out bytes.Buffer
	var in io.Reader = strings.NewReader(cmd.Text)
	if len(cmd.Secret) > 0 {
		in = bytes.NewReader(cmd.Secret)
	}
	app := newApp(in, &out, &out)
	err = app.RunContext(ctx, cliargs.Reorder(app, append([]string{"mailproxy"}, cmd.Args...)))
	return out.String(), err
}

// errOlderProgram is a whole configuration from a program that does not know all that there is in one.
var errOlderProgram = errors.New("nothing was changed: its mailproxy is older than the master's, and what it does not know of would be removed")

// knowsAll refuses a whole configuration from a program that is older than this one: what such a text lacks is removed. It may come from a
// member that was put back to an older version, and holds all that the master has.
func (d *daemon) knowsAll(from config.CID, cmd config.Command) error {
	if cmd.Args[0] != "config" || cmd.Args[1] != "apply" || cmd.Schema >= db.OwnSchema() {
		return nil
	}
	name := d.local.Name
	if s := d.config.loaded.Load(); s != nil {
		for _, n := range s.Nodes {
			if n.CID == from {
				name = n.Name
			}
		}
	}
	return withHint(fmt.Errorf("node %s: %w", name, errOlderProgram), "upgrade mailproxy on %s; or run the command on the master, %s", name, d.local.Name)
}

// cut shortens a text to n bytes at most, at a character's edge.
func cut(s string, n int) string {
	if len(s) <= n {
		return s
	}
	return strings.ToValidUTF8(s[:n], "")
}
