// Chaos runs a cluster in a lab and breaks it at random: `make chaos`. It runs in rounds of storm and calm.
//
//  1. In a storm faults come one after the other, in an order that follows from the seed alone; and meanwhile, everywhere, configuration
//     is committed, pmgcm is run, and killed, and mail is sent.
//  2. An observer notes what each node's database says, what was acknowledged and which commands ended how: the facts.
//  3. In a calm all is put right, and the cluster must come to rest by itself: in sync, with digests recomputed, and somebody must take
//     configuration. A node is deleted, tries to come in, and enters again as a new one.
//  4. test/history judges the facts of the round. What was answered with 250 must have arrived.
//
// It ends with a line of counts; exit code 1 where a rule does not hold, the facts then kept in a file that the output names.
//
// Variables: CHAOS_TIME how long (2m), CHAOS_SEED the seed to repeat, CHAOS_NODES how many nodes (3).
package main
