// Package queue passes on messages that could not be passed on at once, and lie in the spool: the schedule, the runner that tries
// again, and the DSNs for what cannot be delivered.
//
// The walk of an item:
//
//  1. Put gives it to the spool, and returns when it is on the disk.
//  2. Run takes what is due, groups the open forward-paths by next hop, and makes one attempt for each group, side by side. A next hop
//     gets as many at once as it bears (site.go); what there is no room for waits, and next hops take turns, so that none holds up
//     another. What is for a next hop that seems dead is put off without an attempt. Each forward-path has its own place in the
//     schedule: who waits for room at one next hop, or is being tried there for hours, holds up no other recipient of the item.
//  3. Delivered paths are closed on disk; refused ones are reported in one DSN, which is spooled before they are closed; the
//     others stay, to be tried again after 1 minute, 2, 4 … about an hour, until the item's life is over, and their sender is told
//     once that they are late. The table at settle says it all. What there is to tell of several next hops that were tried together
//     is told when the last of these attempts has ended.
//  4. With its last path closed the item is removed.
//
// # Invariants
//
//   - What Put returned without error is on disk and is removed only when every forward-path was delivered or reported.
//   - What Put returned with an error is not there; where the disk has failed it may come back after a restart.
//   - The sender is told once, by DSN, of each path that fails, is late, or was passed on, as far as its NOTIFY wants it (RFC 3461),
//     wherever the process is killed.
//   - Nobody is told who has a null reverse-path. Nor is a reverse-path, which may be forged, of mail from outside our networks for
//     a path that was never verified, which means that we took it while its next hop was out of reach: what the next hop then
//     refuses is kept, untried, to the end of its life, for an operator to look at and to have tried again (a next hop that is back with
//     no users refuses everybody), and then given up, named in the log (dsn.none) and counted. Only where such a path is given up since
//     its next hop was never in reach, the sender is told: the path may well exist, and mail that was accepted is not lost in silence.
//   - At most 100 DSNs an hour go to one reverse-path and 10,000 in all; what is over that waits for its turn, untried.
//   - One attempt at a time for a forward-path, and 20 for an item; an item being tried cannot be deleted. What attempts for one item
//     bring is written down one by one.
//   - A message is delivered twice only where an attempt was cut between the next hop's 250 and our note of it; the log then
//     has attempt.cut, or attempt.done with "no answer to the final dot", with the item's ID.
package queue
