// Package cliargs puts flags before arguments. urfave/cli v2 stops reading flags at the first argument and drops the rest in
// silence, so that `pmgcm join IP --fingerprint F`, the form that join-cmd prints, would lose its fingerprint.
package cliargs

import (
	"strings"

	"github.com/urfave/cli/v2"
)

// Reorder gives args (with the program's name in front, as os.Args) in the order that app wants: at each command its flags, then
// its arguments, both in the order given. What stands behind "--" is left alone. Unknown flags go to the front too, where cli
// reports them.
func Reorder(app *cli.App, args []string) []string {
	if len(args) == 0 {
		return nil
	}
	if args[len(args)-1] == "--"+cli.BashCompletionFlag.Names()[0] {
		return args // cli wants it last
	}
	out := []string{args[0]}
	flags, commands := withHelp(app.Flags), app.Commands
	rest := args[1:]
	for {
		head, tail := leadingFlags(flags, rest)
		out = append(out, head...)
		sub := find(commands, tail)
		if sub == nil {
			return append(out, flagsFirst(flags, tail)...)
		}
		out = append(out, tail[0])
		flags, commands, rest = withHelp(sub.Flags), sub.Subcommands, tail[1:]
	}
}

func withHelp(flags []cli.Flag) []cli.Flag {
	return append([]cli.Flag{cli.HelpFlag, cli.VersionFlag}, flags...)
}

// leadingFlags splits args at the first word that is neither a flag nor a flag's value.
func leadingFlags(flags []cli.Flag, args []string) (head, tail []string) {
	for i := 0; i < len(args); {
		n := flagWords(flags, args[i:])
		if n == 0 {
			return args[:i], args[i:]
		}
		i += n
	}
	return args, nil
}

func flagsFirst(flags []cli.Flag, args []string) []string {
	var front, back []string
	for i := 0; i < len(args); {
		if args[i] == "--" {
			back = append(back, args[i:]...)
			break
		}
		n := flagWords(flags, args[i:])
		if n == 0 {
			back = append(back, args[i])
			i++
			continue
		}
		front = append(front, args[i:i+n]...)
		i += n
	}
	return append(front, back...)
}

// flagWords says how many words of args the flag at its front takes: 0 where there is none.
func flagWords(flags []cli.Flag, args []string) int {
	word := args[0]
	if len(word) < 2 || word[0] != '-' || word == "--" {
		return 0
	}
	name, _, hasValue := strings.Cut(strings.TrimLeft(word, "-"), "=")
	if hasValue || len(args) < 2 || !takesValue(flags, name) {
		return 1
	}
	return 2
}

func takesValue(flags []cli.Flag, name string) bool {
	for _, f := range flags {
		for _, n := range f.Names() {
			if n == name {
				d, ok := f.(cli.DocGenerationFlag)
				return ok && d.TakesValue()
			}
		}
	}
	return false
}

func find(commands []*cli.Command, args []string) *cli.Command {
	if len(args) == 0 {
		return nil
	}
	for _, c := range commands {
		if c.HasName(args[0]) {
			return c
		}
	}
	return nil
}
