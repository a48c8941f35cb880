package tunnel

import (
	"time"

	"golang.org/x/crypto/ssh"
)

// clockReply answers a keep-alive: the answering node's clock, and where it refused another daemon of the asking node's identity.
type clockReply struct {
	UnixNano uint64
	Ghost    string
}

// maxGhostBytes bounds an address that a peer tells.
const maxGhostBytes = 64

// A Clock is how far a peer's clock is from this node's, as last measured.
type Clock struct {
	// Ahead is positive where the peer's clock is ahead.
	Ahead time.Duration
	// Within is how far that may be off: half of the round trip.
	Within time.Duration
	// At is when it was measured, by this node's clock; zero: never.
	At time.Time
}

// readClock measures by the answer to a question that was sent at asked and took so long; the other side's clock was read half-way
// between. No answer, or one of a node that tells no time, measures nothing.
func readClock(payload []byte, asked time.Time, took time.Duration) (Clock, bool) {
	var r clockReply
	if ssh.Unmarshal(payload, &r) != nil || r.UnixNano == 0 {
		return Clock{}, false
	}
	theirs := time.Unix(0, int64(r.UnixNano))
	return Clock{Ahead: theirs.Sub(asked.Add(took / 2)), Within: took / 2, At: asked.Add(took)}, true
}

// askAlive sends one keep-alive, and measures the peer's clock by the answer. The time it took is the machine's, which no
// change of the clock touches.
func (s *session) askAlive() error {
	asked, start := s.t.o.Now(), time.Now()
	_, payload, err := s.ssh.SendRequest(keepAlive, true, nil)
	if err != nil {
		return err
	}
	if c, ok := readClock(payload, asked, time.Since(start)); ok {
		var told clockReply
		_ = ssh.Unmarshal(payload, &told) // readClock has
		s.t.mu.Lock()
		s.peer.clock, s.peer.twinAt = c, cleaned(told.Ghost, maxGhostBytes)
		s.t.mu.Unlock()
	}
	return nil
}

// answer takes global requests: only keep-alives are granted.
func answer(requests <-chan *ssh.Request, now func() time.Time, ghost func() string) {
	for r := range requests {
		var payload []byte
		if r.Type == keepAlive {
			payload = ssh.Marshal(clockReply{uint64(now().UnixNano()), ghost()})
		}
		r.Reply(r.Type == keepAlive, payload) //nolint:errcheck // the connection is gone, the loop ends
	}
}
