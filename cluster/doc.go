// Package cluster makes nodes one cluster: who is a member, who is master, and that every member holds the master's configuration.
//
// Node is the part inside the daemon. Its walk:
//
//  1. It reads its own state (position and promise, one row) and from it its role: single, master or slave. A role is a function
//     that it is in, with a context that dies with the role.
//  2. It asks every peer's position every few seconds (a slave asks other slaves less often), and at once when the tunnel to it comes up.
//     A higher epoch in force at a peer is promised, durably, before anything else: from then on the own write guard refuses, and the
//     node is a slave.
//  3. As master it runs one pusher per slave: a dirty mark, then read both positions, compare, push. It re-reads instead of
//     queueing, so ten commits in a burst are one push. It renews its lease as long as a majority holds its epoch.
//  4. A master that is refused for a promise, with no higher epoch in force anywhere in reach, runs the promote round itself, so
//     that a promote that died half-way leaves no cluster that no one may configure.
//  5. It recomputes the digest from the rows, so that a change by hand shows as drift.
//
// Operator is the part inside pmgcm. It changes this node's own database and reaches the others through the daemon's sockets in
// the run directory; every one of its methods can be killed at any instant and be called again.
//
// Invariants: a node's promise and epoch never go back. In one epoch one node commits. What only a loser knew ends in its
// journal. The decisions (what a position means beside another, majorities, whom to adopt from) are pure functions in decide.go; model_test.go
// tries every order of what may happen with them.
package cluster
