package e2e

import (
	"errors"
	"fmt"
	"io"
	"net/smtp"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"mailproxy/test/lab"
)

// A step is one command of a text and the lines that stand below it; or hosts that are lost at this place.
type step struct {
	line    int
	host    string
	command string
	shows   []string
	lost    []string
}

// A section is what stands under one heading.
type section struct {
	title string
	steps []step
}

var (
	prompt   = regexp.MustCompile(`^(mx\d)# (.+)$`)
	lostMark = regexp.MustCompile(`^<!-- lost: ([a-z0-9 ]+) -->$`)
)

// readRunbook takes the commands out of a text: in fenced blocks, behind a prompt.
func readRunbook(text string) ([]section, error) {
	var all []section
	fenced := false
	for i, line := range strings.Split(text, "\n") {
		title, heading := strings.CutPrefix(line, "## ")
		lost := lostMark.FindStringSubmatch(line)
		command := prompt.FindStringSubmatch(line)
		switch {
		case strings.HasPrefix(line, "```"):
			fenced = !fenced
		case heading && !fenced:
			all = append(all, section{title: title})
		case len(all) == 0:
		case lost != nil && !fenced:
			s := &all[len(all)-1]
			s.steps = append(s.steps, step{line: i + 1, lost: strings.Fields(lost[1])})
		case command != nil && fenced:
			s := &all[len(all)-1]
			s.steps = append(s.steps, step{line: i + 1, host: command[1], command: command[2]})
		case fenced:
			steps := all[len(all)-1].steps
			if len(steps) == 0 || steps[len(steps)-1].command == "" {
				return nil, fmt.Errorf("line %d: %q stands below no command", i+1, line)
			}
			last := &steps[len(steps)-1]
			last.shows = append(last.shows, line)
		case command != nil, strings.Contains(line, "<!--"):
			return nil, fmt.Errorf("line %d: %q is in no block", i+1, line)
		}
	}
	return all, nil
}

// pattern makes lines of a text a pattern: … is anything on a line, and alone any lines; blanks may be more or less.
func pattern(lines []string) *regexp.Regexp {
	var b strings.Builder
	for _, l := range lines {
		if l == "…" {
			b.WriteString(`(?:.*\n)*`)
			continue
		}
		var words []string
		for w := range strings.FieldsSeq(l) {
			words = append(words, strings.ReplaceAll(regexp.QuoteMeta(w), "…", ".*"))
		}
		indent := ""
		if strings.HasPrefix(l, " ") {
			indent = `[ \t]+`
		}
		b.WriteString(indent + strings.Join(words, `[ \t]+`) + `[ \t]*\n`)
	}
	return regexp.MustCompile(`^` + b.String() + `$`)
}

// A reader is somebody who follows a text.
type reader struct {
	t       *testing.T
	hosts   map[string]*host
	printed []string // lines that commands printed, for the one that is to be pasted
}

// passphrase is what the reader keeps elsewhere.
const passphrase = "correct horse battery staple"

func (r *reader) follow(steps []step) {
	r.t.Helper()
	for _, s := range steps {
		for _, name := range s.lost {
			r.hosts[name].lose()
			r.hosts[name].install()
		}
		if s.command != "" {
			if err := r.do(s); err != nil {
				r.t.Fatalf("line %d: %s# %s: %v", s.line, s.host, s.command, err)
			}
		}
	}
}

// do runs one command, and wants it to succeed and to print what stands below it. Commands that only look are repeated until they
// show that.
func (r *reader) do(s step) error {
	command, err := r.paste(s.command)
	if err != nil {
		return err
	}
	h := r.hosts[s.host]
	try := func() error {
		out, code, err := h.run(command)
		if answers := answersIn(s.shows); answers != nil {
			out, code, err = h.typing(command, answers)
		}
		if err != nil || code != 0 {
			return fmt.Errorf("exit code %d, %w\n%s", code, err, out)
		}
		if !pattern(s.shows).MatchString(out) {
			return fmt.Errorf("it printed\n%sand the text shows\n%s", out, strings.Join(s.shows, "\n"))
		}
		r.printed = append(r.printed, strings.Split(out, "\n")...)
		return nil
	}
	if strings.HasPrefix(command, "pmgcm status") || strings.HasPrefix(command, "mailproxy domain list") {
		return lab.Poll(try)
	}
	return try()
}

// answersIn finds the questions in what a text shows, and what is typed there.
func answersIn(shows []string) []asked {
	var all []asked
	for _, l := range shows {
		if question, typed, ok := strings.Cut(l, "[y/N] "); ok {
			all = append(all, asked{question: question + "[y/N] ", typed: typed})
		} else if strings.HasPrefix(l, "passphrase ") || l == "the same again:" {
			all = append(all, asked{l, passphrase, true})
		}
	}
	return all
}

// paste gives a command with … in it as it was printed last.
func (r *reader) paste(command string) (string, error) {
	if !strings.Contains(command, "…") {
		return command, nil
	}
	want := pattern([]string{command})
	for i := len(r.printed) - 1; i >= 0; i-- {
		if want.MatchString(r.printed[i] + "\n") {
			return r.printed[i], nil
		}
	}
	return "", fmt.Errorf("no command printed that line")
}

