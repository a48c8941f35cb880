package smtpd

import "sync/atomic"

// counters count since the start.
type counters struct {
	sessions          atomic.Uint64
	refused           atomic.Uint64
	messages          atomic.Uint64
	delivered         atomic.Uint64
	queued            atomic.Uint64
	rejected          atomic.Uint64
	recipientsRefused atomic.Uint64
	duplicates        atomic.Uint64
	gone              atomic.Uint64
	framing           atomic.Uint64
	tlsStarted        atomic.Uint64
	tlsFailed         atomic.Uint64
}

// Stats are numbers for metrics. Open is of this moment, the others count since the start.
type Stats struct {
	Open              int    `json:"open"`          // sessions
	OpenInternal      int    `json:"open_internal"` // of them, from our networks
	Sessions          uint64 `json:"sessions"`      // admitted
	Refused           uint64 `json:"refused"`       // sessions over a limit, or while draining
	Messages          uint64 `json:"messages"`      // read to their final dot
	Delivered         uint64 `json:"delivered"`     // of them, taken by a next hop in the client's transaction
	Queued            uint64 `json:"queued"`        // of them, spooled as a whole
	Rejected          uint64 `json:"rejected"`      // of them, answered 4xx or 5xx
	RecipientsRefused uint64 `json:"recipients_refused"`
	Duplicates        uint64 `json:"duplicates"` // possible ones: perhaps taken, and the client was gone before it knew, or told to come again
	Gone              uint64 `json:"gone"`       // transactions dropped because the client was gone before the dot
	Framing           uint64 `json:"framing"`    // sessions ended for what the client sent or for its silence
	TLS               uint64 `json:"tls"`        // handshakes done
	TLSFailed         uint64 `json:"tls_failed"` // handshakes not done

	Limited map[string]uint64 `json:"limited"` // how often each limit was met, by its name
}

// Stats gives the numbers of this moment.
func (s *Server) Stats() Stats {
	s.sessions.mu.Lock()
	open, internal := len(s.sessions.conns), s.sessions.crowds[inside].all
	s.sessions.mu.Unlock()
	limited := make(map[string]uint64, limitCount)
	for l := range s.limits {
		limited[limitNames[l]] = s.limits[l].count()
	}
	c := &s.count
	return Stats{
		Open: open, OpenInternal: internal, Sessions: c.sessions.Load(), Refused: c.refused.Load(), Messages: c.messages.Load(),
		Delivered: c.delivered.Load(), Queued: c.queued.Load(), Rejected: c.rejected.Load(), Duplicates: c.duplicates.Load(),
		RecipientsRefused: c.recipientsRefused.Load(),
		Gone:              c.gone.Load(), Framing: c.framing.Load(), TLS: c.tlsStarted.Load(), TLSFailed: c.tlsFailed.Load(),
		Limited: limited,
	}
}
