// Package filter decides about mail by the configuration: which recipients are taken, by which transport they go, and what
// becomes of a message.
//
// The walk: Compile makes a Ruleset from a config.Snapshot once; the daemon swaps it in as a whole. A transaction keeps the
// Ruleset that was in force at its MAIL to its end. RCPT asks Accepts and Route, the end of DATA asks Decide.
//
// Invariants: a Ruleset is immutable and may be used by many at once; nothing here touches a disk or a network; a snapshot that
// does not compile changes nothing.
package filter
