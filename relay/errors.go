package relay

import (
	"errors"
	"strconv"
)

// ErrNoAnswer says that the final dot was sent and no valid reply came back, so the hop may or may not have taken the message.
var ErrNoAnswer = errors.New("no answer to the final dot")

// ErrProtocol is what every reply that is no SMTP reply wraps.
var ErrProtocol = errors.New("protocol error")

// ErrLost is the cause of a temporary Reply made here because the connection ended in the middle of a transaction.
var ErrLost = errors.New("connection lost")

var (
	errTLSNotOffered = errors.New("STARTTLS is required and not offered")
	errRecentlyDown  = errors.New("was out of reach a moment ago")
	errNotAsked      = errors.New("no address that the hop can be asked about")
	errNoHost        = errors.New("no host to connect to")
	errSelf          = errors.New("it is this node itself: mail would go in circles")
	errTooMany       = errors.New("more recipients than the hop takes at once")
)

// A Stage is how far an attempt came.
type Stage uint8

// The stages in their order. StageLookup is the DNS lookup of an MX transport.
const (
	StageLookup Stage = iota
	StageConnect
	StageGreeting
	StageEhlo
	StageStartTLS
	StageAuth
	StageReset
	StageMail
	StageRcpt
	StageData
	StageDot
	stages
)

var stageNames = [stages]string{"lookup", "connect", "greeting", "ehlo", "starttls", "auth", "rset", "mail", "rcpt", "data", "dot"}

// String gives the stage in lower case, as the log shows it.
func (s Stage) String() string {
	if s < stages {
		return stageNames[s]
	}
	return "stage " + strconv.Itoa(int(s))
}

// reasons are the classes that stages fall into.
var reasons = [stages]string{"dns", "connect", "greeting", "greeting", "tls", "auth", "mail", "mail", "rcpt", "data", "final"}

// Reason is the class of what ended at the stage: dns, connect, greeting, tls, auth, mail, rcpt, data, final.
func (s Stage) Reason() string {
	if s < stages {
		return reasons[s]
	}
	return "unknown"
}

// OutOfReach says that a next hop answered nothing of the transaction. It is about the hop or the way to it, not about the
// message, which may be tried again.
type OutOfReach struct {
	// Hop is the last one tried, as host:port; a domain where its lookup did not succeed.
	Hop string
	// Stage is how far the attempt came.
	Stage Stage
	// Err is why; a *mail.Reply where the hop refused in the greeting, EHLO or STARTTLS.
	Err error
}

// Error gives "127.0.0.1:25: connect: connection refused".
func (e *OutOfReach) Error() string { return e.Hop + ": " + e.Stage.String() + ": " + e.Err.Error() }

// Unwrap gives Err.
func (e *OutOfReach) Unwrap() error { return e.Err }
