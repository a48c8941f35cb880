package main

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/rogpeppe/go-internal/testscript"

	"mailproxy/internal/testbin"
)

// TestScripts runs the transcripts in testdata/script with the real programs. Their own commands are:
//
//	node            makes a node, starts its daemon, and sets MAILPROXY_CONFIG, SMTP, WEB, TUNNEL, STATE, RUN
//	exits N CMD     runs a command and wants exit code N
func TestScripts(t *testing.T) {
	testscript.Run(t, testscript.Params{
		Dir: filepath.Join("testdata", "script"),
		Setup: func(e *testscript.Env) error {
			e.Setenv("PATH", testbin.Dir()+string(filepath.ListSeparator)+e.Getenv("PATH"))
			e.Setenv("D", shortDir(e.T().(testing.TB)))
			for _, door := range []string{"SMTP", "WEB", "TUNNEL"} { // free ones; those of the node, once there is one
				e.Setenv(door, freePort(e.T().(testing.TB)))
			}
			e.Values[tbKey{}] = e.T().(testing.TB)
			return nil
		},
		Cmds: map[string]func(*testscript.TestScript, bool, []string){"node": scriptNode, "exits": scriptExits},
	})
}

// tbKey is where a script keeps its testing.TB.
type tbKey struct{}

func scriptNode(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) > 0 {
		ts.Fatalf("usage: node")
	}
	n := newNode(ts.Value(tbKey{}).(testing.TB))
	n.start()
	n.waitHealthy()
	for key, value := range map[string]string{"MAILPROXY_CONFIG": n.file, "SMTP": n.smtp, "WEB": n.web, "TUNNEL": n.tunnel, "STATE": n.local.StateDir,
		"RUN": n.local.RunDir} {
		ts.Setenv(key, value)
	}
	ts.Defer(n.stop)
}

func scriptExits(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) < 2 {
		ts.Fatalf("usage: exits CODE COMMAND [ARGUMENT...]")
	}
	err := ts.Exec(args[1], args[2:]...)
	code := "0"
	if err != nil {
		var exit interface{ ExitCode() int }
		if !errors.As(err, &exit) {
			ts.Fatalf("%v", err)
		}
		code = fmt.Sprint(exit.ExitCode())
	}
	if code != args[0] {
		ts.Fatalf("%s: exit code %s, want %s", strings.Join(args[1:], " "), code, args[0])
	}
}

func TestCompletionKnowsCommandsAndFlags(t *testing.T) {
	script, err := os.ReadFile(filepath.Join("..", "..", "scripts", "completion.bash"))
	if err != nil {
		t.Fatal(err)
	}
	for typed, want := range map[string]string{
		"mailproxy co":               "config",
		"mailproxy config sh":        "show",
		"mailproxy config apply --":  "--yes",
		"mailproxy config apply --y": "--yes",
		"pmgcm promote --":           "--force",
		"pmgcm --":                   "--config",
	} {
		name, _, _ := strings.Cut(typed, " ")
		cmd := exec.Command("bash", "-c", strings.ReplaceAll(string(script), "@NAME@", name)+`
			COMP_WORDS=($2) COMP_CWORD=$((${#COMP_WORDS[@]} - 1)); _$1; echo "${COMPREPLY[@]}"`, "bash", name, typed)
		cmd.Env = append(os.Environ(), "PATH="+testbin.Dir()+":"+os.Getenv("PATH"))
		out, err := cmd.CombinedOutput()
		if err != nil || !slices.Contains(strings.Fields(string(out)), want) {
			t.Errorf("%s: %v, %s, want %s", typed, err, out, want)
		}
	}
}

func TestHelpNamesEveryCommand(t *testing.T) {
	var out strings.Builder
	if code := run([]string{"mailproxy", "--help"}, os.Stdin, &out, &out); code != 0 {
		t.Fatalf("exit code %d", code)
	}
	for _, c := range newApp(nil, nil, nil).VisibleCommands() {
		if !strings.Contains(out.String(), c.Name) || c.Usage == "" || c.Description == "" {
			t.Errorf("%s is not described", c.Name)
		}
		for _, sub := range c.Subcommands {
			if sub.Usage == "" || sub.Description == "" {
				t.Errorf("%s %s is not described", c.Name, sub.Name)
			}
		}
	}
}
