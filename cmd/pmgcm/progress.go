package main

import (
	"fmt"
	"io"
	"os"
	"strings"
	"sync"
	"time"

	"golang.org/x/term"

	"mailproxy/config"
)

// How often progress is shown: on a terminal so that it seems to move, elsewhere as join shows it.
const (
	redrawEvery = 100 * time.Millisecond
	lineEvery   = time.Second
)

// A progress shows how far pushes to several nodes are: on a terminal a bar for each, drawn over in place and gone at the end; elsewhere
// a line for a node at most once a second, from the second on. Its methods may be called at once from several goroutines.
type progress struct {
	w     io.Writer
	width func() int // of the terminal; 0: it is none

	mu    sync.Mutex
	all   []*pushed // in the order of their first rows
	drawn int       // lines on the terminal
	next  time.Time // when to draw again
	ended bool
}

// A pushed is one node's.
type pushed struct {
	node     config.Node
	sent, of int64
	next     time.Time // when a line for it is due
}

func newProgress(w io.Writer) *progress {
	p := &progress{w: w, width: func() int { return 0 }}
	if onTerminal(w) && os.Getenv("TERM") != "dumb" {
		p.width = func() int {
			width, _, err := term.GetSize(int(w.(*os.File).Fd()))
			if err != nil || width < 1 {
				return 80
			}
			return width
		}
	}
	return p
}

// note takes down how far a push is, and shows it where that is due.
func (p *progress) note(node config.Node, sent, of int64) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.ended {
		return
	}
	now := time.Now()
	one := p.find(node, now)
	one.sent, one.of = sent, of
	if width := p.width(); width > 0 {
		if now.After(p.next) || sent >= of {
			p.next = now.Add(redrawEvery)
			p.draw(width)
		}
		return
	}
	if now.After(one.next) {
		one.next = now.Add(lineEvery)
		fmt.Fprintf(p.w, "%s: sent %d of %d rows\n", label(node), sent, of)
	}
}

func (p *progress) find(node config.Node, now time.Time) *pushed {
	for _, one := range p.all {
		if one.node.CID == node.CID {
			return one
		}
	}
	one := &pushed{node: node, next: now.Add(lineEvery)}
	p.all = append(p.all, one)
	return one
}

// draw draws all bars over those that are there. A line that would not fit is cut, since one that is broken could not be drawn over.
func (p *progress) draw(width int) {
	var b strings.Builder
	if p.drawn > 0 {
		fmt.Fprintf(&b, "\x1b[%dA", p.drawn)
	}
	for _, one := range p.all {
		line := []rune(one.bar())
		fmt.Fprintf(&b, "\r%s\x1b[K\n", string(line[:min(len(line), width-1)]))
	}
	p.drawn = len(p.all)
	_, _ = io.WriteString(p.w, b.String())
}

// barWidth is that of a bar, in characters.
const barWidth = 30

// bar is a node's line: "mx2(2) [######------------------------]  20%, 200 of 1000 rows". Once all are sent the node still has to put
// them in their places.
func (d *pushed) bar() string {
	part := min(1, float64(d.sent)/float64(max(1, d.of)))
	full := int(part * barWidth)
	text := fmt.Sprintf("%s [%s%s] %3d%%, %d of %d rows", label(d.node), strings.Repeat("#", full), strings.Repeat("-", barWidth-full), int(part*100), d.sent, d.of)
	if d.sent >= d.of {
		text += ", applying"
	}
	return text
}

// end takes the bars away; what comes of the pushes is shown in their place.
func (p *progress) end() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.ended = true
	if p.drawn > 0 {
		fmt.Fprintf(p.w, "\x1b[%dA\r\x1b[J", p.drawn)
		p.drawn = 0
	}
}

func label(node config.Node) string { return fmt.Sprintf("%s(%d)", node.Name, node.CID) }
