package tunnel

import (
	"bufio"
	"compress/flate"
	"context"
	"errors"
	"io"
	"time"

	"golang.org/x/crypto/ssh"
)

// A stream for bulk over a slow link is packed: the bytes of both directions are one DEFLATE stream each (RFC 1951), flushed as often as
// there is nothing more to send, so that who waits for an answer has the whole question. Configuration becomes a fifth of its size or less
// by it, at the price of a second of a processor for some 200 MB.
//
// Unpacking is bounded by the format: the window is 32 KiB, and no more is unpacked than is read.

const (
	// packedSuffix behind the name of a service asks for such a stream. A node that does not know it refuses the service, and is asked for a
	// plain one.
	packedSuffix = "+deflate"
	// maxPacked bounds the packed streams that a peer may open: each takes about 1 MB.
	maxPacked = 4
	// weighBytes are sent once over each connection that bulk is to go over, and slowBlock is how long they take, there and the answer back,
	// from which on a link is taken for slow: one of about 100 Mbit/s and less, or of a long round trip. Within a site it is a millisecond.
	weighBytes = 64 << 10
	slowBlock  = 5 * time.Millisecond
	// weighTries is how often they are sent until they are fast once: a processor may have been busy. After so many times slowBlock it was
	// none, and nobody waits longer: a line that is as thin as that has enough to carry.
	weighTries    = 3
	weighPatience = 20
	// weighRequest names the global request that carries them. No node grants it; the refusal is the answer.
	weighRequest = "weigh@mailproxy"
)

// isSlow says whether the link that a session goes over is slow. It is weighed when that is asked first; who cannot wait for it packs.
func (s *session) isSlow(ctx context.Context) bool {
	s.weigh.Do(func() {
		s.slow.Store(true)
		if !s.owned.spawn(s.weighLink) {
			close(s.weighed) // the session has ended
		}
	})
	timer := time.NewTimer(weighPatience * s.t.timing.slow)
	defer timer.Stop()
	select {
	case <-s.weighed:
	case <-timer.C:
	case <-ctx.Done():
	}
	return s.slow.Load()
}

func (s *session) weighLink() {
	defer close(s.weighed)
	block := make([]byte, weighBytes)
	for range weighTries {
		start := time.Now()
		if _, _, err := s.ssh.SendRequest(weighRequest, true, block); err != nil {
			return // who dials next hears of it
		}
		took := time.Since(start)
		if took < s.t.timing.slow {
			s.slow.Store(false)
		}
		if took < s.t.timing.slow || took > weighPatience*s.t.timing.slow {
			return
		}
	}
}

// packer packs what it is given, and sends it on.
type packer struct {
	out *bufio.Writer
	z   *flate.Writer
}

func newPacker(to io.Writer) *packer {
	p := &packer{out: bufio.NewWriterSize(to, chunkBytes)}
	p.z, _ = flate.NewWriter(p.out, flate.BestSpeed) // the level is a valid one
	return p
}

// Write sends all of b before it returns.
func (p *packer) Write(b []byte) (int, error) {
	n, err := p.z.Write(b)
	if err == nil {
		err = p.z.Flush()
	}
	if err == nil {
		err = p.out.Flush()
	}
	return n, err
}

// unpacker gives what a packer was given. The end of the packed stream is the channel's: how that ended, the fin says.
type unpacker struct{ z io.Reader }

func newUnpacker(from io.Reader) unpacker {
	return unpacker{flate.NewReader(bufio.NewReaderSize(from, chunkBytes))}
}

func (u unpacker) Read(b []byte) (int, error) {
	n, err := u.z.Read(b)
	if errors.Is(err, io.ErrUnexpectedEOF) {
		err = io.EOF
	}
	return n, err
}

// packing gives what a conn's goroutines read from and write to.
func (c *conn) packing(ch ssh.Channel) (io.Reader, io.Writer) {
	if c.packed {
		return newUnpacker(ch), newPacker(ch)
	}
	return ch, ch
}
