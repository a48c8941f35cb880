package smtpd

import (
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"

	"mailproxy/config"
)

// A dialog is a file of testdata: what stands before the first C: or S: sets the scene, one directive a line:
//
//	> hop NAME                      a next hop
//	> hop NAME say KEY = REPLY      its answer: rcpt ADDRESS, mail, data, dot; "close" closes
//	> hop NAME down                 it is out of reach
//	> domain NAME HOP               we relay for it to that hop
//	> set NAME VALUE                a setting
//	> trust                         the client is in one of our networks
//	C: a line that the client sends (\r \n \t \0 \xHH as in Go; lines behind one another go out in one write)
//	C~ the same without CRLF
//	S: a reply line that is wanted; "S: EOF" the end of the connection. IDs are shown as ID.
//	= hop NAME N                    how many messages it has taken by then
//	= hop NAME was told COMMAND     a command, to the letter
//	= queue N                       how many items are in the queue
//	= stat NAME N                   a number of Stats
type dialog struct {
	t        *testing.T
	hops     map[string]*hop
	snapshot *config.Snapshot
	rig      *rig
	peer     *peer
	unsent   strings.Builder
}

func TestDialogs(t *testing.T) {
	files, err := filepath.Glob("testdata/*.txt")
	if err != nil || len(files) == 0 {
		t.Fatal("no dialogs: ", err)
	}
	for _, file := range files {
		t.Run(strings.TrimSuffix(filepath.Base(file), ".txt"), func(t *testing.T) {
			text, err := os.ReadFile(file)
			if err != nil {
				t.Fatal(err)
			}
			d := &dialog{t: t, hops: map[string]*hop{}, snapshot: &config.Snapshot{}}
			for i, line := range strings.Split(string(text), "\n") {
				if line == "" || strings.HasPrefix(line, "#") {
					continue
				}
				if !d.step(line) {
					t.Fatalf("%s:%d: %s", file, i+1, line)
				}
			}
		})
	}
}

// step does one line; false where it went wrong, which has been said then.
func (d *dialog) step(line string) bool {
	kind, text, _ := strings.Cut(line, " ")
	if kind != ">" && d.rig == nil {
		d.rig = newRig(d.t, d.snapshot, nil)
		d.peer = d.rig.dial()
	}
	switch kind {
	case ">":
		return d.scene(strings.Fields(text), text)
	case "C:", "C~":
		s, err := strconv.Unquote(`"` + strings.ReplaceAll(text, `"`, `\"`) + `"`)
		if err != nil {
			d.t.Error(err)
			return false
		}
		d.unsent.WriteString(s)
		if kind == "C:" {
			d.unsent.WriteString("\r\n")
		}
		return true
	case "S:":
		d.flush()
		return d.reply(text)
	case "=":
		d.flush()
		if hop, command, ok := strings.Cut(text, " was told "); ok {
			return d.told(d.hops[strings.TrimPrefix(hop, "hop ")], command)
		}
		return d.check(strings.Fields(text))
	}
	d.t.Errorf("unknown line")
	return false
}

func (d *dialog) flush() {
	if d.unsent.Len() > 0 {
		d.peer.send(d.unsent.String())
		d.unsent.Reset()
	}
}

func (d *dialog) scene(f []string, text string) bool {
	switch {
	case f[0] == "hop" && len(f) == 2:
		d.hops[f[1]] = newHop(d.t)
	case f[0] == "hop" && f[2] == "down":
		d.hops[f[1]].close()
	case f[0] == "hop" && f[2] == "say":
		_, rest, _ := strings.Cut(text, " say ")
		key, reply, _ := strings.Cut(rest, " = ")
		d.hops[f[1]].set(key, strings.NewReplacer(`\r`, "\r", `\n`, "\n").Replace(reply))
	case f[0] == "domain":
		d.snapshot.Domains = d.snapshot.Domains.Patch(map[string]*config.Domain{f[1]: {Name: f[1], Hosts: []string{d.hops[f[2]].addr()}}})
	case f[0] == "set":
		d.snapshot.Settings = append(d.snapshot.Settings, config.Setting{Name: f[1], Value: f[2]})
	case f[0] == "trust":
		d.snapshot.Networks = append(d.snapshot.Networks, loopback)
	default:
		d.t.Errorf("unknown directive")
		return false
	}
	return true
}

var ids = regexp.MustCompile(`[0-9B-Z_]{16}(\.[0-9]+)?`)

func (d *dialog) reply(want string) bool {
	got, err := d.peer.r.ReadString('\n')
	got = ids.ReplaceAllString(strings.TrimSuffix(got, "\r\n"), "ID")
	if err != nil {
		got += nameEnd(err)
	}
	if got != want {
		d.t.Errorf("got  S: %s", got)
		return false
	}
	return true
}

func (d *dialog) told(h *hop, command string) bool {
	got := h.commands()
	if !slices.Contains(got, command) {
		d.t.Errorf("got %q", got)
		return false
	}
	return true
}

func (d *dialog) check(f []string) bool {
	var got int
	switch f[0] {
	case "hop":
		got = len(d.hops[f[1]].messages())
	case "queue":
		for _, i := range d.rig.queue.List() {
			if i.Unanswered {
				d.t.Errorf("item %s is held", i.ID)
				return false
			}
			got++
		}
	case "stat":
		s := d.rig.server.Stats()
		got = int(map[string]uint64{
			"delivered": s.Delivered, "queued": s.Queued, "rejected": s.Rejected, "framing": s.Framing, "duplicates": s.Duplicates,
		}[f[1]])
	}
	if want := f[len(f)-1]; strconv.Itoa(got) != want {
		d.t.Errorf("got %d", got)
		return false
	}
	return true
}
