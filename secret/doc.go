// Package secret seals the cluster's secrets: passwords, private keys.
//
//  1. A secret is sealed with the data key, which all secrets of a cluster have in common (DataKey.Seal). Its name is sealed with it, so that
//     a value which is moved to another name does not open.
//  2. The data key is wrapped for each node that may know it (DataKey.WrapFor), by the node's own key, the one that its tunnel has. So a
//     node needs no further key, and each node's rows are the same bytes.
//  3. A node unwraps the data key with its key file (Unwrap), in memory, whenever it needs a secret.
//
// What a node needs where its PostgreSQL is down lies in a file too, as a Box: sealed as in the database.
//
// A node that shall know nothing more is shut out by a new data key: everything is sealed anew, and wrapped for the others.
//
// Sealed: a nonce of 24 bytes and XChaCha20-Poly1305 (draft-irtf-cfrg-xchacha-03). Wrapped: a file of age (https://age-encryption.org/v1)
// with one ssh-ed25519 recipient.
package secret
