package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/urfave/cli/v2"
	"golang.org/x/term"

	"mailproxy/config"
	"mailproxy/db"
)

func configCommand() *cli.Command {
	return &cli.Command{
		Name: "config", Usage: "the whole configuration as one text",
		Description: "The text is TOML with [settings], [[network]], [[transport]], [[domain]], [[certificate]] and [[tls_sender]]; it fits in git.",
		Subcommands: []*cli.Command{
			{Name: "show", Usage: "print the configuration", Flags: []cli.Flag{jsonFlag()}, Action: configShow,
				Description: "Settings that were not set, and keys that are not needed, are left out."},
			{Name: "apply", Usage: "make the configuration what a file says", ArgsUsage: "FILE", Action: configApply,
				Flags: []cli.Flag{
					&cli.BoolFlag{Name: "yes", Aliases: []string{"y"}, Usage: "do not ask"},
					&cli.BoolFlag{Name: "empty", Usage: "take a text that names nothing, and so removes everything"},
				},
				Description: "Shows the difference and asks. What the file does not name is removed. All of it is one commit, or none: " +
					"a configuration that mail could not be taken by is refused with line and reason. - reads from standard input. A text that names " +
					"nothing, as of a command that failed, is refused without --empty."},
			{Name: "rollback", Usage: "make the configuration what it was after a commit", ArgsUsage: "[EPOCH:]SERIAL", Action: configRollback,
				Flags: []cli.Flag{&cli.BoolFlag{Name: "yes", Aliases: []string{"y"}, Usage: "do not ask"}},
				Description: "Shows the difference and asks. It is a new commit, so that it can be taken back the same way. Settings, networks, transports " +
					"and domains are brought back; members of the cluster are not. With EPOCH, the number before the owner in `config history`, " +
					"the commit must be of that epoch. The history keeps 1,000 commits, or 90 days."},
			{Name: "history", Usage: "show who changed what", Action: configHistory,
				Flags:       []cli.Flag{&cli.IntFlag{Name: "limit", Value: 20, Usage: "show the newest `N`"}, jsonFlag()},
				Description: "The newest comes first. What a new master did not have is not here but in `pmgcm journal`."},
			{Name: "note", Usage: "put a command that changes no row into the history", Action: configNote, Hidden: true,
				Description: "`pmgcm journal drop` carries it to the master."},
		},
	}
}

// configView is the configuration in JSON.
type configView struct {
	Position   config.Position    `json:"position"`
	Settings   []config.Setting   `json:"settings"`
	Networks   []config.Network   `json:"networks"`
	Transports []config.Transport `json:"transports"`
	Domains    []config.Domain    `json:"domains"`

	Recipients []config.RecipientList `json:"recipients"`

	Certificates []config.Certificate `json:"certificates"`
	TLSSenders   []config.TLSSender   `json:"tls_senders"`
}

func configShow(c *cli.Context) error {
	return show(c, func(s *config.Snapshot) any {
		return configView{s.Position, nonNil(s.Settings), nonNil(s.Networks), nonNil(s.Transports), s.Domains.List(), nonNil(s.Recipients),
			nonNil(s.Certificates), nonNil(s.TLSSenders)}
	}, func(s *config.Snapshot) error {
		_, err := c.App.Writer.Write(s.Text())
		return err
	})
}

func configApply(c *cli.Context) error {
	args, err := arguments(c, 1, 1)
	if err != nil {
		return err
	}
	if args[0] == "-" && !c.Bool("yes") {
		return usagef("config apply -: standard input cannot be asked: add --yes")
	}
	parts, err := readParts(c, args[0])
	if err != nil {
		return err
	}
	return withStore(c, func(ctx context.Context, s *store) error {
		before, err := s.Load(ctx)
		if err != nil {
			return err
		}
		if s.at != (config.Position{}) && before.Position != s.at {
			return withHint(errMeanwhile, againHint)
		}
		after := before.With(parts)
		if err := compiles(s.sound, after); err != nil {
			return inText(args[0], parts.Locate(err))
		}
		return s.replace(c, before, after)
	})
}

func configRollback(c *cli.Context) error {
	args, err := arguments(c, 1, 1)
	if err != nil {
		return err
	}
	epoch, serial, err := parseCommit(args[0])
	if err != nil {
		return err
	}
	return withStore(c, func(ctx context.Context, s *store) error {
		before, after, err := s.Undo(ctx, epoch, serial)
		if errors.Is(err, db.ErrNoSuch) {
			return withHint(fmt.Errorf("the history has no commit %s that leads to today's configuration", args[0]), "mailproxy config history --limit 100")
		}
		if err != nil {
			return err
		}
		if err := compiles(s.sound, after); err != nil {
			return err
		}
		return s.replace(c, before, after)
	})
}

