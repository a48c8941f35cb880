package main

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"slices"
	"strings"

	"github.com/urfave/cli/v2"

	"mailproxy/config"
	"mailproxy/db"
	"mailproxy/mail"
)

// maxRecipientFile bounds a file of recipients: a million addresses have a third of it.
const maxRecipientFile = 64 << 20

func recipientsCommand() *cli.Command {
	return &cli.Command{
		Name: "recipients", Usage: "lists of a domain's recipients",
		Description: "A domain with a list takes mail for the recipients on it and for postmaster, and refuses others, without asking its next hop. " +
			"An address is on it in upper and lower case, also with +TAG behind its local part; *@DOMAIN is everyone. A domain without a list has its next hop " +
			"asked about each recipient; its answers are kept for some minutes.",
		Subcommands: []*cli.Command{
			{Name: "add", Usage: "put recipients on their domains' lists", ArgsUsage: "ADDRESS...", Action: onMaster(recipientsAdd),
				Description: "The first one makes the list: from then on all others of the domain are refused. " +
					"Example: mailproxy domain recipients add info@example.test sales@example.test"},
			{Name: "remove", Usage: "take recipients off their domains' lists", ArgsUsage: "ADDRESS...", Action: onMaster(recipientsRemove),
				Description: "With the last one of a domain goes the list, and the next hop is asked again."},
			{Name: "import", Usage: "make a domain's list what a file says", ArgsUsage: "DOMAIN FILE", Action: recipientsImport,
				Flags: []cli.Flag{&cli.BoolFlag{Name: "empty", Usage: "take a file without addresses, and so remove the list"}},
				Description: "One address or local part a line; what stands behind it and a blank, and lines that begin with #, are passed over, " +
					"so that a relay_recipient_maps of Postfix is taken as it is. Those not named are removed. - reads from standard input."},
			{Name: "list", Usage: "show the lists, or that of a domain", ArgsUsage: "[DOMAIN]", Action: recipientsList, Flags: []cli.Flag{jsonFlag()},
				Description: "One address a line, by domain."},
		},
	}
}

// recipientArguments gives the local parts by domain.
func recipientArguments(c *cli.Context) (map[string][]string, error) {
	args, err := arguments(c, 1, -1)
	if err != nil {
		return nil, err
	}
	byDomain := map[string][]string{}
	for _, a := range args {
		local, domain, err := config.ParseRecipient(a)
		if err != nil {
			return nil, usagef("%s: %v", commandName(c), err)
		}
		byDomain[domain] = append(byDomain[domain], local)
	}
	return byDomain, nil
}

func recipientsAdd(c *cli.Context) error {
	byDomain, err := recipientArguments(c)
	if err != nil {
		return err
	}
	return editRecipients(c, byDomain, "added", func(ctx context.Context, tx *db.Tx, _ *config.Snapshot, domain string) error {
		return tx.PutRecipients(ctx, domain, byDomain[domain])
	})
}

func recipientsRemove(c *cli.Context) error {
	byDomain, err := recipientArguments(c)
	if err != nil {
		return err
	}
	return editRecipients(c, byDomain, "removed", func(ctx context.Context, tx *db.Tx, now *config.Snapshot, domain string) error {
		there := config.RecipientsOf(now.Recipients, domain)
		for _, local := range byDomain[domain] {
			if _, ok := slices.BinarySearch(there, local); !ok {
				return withHint(fmt.Errorf("recipient %s@%s: %w", local, domain, errNoSuch), "mailproxy domain recipients list %s", domain)
			}
		}
		return tx.DeleteRecipients(ctx, domain, byDomain[domain])
	})
}

// editRecipients is one commit for the lists of several domains.
func editRecipients(c *cli.Context, byDomain map[string][]string, what string,
	change func(ctx context.Context, tx *db.Tx, now *config.Snapshot, domain string) error) error {
	n := 0
	at, err := edit(c, func(ctx context.Context, tx *db.Tx, now *config.Snapshot) error {
		for _, domain := range slices.Sorted(maps.Keys(byDomain)) {
			if now.Domains.Get(domain) == nil {
				return noSuch("domain", domain)
			}
			if err := change(ctx, tx, now, domain); err != nil {
				return err
			}
			n += len(byDomain[domain])
		}
		return nil
	})
	if err != nil {
		return err
	}
	return done(c, at, "%s %s", count(n, "recipient"), what)
}

