package history

import (
	"time"

	"mailproxy/config"
)

// A Fact is one thing that was seen. Exactly one of the pointers is set.
type Fact struct {
	At   time.Time  `json:"at"`             // for what takes time: when it ended
	Node config.CID `json:"node,omitempty"` // the node that it is about

	State   *State   `json:"state,omitempty"`
	Ack     *Ack     `json:"ack,omitempty"`
	Promote *Promote `json:"promote,omitempty"`
	Pull    *Mark    `json:"pull,omitempty"`   // `pmgcm sync --pull` was given on the node
	Reset   *Mark    `json:"reset,omitempty"`  // the node's database is another now: rolled back, restored, or entered anew
	Tamper  *Mark    `json:"tamper,omitempty"` // rows were changed on the node behind the cluster's back
	Dealt   *Dealt   `json:"dealt,omitempty"`
	Deleted *Mark    `json:"deleted,omitempty"` // `pmgcm delete` of the node has ended
	Tunnel  *Tunnel  `json:"tunnel,omitempty"`
	Command *Command `json:"command,omitempty"`
	Calm    *Mark    `json:"calm,omitempty"`  // from here on all nodes reach each other, and nothing is broken or killed any more
	Storm   *Mark    `json:"storm,omitempty"` // that is over
	Reader  *Reader  `json:"reader,omitempty"`
}

// A Mark has nothing to say but that it was; Why is for people.
type Mark struct {
	Why string `json:"why,omitempty"`
}

// A State is what a node's database says in one transaction.
type State struct {
	Position config.Position `json:"position"` // with the kept digest
	Promised config.Epoch    `json:"promised"`
	// Rows is the digest computed from the rows; nil: it was not.
	Rows *config.Digest `json:"rows,omitempty"`
	// InSync says that `pmgcm status --verify` shows the node in sync.
	InSync bool `json:"in_sync,omitempty"`
	// Began is when the reading began; zero: not known, and then it does not judge what was acknowledged shortly before.
	Began time.Time `json:"began,omitzero"`
	// Log is config.history and the journal; nil: they were not read.
	Log *Log `json:"log,omitempty"`
}

// A Log is what a node knows of commits.
type Log struct {
	// Above is the serial up to which history was trimmed; 0: it is whole.
	Above   int64    `json:"above,omitempty"`
	History []Commit `json:"history"`
	Journal []Commit `json:"journal,omitempty"`
}

// A Commit is a row of config.history or of node.journal.
type Commit struct {
	Epoch   config.Epoch `json:"epoch"`
	Serial  int64        `json:"serial"`
	Node    config.CID   `json:"node"` // that made it
	At      time.Time    `json:"at,omitzero"`
	Who     string       `json:"who,omitempty"`
	Command string       `json:"command,omitempty"`
}

// An Ack is a configuration change of which the node told its caller that it is done.
type Ack struct {
	Position config.Position `json:"position"` // without a digest where none was told
	// Majority says that a majority of the members was known to hold it, each from the master that made it, by the time of the fact.
	Majority bool `json:"majority,omitempty"`
}

// A Promote is a promote that was begun on the node, also one that was killed or that the daemon ran by itself.
type Promote struct {
	Forced bool `json:"forced,omitempty"`
	// Epoch is what it put in force; zero: unknown or nothing.
	Epoch config.Epoch `json:"epoch,omitzero"`
}

// A Dealt is a commit that an administrator took out of the node's journal, by applying or dropping it.
type Dealt struct {
	Epoch  config.Epoch `json:"epoch"`
	Serial int64        `json:"serial"`
}

// A Tunnel is a try of the node to come in at another.
type Tunnel struct {
	To config.CID `json:"to"`
	// Since is from when on the other was in reach of a node that knew of a deletion; zero: always.
	Since time.Time `json:"since,omitzero"`
	// Opened and Read say what came of it.
	Opened bool `json:"opened,omitempty"`
	Read   bool `json:"read,omitempty"`
}

// How a command ended.
const (
	Done    = "done"
	Killed  = "killed"
	Refused = "refused" // with a clear error, nothing changed
	Failed  = "failed"  // otherwise
)

// A Command is a command line on the node, and how it ended.
type Command struct {
	Line    string `json:"line"`
	Outcome string `json:"outcome"`
	Error   string `json:"error,omitempty"`
}

// A Reader is a reading of the configuration on the node, and what it took.
type Reader struct {
	What string        `json:"what"`
	Took time.Duration `json:"took"`
}
