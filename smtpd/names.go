package smtpd

import (
	"context"
	"net"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"time"
)

// Bounds on looking clients' names up.
const (
	nameTime     = 2 * time.Second // for one look-up, of the name and back; Go's resolver does not end sooner where its context does
	nameWait     = time.Second     // a client's message waits no longer for it, counted from when it was begun
	nameLife     = 5 * time.Minute // how long a name is believed
	noNameLife   = time.Minute     // and that there is none, or that the DNS does not answer
	maxNames     = 20_000          // answers kept
	maxLookups   = 100             // at once; with more under way a client has no name
	maxConfirmed = 5               // names of one address that are looked at
)

// names knows the forward-confirmed names of clients: what the DNS says that an address is called, where that name has the address.
type names struct {
	resolver *net.Resolver
	ended    context.Context // ends every look-up
	wait     sync.WaitGroup

	mu         sync.Mutex
	young, old map[netip.Addr]*lookup
	running    int
}

// A lookup is one address' name, known or being looked up. name may be read once done is closed: a host name in lower case without
// final dot, or "".
type lookup struct {
	done  chan struct{}
	name  string
	until time.Time
}

// named is a look-up that is done; "" is who has no name.
func named(name string) *lookup {
	l := &lookup{done: make(chan struct{}), name: name}
	close(l.done)
	return l
}

// stop waits until nothing is looked up any more; ended must have.
func (n *names) stop() {
	n.mu.Lock()
	n.mu.Unlock() //nolint:staticcheck // whoever comes behind sees that ended has
	n.wait.Wait()
}

// of gives an address' look-up, begun now if it must be. It does not wait.
func (n *names) of(addr netip.Addr, now time.Time) *lookup {
	if !addr.IsValid() {
		return named("")
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	l := n.young[addr]
	if l == nil {
		l = n.old[addr]
	}
	if l != nil && now.Before(l.until) {
		return l
	}
	if n.running >= maxLookups || n.ended.Err() != nil {
		return named("")
	}
	l = &lookup{done: make(chan struct{}), until: now.Add(nameLife)}
	if n.young == nil || len(n.young) >= maxNames/2 {
		n.old, n.young = n.young, make(map[netip.Addr]*lookup)
	}
	n.young[addr] = l
	n.running++
	n.wait.Go(func() {
		l.name = n.ask(addr)
		close(l.done)
		n.mu.Lock()
		defer n.mu.Unlock()
		n.running--
		if l.name == "" {
			l.until = now.Add(noNameLife)
		}
	})
	return l
}

// ask asks the DNS for an address' names, and for the addresses of each.
func (n *names) ask(addr netip.Addr) string {
	ctx, cancel := context.WithTimeout(n.ended, nameTime)
	defer cancel()
	found, err := n.resolver.LookupAddr(ctx, addr.String())
	if err != nil && len(found) == 0 {
		return ""
	}
	// net gives names that can stand in a header, and drops others; with a final dot, but for those of /etc/hosts.
	for _, full := range found[:min(len(found), maxConfirmed)] {
		has, _ := n.resolver.LookupNetIP(ctx, "ip", full)
		if slices.ContainsFunc(has, func(a netip.Addr) bool { return a.Unmap() == addr.WithZone("") }) {
			return strings.ToLower(strings.TrimSuffix(full, "."))
		}
	}
	return ""
}

// by gives the name, or "" where it is not known by then.
func (l *lookup) by(deadline time.Time) string {
	select {
	case <-l.done:
		return l.name
	default:
	}
	timer := time.NewTimer(time.Until(deadline))
	defer timer.Stop()
	select {
	case <-l.done:
		return l.name
	case <-timer.C:
		return ""
	}
}