func recipientsImport(c *cli.Context) error {
	args, err := arguments(c, 2, 2)
	if err != nil {
		return err
	}
	domain, err := config.NormalizeDomain(args[0])
	if err != nil {
		return usagef("%v", err)
	}
	text, err := readRecipientFile(c, args[1])
	if err != nil {
		return err
	}
	locals, err := parseRecipients(domain, text)
	if err != nil {
		return fmt.Errorf("%s:%w", args[1], err)
	}
	if len(locals) == 0 && !c.Bool("empty") {
		return withHint(fmt.Errorf("nothing was changed: %s names no recipient, and so would remove the list of %s", args[1], domain),
			"add --empty where that is meant")
	}
	return withStore(c, func(ctx context.Context, s *store) error {
		slave, err := s.isSlave(ctx)
		if err != nil {
			return err
		}
		if !slave {
			return s.setRecipients(c, domain, locals)
		}
		words := []string{"domain", "recipients", "import", domain, "-"}
		if c.Bool("empty") {
			words = append(words, "--empty")
		}
		return s.carry(c, config.Command{Args: words, Text: string(text)})
	})
}

// setRecipients is one commit for a list of any length.
func (s *store) setRecipients(c *cli.Context, domain string, locals []string) error {
	ctx, cancel := context.WithTimeout(c.Context, applyTimeout)
	defer cancel()
	if err := s.wantMaster(ctx); err != nil {
		return err
	}
	before := 0
	at, err := s.commit(ctx, func(ctx context.Context, tx *db.Tx) error {
		now, err := tx.Snapshot(ctx)
		if err != nil {
			return err
		}
		if now.Domains.Get(domain) == nil {
			return noSuch("domain", domain)
		}
		before = len(config.RecipientsOf(now.Recipients, domain))
		return tx.SetRecipients(ctx, domain, locals)
	})
	if err != nil {
		return err
	}
	return done(c, at, "recipients of %s: %d, were %d", domain, len(locals), before)
}

func readRecipientFile(c *cli.Context, file string) ([]byte, error) {
	in := c.App.Reader
	if file != "-" {
		f, err := os.Open(file)
		if err != nil {
			return nil, fmt.Errorf("read recipients: %w", err)
		}
		defer f.Close()
		in = f
	}
	text, err := io.ReadAll(io.LimitReader(in, maxRecipientFile+1))
	if err == nil && len(text) > maxRecipientFile {
		err = errors.New("it has more than " + config.FormatSize(maxRecipientFile))
	}
	if err != nil {
		return nil, fmt.Errorf("read recipients: %w", err)
	}
	return text, nil
}

// parseRecipients gives the local parts of a file, sorted, each once. The error begins with the line's number.
func parseRecipients(domain string, text []byte) ([]string, error) {
	var locals []string
	lines := bufio.NewScanner(bytes.NewReader(text))
	for n := 1; lines.Scan(); n++ {
		address := firstField(lines.Text())
		if address == "" {
			continue
		}
		if !strings.Contains(address, "@") {
			address += "@" + domain
		} else if strings.HasPrefix(address, "@") { // Postfix's word for everyone
			address = config.Everyone + address
		}
		local, of, err := config.ParseRecipient(address)
		if err == nil && of != domain {
			err = fmt.Errorf("%s is not of %s", address, domain)
		}
		if err != nil {
			return nil, fmt.Errorf("%d: %w", n, err)
		}
		locals = append(locals, local)
	}
	if err := lines.Err(); err != nil {
		return nil, fmt.Errorf(" %w", err)
	}
	slices.Sort(locals)
	return slices.Compact(locals), nil
}

// firstField is what stands before a blank that is not quoted; empty for a comment.
func firstField(line string) string {
	line = strings.TrimSpace(line)
	if strings.HasPrefix(line, "#") {
		return ""
	}
	quoted := false
	for i := 0; i < len(line); i++ {
		switch x := line[i]; {
		case quoted && x == '\\':
			i++
		case x == '"':
			quoted = !quoted
		case !quoted && (x == ' ' || x == '\t'):
			return line[:i]
		}
	}
	return line
}

func recipientsList(c *cli.Context) error {
	args, err := arguments(c, 0, 1)
	if err != nil {
		return err
	}
	return withStore(c, func(ctx context.Context, s *store) error {
		snapshot, err := s.Load(ctx)
		if err != nil {
			return err
		}
		lists := snapshot.Recipients
		if len(args) == 1 {
			name, err := config.NormalizeDomain(args[0])
			if err != nil {
				return usagef("%v", err)
			}
			if snapshot.Domains.Get(name) == nil {
				return noSuch("domain", name)
			}
			lists = slices.DeleteFunc(slices.Clone(lists), func(l config.RecipientList) bool { return l.Domain != name })
		}
		if c.Bool("json") {
			return printJSON(c.App.Writer, nonNil(lists))
		}
		out := bufio.NewWriter(c.App.Writer)
		for _, l := range lists {
			for _, local := range l.Locals {
				_, _ = out.WriteString(addressText(local, l.Domain) + "\n")
			}
		}
		return out.Flush()
	})
}

// addressText is the address as it can be pasted.
func addressText(local, domain string) string {
	if local == config.Everyone {
		return local + "@" + domain
	}
	return mail.Path{Local: local, Domain: domain}.String()
}
