// Package db keeps a node's data in PostgreSQL: a private instance that it supervises itself (Instance), or any by DSN.
//
// Three schemas say how rows travel: config.* is the master's and the same everywhere, mail.* is of the node where it happened,
// node.* is this node's alone.
//
// A configuration commit (Commit, but a psql session too):
//  1. the first statement locks the one row of node.position and passes the write guard: only the master writes, and under its lease;
//  2. triggers take the next serial, write config.history and config.change, and keep each table's digest;
//  3. COMMIT wakes whoever listens (Listen), here the daemon, which loads (Load) and pushes.
//
// A push (DB.Push, run on the master against a Peer):
//  1. the peer's position is read: in sync, behind, drifted, or ahead;
//  2. rows go into a staging table there: those that later commits touched, or whole tables whose digest differs; a large table's go into
//     one of its own, all of them or those of the buckets that differ; where that takes long it is committed on the way, and a push that
//     breaks goes on from there;
//  3. node.push, in the same transaction, locks the position row, refuses a lower epoch than it has promised, sets commits aside in
//     node.journal that the master does not know, merges, puts the tables that were copied whole in the place of empty ones, and
//     commits only where the digest is the master's.
//
// A peer logs in as a role of its own (Backend), so the server itself knows who asks; it holds EXECUTE on a few functions.
package db
