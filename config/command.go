package config

// A Command is a configuration command of an administrator that is carried to the master and runs there.
type Command struct {
	// Who typed it, and how, for the history.
	Who  string `json:"who"`
	Line string `json:"line"`
	// Args are its words without the program's name and without --config.
	Args []string `json:"args"`
	// Text is its standard input.
	Text string `json:"text,omitempty"`
	// Secret is its standard input where that is a secret, which stands nowhere else.
	Secret []byte `json:"secret,omitempty"`
	// At is the position whose configuration the administrator saw; where it is not zero and the master is elsewhere, nothing is done.
	At Position `json:"at,omitzero"`
	// Schema is the newest migration that the program knows which the administrator used; 0 for one that does not say so, which is older.
	Schema int64 `json:"schema,omitempty"`
}

// MaxCommandBytes bounds a Command in JSON: a text with a million domains.
const MaxCommandBytes = 128 << 20

// A CommandReply is how a Command ended at the master.
type CommandReply struct {
	// Output is what the command printed.
	Output string `json:"output,omitempty"`
	// Error, Hint and Code are what it failed with; Code 0 is success.
	Error string `json:"error,omitempty"`
	Hint  string `json:"hint,omitempty"`
	Code  int    `json:"code"`
	// At is the master's position afterwards.
	At Position `json:"at"`
}
