package main

import (
	"bufio"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"strings"
	"time"

	"mailproxy/test/lab"
)

// calm starts what is down and waits until the queue is empty; then the node is stopped, and its spool looked at.
func (r *run) calm() error {
	for _, h := range r.hops {
		if err := h.up(); err != nil {
			return err
		}
	}
	if !r.host.Runs() {
		if err := r.host.Start(); err != nil {
			return err
		}
	}
	err := lab.PollFor(2*time.Minute, func() error {
		if _, err := r.host.Must("mailproxy", "queue", "flush"); err != nil {
			return err
		}
		out, err := r.host.Must("mailproxy", "queue", "list", "--json", "--limit", "1")
		if err != nil {
			return err
		}
		var list struct {
			Total *int `json:"total"`
		}
		if err := json.Unmarshal([]byte(out), &list); err != nil || list.Total == nil {
			return fmt.Errorf("queue list --json: %s", out)
		}
		if *list.Total > 0 {
			return fmt.Errorf("%d messages are still in the queue", *list.Total)
		}
		return nil
	})
	if err == nil {
		err = r.host.Stop()
	}
	if err == nil {
		_, err = r.host.Must("mailproxy", "spool", "check")
	}
	return err
}

// windows are the events in the log that name a message which may have come twice.
var windows = []string{"attempt.cut", "attempt.unanswered", "mail.possible_duplicate"}

// named counts those events.
func (r *run) named() (count int, err error) {
	f, err := os.Open(r.host.LogFile())
	if err != nil {
		return 0, err
	}
	defer f.Close()
	lines := bufio.NewScanner(f)
	lines.Buffer(nil, 1<<20)
	for lines.Scan() {
		for _, w := range windows {
			if strings.Contains(lines.Text(), `"message":"`+w+`"`) {
				count++
			}
		}
	}
	return count, lines.Err()
}

// A verdict is what became of the messages.
type verdict struct {
	accepted, givenUp int
	lost              []string
	doubled, allowed  int
	// unexplained are copies of messages whose client always had an answer.
	unexplained int
}

func (r *run) verdict() verdict {
	r.mu.Lock()
	defer r.mu.Unlock()
	var v verdict
	for _, m := range r.messages {
		if !m.accepted {
			v.givenUp++ // its client may bring it to somebody else
			continue
		}
		v.accepted++
		v.allowed += m.unanswered * len(m.hops)
		for _, h := range m.hops {
			switch n := h.Count(m.subject); {
			case n == 0:
				v.lost = append(v.lost, m.subject+" to "+h.domain)
			case n > 1:
				v.doubled += n - 1
				v.unexplained += max(0, n-1-m.unanswered)
			}
		}
	}
	return v
}

func (r *run) judge() error {
	v := r.verdict()
	named, err := r.named()
	var errs []error
	if err != nil {
		errs = append(errs, err)
	}
	if len(v.lost) > 0 {
		errs = append(errs, fmt.Errorf("%d were answered with 250 and are lost: %s", len(v.lost), strings.Join(v.lost[:min(10, len(v.lost))], ", ")))
	}
	if v.unexplained > named {
		errs = append(errs, fmt.Errorf("%d came twice in no window that a client knows of, and the log names only %d", v.unexplained, named))
	}
	if v.accepted == 0 || r.kills == 0 {
		errs = append(errs, errors.New("nothing was accepted, or nothing killed: the run shows nothing"))
	}
	return errors.Join(errs...)
}

// counts is the last line.
func (r *run) counts() string {
	v := r.verdict()
	named, _ := r.named() // judge has its error
	return fmt.Sprintf("crash: seed %d, %.0f s, the daemon killed %d times, the host %d times, stopped %d times; %d messages accepted, %d lost, "+
		"%d copies too many (clients cut off before their answer may have caused %d, the log names %d attempts); %d never accepted",
		r.seed, time.Since(r.began).Seconds(), r.kills, r.failures, r.stops, v.accepted, len(v.lost), v.doubled, v.allowed, named, v.givenUp)
}