// configNote makes a commit of its author's command alone: "pmgcm journal drop" leaves its reason so.
func configNote(c *cli.Context) error {
	if _, err := arguments(c, 0, 0); err != nil {
		return err
	}
	return withStore(c, func(ctx context.Context, s *store) error {
		_, err := s.Commit(ctx, s.author, func(ctx context.Context, tx *db.Tx) error { return tx.Renew(ctx) }, nil)
		return err
	})
}

// parseCommit reads "SERIAL", or "N:SERIAL" with the number of an epoch, for which "N.OWNER" is taken too, and / for the colon.
func parseCommit(s string) (epoch, serial int64, err error) {
	first, rest, both := strings.Cut(s, ":")
	if !both {
		first, rest, both = strings.Cut(s, "/") // as history prints it
	}
	if both {
		n, _, _ := strings.Cut(first, ".")
		if epoch, err = strconv.ParseInt(n, 10, 64); err != nil || epoch < 1 {
			return 0, 0, usagef("config rollback: %q is no epoch", first)
		}
		first = rest
	}
	if serial, err = strconv.ParseInt(first, 10, 64); err != nil || serial < 1 {
		return 0, 0, usagef("config rollback: %q is no serial; `mailproxy config history` shows them", first)
	}
	return epoch, serial, nil
}

// replace makes the configuration another one: it shows the difference, asks, and commits it, here or on the master.
func (s *store) replace(c *cli.Context, before, after *config.Snapshot) error {
	differences := config.Diff(before, after)
	if len(differences) == 0 {
		_, err := fmt.Fprintf(c.App.Writer, "nothing to change (configuration %v)\n", before.Position)
		return err
	}
	slave, err := s.isSlave(c.Context)
	if err != nil {
		return err
	}
	if carriedStore(c.Context) == nil { // else it was shown and confirmed where it comes from
		for _, d := range differences {
			_, _ = fmt.Fprintln(c.App.Writer, clean(d.String()))
		}
		if err := confirm(c, fmt.Sprintf("apply %d changes?", len(differences))); err != nil {
			return err
		}
	}
	if slave {
		return s.carry(c, config.Command{Args: []string{"config", "apply", "-", "--yes"}, Text: string(after.Text()), At: before.Position})
	}
	return s.apply(c, before, after, differences)
}

// applyTimeout bounds one commit of any size.
const applyTimeout = 30 * time.Minute

// apply commits what turns before into after, where before is still what there is.
func (s *store) apply(c *cli.Context, before, after *config.Snapshot, differences []config.Difference) error {
	ctx, cancel := context.WithTimeout(c.Context, applyTimeout) // anew: the operator may have taken their time to answer
	defer cancel()
	at, err := s.commit(ctx, func(ctx context.Context, tx *db.Tx) error {
		now, err := tx.Snapshot(ctx)
		if err != nil {
			return err
		}
		if len(config.Diff(before, now)) > 0 {
			return withHint(errMeanwhile, againHint)
		}
		return putDifferences(ctx, tx, after, differences)
	})
	if err != nil {
		return err
	}
	return done(c, at, "%s applied", count(len(differences), "change"))
}

var errMeanwhile = errors.New("the configuration was changed meanwhile")

const againHint = "run it again to see the difference from what there is now"

// putDifferences writes every object that differs. Domains can be many: they go in bulk.
func putDifferences(ctx context.Context, tx *db.Tx, after *config.Snapshot, differences []config.Difference) error {
	put := make(map[string]bool, len(differences))
	var gone []string
	for _, d := range differences {
		if d.Op != "-" {
			put[d.Object] = true
			continue
		}
		if name, ok := strings.CutPrefix(d.Object, "domain "); ok {
			gone = append(gone, name)
		} else if !strings.HasPrefix(d.Object, "recipients ") {
			if err := deleteObject(ctx, tx, d.Object); err != nil {
				return err
			}
		}
	}
	if err := tx.DeleteDomains(ctx, gone); err != nil {
		return err
	}
	if err := putRecipients(ctx, tx, after, differences); err != nil {
		return err
	}
	for _, x := range after.Settings {
		if put["setting "+x.Name] {
			if err := tx.PutSetting(ctx, x); err != nil {
				return err
			}
		}
	}
	for _, x := range after.Networks {
		if put["network "+x.Prefix.String()] {
			if err := tx.PutNetwork(ctx, x); err != nil {
				return err
			}
		}
	}
	for _, x := range after.Transports {
		if put["transport "+x.Name] {
			if err := tx.PutTransport(ctx, x); err != nil {
				return err
			}
		}
	}
	for _, x := range after.Certificates {
		if put["certificate "+x.Name] {
			if err := tx.PutCertificate(ctx, x); err != nil {
				return err
			}
		}
	}
	for _, x := range after.TLSSenders {
		if put["tls_sender "+x.Domain] {
			if err := tx.PutTLSSender(ctx, x); err != nil {
				return err
			}
		}
	}
	var domains []config.Domain
	for x := range after.Domains.All() {
		if put["domain "+x.Name] {
			domains = append(domains, *x)
		}
	}
	return tx.PutDomains(ctx, domains)
}

