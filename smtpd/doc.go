// Package smtpd receives mail over SMTP (RFC 5321) and delivers each message inside its client's transaction, or spools it.
//
// The walk of a session, all in one goroutine at a time:
//
//  1. The listener, which is for mail from the Internet, from our networks, or both (Purpose), accepts, counts sessions and
//     connections by its limits (limit.go; 421 where there are too many), and makes a conn. Up to the first MAIL
//     that answers by itself (early.go); then go-smtp is given it, in another goroutine. From a balancer a PROXY header
//     comes first, which says who the client is (proxy.go), and a listed host may say so by XCLIENT (xclient.go): limits, networks,
//     log and Received go by that. Its name is looked up meanwhile (names.go).
//  2. conn is the net.Conn that go-smtp reads from and writes to. Its Read takes one line from the wire, checks framing, syntax
//     and order, answers what go-smtp must not see (STARTTLS, BDAT, bad order, bad parameters), and passes on a line of fixed
//     text; of RCPT until one was taken. What the client wrote in MAIL and RCPT goes to the session as values, never through go-smtp's parser.
//  3. go-smtp keeps its state machine and calls the session: Mail pins the Ruleset in a transaction, Rcpt asks the Ruleset and
//     the next hop, Data reads the body straight from conn and decides (deliver.go).
//  4. conn's Write takes go-smtp's reply codes; the text on the wire is always that of a mail.Reply of ours (reply.go). Replies
//     are held until the next read from the wire, so that a pipelined burst is answered in one write.
//
// The states of a conn:
//
//	greeting -> command <-> body -> dot -> command
//	     \________|___________|______________|____> ended
//
//	body: go-smtp wrote 354, the session reads the message up to CRLF.CRLF
//	dot:  the message was taken; go-smtp's own reader is given the final dot that it waits for
//
// Invariants:
//
//   - The end of a message is CRLF.CRLF and nothing else; bare CR and bare LF are normalised before anything is stored.
//   - Who must wait for a reply (RFC 2920 §3.1) and has sent on before it goes out is refused, and the session ends: it is looked for in our
//     buffer, in TLS's and in the kernel's. So nothing that was said in clear is taken for what comes inside TLS.
//   - Any doubt about framing or size, and any time-out, ends the session: what came after is never run as commands.
//   - No octet from the network stands in a reply. Causes go to the log only.
//   - 250 to the final dot means: the next hop's 2xx, or synced in the spool.
//   - A client that is gone before our final dot to the next hop: the dot is never sent.
//   - Everything is bounded: line, header, size, recipients, errors, unknown recipients, sessions, silence, age, rate. Clients from the
//     Internet and from our networks have bounds of their own, so that neither takes the other's room.
//
// RFCs: 5321, 1870 (SIZE), 2034 (enhanced codes), 2920 (PIPELINING), 3207 (STARTTLS), 3461 (DSN), 3848 (with), 6152 (8BITMIME), 6531
// (SMTPUTF8), 9422 (LIMITS).
package smtpd
