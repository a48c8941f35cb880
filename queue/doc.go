// Package queue keeps messages that could not be passed on at once: the spool on disk, the schedule over it, the runner that
// tries again, and the DSNs for what cannot be delivered.
//
// The walk of an item:
//
//  1. Put writes it to new/, syncs it, renames it into item/ and syncs that directory; only then it returns. Concurrent Puts
//     share the directory's sync.
//  2. Run takes what is due, groups the open forward-paths by next hop, and makes one attempt for each group.
//  3. Delivered paths are closed on disk; refused ones are reported in one DSN, which is spooled before they are closed; the
//     others stay, to be tried again after 1 minute, 2, 4 … about an hour, until the item's life is over.
//  4. With its last path closed the item is removed.
//
// # The spool on disk
//
// Under Options.Dir, all files 0600:
//
//	new/ID          being written; removed at start
//	item/ID         a message that is accepted
//	item/ID.held    a message whose acceptance is not decided; removed at start, since it was never answered
//	item/ID.state   what became of its forward-paths so far; absent before the first attempt ended
//	item/ID.try     an attempt is under way: found at start, it names an attempt that was cut and may have delivered
//	damaged/NAME    set aside: its checksum or shape is wrong; never delivered
//
// An item's file never changes. Numbers are big-endian, checksums CRC-32C (Castagnoli):
//
//	octets  what
//	8       "MPROXYQ1"
//	4       length E of the envelope
//	8       length C of the content
//	4       checksum of the 20 octets before and the envelope
//	E       the envelope: mail.Envelope in JSON, with forward_paths in the order that ID.state counts them in
//	C       the content, CRLF line ends, as it is sent
//	4       checksum of the content
//
// ID.state is one line: the checksum of the rest in 8 hex digits, a blank, and JSON; it is replaced as a whole.
//
// # Invariants
//
//   - What Put returned without error is on disk and is removed only when every forward-path was delivered or reported.
//   - What Put returned with an error left nothing behind.
//   - One attempt at a time for an item; an item being tried cannot be deleted.
//   - A message is delivered twice only where an attempt was cut between the next hop's 250 and our note of it; the log then
//     has attempt.cut, or attempt.done with "no answer to the final dot", with the item's ID.
package queue
