// Package tunnel connects the nodes of a cluster: a byte stream to a service of the node with a given CID, the peer proven, deadlines
// obeyed. It is the only package that knows SSH.
//
// Its walk:
//
//  1. A node has one key (node.key). A cluster CA, whose private key never leaves the node that made it, signs a host and a user
//     certificate for it; both lie in the key directory beside identity.json.
//  2. Reload takes the members, CAs and revoked nodes from a config.Snapshot and cuts at once what they no longer allow.
//  3. One connection per pair of peers serves both directions. Either side dials; of two, the one that the lower CID dialled takes
//     all new channels, and the other ends with its last channel.
//  4. Dial opens a channel that names a service; at the other end the gate looks the service up and hands the channel to its
//     Handler. Nothing else is served: no shell, no exec, no forwarding, no global request but the keep-alive.
//  5. Each peer's services are also Unix sockets under the run directory.
//  6. Join is the one exchange with a stranger: JSON over a connection whose host key was pinned or confirmed before.
//
// Its invariants: a peer is let in only with a certificate of its kind (user certificates dial, host certificates answer), signed by
// a CA that the snapshot lists, for its CID and this cluster, over the very key that the snapshot holds for that CID; everything from
// the network is bounded in size, number and time; who is silent for ten seconds is cut; a stream that ends without the other side's
// word is an error, never an end of file; Run returns when all that it started has ended.
package tunnel
