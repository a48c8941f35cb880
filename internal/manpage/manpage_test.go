package manpage

import (
	"bytes"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/urfave/cli/v2"
)

func testApp(out *bytes.Buffer) *cli.App {
	return &cli.App{
		Name:   "tool",
		Writer: out,
		Flags: []cli.Flag{
			&cli.StringFlag{Name: "config", Aliases: []string{"c"}, Usage: "the node `FILE`", EnvVars: []string{"TOOL_CONFIG"}, Value: "/etc/a-b"},
		},
		Commands: []*cli.Command{
			{Name: "domain", Usage: "a group", Subcommands: []*cli.Command{{
				Name: "add", Usage: "add a domain", ArgsUsage: `NAME "X"`,
				Description: ".starts with a dot\nand \\ goes on:\n  tool domain add a-b\n\nSecond paragraph",
				Flags: []cli.Flag{
					&cli.StringSliceFlag{Name: "to", Usage: "where it goes", Value: cli.NewStringSlice("a", "b")},
					&cli.BoolFlag{Name: "yes", Usage: "do not ask"},
					&cli.DurationFlag{Name: "ttl", Usage: "how long", Value: time.Hour},
					&cli.DurationFlag{Name: "wait", Usage: "how long", Value: 30 * time.Minute},
					&cli.IntFlag{Name: "count", Usage: "how many"},
				},
			}}},
			{Name: "secret", Usage: "not shown", Hidden: true},
			Command(),
		},
	}
}

const page = `.TH TOOL 1
.B tool
[\fIglobal options\fR]
.I command
[\fIoptions\fR] [\fIarguments\fR]
.TP
\fB\-\-config\fR, \fB\-c\fR \fIFILE\fR
The node FILE (default: /etc/a\-b) [TOOL_CONFIG].
.SS "tool domain COMMAND"
A group.
.SS "tool domain add [options] NAME ''X''"
Add a domain.
.PP
\&.starts with a dot
and \e goes on:
.RS
.nf
tool domain add a\-b
.fi
.RE
.PP
Second paragraph
.TP
\fB\-\-to\fR \fIVALUE\fR
Where it goes (default: a, b).
.TP
\fB\-\-yes\fR
Do not ask.
.TP
\fB\-\-ttl\fR \fIVALUE\fR
How long (default: 1h).
.TP
\fB\-\-wait\fR \fIVALUE\fR
How long (default: 30m).
.TP
\fB\-\-count\fR \fIVALUE\fR
How many.
.SH FILES
`

func TestThePageHasEveryVisibleCommandWithItsFlags(t *testing.T) {
	template := filepath.Join(t.TempDir(), "tool.1.in")
	if err := os.WriteFile(template, []byte(".TH TOOL 1\n@SYNOPSIS@\n@OPTIONS@\n@COMMANDS@\n.SH FILES\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	var out bytes.Buffer
	if err := testApp(&out).Run([]string{"tool", "man", template}); err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(page, out.String()); diff != "" {
		t.Errorf("page differs (-want +got):\n%s", diff)
	}
}

func TestATemplateThatIsNotThereIsAnError(t *testing.T) {
	var out bytes.Buffer
	if err := testApp(&out).Run([]string{"tool", "man", filepath.Join(t.TempDir(), "none")}); err == nil || out.Len() > 0 {
		t.Errorf("err %v, printed %q; want an error and nothing printed", err, out.String())
	}
}
