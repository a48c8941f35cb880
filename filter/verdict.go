package filter

import "mailproxy/mail"

// An Action is what becomes of a message.
type Action uint8

// ActionDeliver passes a message on to the next hop; ActionReject refuses it (so far only smtpd does, by its limits).
const (
	ActionDeliver Action = iota
	ActionReject
)

// String gives the action in lower case, as the log shows it.
func (a Action) String() string {
	switch a {
	case ActionDeliver:
		return "deliver"
	case ActionReject:
		return "reject"
	}
	return "unknown"
}

// A Verdict is a decision about one message, with the rule that made it. Log, metrics, header and reply read from it.
type Verdict struct {
	Action Action
	// Rule is the name of the rule that decided.
	Rule string
	// Reason says in a few words why.
	Reason string
}

// Decide says what becomes of a message.
func (r *Ruleset) Decide(_ *mail.Envelope, _ mail.Content) Verdict {
	return Verdict{Action: ActionDeliver, Rule: "default", Reason: "no rule matched"}
}
