package smtpd

import (
	"net/netip"
	"sync"
	"time"

	"mailproxy/config"
)

// A limit is what a client can come up against.
type limit uint8

const (
	limitSessions limit = iota
	limitAddress
	limitNetwork
	limitConnections
	limitMessages
	limitRecipients
	limitUnknown
	limitErrors
	limitSlow
	limitCount
)

var limitNames = [limitCount]string{"sessions", "sessions_per_address", "sessions_per_network", "connections", "messages", "recipients",
	"unknown_recipients", "errors", "slow"}

var (
	replyTooManyFromNetwork = r(421, 470, "too many sessions from your network")
	replyTooOften           = r(421, 470, "too many connections from your address, try again later")
	replyTooManyMessages    = r(450, 471, "too many messages from your address, try again later")
	replyTooManyRecipients  = r(450, 471, "too many recipients from your address, try again later")
	replyUnknownMany        = r(450, 471, "too many unknown recipients, try again later")
	replyHarvest            = r(421, 471, "too many unknown recipients, try again later")
)

// limitLogEvery is how often one limit is logged.
const limitLogEvery = 30 * time.Second

// A limitLog counts how often a limit was met, and logs the first time, and now and then how many there were since.
type limitLog struct {
	mu     sync.Mutex
	total  uint64
	unsaid uint64
	said   time.Time
}

// met notes one more. It gives how many there were since the last time that was to be logged; 0: nothing is to be logged.
func (l *limitLog) met(now time.Time) uint64 {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.total++
	l.unsaid++
	if now.Sub(l.said) < limitLogEvery {
		return 0
	}
	n := l.unsaid
	l.said, l.unsaid = now, 0
	return n
}

func (l *limitLog) count() uint64 {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.total
}

// limited notes that a client came up against a limit.
func (s *Server) limited(l limit, client netip.Addr) {
	if n := s.limits[l].met(time.Now()); n > 0 {
		s.log.Info().Str("limit", limitNames[l]).Stringer("client", client).Uint64("count", n).Msg("limit.reached")
	}
}

// A side is one of the two that a server takes mail from: each has its own limits, so that neither takes the other's room.
type side uint8

const (
	outside side = iota // the Internet
	inside              // our networks
	sides
)

func limitsOf(v *config.Values, s side) *config.Limits {
	if s == inside {
		return &v.Internal
	}
	return &v.Limits
}

// take counts one more of a client's by its side's limit for a minute.
func (c *conn) take(which rate, perMinute int) bool {
	return c.server.rates[c.side].take(c.key, which, perMinute, time.Minute, time.Now())
}

// unknownTime is what the limit of unknown recipients is for.
const unknownTime = time.Hour

// countUnknown counts a recipient that was refused for good. Where a client has tried too many it is told nothing more: who harvests
// addresses must not learn from us which there are. A message with some good recipients is still taken for those before.
func (c *conn) countUnknown(v *config.Values) {
	if c.side == inside {
		return // a list that is out of date
	}
	c.unknown++
	over := v.MaxUnknown > 0 && c.unknown >= v.MaxUnknown
	if !c.server.rates[c.side].take(c.key, rateUnknown, v.MaxUnknownPerHour, unknownTime, time.Now()) || over {
		c.harvest = true
	}
}

// harvested is the answer to one more recipient of a client that tried too many; it ends a session that goes on and on.
func (c *conn) harvested(v *config.Values) error {
	c.server.limited(limitUnknown, c.client)
	if c.blind++; c.blind > v.MaxRecipients {
		c.end(replyHarvest)
	}
	return c.door(replyUnknownMany, nil)
}
