// Command bench measures mailproxy beside Debian's Postfix and HAProxy, on this machine, in one run:
//
//  1. smtp: messages a second into smtp-sink, sent by smtp-source: directly, through HAProxy's TCP mode, through a private Postfix
//     (its queue) and through mailproxy (cut-through). Connections kept, and one for each message. Rounds alternate, a ratio is of two
//     rows of one round, and what is given is the median of the rounds. Also with 20 forward-paths a message, and with messages of 1 MB.
//     smtp.latency: what one small message takes through an idle node and directly. smtp.flat: a node with 10 domains and recipients and
//     one with 100,000.
//  2. spool: the same with the next hop's port closed: Postfix's queue against mailproxy's spool, both on one disk, both synced.
//     smtp.drain: 10,000 messages wait, their next hop is back, and the operator has all of them tried.
//  3. cluster: three nodes and 100,000 domains; the time from a commit on the master until each slave's SMTP answers by it.
//     Then the same of two nodes over a link of 100 ms (cluster.commit_to_slave.rtt100); how soon the configuration can be written again
//     after pmgcm promote, with the old master alive or the others dead (cluster.handover_ms, cluster.forced_promote_ms); and how
//     soon a node is in sync that was away for 10,000 commits (cluster.away_10000_commits_s).
//  4. cluster.16: 16 nodes; what their daemons and tunnels cost while nothing happens, and the time from the begin of a commit until the
//     last of them answers by it.
//  5. cluster.full_sync_1m: a table of 1,000,000 rows and a node that joins, the same as a merge where one row of a hundred differs, and one row
//     that changes; beside pg_dump and psql, which copy the same rows through the same tunnel into the same indexed table, without triggers.
//     A reader at the slave says how long it had to wait at most.
//  6. memory: an idle node without PostgreSQL, and what each of 9,000 idle sessions adds; the most it has while 200 sessions send 10 MB each.
//
// All parts are real, live in one temporary directory and on 127.0.0.0/8, and are ended by their process IDs. Nothing is estimated:
// what cannot be measured is named, and the command ends with exit code 1.
package main
