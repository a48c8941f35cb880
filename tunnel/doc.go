// Package tunnel connects the nodes of a cluster: a byte stream to a service of the node with a given CID, the peer proven, deadlines
// obeyed. It is the only package that knows SSH and WireGuard.
//
// Its walk:
//
//  1. A node has one key (node.key). A cluster CA, whose private key never leaves the node that made it, signs a host and a user
//     certificate for it; both lie in the key directory beside identity.json.
//  2. Reload takes the members, CAs and revoked nodes from a config.Snapshot and cuts at once what they no longer allow.
//  3. One connection per pair of peers serves both directions. Either side dials; of two, the one that the lower CID dialled takes
//     all new channels, and the other ends with its last channel.
//     By the setting it runs over plain TCP or inside of WireGuard (carrier); each node listens for both. One that was made by the other
//     carrier takes new channels only while there is none by the wanted one. DialBulk has a connection of its own, and its
//     streams are packed over a slow link (pack.go).
//  4. Dial opens a channel that names a service; at the other end the gate looks the service up and hands the channel to its
//     Handler. OpenSSH's "ssh -L SOCKET:/SERVICE" with a member's certificate does the same. Nothing else is served: no shell, no
//     exec, no other forwarding, no global request but the keep-alive.
//     Of two live daemons of one identity (a cloned machine) the first stays, the other is refused, and all three know (ghost.go).
//  5. Each peer's services are also Unix sockets under the run directory.
//  6. Join, by TCP alone, is the one exchange with a stranger: JSON over a connection whose host key was pinned or confirmed before.
//
// Its invariants: a peer is let in only with a certificate of its kind (user certificates dial, host certificates answer), signed by
// a CA that the snapshot lists, for its CID and this cluster, over the very key that the snapshot holds for that CID; everything from
// the network is bounded in size, number and time; who is silent for ten seconds while a stream is open is cut; a stream that ends without
// the other side's word is an error, never an end of file; Run returns when all that it started has ended.
package tunnel
