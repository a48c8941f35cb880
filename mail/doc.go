// Package mail is the vocabulary of the mail path: Path, Envelope, Content, Reply and the IDs in logs. It knows the shapes of
// RFC 5321 and RFC 6531, and nothing of networks, disks or configuration.
package mail
