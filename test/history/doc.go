// Package history judges what a cluster did. A run notes facts with their time, from outside: what a node's database said, what was
// acknowledged to whom, which commands were given and killed, who came through a tunnel, how long readers waited. Check then finds
// where one of the rules that must hold always does not. It talks to nothing; a run is stored as JSON, a fact a line, and can be
// judged again.
//
// The rules, by their numbers:
//
//  1. In one epoch at most one node commits, its owner; a node's promise, epoch and (epoch, serial) never go back but by a pull.
//  2. A commit never leaves a node's history but into its journal, and never that but by being dealt with. What a majority had is in
//     every later epoch that began without force.
//  3. One position has one digest of rows, on every node and at every instant; who is shown in sync is where the master is.
//  4. A deleted node opens no tunnel and reads nothing, from 1 s after on.
//  5. A command that was killed can be run again. Once all is calm, somebody takes configuration.
//  6. No reader waits longer than 50 ms.
//
// What one cannot see is not judged: a state without history says nothing of rule 2. Facts stand in the order in which they were
// noted, and those of one node were noted in the order in which they were read.
package history
