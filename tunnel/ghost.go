package tunnel

import (
	"bytes"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"net"
	"time"

	"golang.org/x/crypto/ssh"
)

// Two live daemons of one identity are a machine that was cloned. Both have the key and the certificate, so that nothing tells them
// apart but that they are two: each daemon has an instance, made when it starts, which ends its SSH version string. While a session
// with one instance of a node lives, the other is refused; which of them was first is all that counts. Both learn of it, and so does
// whoever refused.

// ghostNotice is the banner of a refusal, by which a daemon learns that it is the second.
const ghostNotice = "another daemon of this node is connected"

var errGhost = errors.New("another live daemon of that node's identity is connected")

// A sighting is the last refusal of another daemon of a peer.
type sighting struct {
	address string
	at      time.Time
}

// newInstance makes 16 hex digits.
func newInstance() string {
	var b [8]byte
	rand.Read(b[:]) // never fails
	return hex.EncodeToString(b[:])
}

// announced is the version string of a use, with the instance as the last word of its comment (RFC 4253 §4.2).
func (t *Tunnel) announced(u use) string { return u.version() + " " + t.instance }

// instanceOf reads the instance that the other side announced; empty for one that tells none.
func instanceOf(announced []byte) string {
	last := string(announced[bytes.LastIndexByte(announced, ' ')+1:])
	if b, err := hex.DecodeString(last); err != nil || len(b) != 8 {
		return ""
	}
	return last
}

// otherLocked says whether a session with another daemon of the peer lives, and has it looked at. One that gives no sign of life when it is
// asked for it does not count: its host may be gone, and this be the same node again.
func (t *Tunnel) otherLocked(p *peer, instance string) bool {
	if p == nil || instance == "" {
		return false
	}
	for _, s := range p.sessions {
		if s.instance == "" || s.instance == instance || s.reason() != nil {
			continue
		}
		s.doubt()
		if s.unanswered(time.Now()) < t.timing.keepAlive {
			return true
		}
	}
	return false
}

// refuseGhost is asked once a dialler has proven its key, and before it is let in.
func (t *Tunnel) refuseGhost(c ssh.ConnMetadata, by who) error {
	t.mu.Lock()
	defer t.mu.Unlock()
	p := t.peers[by.cid]
	if by.cid == 0 || !t.otherLocked(p, instanceOf(c.ClientVersion())) {
		return nil
	}
	p.sighted = sighting{addressOf(c.RemoteAddr()), time.Now()}
	return &ssh.BannerError{Err: errGhost, Message: ghostNotice}
}

func addressOf(a net.Addr) string {
	if host, _, err := net.SplitHostPort(a.String()); err == nil {
		return host
	}
	return a.String()
}

// ghostLocked gives where another daemon of the peer was refused a moment ago, if the one that is connected was heard since: else it is the
// same node, which came back before its old connection was known to be dead.
func (t *Tunnel) ghostLocked(p *peer) string {
	s := p.bestLocked()
	if s == nil || p.sighted.at.IsZero() || time.Since(p.sighted.at) > 3*t.timing.backoffMax {
		return ""
	}
	if s.since.After(p.sighted.at) || !s.wire.lastHeard().After(p.sighted.at) {
		return ""
	}
	return p.sighted.address
}

// ghost is ghostLocked for the peer of a session, for the answer to its keep-alives.
func (s *session) ghost() string {
	s.t.mu.Lock()
	defer s.t.mu.Unlock()
	return s.t.ghostLocked(s.peer)
}
