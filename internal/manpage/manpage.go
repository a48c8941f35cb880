// Package manpage makes the man pages from what a program knows of its own commands and a template with the written parts.
// A page is made by the program's hidden command `man TEMPLATE`; the template is roff in which @SYNOPSIS@, @OPTIONS@
// and @COMMANDS@ stand on lines of their own.
package manpage

import (
	"errors"
	"fmt"
	"io"
	"os"
	"strings"

	"github.com/urfave/cli/v2"
)

// Command is the hidden command `man TEMPLATE`, which prints the page to the app's Writer.
func Command() *cli.Command {
	return &cli.Command{
		Name:      "man",
		Usage:     "print the man page made from a template",
		ArgsUsage: "TEMPLATE",
		Hidden:    true,
		Action: func(c *cli.Context) error {
			if c.NArg() != 1 {
				return errors.New("want the template's file name")
			}
			template, err := os.ReadFile(c.Args().First())
			if err != nil {
				return fmt.Errorf("read template: %w", err)
			}
			_, err = io.WriteString(c.App.Writer, Render(c.App, string(template)))
			return err
		},
	}
}

// Render gives the page for app in roff (man(7)).
func Render(app *cli.App, template string) string {
	var b strings.Builder
	for line := range strings.Lines(template) {
		switch strings.TrimSpace(line) {
		case "@SYNOPSIS@":
			writeSynopsis(&b, app)
		case "@OPTIONS@":
			writeFlags(&b, app.VisibleFlags())
		case "@COMMANDS@":
			for _, c := range app.VisibleCommands() {
				writeCommand(&b, app.Name, c)
			}
		default:
			b.WriteString(line)
		}
	}
	return b.String()
}

func writeSynopsis(b *strings.Builder, app *cli.App) {
	fmt.Fprintf(b, ".B %s\n", escape(app.Name))
	if len(app.VisibleFlags()) > 0 {
		b.WriteString("[\\fIglobal options\\fR]\n")
	}
	b.WriteString(".I command\n[\\fIoptions\\fR] [\\fIarguments\\fR]\n")
}

// writeCommand writes a command; behind one that groups others, those.
func writeCommand(b *strings.Builder, prefix string, c *cli.Command) {
	if c.Name == "help" {
		return
	}
	name := prefix + " " + c.Name
	fmt.Fprintf(b, ".SS \"%s\"\n", escape(strings.ReplaceAll(usageLine(name, c), `"`, "''")))
	text(b, sentence(c.Usage))
	if c.Description != "" {
		for paragraph := range strings.SplitSeq(c.Description, "\n\n") {
			b.WriteString(".PP\n")
			text(b, paragraph)
		}
	}
	writeFlags(b, c.VisibleFlags())
	for _, sub := range c.VisibleCommands() {
		writeCommand(b, name, sub)
	}
}

func usageLine(name string, c *cli.Command) string {
	parts := []string{name}
	if len(c.Subcommands) > 0 {
		return name + " COMMAND"
	}
	if len(userFlags(c.VisibleFlags())) > 0 {
		parts = append(parts, "[options]")
	}
	if c.ArgsUsage != "" {
		parts = append(parts, c.ArgsUsage)
	}
	return strings.Join(parts, " ")
}

// userFlags leaves out --help, which every command has.
func userFlags(flags []cli.Flag) []cli.Flag {
	var kept []cli.Flag
	for _, f := range flags {
		if f.Names()[0] != "help" {
			kept = append(kept, f)
		}
	}
	return kept
}

func writeFlags(b *strings.Builder, flags []cli.Flag) {
	for _, f := range userFlags(flags) {
		doc, ok := f.(cli.DocGenerationFlag)
		if !ok {
			continue
		}
		usage, value := doc.GetUsage(), ""
		if doc.TakesValue() {
			value = "VALUE"
			// As in cli's own help: a word in back quotes names the value.
			if before, rest, found := strings.Cut(usage, "`"); found {
				if name, after, closed := strings.Cut(rest, "`"); closed {
					value, usage = name, before+name+after
				}
			}
		}
		b.WriteString(".TP\n")
		for i, name := range f.Names() {
			dashes := "--"
			if len(name) == 1 {
				dashes = "-"
			}
			if i > 0 {
				b.WriteString(", ")
			}
			fmt.Fprintf(b, "\\fB%s\\fR", escape(dashes+name))
		}
		if value != "" {
			fmt.Fprintf(b, " \\fI%s\\fR", escape(value))
		}
		b.WriteString("\n")
		if d := defaultText(doc); d != "" {
			usage += " (default: " + d + ")"
		}
		if env := doc.GetEnvVars(); len(env) > 0 {
			usage += " [" + strings.Join(env, ", ") + "]"
		}
		text(b, sentence(usage))
	}
}

// defaultText is what cli's own help says in "(default: …)", but for flags that are off or empty.
func defaultText(f cli.DocGenerationFlag) string {
	if !f.TakesValue() {
		return ""
	}
	d := strings.ReplaceAll(f.GetDefaultText(), `"`, "")
	if d == "" {
		d = f.GetValue()
	}
	// A duration without its zero parts: 1h, not 1h0m0s.
	if strings.HasSuffix(d, "m0s") {
		d = strings.TrimSuffix(d, "0s")
	}
	if strings.HasSuffix(d, "h0m") {
		d = strings.TrimSuffix(d, "0m")
	}
	switch d {
	case "0", "0s", "[]":
		return ""
	}
	return d
}

// sentence gives a usage line, which is lower case without a period, as a sentence.
func sentence(s string) string {
	if s == "" {
		return ""
	}
	s = strings.ToUpper(s[:1]) + s[1:]
	if !strings.HasSuffix(s, ".") {
		s += "."
	}
	return s
}

// text writes a paragraph; lines that are indented in it stay as they are.
func text(b *strings.Builder, s string) {
	literal := false
	for line := range strings.Lines(strings.Trim(s, "\n")) {
		line = strings.TrimRight(line, " \n")
		indented := strings.HasPrefix(line, " ") || strings.HasPrefix(line, "\t")
		if indented != literal {
			b.WriteString(map[bool]string{true: ".RS\n.nf\n", false: ".fi\n.RE\n"}[indented])
			literal = indented
		}
		if indented {
			line = strings.TrimLeft(line, " \t")
		}
		b.WriteString(escape(line) + "\n")
	}
	if literal {
		b.WriteString(".fi\n.RE\n")
	}
}

// escape keeps roff from reading text as requests or escapes, and hyphens from becoming dashes that cannot be pasted.
func escape(s string) string {
	s = strings.ReplaceAll(s, `\`, `\e`)
	s = strings.ReplaceAll(s, "-", `\-`)
	if strings.HasPrefix(s, ".") || strings.HasPrefix(s, "'") {
		s = `\&` + s
	}
	return s
}
