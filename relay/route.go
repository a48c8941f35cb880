package relay

import (
	"context"
	"errors"
	"net"
	"net/netip"
	"slices"
	"strconv"
	"sync"
	"time"

	"mailproxy/config"
	"mailproxy/mail"
)

// A hop is one host that can be tried, and how. It is also the key under which connections are kept: a connection made by another TLS
// policy or login is another's, and so is one that was opened in the name of another client.
type hop struct {
	addr string // host:port
	mx   bool   // its host is of MX records
	tls  config.TLS

	user   string
	secret string // the name of the one with user's password

	tell   config.Tell
	client netip.AddrPort // who we speak for, where tell says so; its port with PROXY alone
	name   string         // what the DNS calls it, with XCLIENT
	helo   string         // what it said in EHLO, with XCLIENT
}

// hopOf is the way to an address by a transport, for a message.
func hopOf(t *config.Transport, addr string, e *mail.Envelope) hop {
	h := hop{addr: addr, tls: t.TLS, user: t.User, secret: t.PasswordSecret(), tell: t.Tell}
	if h.tls == "" {
		h.tls = config.TLSMay
	}
	switch t.Tell {
	case config.TellProxy:
		h.client = netip.AddrPortFrom(e.Client.Unmap(), e.Port)
	case config.TellXClient:
		h.client, h.name, h.helo = netip.AddrPortFrom(e.Client.Unmap(), 0), e.Name, e.Helo
	}
	return h
}

// anyClient is the hop whoever we speak for.
func (h hop) anyClient() hop {
	h.client, h.name, h.helo = netip.AddrPort{}, "", ""
	return h
}

// eachHop calls try for the transport's hops until one is in reach. A reply is a final answer of the DNS.
func (c *Client) eachHop(ctx context.Context, a *Attempt, try func(hop) error) (*mail.Reply, error) {
	if len(a.Transport.Hosts) == 1 { // as most are: nothing is allocated
		only := [1]hop{hopOf(&a.Transport, a.Transport.Hosts[0], a.Envelope)}
		return nil, c.oneOf(ctx, only[:], try)
	}
	if len(a.Transport.Hosts) > 0 {
		return nil, c.oneOf(ctx, c.fixed(a), try)
	}
	hosts, reply, err := c.lookup.mx(ctx, a.Domain, c.hostname)
	if reply != nil {
		return reply, nil
	}
	if err != nil {
		return nil, ended(ctx, &OutOfReach{Hop: a.Domain, Stage: StageLookup, Err: err})
	}
	return c.byPreference(ctx, a, hosts, try)
}

// fixed gives the hops of a transport with hosts, in the order in which they are to be tried.
func (c *Client) fixed(a *Attempt) []hop {
	t := &a.Transport
	first := 0
	if t.Order == config.OrderRoundRobin && len(t.Hosts) > 1 {
		first = c.turns.take(t.Name, len(t.Hosts))
	}
	hops := make([]hop, len(t.Hosts))
	for i := range hops {
		hops[i] = hopOf(t, t.Hosts[(first+i)%len(hops)], a.Envelope)
	}
	return c.reach.order(hops, time.Now())
}

// byPreference tries the hosts of MX records, which come in their order. Where one of a preference is this node by its address, neither
// it nor any that is not better is tried, or mail would go in circles (RFC 5321 §5.1). That is asked of the hosts up to the one whose turn
// it is: a backup that is not needed costs no wait for the DNS.
func (c *Client) byPreference(ctx context.Context, a *Attempt, hosts []mxHost, try func(hop) error) (*mail.Reply, error) {
	hops, upTo := make([]hop, len(hosts)), make(map[string]uint16, len(hosts))
	for i, h := range slices.Backward(hosts) {
		hops[i] = hopOf(&a.Transport, net.JoinHostPort(h.name, c.mxPort), a.Envelope)
		hops[i].mx = true
		upTo[hops[i].addr] = h.preference
	}
	var err error
	for _, h := range c.reach.order(hops, time.Now()) {
		if c.someAreSelf(ctx, hosts, upTo[h.addr]) {
			continue
		}
		if err = c.oneOf(ctx, []hop{h}, try); !isOutOfReach(err) {
			return nil, err
		}
	}
	if err == nil {
		return loopReply(a.Domain), nil
	}
	return nil, err
}

// someAreSelf says whether a host of that preference, or of a better one, is this node.
func (c *Client) someAreSelf(ctx context.Context, hosts []mxHost, preference uint16) bool {
	return slices.ContainsFunc(hosts, func(h mxHost) bool { return h.preference <= preference && c.isSelf(ctx, h.name) })
}

// oneOf tries hops until one is in reach, and notes which are not.
func (c *Client) oneOf(ctx context.Context, hops []hop, try func(hop) error) (err error) {
	for _, h := range hops {
		err = try(h)
		var out *OutOfReach
		switch {
		case ctx.Err() != nil:
			return ended(ctx, err)
		case !errors.As(err, &out):
			if err == nil || errors.Is(err, ErrNoAnswer) {
				c.reach.answered(h)
			}
			return err
		case out.Err == errRecentlyDown: // which is no news
			c.reach.explain(h, out)
		default:
			c.reach.failed(h, out, time.Now())
		}
	}
	return err
}

// selfTime is how long it is believed whether a host of MX records is this node.
const selfTime = time.Minute

// isSelf says whether a host has an address at which this node takes mail. One that the DNS does not tell of is not, and is not asked for
// again at once: connect looks at each address.
func (c *Client) isSelf(ctx context.Context, host string) bool {
	if c.own == nil {
		return false
	}
	now := time.Now()
	if self, known := c.self.get(host, now); known {
		return self
	}
	addrs, _ := c.lookup.addresses(ctx, rooted(host))
	if ctx.Err() != nil {
		return false
	}
	self := slices.ContainsFunc(addrs, func(a netip.Addr) bool { return c.isOwn(a, c.mxPort) })
	c.self.put(host, self, time.Now().Add(selfTime))
	return self
}

// isOwn says whether an address is one at which this node takes mail.
func (c *Client) isOwn(addr netip.Addr, port string) bool {
	if c.own == nil {
		return false
	}
	n, err := strconv.ParseUint(port, 10, 16)
	return err == nil && c.own(netip.AddrPortFrom(addr, uint16(n)))
}

// A selfCache keeps which hosts are this node. The zero selfCache is ready.
type selfCache struct {
	mu   sync.Mutex
	host map[string]selfAnswer
}

type selfAnswer struct {
	self  bool
	until time.Time
}

func (s *selfCache) get(host string, now time.Time) (self, known bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	a, ok := s.host[host]
	return a.self, ok && now.Before(a.until)
}

func (s *selfCache) put(host string, self bool, until time.Time) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.host == nil || len(s.host) >= awayMaximum {
		s.host = make(map[string]selfAnswer)
	}
	s.host[host] = selfAnswer{self, until}
}
