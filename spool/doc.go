// Package spool keeps messages on the disk: an append-only log in segments, in which many writers share one sync.
//
// The walk of a message:
//
//  1. Put encodes it as a record and joins the batch that is filling. The committer writes a batch at the end of the newest
//     segment with one call and syncs the file once; while it does, the next batch fills. Only then Put returns. No timer is
//     involved: one writer alone waits for its own sync, and a hundred wait for two.
//  2. What becomes of it is told by small records behind it: its state, an attempt under way, its removal.
//  3. A segment none of whose messages is left is deleted, the oldest first: a record about a message lies in the same segment or a
//     newer one, so that no removal is forgotten before what it removes. Where much of the log is dead, the oldest segment's
//     messages are copied to its end (tidy).
//
// A message of more than 1 MiB has a file of its own, in the same form, written beside the log: nobody waits for its octets.
//
// # On the disk
//
// Under the directory, all files 0600:
//
//	log/N       a segment, N in 16 hex digits, rising
//	own/ID      a segment with one record: a large message
//	new/ID      one that is being written; removed at start
//	damaged/*   set aside, as segments: what had a wrong checksum or shape; never delivered
//
// Numbers are big-endian, checksums CRC-32C (Castagnoli). A segment begins with
//
//	octets  what
//	8       "MPSPOOL1"
//	8       the spool's mark: random, the same in all its segments. A damaged stretch is passed over by looking for it, and
//	        nobody who sends mail can know it
//	4       checksum of the 16 octets before
//
// and has records up to its end:
//
//	8       the mark
//	1       kind: M message, S state, T attempt under way, U it has ended, D removed, G gap
//	1       0; or X: removed, set in place where the disk was too full for a D. Not in the checksum
//	1       1 for a message that is held: its acceptance is not decided. A state of it, or its removal, decides. 2 for a state in
//	        the middle of an attempt, which goes on
//	1       length I of the ID
//	4       length H of the head
//	8       length C of the content
//	4       checksum of all before but for the second octet behind the mark, and of ID and head
//	I       the message's ID
//	H       M: mail.Envelope in JSON: what an older version did not write is empty, and what a newer one wrote is passed over.
//	        S: the state, the queue's. T: when, as time.RFC3339Nano
//	C       M: the content, CRLF line ends, as it is sent. G: what was there, set aside
//	4       checksum of the content; any, of a gap
//	4       "END\n"
//
// At start a tail of the newest segment that is no whole record is cut off: it was being written, and nobody was told that it is
// there. Anywhere else such a stretch is copied to damaged/ and becomes a gap.
//
// # Invariants
//
//   - What Put returned without error is on the disk until Remove, and found by the next Open.
//   - What Put returned with an error is not there, but where the disk has failed it may come back after a restart.
//   - Release, SetState and Remove are on the disk when they return without error; Mark, Unmark and Drop need not be: they are for a
//     process that is killed.
package spool
