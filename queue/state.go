package queue

import (
	"encoding/json"
	"errors"
	"maps"
	"strings"
	"time"

	"mailproxy/config"
	"mailproxy/mail"
	"mailproxy/relay"
	"mailproxy/spool"
)

// An outcome is the last answer for one forward-path.
type outcome struct {
	Code     int       `json:"code"`
	Enhanced [3]int    `json:"enhanced"`
	Text     string    `json:"text"`
	Hop      string    `json:"hop,omitempty"`
	Source   source    `json:"source,omitempty"`
	Class    string    `json:"class,omitempty"` // as Item.Class
	At       time.Time `json:"at"`
}

// A source says whose words an outcome has.
type source uint8

const (
	fromHop    source = iota // the hop's answer
	fromHere                 // made here: the hop did not say so
	fromNobody               // no hop was in reach: Text is why, with the host in front
)

// outcomeOf is what is kept of a result.
func outcomeOf(r relay.Result, at time.Time) *outcome {
	o := &outcome{Code: r.Reply.Code, Enhanced: r.Reply.Enhanced, Text: r.Reply.Text, Hop: r.Hop, Class: r.Stage.Reason(), At: at}
	if out := new(relay.OutOfReach); errors.As(r.Reply.Cause, &out) {
		o.Source, o.Text = fromNobody, printable(out.Error())
	} else if r.Reply.Cause != nil && !errors.As(r.Reply.Cause, new(*mail.Reply)) {
		o.Source = fromHere
	}
	return o
}

// printable is s with what is not printable ASCII as '?': an error may quote what a host sent, such as the names in its certificate.
func printable(s string) string {
	return strings.Map(func(r rune) rune {
		if r < ' ' || r > '~' {
			return '?'
		}
		return r
	}, s)
}

func (o *outcome) reply() *mail.Reply {
	return &mail.Reply{Code: o.Code, Enhanced: o.Enhanced, Text: o.Text}
}

// A state is what became of an item so far, as the spool keeps it.
type state struct {
	Attempts int       `json:"attempts"`
	Next     time.Time `json:"next"`
	// Turns are of those that are open, where they differ from Attempts and Next.
	Turns map[int]turn `json:"turns,omitempty"`
	// Done counts forward-paths, from 0, that are delivered or reported.
	Done []int `json:"done,omitempty"`
	// Last has the last outcome of those that are open.
	Last map[int]*outcome `json:"last,omitempty"`
	// Hold, Paused, Via and Moving are an operator's orders.
	Hold   *Hold         `json:"hold,omitempty"`
	Paused time.Duration `json:"paused,omitempty"`
	Via    string        `json:"via,omitempty"`
	// Moving is the node that it is being given to; 0 for none. That node may have it, too.
	Moving config.CID `json:"moving,omitempty"`
	// Unreported are open ones that were refused for good, and whose sender could not be told yet.
	Unreported []int `json:"unreported,omitempty"`
	// DelayTold are open ones whose sender was told that they are late.
	DelayTold []int `json:"delay_told,omitempty"`
}

// A turn is one forward-path's own place in the schedule.
type turn struct {
	Attempts int       `json:"attempts"`
	Next     time.Time `json:"next"`
}

func (s *state) turn(i int) turn {
	if own, ok := s.Turns[i]; ok {
		return own
	}
	return turn{s.Attempts, s.Next}
}

// dueAt gives the state with all that is open to be tried at a time, also what was refused for good and not yet told.
func (s *state) dueAt(next time.Time) state {
	due := *s
	due.Next, due.Unreported, due.Turns = next, nil, maps.Clone(s.Turns)
	for i, own := range due.Turns {
		due.Turns[i] = turn{own.Attempts, next}
	}
	return due
}

// classRoute is the class of what our own configuration refuses.
const classRoute = "route"

func (s *state) encode() ([]byte, error) { return json.Marshal(s) }

// decodeState gives what encode was given; of nothing, a fresh state.
func decodeState(b []byte) (*state, error) {
	s := new(state)
	if len(b) == 0 {
		return s, nil
	}
	if err := json.Unmarshal(b, s); err != nil {
		return nil, spool.DamagedError("state: " + err.Error())
	}
	return s, nil
}