// putRecipients writes the lists that differ.
func putRecipients(ctx context.Context, tx *db.Tx, after *config.Snapshot, differences []config.Difference) error {
	for _, d := range differences {
		if domain, ok := strings.CutPrefix(d.Object, "recipients "); ok {
			if err := tx.SetRecipients(ctx, domain, config.RecipientsOf(after.Recipients, domain)); err != nil {
				return err
			}
		}
	}
	return nil
}

// deleteObject removes what is no domain.
func deleteObject(ctx context.Context, tx *db.Tx, object string) error {
	kind, name, _ := strings.Cut(object, " ")
	switch kind {
	case "setting":
		return tx.DeleteSetting(ctx, name)
	case "network":
		prefix, err := config.ParseNetwork(name)
		if err != nil {
			return err
		}
		return tx.DeleteNetwork(ctx, prefix)
	case "certificate":
		return tx.DeleteCertificate(ctx, name)
	case "tls_sender":
		return tx.DeleteTLSSender(ctx, name)
	}
	return tx.DeleteTransport(ctx, name)
}

func readParts(c *cli.Context, file string) (*config.Parts, error) {
	var text []byte
	var err error
	if file == "-" {
		text, err = io.ReadAll(c.App.Reader)
	} else {
		text, err = os.ReadFile(file)
	}
	if err != nil {
		return nil, fmt.Errorf("read configuration: %w", err)
	}
	parts, err := config.ParseText(text)
	if err != nil {
		return nil, inText(file, err)
	}
	if parts.Empty() && !c.Bool("empty") && carriedStore(c.Context) == nil {
		return nil, withHint(fmt.Errorf("nothing was changed: %s names no setting, network, transport or domain, and so would remove all there are", file),
			"add --empty where that is meant")
	}
	return parts, nil
}

// inText puts "FILE:LINE:" in front of each problem.
func inText(file string, err error) error {
	problems := config.Problems(err)
	if len(problems) == 0 {
		return err
	}
	var located []error
	for _, p := range problems {
		where := file
		if p.Line > 0 {
			where += ":" + strconv.Itoa(p.Line)
		}
		bare := *p
		bare.Line = 0
		located = append(located, fmt.Errorf("%s: %w", where, &bare))
	}
	return errors.Join(located...)
}

// confirm asks, on a terminal; elsewhere --yes is wanted.
func confirm(c *cli.Context, question string) error {
	if c.Bool("yes") {
		return nil
	}
	in, ok := c.App.Reader.(*os.File)
	if !ok || !term.IsTerminal(int(in.Fd())) {
		return withHint(errors.New("nothing was changed: there is no terminal to ask on"), "add --yes to apply it")
	}
	_, _ = fmt.Fprintf(c.App.Writer, "%s [y/N] ", question)
	answer, err := bufio.NewReader(in).ReadString('\n')
	if err != nil && !errors.Is(err, io.EOF) {
		return err
	}
	if !slices.Contains([]string{"y", "yes"}, strings.ToLower(strings.TrimSpace(answer))) {
		return errors.New("nothing was changed")
	}
	return nil
}

func configHistory(c *cli.Context) error {
	if _, err := arguments(c, 0, 0); err != nil {
		return err
	}
	if c.Int("limit") < 1 {
		return usagef("config history: --limit is at least 1")
	}
	return withStore(c, func(ctx context.Context, s *store) error {
		history, err := s.History(ctx, c.Int("limit"))
		if err != nil {
			return err
		}
		if c.Bool("json") {
			return printJSON(c.App.Writer, nonNil(history))
		}
		t := newTable(c.App.Writer, "POSITION", "WHEN", "NODE", "WHO", "COMMAND", "CHANGES")
		for _, h := range history {
			t.row(fmt.Sprintf("%v/%d", h.Epoch, h.Serial), h.At.UTC().Format(time.RFC3339), strconv.Itoa(int(h.Node)), h.Who, h.Command,
				describeChanges(h.Changes))
		}
		return t.flush()
	})
}

// describeChanges gives "insert domain, update setting" without repeats.
func describeChanges(changes []db.Change) string {
	var words []string
	for _, c := range changes {
		if w := c.Op + " " + c.Table; !slices.Contains(words, w) {
			words = append(words, w)
		}
	}
	return strings.Join(words, ", ")
}
