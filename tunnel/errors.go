package tunnel

import "errors"

// What Dial may answer.
var (
	// ErrUnknownPeer: the CID is no member of this cluster, or this node itself, or this node is in no cluster.
	ErrUnknownPeer = errors.New("no such node in this cluster")
	// ErrUnreachable: there is no connection to the peer; the error wraps why.
	ErrUnreachable = errors.New("unreachable")
	// ErrRefused: the peer is connected and does not open that service, or as many channels are open as may be.
	ErrRefused = errors.New("refused")
	// ErrLost: the connection broke while the stream was open.
	ErrLost = errors.New("connection to the node was lost")
)

// What Listen and the functions on keys and identities may answer.
var (
	// ErrPathTooLong: a peer's socket would have a path of more than 107 bytes, which Linux does not take.
	ErrPathTooLong = errors.New("socket path is longer than 107 bytes")
	// ErrKeyMode: a private key is readable by others.
	ErrKeyMode = errors.New("private key is readable by others")
	// ErrBadKey: a key file or public key is not an Ed25519 key in OpenSSH's form.
	ErrBadKey = errors.New("not an Ed25519 key in OpenSSH's form")
	// ErrBadCertificate: a certificate does not fit the key, CID or cluster it is for.
	ErrBadCertificate = errors.New("certificate does not fit")
)

// What Join may answer besides a *JoinError and network errors.
var (
	// ErrNotConfirmed: the operator did not confirm the host key that was found. Nothing was sent.
	ErrNotConfirmed = errors.New("host key was not confirmed")
	// ErrFingerprint: the host key is another than the one that was pinned. Nothing was sent.
	ErrFingerprint = errors.New("host key does not match")
	// ErrBadReply: the answer is no answer to this request: too long, malformed, for another key or from another node.
	ErrBadReply = errors.New("malformed answer")
)

// Sentinels for the codes of a JoinError; errors.Is finds them.
var (
	ErrTokenUnknown  = errors.New("join token is not known")
	ErrTokenUsed     = errors.New("join token was used")
	ErrTokenExpired  = errors.New("join token has expired")
	ErrNotMaster     = errors.New("node is not the master")
	ErrNoCluster     = errors.New("node is in no cluster")
	ErrRevoked       = errors.New("key belongs to a deleted node")
	ErrOtherIdentity = errors.New("key is a member with another identity")
	ErrBadRequest    = errors.New("malformed join request")
	ErrTooManyJoins  = errors.New("too many join attempts")
	ErrJoinFailed    = errors.New("join failed at the other node")
)