// The stories of docs/RECOVERY.md, each with a cluster of its own: what an administrator does before anything is lost, and then what
// the story says.
func TestRunbooks(t *testing.T) {
	t.Parallel()
	text, err := os.ReadFile(filepath.Join("..", "..", "docs", "RECOVERY.md"))
	if err != nil {
		t.Fatal(err)
	}
	sections, err := readRunbook(string(text))
	if err != nil {
		t.Fatal(err)
	}
	before := sections[0]
	stories := 0
	for _, s := range sections[1:] {
		if len(s.steps) == 0 {
			continue
		}
		stories++
		t.Run(s.title, func(t *testing.T) {
			r := &reader{t: t, hosts: newHosts(t, 3)}
			r.follow(clusterSteps())
			r.follow(before.steps)
			r.follow(s.steps)
			for _, h := range r.hosts {
				h.eventually(h.takesMail)
				h.eventually(h.opensItsSecret)
			}
		})
	}
	if len(before.steps) == 0 || stories != 4 {
		t.Errorf("%d stories with commands, want 4: one node lost, the master, all, and the same node again", stories)
	}
}

// clusterSteps make the cluster that the text is about.
func clusterSteps() []step {
	var all []step
	do := func(host, command string, shows ...string) {
		all = append(all, step{host: host, command: command, shows: append(shows, "…")})
	}
	for i := 1; i <= 3; i++ {
		name := fmt.Sprintf("mx%d", i)
		do(name, fmt.Sprintf("mailproxy init --name %s.example.net --address 192.0.2.1%d", name, i))
		do(name, "systemctl enable --now mailproxy")
		if i == 1 {
			do(name, "pmgcm create")
			continue
		}
		do("mx1", "pmgcm join-cmd")
		do(name, "pmgcm join 192.0.2.11:7025 --fingerprint SHA256:… --token …", "…", "joined")
	}
	do("mx1", "mailproxy domain add example.test --to 10.0.0.10:25")
	do("mx1", "head -c 32 /dev/urandom | mailproxy secret set dkim --file -", "secret dkim set …")
	for i := 1; i <= 3; i++ {
		do(fmt.Sprintf("mx%d", i), "mailproxy domain list", "…", "example.test …")
	}
	return all
}

// takesMail gives nil where the host takes a message for the domain; its next hop is out of reach, so it is queued.
func (h *host) takesMail() error {
	c, err := smtp.Dial(h.address + ":25")
	if err != nil {
		return err
	}
	defer c.Close()
	if err := errors.Join(c.Mail("from@client.test"), c.Rcpt("to@example.test")); err != nil {
		return err
	}
	w, err := c.Data()
	if err != nil {
		return err
	}
	_, err = io.WriteString(w, "Subject: after all\r\n\r\nx\r\n")
	return errors.Join(err, w.Close())
}

// opensItsSecret gives nil where the host can open the secret that was set before anything was lost. It is sealed together with its name,
// so that what opens is what was set.
func (h *host) opensItsSecret() error {
	out, code, err := h.run("mailproxy secret list")
	if err == nil && (code != 0 || !pattern([]string{"SECRET STATE", "dkim sealed"}).MatchString(out)) {
		err = fmt.Errorf("secret list: exit code %d\n%s", code, out)
	}
	return err
}

// The reading of a text is itself a promise: what does not do what the text shows fails.
func TestARunbookIsReadAsItStands(t *testing.T) {
	sections, err := readRunbook("# x\n\n## One\n<!-- lost: mx1 mx2 -->\n```\nmx1# a b\nout …\n…\nmx2# c\n```\n")
	if err != nil || len(sections) != 1 || len(sections[0].steps) != 3 {
		t.Fatalf("%+v, %v", sections, err)
	}
	steps := sections[0].steps
	if len(steps[0].lost) != 2 || steps[1].host != "mx1" || steps[1].command != "a b" || len(steps[1].shows) != 2 || steps[2].command != "c" {
		t.Errorf("%+v", steps)
	}
	for _, bad := range []string{"## One\n```\nno command\n```", "## One\nmx1# outside", "## One\n<!-- typo: mx1 -->"} {
		if _, err := readRunbook(bad); err == nil {
			t.Errorf("%q was read", bad)
		}
	}
	p := pattern([]string{"one  two", "…", "  at …/… end"})
	for out, want := range map[string]bool{
		"one two\n  at 1/2 end\n": true, "one   two\nmore\nand more\n  at 1.1/2 end\n": true,
		"one two\n  at 1/2 end\nmore\n": false, "one two three\n  at 1/2 end\n": false, "one two\nat 1/2 end\n": false, "one two\n": false,
	} {
		if p.MatchString(out) != want {
			t.Errorf("%q matches: %v", out, !want)
		}
	}
	if pattern(nil).MatchString("anything\n") || !pattern(nil).MatchString("") {
		t.Error("nothing below a command is not nothing")
	}
}
