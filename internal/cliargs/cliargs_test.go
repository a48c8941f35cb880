package cliargs

import (
	"slices"
	"strings"
	"testing"

	"github.com/urfave/cli/v2"
)

func testApp() *cli.App {
	return &cli.App{
		Flags: []cli.Flag{&cli.StringFlag{Name: "config"}},
		Commands: []*cli.Command{
			{Name: "join", Flags: []cli.Flag{&cli.StringFlag{Name: "fingerprint"}, &cli.StringFlag{Name: "token"}, &cli.BoolFlag{Name: "yes", Aliases: []string{"y"}}}},
			{Name: "journal", Subcommands: []*cli.Command{{Name: "show", Flags: []cli.Flag{&cli.BoolFlag{Name: "json"}}}}},
		},
	}
}

func TestReorder(t *testing.T) {
	for _, c := range []struct{ name, in, want string }{
		{"flags behind the argument", "pmgcm join 10.0.0.1 --fingerprint SHA256:x --token t", "pmgcm join --fingerprint SHA256:x --token t 10.0.0.1"},
		{"flags in front stay", "pmgcm join --fingerprint F 10.0.0.1", "pmgcm join --fingerprint F 10.0.0.1"},
		{"flags on both sides", "pmgcm join --token t 10.0.0.1 --fingerprint F", "pmgcm join --token t --fingerprint F 10.0.0.1"},
		{"a value with =", "pmgcm join 10.0.0.1 --token=t", "pmgcm join --token=t 10.0.0.1"},
		{"a bool flag takes no word", "pmgcm join -y 10.0.0.1 --token t", "pmgcm join -y --token t 10.0.0.1"},
		{"the program's flags in front", "pmgcm --config f join 10.0.0.1 --token t", "pmgcm --config f join --token t 10.0.0.1"},
		{"a command under a command", "pmgcm journal show 4 --json", "pmgcm journal show --json 4"},
		{"behind -- nothing moves", "pmgcm join a -- --token t", "pmgcm join a -- --token t"},
		{"an unknown flag is kept for cli to report", "pmgcm join a --nonsense", "pmgcm join --nonsense a"},
		{"a single dash is an argument", "pmgcm join - --token t", "pmgcm join --token t -"},
		{"a value flag at the end, without its value", "pmgcm join a --token", "pmgcm join --token a"},
		{"completion wants its flag last", "pmgcm join a --generate-bash-completion", "pmgcm join a --generate-bash-completion"},
		{"no command", "pmgcm --help", "pmgcm --help"},
	} {
		t.Run(c.name, func(t *testing.T) {
			got := Reorder(testApp(), strings.Fields(c.in))
			if !slices.Equal(got, strings.Fields(c.want)) {
				t.Errorf("got  %q\nwant %q", strings.Join(got, " "), c.want)
			}
		})
	}
}

func TestReorderGivesCLIWhatItNeeds(t *testing.T) {
	app := testApp()
	var ip, fingerprint string
	app.Commands[0].Action = func(c *cli.Context) error {
		ip, fingerprint = c.Args().First(), c.String("fingerprint")
		return nil
	}
	if err := app.Run(Reorder(app, strings.Fields("pmgcm join 10.0.0.1 --fingerprint SHA256:x"))); err != nil {
		t.Fatal(err)
	}
	if ip != "10.0.0.1" || fingerprint != "SHA256:x" {
		t.Errorf("argument %q, fingerprint %q", ip, fingerprint)
	}
}
