package queue

import (
	"errors"
	"fmt"
	"sync"
	"time"

	"github.com/rs/zerolog"

	"mailproxy/spool"
)

// probeEvery is how often a write is let through to a spool that is sick, to see whether it has recovered.
const probeEvery = 5 * time.Second

// health is what is known to be wrong with the spool. After a write that could not be made durable, all are refused but one in
// 5 seconds; the first that succeeds ends it. Each write syncs files of its own, so its success is no leftover.
type health struct {
	mu       sync.Mutex
	sick     error
	probeAt  time.Time
	fullTill time.Time // until when spool.full is not said again
}

// begin says whether a write may be tried, and gives what is to be called with its outcome.
func (h *health) begin(now time.Time) (done func(time.Time, zerolog.Logger, error), err error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.sick != nil {
		if now.Before(h.probeAt) {
			return nil, fmt.Errorf("%w: %w", ErrSick, h.sick)
		}
		h.probeAt = now.Add(probeEvery)
	}
	return h.written, nil
}

// written notes the outcome of a whole Put.
func (h *health) written(now time.Time, log zerolog.Logger, err error) {
	if err != nil {
		h.note(now, log, err)
		return
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.sick != nil {
		h.sick = nil
		log.Info().Msg("spool.recovered")
	}
}

// note notes an error of the spool; nil is nothing new.
func (h *health) note(now time.Time, log zerolog.Logger, err error) {
	var content *spool.ContentError
	switch {
	case err == nil, errors.As(err, &content):
		return
	case errors.Is(err, ErrFull):
		h.full(now, log, err)
		return
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.sick == nil {
		log.Error().AnErr("err", err).Msg("spool.sick")
	}
	h.sick, h.probeAt = err, now.Add(probeEvery)
}

// full notes that there was no room; said at most once in 30 s.
func (h *health) full(now time.Time, log zerolog.Logger, err error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if now.After(h.fullTill) {
		h.fullTill = now.Add(30 * time.Second)
		log.Error().AnErr("err", err).Msg("spool.full")
	}
}

func (h *health) problem() error {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.sick
}

// Healthy gives nil, or why no mail is taken: writes that are not durable (ErrSick), no room (ErrFull).
func (q *Queue) Healthy() error {
	if err := q.health.problem(); err != nil {
		return fmt.Errorf("%w: %w", ErrSick, err)
	}
	return q.spool.Room(0, q.o.MinFree)
}

// Whole gives nil, or ErrDamaged: what was set aside is for a person to look at. New mail is taken all the same.
func (q *Queue) Whole() error {
	if n := q.spool.Damaged(); n > 0 {
		return fmt.Errorf("%w: %d set aside in %s/damaged", ErrDamaged, n, q.o.Dir)
	}
	return nil
}

// Free is how many octets the spool can take before mail is put off; negative: it is.
func (q *Queue) Free() (int64, error) {
	free, err := q.spool.Free()
	return free - q.o.MinFree, err
}

// Stats are numbers for metrics. The first group is of this moment, the second counts from the daemon's start.
type Stats struct {
	Items      int       `json:"items"`      // without unanswered ones
	Unanswered int       `json:"unanswered"` // whose client has no answer yet
	OnHold     int       `json:"on_hold"`    // of Items, by an operator's order
	Kept       int       `json:"kept"`       // of Items, as Item.Kept, and not on hold
	Busy       int       `json:"busy"`
	Bytes      int64     `json:"bytes"`
	Damaged    int       `json:"damaged"`
	Oldest     time.Time `json:"oldest,omitzero"`
	Attempts   uint64    `json:"attempts"`            // made for one next hop
	Sent       uint64    `json:"sent"`                // forward-paths delivered
	Failed     uint64    `json:"failed"`              // forward-paths refused for good
	Expired    uint64    `json:"expired"`             // forward-paths given up at the end of an item's life
	DSNs       uint64    `json:"dsns"`                // DSNs spooled
	Untold     uint64    `json:"untold"`              // forward-paths given up without a DSN
	Cut        uint64    `json:"cut"`                 // attempts that a killed daemon left, found at start
	Unsure     uint64    `json:"unanswered_attempts"` // attempts whose final dot was not answered
}

// Stats gives the numbers of this moment.
func (q *Queue) Stats() Stats {
	q.mu.Lock()
	defer q.mu.Unlock()
	s := q.counts
	s.Damaged = q.spool.Damaged()
	for _, n := range q.items {
		if n.held {
			s.Unanswered++
			continue
		}
		s.Items++
		s.Bytes += n.size
		switch {
		case n.hold != nil:
			s.OnHold++
		case n.kept():
			s.Kept++
		}
		if n.trying > 0 {
			s.Busy++
		}
		if s.Oldest.IsZero() || n.created.Before(s.Oldest) {
			s.Oldest = n.created
		}
	}
	return s
}
