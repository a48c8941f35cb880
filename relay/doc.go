// Package relay makes one outbound attempt: it brings one message to one next hop over SMTP and gives a Result for each
// forward-path. It decides nothing about later attempts and keeps nothing on disk.
//
// The walk of Deliver:
//
//  1. The transport gives hops: its fixed hosts, or the MX records of the domain (RFC 5321 §5.1; null MX RFC 7505). Those that were out of
//     reach go behind the others, but for one attempt now and then; this node itself is none.
//  2. For each hop until one answers: a kept connection, or a new one: connect, a header of the PROXY protocol, greeting, EHLO (HELO where
//     it is refused), STARTTLS by the transport's policy, EHLO again, XCLIENT, AUTH: each as the transport has it.
//  3. MAIL, RCPT… and DATA go out as one write where the hop offers PIPELINING (RFC 2920), then the replies are read. What the
//     sender wants to hear goes with them where the hop offers DSN (RFC 3461); a Result says whether it does.
//  4. The body goes out dot-stuffed, then BeforeDot is called, then the final dot; without BeforeDot the dot is in the body's
//     last write.
//  5. The answer to the dot is the Result of every forward-path that was accepted. The connection goes back to the pool.
//  6. Recipients that are more than the hop takes at once (RFC 9422, or its 452) get transactions of their own behind it.
//
// Invariants:
//
//   - A context that ends before the dot drops the connection and the dot is never sent; from the dot's write on the context
//     is ignored and the answer is waited for.
//   - *OutOfReach means that nothing of the transaction was answered: the message was not offered, or can be offered again.
//   - A kept connection that is found dead is replaced by a fresh one once, and only if no reply of this transaction came.
//   - Every wait has a deadline (RFC 5321 §4.5.3.2), every reply a bound; what a hop sends is cleaned before it is passed on.
package relay
