package main

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"strings"
	"time"

	"github.com/urfave/cli/v2"

	"mailproxy/mail"
	"mailproxy/queue"
	"mailproxy/web"
)

// Bounds of what a trace reads of the log.
const (
	maxLogLines = 1000
	maxLogLine  = 1 << 20
)

// A trace is an item's story. Story is nil where it is not in the queue any more.
type trace struct {
	Story *queue.Story      `json:"queue"`
	Log   []json.RawMessage `json:"log"`
}

func queueTrace(c *cli.Context) error {
	args, err := arguments(c, 1, 1)
	if err != nil {
		return err
	}
	id := args[0]
	if !mail.IsID(id) { // it becomes a pattern
		return usagef("queue trace: %q is no ID", id)
	}
	nodes, err := queueNodes(c)
	if err != nil {
		return err
	}
	t := trace{Log: []json.RawMessage{}}
	story, err := nodes.all[0].client.Item(c.Context, id)
	switch {
	case err == nil:
		t.Story = &story
	case !errors.Is(err, web.ErrNoSuch):
		return fmt.Errorf("item %s: %w", id, err)
	}
	if !nodes.named {
		if t.Log, err = readLog(c.Context, c.String("log"), id, story.Envelope.Session); err != nil {
			return err
		}
	}
	if t.Story == nil && len(t.Log) == 0 {
		return fmt.Errorf("item %s: %w, and this host's log has nothing of it", id, web.ErrNoSuch)
	}
	if c.Bool("json") {
		return printJSON(c.App.Writer, t)
	}
	return printTrace(c.App.Writer, id, t, nodes)
}

// readLog gives the log's lines about an item or its session; the journal has none where there is no journal.
func readLog(ctx context.Context, file, id, session string) ([]json.RawMessage, error) {
	if file != "" {
		f, err := os.Open(file)
		if err != nil {
			return nil, err
		}
		defer func() { _ = f.Close() }()
		return pickLines(f, id, session), nil
	}
	pattern := id
	if mail.IsID(session) {
		pattern += "|" + session
	}
	cmd := exec.CommandContext(ctx, "journalctl", "--unit", "mailproxy", "--output", "cat", "--no-pager", "--grep", pattern)
	out, err := cmd.StdoutPipe()
	if err == nil {
		err = cmd.Start()
	}
	if err != nil { // there is none here
		return []json.RawMessage{}, nil
	}
	lines := pickLines(out, id, session)
	_, _ = io.Copy(io.Discard, out)
	_ = cmd.Wait() // it fails where nothing is found
	return lines, nil
}

// pickLines gives those lines that are JSON and about an item, a DSN of it, or its session and no other item, the first thousand.
func pickLines(r io.Reader, id, session string) []json.RawMessage {
	found := []json.RawMessage{}
	lines := bufio.NewScanner(r)
	lines.Buffer(nil, maxLogLine)
	for lines.Scan() && len(found) < maxLogLines {
		var about struct{ Item, Session, About string }
		if json.Unmarshal(lines.Bytes(), &about) != nil {
			continue
		}
		if about.Item == id || about.About == id || about.Item == "" && session != "" && about.Session == session {
			found = append(found, bytes.Clone(lines.Bytes()))
		}
	}
	return found
}

func printTrace(w io.Writer, id string, t trace, nodes *queueNodeList) error {
	var b strings.Builder
	at := func(when time.Time, format string, args ...any) {
		fmt.Fprintf(&b, "%s  %s\n", when.UTC().Format(time.DateTime), clean(fmt.Sprintf(format, args...)))
	}
	if t.Story == nil {
		fmt.Fprintf(&b, "item %s is not in the queue any more\n", id)
	} else {
		story, i := t.Story, t.Story.Item
		if i.Client == "" {
			at(i.Created, "made here: %d octets from %s to %s", i.Size, from(i.ReversePath), count(len(story.Recipients), "recipient"))
		} else {
			at(i.Created, "received from %s (%s) in session %s: %d octets from %s to %s", i.Client, story.Envelope.Helo, i.Session, i.Size,
				from(i.ReversePath), count(len(story.Recipients), "recipient"))
		}
		for _, r := range story.Recipients {
			if r.At.IsZero() {
				fmt.Fprintf(&b, "%19s  %s\n", "", clean(r.ForwardPath.String()+recipientText(r)))
			} else {
				at(r.At, "%s%s", r.ForwardPath, recipientText(r))
			}
		}
		if i.OnHold != nil {
			at(i.OnHold.Since, "put on hold by %s; its life stands still", i.OnHold.By)
		}
		fmt.Fprintf(&b, "tried %s; next: %s", count(i.Attempts, "time"), nextAttempt(i))
		if i.Via != "" {
			fmt.Fprintf(&b, "; ordered to go by transport %s", clean(i.Via))
		}
		if !story.Expires.IsZero() {
			fmt.Fprintf(&b, "; given up at %s", story.Expires.UTC().Format(time.DateTime))
		}
		b.WriteString("\n")
	}
	switch {
	case nodes.named:
		fmt.Fprintf(&b, "log: on %s, \"mailproxy queue trace %s\"\n", nodes.all[0].label(), id)
	case len(t.Log) == 0:
		b.WriteString("log: nothing of it on this host\n")
	default:
		b.WriteString("log:\n")
	}
	for _, line := range t.Log {
		b.WriteString(logText(line) + "\n")
	}
	_, err := io.WriteString(w, b.String())
	return err
}

// logText is a line of the log as people read it: when, what, and the fields in their order.
func logText(line []byte) string {
	d := json.NewDecoder(bytes.NewReader(line))
	_, _ = d.Token() // it is an object: pickLines has read it
	var when, what string
	var fields strings.Builder
	for d.More() {
		key, err := d.Token()
		if err != nil {
			break
		}
		var value json.RawMessage
		if d.Decode(&value) != nil {
			break
		}
		text := string(value)
		var s string
		if json.Unmarshal(value, &s) == nil {
			text = s
		}
		switch key {
		case "time":
			when = text
		case "message":
			what = text
		case "level":
		default:
			fmt.Fprintf(&fields, " %v=%s", key, value)
		}
	}
	return clean(when + "  " + what + fields.String())
}
